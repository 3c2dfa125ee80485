"""quantize_model: what is converted, what is not and why, and the memory it takes."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import nn

import qlora_native as qn
from _models import randomize_adapters, tiny_llama, tiny_net, token_ids
from qlora_native.convert import quantize_model
from qlora_native.nn import (
    Linear4bit,
    add_lora,
    count_parameters,
    lora_parameters,
    merge_lora,
    unmerge_lora,
)


def linear_names(model: nn.Module, kind: type) -> set[str]:
    return {n for n, m in model.named_modules() if type(m) is kind}


def test_every_linear_but_the_head_is_converted():
    model = tiny_net()
    reference = tiny_net()
    report = quantize_model(model)
    names = [name for name, _ in report.converted]
    expected = [f"layers.{i}.{n}" for i in range(2) for n in ("q_proj", "up_proj", "down_proj")]
    assert names == expected
    assert dict(report.converted)["layers.1.up_proj"] == (37, 24)
    assert linear_names(model, Linear4bit) == set(expected)
    assert linear_names(model, nn.Linear) == {"lm_head"}
    for name in names:
        layer, dense = model.get_submodule(name), reference.get_submodule(name)
        assert torch.equal(layer.dequantize(), qn.quantize_4bit(dense.weight).dequantize())
        assert torch.equal(layer.bias, dense.bias)
    assert model(token_ids()).shape == (3, 5, 11)


def test_report_accounts_for_everything():
    model = tiny_net()
    report = quantize_model(model)
    skipped = dict(report.skipped)
    assert skipped["lm_head"] == "named by skip='lm_head'"
    assert skipped["embed"] == "Embedding is not a Linear"
    assert skipped["layers.0.norm"] == "LayerNorm is not a Linear"
    owners = {n for n, m in model.named_modules() if list(m.parameters(recurse=False))}
    assert {n for n, _ in report.converted} | skipped.keys() == owners
    assert report.bytes_before == sum(p.nbytes for p in tiny_net().parameters())
    assert report.bytes_after == sum(p.nbytes for p in model.parameters())
    text = str(report)
    assert "6 linear layers" in text
    assert "Embedding is not a Linear" in text


def test_bits_per_parameter_of_a_large_layer():
    model = nn.ModuleDict({"a": nn.Linear(1024, 512, bias=False)})
    report = quantize_model(model, block_size=64)
    # 4 bits, 8 / 64 for the codes of absmax, 32 / (64 * 256) for absmax2, one offset.
    expected = 4 + 8 / 64 + 32 / (64 * 256) + 32 / (1024 * 512)
    assert report.bits_per_parameter == pytest.approx(expected, abs=1e-12)
    single = nn.ModuleDict({"a": nn.Linear(1024, 512, bias=False)})
    assert quantize_model(single, double_quant=False).bits_per_parameter == 4.5
    assert quantize_model(nn.ModuleDict({"e": nn.Embedding(2, 2)})).bits_per_parameter == 0.0


@pytest.mark.parametrize(
    ("skip", "left"),
    [
        ((), set()),
        (("layers.0",), {"layers.0.q_proj", "layers.0.up_proj", "layers.0.down_proj"}),
        (("up_proj", "lm_head"), {"layers.0.up_proj", "layers.1.up_proj", "lm_head"}),
        (("layers.1.q_proj",), {"layers.1.q_proj"}),
        (("proj", "layer"), set()),
    ],
)
def test_skip_names_whole_components(skip, left):
    model = tiny_net()
    quantize_model(model, skip=skip)
    assert linear_names(model, nn.Linear) == left


def test_a_head_tied_to_the_embeddings_stays_tied():
    model = tiny_llama(tie_word_embeddings=True)
    report = quantize_model(model, skip=())
    assert dict(report.skipped)["lm_head"] == "weight shared with model.embed_tokens.weight"
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert len(report.converted) == 14


def test_layers_that_may_compute_something_else_are_left():
    class Special(nn.Linear):
        pass

    hooked = nn.Linear(4, 4)
    hooked.register_forward_hook(lambda module, inputs, output: output * 2)
    normed = torch.nn.utils.weight_norm(nn.Linear(4, 4))
    parametrized = torch.nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.ModuleDict(
        {
            "special": Special(4, 4),
            "hooked": hooked,
            "normed": normed,
            "parametrized": parametrized,
            "fp64": nn.Linear(4, 4, dtype=torch.float64),
            "void": nn.Linear(0, 4),
            "quantized": Linear4bit.from_linear(nn.Linear(4, 4)),
            "attention": nn.MultiheadAttention(4, 1),
            "plain": nn.Linear(4, 4),
        }
    )
    report = quantize_model(model)
    assert report.converted == (("plain", (4, 4)),)
    reasons = dict(report.skipped)
    assert reasons["special"] == "Special is a subclass of Linear"
    assert reasons["hooked"] == reasons["normed"] == "has hooks"
    assert "subclass of Linear" in reasons["parametrized"]
    assert reasons["fp64"] == "weight is torch.float64"
    assert reasons["void"] == "weight has no elements"
    assert reasons["quantized"] == "already quantized"
    assert "subclass of Linear" in reasons["attention.out_proj"]
    assert quantize_model(model).converted == ()


def test_the_model_itself_cannot_be_replaced():
    report = quantize_model(nn.Linear(4, 4))
    assert report.converted == ()
    assert "from_linear" in report.skipped[0][1]


def test_adapters_that_are_there_stay_and_train():
    model, reference = tiny_net(), tiny_net()
    quantize_model(reference)
    for net in (model, reference):
        add_lora(net, r=2, target_modules=["q_proj"])
        randomize_adapters(net)
    before = [p.detach().clone() for p in lora_parameters(model)]
    report = quantize_model(model)
    assert [name for name, _ in report.converted if "q_proj" in name] == [
        "layers.0.q_proj.base_layer",
        "layers.1.q_proj.base_layer",
    ]
    reasons = dict(report.skipped)
    for part in ("lora_A", "lora_B"):
        assert reasons[f"layers.1.q_proj.{part}.default"] == "part of a LoRA adapter"
    after = list(lora_parameters(model))
    assert len(before) == len(after) == 4
    assert all(
        p.requires_grad and torch.equal(p, old) for p, old in zip(after, before, strict=True)
    )
    assert count_parameters(model) == count_parameters(reference)
    assert torch.equal(model(token_ids()), reference(token_ids()))


def test_a_layer_with_merged_adapters_is_refused():
    model = tiny_net()
    add_lora(model, r=2, target_modules=["down_proj"])
    randomize_adapters(model)
    merge_lora(model)
    with pytest.raises(RuntimeError, match=r"'layers\.0\.down_proj'.*\['default'\] are merged"):
        quantize_model(model)
    assert linear_names(model, Linear4bit) == set()
    # A layer that is not to be converted does not matter.
    assert len(quantize_model(model, skip=("down_proj", "lm_head")).converted) == 4
    unmerge_lora(model)
    assert len(quantize_model(model).converted) == 2
    assert merge_lora(model) == 2
    assert quantize_model(model).converted == ()


def test_a_layer_used_at_two_paths_is_converted_once():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    report = quantize_model(model)
    assert len(report.converted) == 1
    assert model["a"] is model["b"]
    assert isinstance(model["a"], Linear4bit)


def test_non_finite_weights_are_named_and_counted():
    model = tiny_net()
    model.layers[1].up_proj.weight.data.view(-1)[[3, 5, 800]] = float("nan")
    with pytest.raises(ValueError, match=r"layers\.1\.up_proj\.weight: .*holds 3 values"):
        quantize_model(model)
    other = tiny_net()
    other.layers[1].up_proj.weight.data[0, 0] = float("inf")
    quantize_model(other, check_finite=False)
    assert other.layers[1].up_proj.dequantize().isnan().any()


def test_running_out_of_memory_names_the_layer(monkeypatch):
    model = tiny_net()
    from_linear = Linear4bit.from_linear

    def small_device(linear, **settings):
        if linear.out_features == 37:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return from_linear(linear, **settings)

    monkeypatch.setattr(Linear4bit, "from_linear", small_device)
    with pytest.raises(
        torch.OutOfMemoryError,
        match=r"layers\.0\.up_proj\.weight \(37, 24\): CUDA .* 2\.00 GiB",
    ) as raised:
        quantize_model(model)
    assert isinstance(raised.value.__cause__, torch.OutOfMemoryError)
    assert linear_names(model, Linear4bit) == {"layers.0.q_proj"}


def test_bad_settings_leave_the_model_alone():
    model = tiny_net()
    for arguments in ({"quant_type": "nf5"}, {"block_size": 48}, {"quant_type": "custom"}):
        with pytest.raises(ValueError):
            quantize_model(model, **arguments)
    with pytest.raises(TypeError, match="lm_head"):
        quantize_model(model, skip="lm_head")
    assert linear_names(model, Linear4bit) == set()
    meta = tiny_net().to("meta")
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj\.weight: .*meta"):
        quantize_model(meta)


def test_settings_reach_the_layers():
    model = tiny_net()
    codebook = tuple(i / 8 - 1 for i in range(16))
    quantize_model(
        model.eval(),
        quant_type="custom",
        codebook=codebook,
        block_size=32,
        double_quant=False,
        compute_dtype=torch.bfloat16,
        device="cpu",
    )
    layer = model.layers[0].q_proj
    assert (layer.quant_type, layer.codebook) == ("custom", codebook)
    assert (layer.block_size, layer.double_quant) == (32, False)
    assert layer.compute_dtype == torch.bfloat16
    assert not layer.training


def test_the_model_ends_up_on_the_device(device):
    expected, model = tiny_net(), tiny_net()
    quantize_model(expected)
    quantize_model(model, device=device)
    assert {p.device.type for p in model.parameters()} == {device}
    ours, theirs = model.state_dict(), expected.state_dict()
    assert all(torch.equal(ours[name].cpu(), theirs[name]) for name in theirs)


def test_dense_weights_die_one_by_one():
    model = nn.ModuleList(nn.Linear(64, 64, bias=False) for _ in range(6))
    dense = [weakref.ref(layer.weight) for layer in model]
    alive_after = []

    def progress(done: int, total: int, name: str) -> None:
        assert (total, name) == (6, str(done - 1))
        alive_after.append(sum(reference() is not None for reference in dense))

    # Reference counts alone must free them: a collection may come too late.
    gc.disable()
    try:
        quantize_model(model, progress=progress)
    finally:
        gc.enable()
    assert alive_after == [5, 4, 3, 2, 1, 0]


def test_peak_of_live_tensor_bytes():
    """Counts every byte that torch hands out and gets back while the model is converted."""
    layers, dim = 8, 256
    model = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(layers))
    dense_bytes = dim * dim * 4
    live = {"now": layers * dense_bytes, "peak": 0}
    start = live["now"]

    def track(tensor: torch.Tensor) -> None:
        live["now"] += tensor.nbytes
        live["peak"] = max(live["peak"], live["now"])
        weakref.finalize(tensor, release, tensor.nbytes)

    def release(size: int) -> None:
        live["now"] -= size

    for layer in model:
        weakref.finalize(layer.weight, release, dense_bytes)

    class Count(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            # Views own nothing; what an operator allocates has a schema without aliasing.
            fresh = not any(r.alias_info for r in func._schema.returns)
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                if fresh and isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                    track(tensor)
            return out

    with Count():
        report = quantize_model(model, check_finite=False)
    packed = report.bytes_after
    assert live["now"] <= packed * 1.1
    # The dense model and the first layer's packed form, an eighth of a dense one, with constants.
    assert live["peak"] <= start + dense_bytes * 0.15
    assert live["peak"] >= start


def test_a_model_mapped_from_a_file(tmp_path):
    model = tiny_net()
    torch.save(model.state_dict(), tmp_path / "model.pt")
    mapped = torch.load(tmp_path / "model.pt", mmap=True, weights_only=True)
    other = tiny_net(seed=1).to("meta")
    other.load_state_dict(mapped, assign=True)
    del mapped
    quantize_model(model)
    quantize_model(other)
    ids = token_ids()
    assert torch.equal(model(ids), other(ids))


def test_llama_in_bfloat16():
    model = tiny_llama().bfloat16()
    ids = token_ids(vocabulary=64)
    before = model(ids).logits.float()
    report = quantize_model(model)
    assert len(report.converted) == 14
    after = model(ids).logits
    assert after.dtype == torch.bfloat16
    # Four bits change the outputs a little and no more.
    change = (after.float() - before).norm() / before.norm()
    assert 0.01 < change < 0.3
    state = model.state_dict()
    other = tiny_llama(seed=1).bfloat16()
    quantize_model(other)
    other.load_state_dict(state, strict=True)
    assert torch.equal(other(ids).logits, after)
