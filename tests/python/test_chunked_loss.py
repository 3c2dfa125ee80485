"""Models of transformers with the loss by chunks learn what they learn with their own."""

import copy
import inspect
import math

import pytest
import torch

transformers = pytest.importorskip("transformers")

import qlora_native as qn  # noqa: E402
from _hf import tiny, with_adapters  # noqa: E402
from _training import LORA, adapter_state, arguments, losses, trainer  # noqa: E402
from qlora_native.nn.sharding import shard_model, whole  # noqa: E402
from qlora_native.training import (  # noqa: E402
    UnsupportedModelError,
    learned_tokens,
    restore_plain_loss,
    use_chunked_loss,
    uses_chunked_loss,
)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def gemma2():
    config = transformers.Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=0.5)
    return transformers.Gemma2ForCausalLM(config)


def cohere():
    return transformers.CohereForCausalLM(transformers.CohereConfig(**SIZES, logit_scale=0.3))


def granite():
    return transformers.GraniteForCausalLM(transformers.GraniteConfig(**SIZES, logits_scaling=4.0))


MODELS = {
    "llama": lambda: tiny("llama"),
    "opt": lambda: tiny("opt"),
    "qwen, tied": lambda: tiny("qwen", tie_word_embeddings=True),
    "mixtral": lambda: tiny("mixtral"),
    "gemma2, softcapped": gemma2,
    "cohere, scaled": cohere,
    "granite, scaled": granite,
}


def batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, 64, (3, 11), generator=generator)
    labels = ids.clone()
    labels[0, :5] = labels[2] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": (labels != 7).long()}


def adapted(make):
    torch.manual_seed(0)
    return with_adapters(make())


def step(model, **others):
    model.zero_grad()
    output = model(**batch(), **others)
    output.loss.backward()
    return output, {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(model, **others):
    plain, gradients = step(model, **others)
    use_chunked_loss(model, chunk_tokens=7)
    chunked, found = step(model, **others)
    assert plain.logits is not None and chunked.logits is None
    torch.testing.assert_close(chunked.loss, plain.loss)
    assert found.keys() == gradients.keys() and gradients
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS.keys())
@pytest.mark.parametrize("items", [None, 40, torch.tensor(40)], ids=["mean", "int", "tensor"])
def test_loss_and_gradients_are_those_of_the_model(make, items):
    others = {} if items is None else {"num_items_in_batch": items}
    assert_same_step(adapted(make), **others)


def test_labels_that_are_shifted_already_and_another_ignored_label():
    labels = batch()["labels"]
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:].contiguous()
    model = adapted(MODELS["llama"])
    assert_same_step(model, shift_labels=shifted)
    restore_plain_loss(model)
    assert_same_step(model, ignore_index=5, shift_labels=shifted.where(shifted >= 0, 5))


@pytest.mark.parametrize("items", [None, 40])
def test_tokens_that_are_not_learned_do_not_go_through_the_head(items, monkeypatch):
    model = adapted(MODELS["llama"])
    learned = learned_tokens(batch()["labels"])
    assert learned.tolist() == [*range(4, 10), *range(11, 21)]
    others = {} if items is None else {"num_items_in_batch": items}
    plain, gradients = step(model, **others)
    use_chunked_loss(model, chunk_tokens=7)
    rows = []
    multiply = torch.nn.functional.linear

    def linear(x, weight, bias=None):
        if weight is model.lm_head.weight:
            rows.append(len(x))
        return multiply(x, weight, bias)

    monkeypatch.setattr(torch.nn.functional, "linear", linear)
    found, found_gradients = step(model, learned_tokens=learned, **others)
    assert rows == [7, 7, 2]
    nothing = torch.full((3, 11), -100)
    without = batch() | {"labels": nothing, "learned_tokens": learned_tokens(nothing)}
    assert model(**without, num_items_in_batch=5).loss == 0
    torch.testing.assert_close(found.loss, plain.loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found_gradients[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ["trained", "4-bit", "adapter"])
def test_heads_of_every_kind(kind):
    model = tiny("llama")
    if kind == "4-bit":
        qn.quantize_model(model, skip=())
        assert isinstance(model.lm_head, qn.nn.Linear4bit)
    targets = ["q_proj", "lm_head"] if kind == "adapter" else ["q_proj"]
    qn.add_lora(model, r=4, target_modules=targets)
    if kind == "trained":
        model.lm_head.weight.requires_grad_()
    assert_same_step(model.train())


def test_gradient_checkpointing_and_compile():
    model = adapted(MODELS["llama"])
    _, gradients = step(model)
    use_chunked_loss(model, chunk_tokens=7)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    _, found = step(model)
    for name, gradient in gradients.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)
    model = adapted(MODELS["llama"])
    use_chunked_loss(model, chunk_tokens=7)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(**batch()).loss, model(**batch()).loss)


def test_what_needs_logits_has_them():
    model = adapted(MODELS["llama"])
    use_chunked_loss(model)
    shape = (3, 11, 64)
    learned = learned_tokens(batch()["labels"])
    assert model.eval()(**batch(), learned_tokens=learned).logits.shape == shape
    model.train()
    assert model(input_ids=batch()["input_ids"]).logits.shape == shape
    assert model(**batch(), return_dict=False)[1].shape == shape
    ids, mask = batch()["input_ids"], batch()["attention_mask"]
    assert model(ids, mask, labels=ids).logits.shape == shape
    use_chunked_loss(model, in_evaluation=True)
    with torch.no_grad():
        found = model.eval()(**batch())
    assert found.logits is None
    restore_plain_loss(model)
    torch.testing.assert_close(found.loss, model(**batch()).loss)


def test_taken_back_it_is_the_model_of_before():
    model = tiny("llama")
    signature = inspect.signature(model.forward)
    assert not uses_chunked_loss(model)
    use_chunked_loss(model)
    use_chunked_loss(model)
    assert uses_chunked_loss(torch.nn.Sequential(model))
    assert inspect.signature(model.forward) == signature
    restore_plain_loss(model)
    assert "forward" not in vars(model) and not uses_chunked_loss(model)


def test_a_copy_runs_itself():
    model = adapted(MODELS["llama"])
    use_chunked_loss(model)
    twin = copy.deepcopy(model)
    with torch.no_grad():
        twin.lm_head.weight.zero_()
    assert twin(**batch()).loss.item() == pytest.approx(math.log(64))
    assert model(**batch()).loss.item() != pytest.approx(math.log(64))
    restore_plain_loss(twin)
    assert twin(**batch()).loss.item() == pytest.approx(math.log(64))


def test_a_pickled_model_has_its_plain_loss(tmp_path):
    model = adapted(MODELS["llama"])
    use_chunked_loss(model)
    torch.save(model, tmp_path / "model.pt")
    loaded = torch.load(tmp_path / "model.pt", weights_only=False)
    assert not uses_chunked_loss(loaded)
    assert loaded(**batch()).logits is not None
    use_chunked_loss(loaded)
    assert uses_chunked_loss(loaded) and loaded(**batch()).logits is None
    restore_plain_loss(loaded)
    assert loaded(**batch()).logits is not None


@pytest.fixture
def one_rank():
    dist = pytest.importorskip("torch.distributed")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def test_a_dense_head_that_is_split_over_ranks_is_multiplied_by_itself(one_rank, monkeypatch):
    # Any other is gathered for each chunk, forward and backward.
    monkeypatch.setattr("qlora_native.training.causal_lm.chunked_cross_entropy", None)
    model = adapted(MODELS["llama"])
    use_chunked_loss(model, chunk_tokens=7)
    expected, gradients = step(model)
    gradients = {name: gradient.clone() for name, gradient in gradients.items()}
    shard_model(model, one_rank)
    found, parts = step(model)
    torch.testing.assert_close(found.loss, expected.loss)
    assert parts.keys() == gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(whole(parts[name]), gradient)


class ScaledForCausalLM(transformers.LlamaForCausalLM):
    """Its logits are not those of its head."""

    def forward(self, *args, labels=None, **kwargs):
        output = super().forward(*args, **kwargs)
        output.logits = output.logits * 1.1
        if labels is not None:
            output.loss = self.loss_function(output.logits, labels, self.vocab_size)
        return output


class RegularizedForCausalLM(transformers.LlamaForCausalLM):
    """Its loss has a second part."""

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        output.loss = output.loss + 1.0
        return output


def of_class(kind):
    return kind(tiny("llama").config)


REFUSED = {
    "other logits": (lambda: of_class(ScaledForCausalLM), "logits .* are not those of its head"),
    "other loss": (lambda: of_class(RegularizedForCausalLM), "is not the cross-entropy"),
    "routers": (lambda: tiny("mixtral", output_router_logits=True), "a part for its routers"),
    "no language model": (lambda: tiny("llama").model, "LlamaModel is no causal language model"),
    "no model": (lambda: torch.nn.Linear(2, 2), "Linear is no causal language model"),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_where_it_does_not_apply_the_model_is_left_alone(make, message):
    model = make().train()
    before = dict(vars(model))
    with pytest.raises(UnsupportedModelError, match=message):
        use_chunked_loss(model)
    assert vars(model).keys() == before.keys() and model.training


def test_a_loss_of_ones_own_is_not_replaced():
    model = tiny("llama")
    model.loss_function = lambda logits, labels, vocab_size, **_: logits.sum()
    with pytest.raises(UnsupportedModelError, match="has a loss of its own"):
        use_chunked_loss(model)


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 3, "max_steps": 4},
        {"label_smoothing_factor": 0.1, "max_steps": 3},
        {"gradient_checkpointing": True, "max_steps": 3},
    ],
    ids=["accumulation", "label smoothing", "checkpointing"],
)
def test_trainer_over_peft_learns_the_same(tmp_path, options):
    peft = pytest.importorskip("peft")
    runs = []
    for chunked in (False, True):
        model = tiny("llama")
        qn.quantize_model(model)
        torch.manual_seed(3)
        model = peft.get_peft_model(model, peft.LoraConfig(**LORA))
        if chunked:
            use_chunked_loss(model, chunk_tokens=5)
        run = trainer(model, arguments(tmp_path, **options))
        run.train()
        runs.append((losses(run), adapter_state(model)))
    assert runs[0][0] == pytest.approx(runs[1][0], rel=1e-4)
    for name, value in runs[0][1].items():
        torch.testing.assert_close(runs[1][1][name], value, rtol=1e-3, atol=1e-5, msg=name)


def test_a_loss_for_routers_that_is_asked_for_later_is_there():
    model = tiny("mixtral").train()
    model.config.router_aux_loss_coef = 1.0
    ids = torch.arange(24).view(2, 12)
    use_chunked_loss(model)
    model.config.output_router_logits = True
    found = model(input_ids=ids, labels=ids).loss
    restore_plain_loss(model)
    assert found.item() == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
