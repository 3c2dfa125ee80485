"""Layers of experts in 4 bits: what the dense layers of the decoded weights compute."""

import copy
import io

import pytest
import torch

pytest.importorskip("transformers")

import qlora_native as qn
from _hf import IDS, MIXTURES, dense_twin, logits, quantized, tiny
from qlora_native.nn import Experts4bit, dequantize_experts, quantize_experts
from qlora_native.nn.expert_conversion import is_experts


def experts_in(model):
    return [m for m in model.modules() if isinstance(m, Experts4bit)]


def dense_experts(kind):
    return next(m for m in tiny(kind).modules() if is_experts(m))


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("settings", [{}, {"double_quant": False, "quant_type": "fp4"}], ids=str)
def test_quantize_model_packs_experts(kind, settings):
    model = tiny(kind)
    total = sum(p.numel() for p in model.parameters())
    report = qn.quantize_model(model, **settings)
    layers = experts_in(model)
    assert len(layers) == 2
    assert all(p.dtype == torch.uint8 for n, p in layers[0].named_parameters() if "bias" not in n)
    stacks = {name: shape for name, shape in report.converted if len(shape) == 3}
    assert len(stacks) == 4
    assert "and 4 stacks of experts" in str(report)
    hidden = model.config.hidden_size
    for name, shape in stacks.items():
        assert shape[2 if "gate_up" in name else 1] == hidden
    assert qn.nn.count_parameters(model)[1] == total
    twin = dense_twin(model)
    torch.testing.assert_close(logits(model), logits(twin), rtol=1e-5, atol=1e-6)
    assert not torch.allclose(logits(model), logits(tiny(kind)), atol=1e-4)


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "qlora_native"])
def test_gradients_are_those_of_the_dense_layer(kind, implementation):
    model = quantized(kind)
    twin = dense_twin(model)
    for one in (model, twin):
        one.config._experts_implementation = implementation
    gradients = []
    for one in (model, twin):
        x = one.get_input_embeddings()(IDS).detach().requires_grad_()
        one(inputs_embeds=x, labels=IDS).loss.backward()
        trained = {n: p.grad for n, p in one.named_parameters() if p.grad is not None}
        gradients.append({"x": x.grad} | trained)
    ours, theirs = gradients
    assert any("router" in n or "gate.weight" in n for n in ours)
    assert any("experts" in n for n in ours) == (kind == "gpt_oss")  # its biases
    for name, gradient in ours.items():
        torch.testing.assert_close(gradient, theirs[name], rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", MIXTURES)
def test_each_expert_is_the_quantized_matrix(kind):
    dense = dense_experts(kind)
    stacks = {name: dense._parameters[name].clone() for name in ("gate_up_proj", "down_proj")}
    layer = quantize_experts(copy.deepcopy(dense))
    for name, stack in stacks.items():
        for expert, weight in enumerate(stack):
            weight = weight.T if dense.is_transposed else weight
            ours, q = layer.quantized_stack(name)[expert], qn.quantize_4bit(weight.contiguous())
            assert torch.equal(ours.packed.flatten(), q.packed)
            assert torch.equal(ours.dequantize(), q.dequantize())
    before = type(dense)
    dequantize_experts(layer, torch.bfloat16)
    assert type(layer) is before
    assert layer.gate_up_proj.dtype == torch.bfloat16
    assert layer.gate_up_proj.shape == dense.gate_up_proj.shape
    assert set(dict(layer.named_parameters())) == set(dict(dense.named_parameters()))


def test_a_layer_survives_copies_and_pickles():
    layer = quantize_experts(dense_experts("gpt_oss"))
    x, index, weights = torch.randn(6, 32), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    expected = layer(x, index, weights)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(layer), torch.load(buffer, weights_only=False)):
        assert type(other) is type(layer)
        assert torch.equal(other(x, index, weights), expected)
    restored = quantize_experts(dense_experts("gpt_oss"))
    restored.load_state_dict(layer.state_dict())
    assert torch.equal(restored(x, index, weights), expected)
    assert "quant_type=nf4" in repr(layer)


def test_a_state_dict_of_another_quantization_is_refused():
    layer = quantize_experts(dense_experts("gpt_oss"))
    before = copy.deepcopy(layer.state_dict())
    for settings in ({"quant_type": "fp4"}, {"block_size": 32}, {"double_quant": False}):
        ((name, value),) = settings.items()
        other = quantize_experts(dense_experts("gpt_oss"), **settings).state_dict()
        with pytest.raises(RuntimeError, match=f"up_proj was quantized with {name}={value!r}"):
            layer.load_state_dict(other)
        if name == "block_size":
            # Without the settings beside them, the shapes tell what they can.
            with pytest.raises(
                RuntimeError, match=r"gate_up_proj_absmax has shape .* block_size=64"
            ):
                layer.load_state_dict(dict(other))
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_bfloat16_and_compute_dtype():
    dense = dense_experts("mixtral").bfloat16()
    x, index = torch.randn(6, 32).bfloat16(), torch.randint(0, 4, (6, 2))
    weights = torch.rand(6, 2)
    layer = quantize_experts(copy.deepcopy(dense))
    assert layer.dequantize_stack("down_proj").dtype == torch.bfloat16
    y = layer(x, index, weights)
    assert y.dtype == torch.bfloat16
    exact = quantize_experts(copy.deepcopy(dense), compute_dtype=torch.float32)(x, index, weights)
    assert exact.dtype == torch.bfloat16
    torch.testing.assert_close(y, exact, rtol=0.05, atol=1e-3)
    # Casting the model leaves the bytes alone.
    assert torch.equal(layer.to(torch.float32)(x, index, weights), y)


def test_refusals_leave_the_layer_as_it_was():
    dense = dense_experts("mixtral")
    with torch.no_grad():
        dense.down_proj[2, 3, 4] = torch.nan
    kind, before = type(dense), dense.down_proj
    with pytest.raises(ValueError, match=r"down_proj of expert 2: .* 1 values that are NaN"):
        quantize_experts(dense)
    assert type(dense) is kind
    assert dense.down_proj is before
    model = tiny("mixtral")
    with torch.no_grad():
        model.model.layers[1].mlp.experts.gate_up_proj[0, 0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"model.layers.1.mlp.experts.gate_up_proj of expert 0"):
        qn.quantize_model(model)
    with pytest.raises(ValueError, match="block_size 48"):
        quantize_experts(dense_experts("mixtral"), block_size=48)
    with pytest.raises(ValueError, match="meta device"):
        quantize_experts(dense_experts("mixtral").to("meta"))
    layer = quantize_experts(dense_experts("mixtral"))
    with pytest.raises(RuntimeError, match=r"up_proj is torch\.float32, expected packed"):
        layer.load_state_dict(dense_experts("mixtral").state_dict(), strict=False)
    layer._is_expert_parallel = True
    with pytest.raises(NotImplementedError, match="expert parallelism"):
        layer(torch.randn(1, 32), torch.zeros(1, 2, dtype=torch.long), torch.ones(1, 2))


def test_what_cannot_be_packed_stays_dense_and_is_told():
    model = tiny("qwen3_moe", moe_intermediate_size=23)
    report = qn.quantize_model(model)
    assert not experts_in(model)
    reasons = dict(report.skipped)
    path = "model.layers.0.mlp.experts"
    assert reasons[path] == "down_proj (5, 32, 23): in_features must be even and not 0"
    skipped = tiny("mixtral")
    qn.quantize_model(skipped, skip=["experts", "lm_head"])
    assert not experts_in(skipped)
    assert not is_experts(torch.nn.Linear(2, 2))


def test_the_dense_export_decodes_experts():
    model = quantized("mixtral")
    before = logits(model)
    qn.merge_lora(model, dense=True)
    assert not experts_in(model)
    torch.testing.assert_close(logits(model), before, rtol=1e-5, atol=1e-6)


def test_no_dense_stack_in_forward_or_backward():
    """Nothing as large as a dense stack is kept for the backward."""
    layer = quantize_experts(dense_experts("mixtral"))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        x = torch.randn(6, 32, requires_grad=True)
        layer(x, torch.randint(0, 4, (6, 2)), torch.rand(6, 2)).sum().backward()
    stack = 4 * 96 * 32
    assert all(t.numel() < stack for t in kept if t.is_floating_point())
    assert any(t.dtype == torch.uint8 for t in kept)


@pytest.mark.parametrize("kind", MIXTURES)
def test_every_device_has_the_same_bytes_and_results(device, kind):
    reference = quantize_experts(dense_experts(kind))
    layer = quantize_experts(dense_experts(kind), device=device)
    for name, parameter in reference.named_parameters():
        assert torch.equal(dict(layer.named_parameters())[name].cpu(), parameter), name
    x, index, weights = torch.randn(9, 32), torch.randint(0, 4, (9, 2)), torch.rand(9, 2)
    results = []
    for one, place in ((reference, "cpu"), (layer, device)):
        inputs = x.to(place).requires_grad_()
        y = one(inputs, index.to(place), weights.to(place))
        (gradient,) = torch.autograd.grad(y.square().sum(), inputs)
        results.append((y.cpu(), gradient.cpu()))
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_the_layer_compiles_in_one_graph():
    layer = quantize_experts(dense_experts("mixtral"))
    x, index, weights = torch.randn(6, 32), torch.randint(0, 4, (6, 2)), torch.rand(6, 2)
    x.requires_grad_()
    results = []
    for one in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        y = one(x, index, weights)
        results.append((y, *torch.autograd.grad(y.square().sum(), x)))
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected)
