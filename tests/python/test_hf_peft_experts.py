"""LoRA of PEFT on 4-bit experts by target_parameters: the stock values and files."""

import copy

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from peft import LoraConfig, PeftModel, get_peft_model

import qlora_native as qn
from _hf import IDS, MIXTURES, dense_twin, fill, logits, loss_and_gradients, quantized
from qlora_native.hf import peft_experts
from qlora_native.nn import Experts4bit

PARAMETERS = {
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj"],
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
}


def pair(kind, **options):
    base = quantized(kind)
    models = []
    for model in (base, dense_twin(base)):
        torch.manual_seed(0)
        config = LoraConfig(**copy.deepcopy(PARAMETERS | options))
        models.append(fill(get_peft_model(model, config)))
    return models


def wrappers_in(model):
    return [m for m in model.modules() if isinstance(m, peft_experts.ParamWrapper)]


def assert_same_step(ours, theirs):
    got, gradients = loss_and_gradients(ours)
    expected, expected_gradients = loss_and_gradients(theirs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    assert sum("experts" in key for key in gradients) == 8
    for key, gradient in expected_gradients.items():
        assert (gradients[key] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, key


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}], ids=str)
def test_a_step_is_that_of_the_stock_wrapper_over_the_dense_stack(kind, options):
    ours, theirs = pair(kind, **options)
    assert len(wrappers_in(ours)) == 4
    assert {m.get_base_layer().adapters == {} for m in wrappers_in(ours)} == {True}
    assert_same_step(ours, theirs)
    assert ours.get_nb_trainable_parameters() == theirs.get_nb_trainable_parameters()


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradients_under_checkpointing(reentrant):
    ours, theirs = pair("mixtral")
    qn.prepare_for_training(ours, use_reentrant=reentrant)
    ours.train()
    theirs.train()
    assert_same_step(ours, theirs)


@pytest.mark.parametrize("kind", MIXTURES)
def test_files_are_the_stock_ones(tmp_path, kind):
    from safetensors.torch import load_file

    ours, theirs = pair(kind)
    ours.save_pretrained(tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    a, b = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("ours", "theirs"))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)
    expected = logits(ours)
    for base, folder in ((quantized(kind), "theirs"), (dense_twin(quantized(kind)), "ours")):
        loaded = PeftModel.from_pretrained(base, tmp_path / folder)
        torch.testing.assert_close(logits(loaded), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_merge_is_the_quantized_sum_and_goes_back_exactly(kind, safe_merge):
    ours, theirs = pair(kind)
    before = {n: t.clone() for n, t in ours.state_dict().items()}
    expected = logits(ours)
    for model in (ours, theirs):
        model.merge_adapter(safe_merge=safe_merge)
    compared = 0
    for path, layer in ours.named_modules():
        if not isinstance(layer, Experts4bit):
            continue
        dense = theirs.get_submodule(path)
        quantized_again = qn.nn.quantize_experts(copy.deepcopy(dense))
        for name in layer.formats:
            merged = layer.dequantize_stack(name)
            difference = (merged - quantized_again.dequantize_stack(name)).abs()
            # Equal but where the last bit of a sum decides about a code.
            assert (difference > 1e-6).float().mean() < 0.01
            compared += 1
    assert compared == 4
    assert all(m.merged_adapters == ["default"] for m in wrappers_in(ours))
    ours.unmerge_adapter()
    after = ours.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items())
    assert torch.equal(logits(ours), expected)
    unloaded = ours.merge_and_unload()
    assert any(isinstance(m, Experts4bit) for m in unloaded.modules())
    assert not any("lora" in n for n, _ in unloaded.named_parameters())


@pytest.mark.parametrize("safe_merge", [False, True])
def test_a_merge_that_is_not_finite_changes_nothing(safe_merge):
    ours, _ = pair("mixtral")
    wrapper = wrappers_in(ours)[0]
    with torch.no_grad():
        wrapper.lora_B["default"].weight[0, 0] = torch.inf
    before = {n: t.clone() for n, t in wrapper.state_dict().items()}
    with pytest.raises(ValueError, match="NaN or infinite"):
        wrapper.merge(safe_merge=safe_merge)
    assert not wrapper.merged_adapters
    assert all(torch.equal(t, before[n]) for n, t in wrapper.state_dict().items())


def test_dropout_drops_the_input_of_the_adapters(tmp_path):
    """Which the stock wrapper refuses; without training the model is the same as without it."""
    dropped = get_peft_model(quantized("mixtral"), LoraConfig(**PARAMETERS, lora_dropout=0.5))
    plain, _ = pair("mixtral")
    fill(dropped).eval()
    plain.load_state_dict(dropped.state_dict())
    assert torch.equal(logits(dropped), logits(plain))
    assert {m.lora_dropout["default"].p for m in wrappers_in(dropped)} == {0.5}
    dropped.train()
    (first, gradients), (again, gradients_again) = (loss_and_gradients(dropped) for _ in range(2))
    assert torch.equal(first, again)
    assert not torch.allclose(first, logits(plain), atol=1e-4)
    qn.prepare_for_training(dropped, use_reentrant=False)
    checkpointed = loss_and_gradients(dropped)[1]
    for key, gradient in gradients.items():
        assert torch.equal(gradient, gradients_again[key])
        torch.testing.assert_close(checkpointed[key], gradient)
    dropped.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantized("mixtral"), tmp_path, is_trainable=True)
    assert {m.lora_dropout["default"].p for m in wrappers_in(loaded)} == {0.5}
    assert torch.equal(logits(loaded.eval()), logits(plain))
    with pytest.raises(ValueError, match="does not work with lora_dropout"):
        PeftModel.from_pretrained(dense_twin(quantized("mixtral")), tmp_path)
    loaded.add_adapter("second", LoraConfig(**PARAMETERS, lora_dropout=0.25))
    assert {m.lora_dropout["second"].p for m in wrappers_in(loaded)} == {0.25}
    assert loaded.peft_config["second"].lora_dropout == 0.25


def test_half_of_the_elements_are_dropped_and_the_others_doubled():
    model = get_peft_model(quantized("qwen3_moe"), LoraConfig(**PARAMETERS, lora_dropout=0.5))
    fill(model).train()
    wrapper = wrappers_in(model)[0]
    seen = []
    wrapper.lora_dropout["default"].register_forward_hook(lambda m, x, y: seen.append((x[0], y)))
    model(input_ids=IDS)
    ((x, y),) = seen
    kept = y != 0
    assert 0.4 < kept.float().mean() < 0.6
    torch.testing.assert_close(y[kept], 2 * x[kept])


def test_a_model_with_adapted_experts_compiles_in_one_graph():
    model, _ = pair("mixtral")
    experts = next(m for n, m in model.named_modules() if n.endswith("layers.0.mlp.experts"))
    assert isinstance(experts, peft_experts.ParamWrapper)
    x, index, weights = torch.randn(6, 32), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    x.requires_grad_()
    trained = [x, *(p for p in experts.parameters() if p.requires_grad)]
    results = []
    for one in (experts, torch.compile(experts, fullgraph=True, backend="aot_eager")):
        y = one(x, index, weights)
        results.append((y, *torch.autograd.grad(y.square().sum(), trained)))
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected)


def test_several_adapters():
    models = pair("qwen3_moe")
    for model in models:
        torch.manual_seed(5)
        model.add_adapter("second", LoraConfig(**(PARAMETERS | {"r": 2})))
        model.set_adapter("second")
        fill(model, seed=6)
    ours, theirs = models
    for names in ("second", "default", ["default", "second"]):
        for model in models:
            model.base_model.set_adapter(names)
        torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)
    with ours.disable_adapter():
        assert torch.equal(logits(ours), logits(quantized("qwen3_moe")))
    for names in (["default"], ["second"]):
        ours.merge_adapter(adapter_names=names)
    wrapper = wrappers_in(ours)[0]
    assert wrapper.merged_adapters == ["default", "second"]
    ours.unmerge_adapter()
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)


def test_biases_of_experts_go_to_the_stock_wrapper():
    ours, theirs = pair("gpt_oss", target_parameters=["experts.down_proj_bias"])
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)
    assert not wrappers_in(ours)


def test_packed_linear_weights_are_no_target_parameters():
    with pytest.raises(NotImplementedError, match="'weight' of a Linear4bit, which holds packed"):
        get_peft_model(
            quantized("llama"), LoraConfig(target_modules=[], target_parameters=["q_proj.weight"])
        )


def test_methods_that_are_not_tried_are_refused_over_experts():
    model = quantized("mixtral", skip=["q_proj", "k_proj", "v_proj", "o_proj", "lm_head"])
    with pytest.raises(NotImplementedError, match="FROD is not known to leave 4-bit"):
        get_peft_model(model, peft.FrodConfig(target_modules=["q_proj"]))
