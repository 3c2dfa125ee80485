"""Every method of PEFT over 4-bit layers: as over the decoded weights, or an error."""

import copy
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

import peft
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from _hf import dense_twin, fill, logits, loss_and_gradients, quantized
from qlora_native.hf.peft_tuners import FORWARD_LEAVES_WEIGHT_ALONE, refuse_untried
from qlora_native.nn import Embedding4bit, Linear4bit

LINEAR = {"target_modules": ["q_proj", "v_proj"]}

# Methods whose layers stand over linear ones, with options that fit the tiny models.
OVER_LINEAR = {
    "LORA": LINEAR,
    "ADALORA": LINEAR | {"total_step": 10},
    "BEFT": LINEAR,
    "BOFT": LINEAR | {"boft_block_size": 4},
    "C3A": LINEAR | {"block_size": 16},
    "DEFT": LINEAR,
    "DELORA": LINEAR,
    "FOURIERFT": LINEAR | {"n_frequency": 20},
    "GLORA": LINEAR,
    "GRALORA": LINEAR,
    "HIRA": LINEAR,
    "HRA": LINEAR,
    "IA3": LINEAR | {"feedforward_modules": ["q_proj"]},
    "LILY": LINEAR,
    "LOHA": LINEAR,
    "LOKR": LINEAR,
    "MISS": LINEAR | {"r": 8},
    "OFT": LINEAR | {"r": 0, "oft_block_size": 4},
    "OSF": LINEAR,
    "PEANUT": LINEAR,
    "POLY": LINEAR,
    "PSOFT": LINEAR | {"r": 8},
    "PVERA": LINEAR,
    "RANDLORA": LINEAR,
    "ROAD": LINEAR | {"group_size": 8},
    "SHIRA": LINEAR | {"r": 4},
    "SUPERTUNING": LINEAR,
    "TINYLORA": LINEAR,
    "UNILORA": LINEAR,
    "VBLORA": LINEAR | {"vector_length": 8, "num_vectors": 10, "topk": 2},
    "VERA": LINEAR,
    "WAVEFT": LINEAR | {"n_frequency": 32},
}
# Those that leave linear layers alone.
ELSEWHERE = {
    "ADAPTION_PROMPT": {"adapter_len": 4, "adapter_layers": 2},
    "CARTRIDGE": {"num_virtual_tokens": 4},
    "CPT": {"cpt_token_ids": [1, 2, 3], "cpt_mask": [1] * 3, "cpt_tokens_type_mask": [1, 2, 3]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "MULTITASK_PROMPT_TUNING": {"num_virtual_tokens": 4, "num_tasks": 1},
    "PREFIX_TUNING": {"num_virtual_tokens": 4},
    "PROMPT_TUNING": {"num_virtual_tokens": 4},
    "P_TUNING": {"num_virtual_tokens": 4},
    "SHADOW": {"target_modules": r".*\.layers\.\d+"},
    "TRAINABLE_TOKENS": {"token_indices": [1, 2]},
}
REFUSED = {
    "ADAMSS": LINEAR,  # clusters rows of the decomposed weight, with scikit-learn
    "FROD": LINEAR,  # decomposes the weights of all layers together
}
TASK = {"task_ids": torch.zeros(2, dtype=torch.long)}
INPUTS = {"POLY": TASK, "MULTITASK_PROMPT_TUNING": TASK, "SHADOW": {"use_cache": False}}
CANNOT_UNMERGE = {"LILY", "OSF", "POLY"}


def config_of(name):
    options = (OVER_LINEAR | ELSEWHERE | REFUSED)[name]
    config_class = PEFT_TYPE_TO_CONFIG_MAPPING[peft.PeftType(name)]
    return config_class(task_type="CAUSAL_LM", **copy.deepcopy(options))


def adapted(base, name):
    torch.manual_seed(0)
    return fill(peft.get_peft_model(base, config_of(name)), scale=0.02)


def pair(name, kind="llama", dtype=torch.float32):
    """The method over a 4-bit model, and over the dense model of the same weights."""
    base = quantized(kind, dtype)
    twin = dense_twin(base)
    return adapted(base, name), adapted(twin, name)


def test_every_method_is_accounted_for():
    known = {*OVER_LINEAR, *ELSEWHERE, *REFUSED, "XLORA"}
    assert {t.value for t in PEFT_TYPE_TO_CONFIG_MAPPING} == known


@pytest.mark.parametrize("name", [*OVER_LINEAR, *ELSEWHERE])
def test_computes_what_it_computes_over_the_decoded_weights(name):
    # OPT has biases, which some of the methods touch; others know Llama only.
    ours, theirs = pair(name, "opt" if name in OVER_LINEAR else "llama")
    inputs = INPUTS.get(name, {})
    got, gradients = loss_and_gradients(ours, **inputs)
    expected, expected_gradients = loss_and_gradients(theirs, **inputs)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert gradients.keys() == expected_gradients.keys()
    for key, gradient in expected_gradients.items():
        if gradient is None:
            assert gradients[key] is None, key
        else:
            torch.testing.assert_close(gradients[key], gradient, rtol=1e-4, atol=1e-6, msg=key)
    if name in OVER_LINEAR:
        assert any(g is not None and g.any() for g in expected_gradients.values())


class Guarded(Linear4bit):
    """A Linear4bit whose packed weight only its own methods may read."""

    inside = False

    @property
    def weight(self):
        assert self.inside, "the packed weight was read from outside"
        return self._parameters["weight"]

    def forward(self, x):
        return self.guarded(super().forward, x)

    def dequantize(self, dtype=None):
        return self.guarded(super().dequantize, dtype)

    def guarded(self, method, *args):
        self.inside = True
        try:
            return method(*args)
        finally:
            self.inside = False


@pytest.mark.parametrize("name", OVER_LINEAR)
def test_no_forward_reads_the_packed_weight(name):
    model, _ = pair(name)
    for module in model.modules():
        if isinstance(module, Linear4bit):
            module.__class__ = Guarded
    for mode in (model.train(), model.eval()):
        logits(mode, **INPUTS.get(name, {}))
    with pytest.raises(AssertionError, match="read from outside"):
        _ = next(m for m in model.modules() if isinstance(m, Guarded)).weight


@pytest.mark.parametrize("name", sorted(set(OVER_LINEAR) - CANNOT_UNMERGE))
def test_a_merge_is_the_quantized_merge_and_goes_back_exactly(name):
    ours, theirs = pair(name, "opt")
    before = {n: t.clone() for n, t in ours.state_dict().items()}
    decoded = {
        n: m.base_layer.dequantize()
        for n, m in ours.named_modules()
        if isinstance(getattr(m, "base_layer", None), Linear4bit)
    }
    for model in (ours, theirs):
        model.eval()
        model.merge_adapter()
    adapted_layers = [n for n, m in ours.named_modules() if getattr(m, "merged_adapters", None)]
    assert len(adapted_layers) == 4
    for path in adapted_layers:
        layer = ours.get_submodule(f"{path}.base_layer")
        merged = theirs.get_submodule(f"{path}.base_layer")
        torch.testing.assert_close(layer.bias, merged.bias)
        if torch.equal(merged.weight, decoded[path]):  # only the bias has changed
            assert torch.equal(layer.dequantize(), decoded[path])
            continue
        expected = Linear4bit.from_linear(merged)
        # Equal but for elements on a decision point, where the last bit of a sum decides.
        difference = (layer.dequantize() - expected.dequantize()).abs()
        assert (difference > 1e-6).float().mean() < 0.01, path
    assert any(
        not torch.equal(before[n], t) for n, t in ours.state_dict().items() if "base_layer" in n
    )
    ours.unmerge_adapter()
    for key, value in ours.state_dict().items():
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", REFUSED)
def test_untried_methods_are_refused_before_they_read_anything(name):
    if name == "ADAMSS":
        pytest.importorskip("sklearn", reason="AdaMSS needs scikit-learn to say anything else")
    with pytest.raises(NotImplementedError, match=f"{name} is not known to leave 4-bit"):
        peft.get_peft_model(quantized("llama"), config_of(name))


def test_a_method_of_tomorrow_is_refused():
    model = peft.get_peft_model(quantized("llama"), config_of("LORA")).base_model
    model.peft_config["other"] = SimpleNamespace(peft_type="TOMORROW")
    with pytest.raises(NotImplementedError, match="TOMORROW is not known to leave 4-bit"):
        model.inject_adapter(model.model, "other")
    refuse_untried(dense_twin(quantized("llama")), model.peft_config)


@pytest.mark.parametrize("name", ["HIRA", "VERA", "OFT"])
def test_bfloat16_models_with_dropout_and_a_compute_dtype(name):
    ours, theirs = pair(name, dtype=torch.bfloat16)
    got, gradients = loss_and_gradients(ours)
    expected, expected_gradients = loss_and_gradients(theirs)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, expected, rtol=0.02, atol=0.02)
    for key, gradient in expected_gradients.items():
        assert (gradients[key] - gradient).norm() < 0.05 * gradient.norm() + 1e-6


def test_the_graph_keeps_no_decoded_weight():
    """A method that reads the weight decodes it again in the backward."""
    model = adapted(quantized("llama"), "HIRA")
    shapes = []
    hooks = torch.autograd.graph.saved_tensors_hooks(
        lambda t: shapes.append((tuple(t.shape), t.dtype)) or t, lambda t: t
    )
    layer = next(m for m in model.modules() if hasattr(m, "base_layer"))
    out_features, in_features = layer.base_layer.out_features, layer.base_layer.in_features
    with hooks:
        layer(torch.randn(3, in_features, requires_grad=True))
    assert (out_features, in_features) not in [shape for shape, _ in shapes]


def test_methods_known_to_leave_the_weight_alone_are_tested():
    assert {t.value for t in FORWARD_LEAVES_WEIGHT_ALONE} < set(OVER_LINEAR)


def test_a_second_kind_of_adapter_over_a_layer_is_refused():
    model = peft.PeftMixedModel(quantized("llama"), peft.LoraConfig(**LINEAR))
    with pytest.raises(NotImplementedError, match="second kind of adapter over it"):
        model.add_adapter("other", peft.LoHaConfig(**LINEAR))


def test_a_second_adapter_of_a_method_reads_the_decoded_weight():
    ours, theirs = pair("SUPERTUNING")
    for model in (ours, theirs):
        torch.manual_seed(3)
        model.add_adapter("second", config_of("SUPERTUNING"))
        model.set_adapter("second")
        fill(model, scale=0.02)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-6)


def test_disabling_merged_adapters_unmerges():
    model = adapted(quantized("llama"), "HRA").eval()
    with model.disable_adapter():
        base = logits(model)
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(logits(model), base)


def test_xlora_mixes_lora_experts_over_four_bits(tmp_path):
    base = quantized("llama")
    twin = dense_twin(base)
    expert = peft.get_peft_model(
        copy.deepcopy(twin), peft.LoraConfig(**LINEAR, task_type="CAUSAL_LM")
    )
    fill(expert).save_pretrained(tmp_path)
    outputs = []
    for model in (base, twin):
        model.config.use_cache = False
        torch.manual_seed(0)
        config = peft.XLoraConfig(
            task_type="CAUSAL_LM", hidden_size=32, adapters={"0": str(tmp_path)}
        )
        outputs.append(logits(peft.get_peft_model(model, config).eval()))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "config",
    [
        peft.LoraConfig(target_modules=["embed_tokens"]),
        peft.LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1, 2]),
        peft.TrainableTokensConfig(token_indices=[1, 2]),
    ],
    ids=lambda config: config.peft_type.value,
)
def test_packed_embeddings_are_refused(config):
    model = quantized("llama")
    table = torch.nn.Embedding(64, 64)
    model.set_input_embeddings(Embedding4bit.from_embedding(table))
    with pytest.raises(NotImplementedError, match="Embedding4bit"):
        peft.get_peft_model(model, config)
