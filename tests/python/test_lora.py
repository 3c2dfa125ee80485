"""LoRA over 4-bit and dense layers: values, gradients, switching, merging, checkpointing."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from _models import Block, randomize_adapters, tiny_llama, tiny_net, token_ids
from qlora_native.convert import quantize_model
from qlora_native.nn import (
    Linear4bit,
    LoraLinear,
    LoraSettings,
    add_lora,
    count_parameters,
    delete_adapter,
    disable_adapters,
    lora_parameters,
    merge_lora,
    prepare_for_training,
    set_adapter,
    unmerge_lora,
)
from torch import nn
from torch.utils.checkpoint import checkpoint

SUFFIXES = ["q_proj", "down_proj"]


def base_layer(kind: str, bias: bool = True, dtype=torch.float32) -> nn.Linear:
    torch.manual_seed(0)
    linear = nn.Linear(37, 10, bias=bias, dtype=dtype)
    return linear if kind == "dense" else Linear4bit.from_linear(linear)


def dense_weight(layer: nn.Linear) -> torch.Tensor:
    if isinstance(layer, Linear4bit):
        return layer.dequantize(torch.float32)
    return layer.weight.detach().float()


def adapted(kind: str, bias: bool = True, **settings) -> LoraLinear:
    layer = LoraLinear(base_layer(kind, bias))
    layer.add_adapter("default", LoraSettings(**({"r": 4, "alpha": 8} | settings)))
    layer.set_adapter("default")
    randomize_adapters(layer)
    return layer


def quantized_net(**arguments):
    model = tiny_net(**arguments)
    quantize_model(model)
    return model


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return copy.deepcopy(dict(model.state_dict()))


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_a_new_adapter_changes_nothing(kind):
    base = base_layer(kind)
    x = torch.randn(3, 37)
    expected = base(x)
    layer = LoraLinear(base)
    layer.add_adapter("default", LoraSettings(r=4))
    layer.set_adapter("default")
    assert torch.equal(layer(x), expected)
    a = layer.lora_A["default"].weight
    assert a.shape == (4, 37)
    # kaiming_uniform with a = sqrt(5) is uniform in +-1/sqrt(in_features).
    assert 0.8 / math.sqrt(37) < a.abs().max() <= 1 / math.sqrt(37)
    assert not layer.lora_B["default"].weight.any()


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["dense", "4bit"])
def test_values_and_gradients_against_dense_fp64(kind, bias, rslora):
    layer = adapted(kind, bias, use_rslora=rslora)
    x = torch.randn(2, 3, 37, requires_grad=True)
    g = torch.randn(2, 3, 10)
    y = layer(x)
    y.backward(g)

    scaling = 8 / math.sqrt(4) if rslora else 8 / 4
    w = dense_weight(layer.base_layer).double()
    a = layer.lora_A["default"].weight.detach().double().requires_grad_()
    b = layer.lora_B["default"].weight.detach().double().requires_grad_()
    x64 = x.detach().double().requires_grad_()
    bias64 = layer.bias.detach().double() if bias else None
    y64 = F.linear(x64, w + scaling * (b @ a), bias64)
    y64.backward(g.double())
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(y.double(), y64, **close)
    torch.testing.assert_close(x.grad.double(), x64.grad, **close)
    torch.testing.assert_close(layer.lora_A["default"].weight.grad.double(), a.grad, **close)
    torch.testing.assert_close(layer.lora_B["default"].weight.grad.double(), b.grad, **close)


def test_products_run_in_the_activations_dtype():
    layer = LoraLinear(base_layer("4bit", dtype=torch.bfloat16))
    layer.add_adapter("default", LoraSettings(r=4))
    layer.set_adapter("default")
    randomize_adapters(layer)
    assert layer.lora_A["default"].weight.dtype == torch.float32
    x = torch.randn(2, 37, dtype=torch.bfloat16)
    dtypes = set()

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten.mm.default, torch.ops.aten.addmm.default):
                dtypes.update(t.dtype for t in args if isinstance(t, torch.Tensor))
            return func(*args, **(kwargs or {}))

    with Watch():
        y = layer(x)
    assert dtypes == {torch.bfloat16}
    assert y.dtype == torch.bfloat16
    y.float().sum().backward()
    assert layer.lora_B["default"].weight.grad.dtype == torch.float32


def test_compute_dtype_reaches_the_adapter():
    torch.manual_seed(0)
    base = Linear4bit.from_linear(nn.Linear(64, 8), compute_dtype=torch.bfloat16)
    layer = LoraLinear(base)
    layer.add_adapter("default", LoraSettings(r=4))
    layer.set_adapter("default")
    randomize_adapters(layer)
    x = torch.randn(2, 64)
    h = x.bfloat16()
    update = F.linear(
        F.linear(h, layer.lora_A["default"].weight.bfloat16()),
        layer.lora_B["default"].weight.bfloat16(),
    )
    assert torch.equal(layer(x), base(x) + (update * (32 / 4)).float())


def test_dropout_acts_in_training_on_the_adapter_only():
    layer = adapted("4bit", dropout=0.5)
    x = torch.randn(64, 37)
    layer.eval()
    quiet = layer(x)
    assert torch.equal(quiet, layer(x))
    layer.train()
    torch.manual_seed(1)
    noisy = layer(x)
    torch.manual_seed(1)
    dropped = F.dropout(x, 0.5)
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    torch.testing.assert_close(noisy, layer.base_layer(x) + F.linear(F.linear(dropped, a), b) * 2)
    assert not torch.equal(noisy, quiet)


def test_only_packed_tensors_are_saved_for_backward():
    layer = adapted("4bit")
    x = torch.randn(6, 37)
    numel = 37 * 10
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x.requires_grad_())
    assert saved
    dense = [t for t in saved if t.is_floating_point() and t.numel() >= numel]
    assert dense == []
    packed = {p.untyped_storage().data_ptr() for p in layer.base_layer.parameters()}
    assert any(t.untyped_storage().data_ptr() in packed for t in saved)


def test_several_adapters():
    layer = adapted("4bit")
    layer.add_adapter("other", LoraSettings(r=2, alpha=3), torch.bfloat16)
    with torch.no_grad():
        layer.lora_B["other"].weight.normal_()
    x = torch.randn(3, 37)
    base = layer.base_layer(x)
    first = layer(x)
    layer.set_adapter("other")
    second = layer(x)
    layer.set_adapter(["default", "other"])
    torch.testing.assert_close(layer(x), first + second - base)
    layer.set_adapter([])
    assert torch.equal(layer(x), base)
    with pytest.raises(KeyError, match="third"):
        layer.set_adapter("third")
    with pytest.raises(ValueError, match="already exists"):
        layer.add_adapter("other", LoraSettings())
    with pytest.raises(ValueError, match=r"'a\.b'"):
        layer.add_adapter("a.b", LoraSettings())


# ---- whole models ----


def test_add_lora_freezes_the_rest_and_counts_logical_parameters():
    model = quantized_net()
    dense_total = sum(p.numel() for p in tiny_net().parameters())
    report = add_lora(model, r=3, alpha=6, target_modules=SUFFIXES)
    expected = [f"layers.{i}.{n}" for i in range(2) for n in SUFFIXES]
    assert list(report.targets) == expected
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trainable == {f"{n}.lora_{x}.default.weight" for n in expected for x in "AB"}
    adapter = 2 * 3 * ((24 + 24) + (37 + 24))
    assert report.trainable == adapter == sum(p.numel() for p in lora_parameters(model))
    assert report.total == dense_total + adapter
    assert count_parameters(model) == (report.trainable, report.total)
    assert f"{adapter:,}" in str(report)


@pytest.mark.parametrize("target", [None, "all-linear"])
def test_all_linear_leaves_the_head_out(target):
    report = add_lora(tiny_net(), target_modules=target)
    assert len(report.targets) == 6
    assert not any("lm_head" in name for name in report.targets)


def test_target_patterns():
    assert add_lora(tiny_net(), target_modules=r".*\.0\..*_proj").targets == (
        "layers.0.q_proj",
        "layers.0.up_proj",
        "layers.0.down_proj",
    )
    assert add_lora(tiny_net(), target_modules=["layers.1.q_proj"]).targets == ("layers.1.q_proj",)
    # A suffix is whole components: "proj" is not the end of "q_proj".
    with pytest.raises(ValueError, match=r"matches no linear layer.*down_proj, lm_head, q_proj"):
        add_lora(tiny_net(), target_modules=["proj"])
    report = add_lora(tiny_net(), target_modules=["q_proj", "k_proj"])
    assert report.unmatched == ("k_proj",)
    assert "k_proj" in str(report)
    with pytest.raises(ValueError, match="'embed', a Embedding"):
        add_lora(tiny_net(), target_modules=["q_proj", "embed"])


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"r": 0}, "r must be"),
        ({"dropout": 1.0}, "dropout"),
        ({"bias": "some"}, "bias"),
        ({"alpha": math.inf}, "alpha"),
        ({"adapter_name": "a.b"}, "a.b"),
    ],
)
def test_bad_settings_leave_the_model_alone(arguments, error):
    model = quantized_net()
    before = state(model)
    with pytest.raises(ValueError, match=error):
        add_lora(model, **arguments)
    assert same(before, state(model))


def test_a_subclass_of_linear_is_not_adapted():
    class Special(nn.Linear):
        pass

    with pytest.raises(TypeError, match="Special"):
        LoraLinear(Special(2, 2))
    model = nn.Sequential(Special(2, 2), nn.Linear(2, 2))
    assert add_lora(model).targets == ("1",)


def test_a_layer_used_at_two_paths_stays_one_layer():
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"a": shared, "b": shared})
    add_lora(model, r=2, target_modules=["a", "b"])
    assert model["a"] is model["b"]
    assert isinstance(model["a"], LoraLinear)


@pytest.mark.parametrize("mode", ["none", "lora_only", "all"])
def test_bias_modes(mode):
    model = quantized_net()
    add_lora(model, r=2, target_modules=SUFFIXES, bias=mode)
    trainable = {n for n, p in model.named_parameters() if p.requires_grad and "lora_" not in n}
    adapted_biases = {f"layers.{i}.{n}.base_layer.bias" for i in range(2) for n in SUFFIXES}
    other = {f"layers.{i}.{n}.bias" for i in range(2) for n in ("norm", "up_proj")}
    assert trainable == {
        "none": set(), "lora_only": adapted_biases, "all": adapted_biases | other
    }[mode]  # fmt: skip


def test_second_adapter_switching_and_disabling():
    model = quantized_net()
    ids = token_ids()
    base = model(ids)
    add_lora(model, r=2, target_modules=SUFFIXES)
    randomize_adapters(model)
    first = model(ids)
    add_lora(model, r=3, target_modules=["up_proj"], adapter_name="second")
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"second"}
    # The second adapter is new, so it changes nothing; the first is inactive.
    assert torch.equal(model(ids), base)
    set_adapter(model, "default")
    assert torch.equal(model(ids), first)
    assert {n.split(".")[-2] for n, p in model.named_parameters() if p.requires_grad} == {"default"}
    with disable_adapters(model):
        assert torch.equal(model(ids), base)
        with disable_adapters(model):
            pass
        assert torch.equal(model(ids), base)
    assert torch.equal(model(ids), first)
    set_adapter(model, ["default", "second"], trainable=False)
    assert not any(p.requires_grad for p in model.parameters())
    with pytest.raises(KeyError, match="third"):
        set_adapter(model, "third")
    with pytest.raises(ValueError, match="'second' already exists"):
        add_lora(model, adapter_name="second")
    with pytest.raises(ValueError, match="biases must be the only one"):
        add_lora(model, bias="all", adapter_name="third")
    delete_adapter(model, "default")
    assert type(model.layers[0].q_proj) is Linear4bit
    assert isinstance(model.layers[0].up_proj, LoraLinear)
    delete_adapter(model, "second")
    assert torch.equal(model(ids), base)
    assert same(state(model), state(quantized_net()))


@pytest.mark.parametrize("quantize", [True, False])
def test_merge_and_unmerge_restore_every_bit(quantize):
    model = quantized_net() if quantize else tiny_net()
    add_lora(model, r=2, target_modules=SUFFIXES)
    randomize_adapters(model)
    ids = token_ids()
    before, out = state(model), model(ids)
    layer = model.layers[0].q_proj
    exact = dense_weight(layer.base_layer).double() + 16 * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    assert merge_lora(model) == 4
    merged = dense_weight(layer.base_layer).double()
    if quantize:
        expected = Linear4bit.from_linear(nn.Linear(24, 24)).requantize_(exact.float().detach())
        difference = (merged - expected.dequantize().double()).abs()
        assert (difference > 1e-6).float().mean() < 0.01
        assert not torch.equal(model(ids), out)
    else:
        torch.testing.assert_close(merged, exact, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(model(ids), out, rtol=1e-4, atol=1e-4)
    for refused in (
        lambda: merge_lora(model),
        lambda: set_adapter(model, "default"),
        lambda: add_lora(model, adapter_name="x"),
        lambda: delete_adapter(model, "default"),
        lambda: prepare_for_training(model),
        lambda: disable_adapters(model).__enter__(),
    ):
        with pytest.raises(RuntimeError, match="merged"):
            refused()
    assert unmerge_lora(model) == 4
    assert same(before, state(model))
    assert torch.equal(model(ids), out)
    assert unmerge_lora(model) == 0


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_dense_export(dtype):
    model = quantized_net()
    add_lora(model, r=2, target_modules=SUFFIXES)
    randomize_adapters(model)
    ids = token_ids()
    out = model(ids)
    assert merge_lora(model, dense=True, dtype=dtype) == 6
    assert not any(isinstance(m, LoraLinear | Linear4bit) for m in model.modules())
    assert model.layers[0].q_proj.weight.dtype == (dtype or torch.float32)
    assert model.layers[0].up_proj.bias.dtype == (dtype or torch.float32)
    assert set(model.state_dict()) == set(tiny_net().state_dict())
    if dtype is None:
        torch.testing.assert_close(model(ids), out, rtol=1e-4, atol=1e-4)


def test_dense_export_of_a_merged_model_does_not_merge_twice():
    model = quantized_net()
    add_lora(model, r=2, target_modules=SUFFIXES)
    randomize_adapters(model)
    merge_lora(model)
    out = model(token_ids())
    merge_lora(model, dense=True)
    torch.testing.assert_close(model(token_ids()), out, rtol=1e-4, atol=1e-4)


def test_merge_refuses_what_it_cannot_do_and_changes_nothing():
    model = quantized_net()
    with pytest.raises(ValueError, match="no adapter"):
        merge_lora(model)
    add_lora(model, r=2, target_modules=SUFFIXES)
    with pytest.raises(ValueError, match="'nope'"):
        merge_lora(model, adapter_names=["nope"])
    with pytest.raises(ValueError, match="dense=True"):
        merge_lora(model, dtype=torch.bfloat16)
    model.layers[1].q_proj.lora_A["default"].weight.data[0, 0] = float("nan")
    before = state(model)
    with pytest.raises(ValueError, match=r"layers\.1\.q_proj.* 1 non-finite"):
        merge_lora(model)
    after = state(model)
    assert all(torch.equal(before[k].nan_to_num(7), after[k].nan_to_num(7)) for k in before)

    tied = tiny_net()
    tied.lm_head.weight = tied.embed.weight
    add_lora(tied, r=2, target_modules=["lm_head"])
    with pytest.raises(ValueError, match="shared"):
        merge_lora(tied)


def test_a_merge_that_fails_midway_is_undone():
    model = quantized_net()
    add_lora(model, r=2, target_modules=SUFFIXES)
    randomize_adapters(model)
    before = state(model)
    # Finite weights whose product is not.
    for part in ("lora_A", "lora_B"):
        getattr(model.layers[1].down_proj, part)["default"].weight.data.fill_(1e30)
    with pytest.raises(ValueError, match="NaN or infinite"):
        merge_lora(model)
    after = state(model)
    assert all(torch.equal(before[k], after[k]) for k in before if "base_layer" in k)
    assert not any(m.merged for m in model.modules() if isinstance(m, LoraLinear))


def test_copies_of_a_merged_layer_can_unmerge():
    layer = adapted("4bit")
    before = state(layer)
    layer.merge()
    other = copy.deepcopy(layer)
    layer.unmerge()
    assert other.merged
    other.unmerge()
    assert same(before, state(other))


# ---- training ----


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module, use_reentrant: bool | None) -> None:
        super().__init__()
        self.block, self.use_reentrant = block, use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.use_reentrant is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant)


def test_both_kinds_of_checkpointing_give_equal_gradients():
    torch.manual_seed(0)
    block = nn.ModuleDict({"b": Block(24, 37, True)})
    quantize_model(block)
    add_lora(block, r=2)
    randomize_adapters(block)
    x = torch.randn(3, 24)
    gradients = []
    for use_reentrant in (None, True, False):
        block.zero_grad()
        Checkpointed(block["b"], use_reentrant)(
            x.clone().requires_grad_()
        ).square().sum().backward()
        gradients.append([p.grad.clone() for p in lora_parameters(block)])
    assert any(g.any() for g in gradients[0])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model = quantized_net()
    add_lora(model, r=2)
    randomize_adapters(model)
    ids = token_ids(shape=(4, 5))

    def gradients(batches):
        model.zero_grad()
        for batch in batches:
            (model(batch).square().sum() / 4).backward()
        return [p.grad.clone() for p in lora_parameters(model)]

    for a, b in zip(gradients([ids]), gradients(ids.split(1)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_llama_trains_end_to_end_with_checkpointing(use_reentrant):
    model = tiny_llama()
    quantize_model(model)
    ids = token_ids(shape=(2, 9), vocabulary=64)
    plain = copy.deepcopy(model)
    for m in (plain, model):
        torch.manual_seed(3)
        add_lora(m, r=4, alpha=16)
        m.train()
    prepare_for_training(model, use_reentrant=use_reentrant)
    assert model.config.use_cache is False
    # Twice is as once: one hook.
    prepare_for_training(model, use_reentrant=use_reentrant)
    assert len(model.get_input_embeddings()._forward_hooks) == 1

    losses = []
    for m in (plain, model):
        optimizer = torch.optim.AdamW(lora_parameters(m), lr=1e-2)
        run = []
        for _ in range(6):
            loss = m(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append(loss.item())
        losses.append(run)
    assert losses[0] == losses[1]
    assert losses[1][-1] < losses[1][0] - 0.3
    out = model.eval()(ids).logits
    merge_lora(model, dense=True)
    torch.testing.assert_close(model(ids).logits, out, rtol=1e-3, atol=1e-3)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_lowers_the_loss_on_every_device(device, dtype):
    model = tiny_net().to(dtype)
    quantize_model(model, device=device)
    add_lora(model, r=4)
    assert {p.device.type for p in lora_parameters(model)} == {device}
    ids = token_ids().to(device)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(ids).flatten(0, 1).float(), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    before, out = state(model), model(ids)
    merge_lora(model)
    unmerge_lora(model)
    assert same(before, state(model))
    assert torch.equal(model(ids), out)


def test_prepare_needs_the_interface_of_transformers():
    model = quantized_net()
    with pytest.raises(NotImplementedError, match="TinyNet"):
        prepare_for_training(model)
    prepare_for_training(model, gradient_checkpointing=False)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_without_graph_breaks(backend):
    layer = adapted("4bit")
    x = torch.randn(4, 37, requires_grad=True)
    y = layer(x)
    y.square().sum().backward()
    expected = [p.grad.clone() for p in (x, *lora_parameters(layer))]
    x.grad = None
    layer.zero_grad()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    out = compiled(x)
    torch.testing.assert_close(out, y)
    out.square().sum().backward()
    for a, b in zip(expected, (x, *lora_parameters(layer)), strict=True):
        torch.testing.assert_close(a, b.grad, rtol=1e-4, atol=1e-5)


def test_autocast():
    layer = adapted("4bit")
    x = torch.randn(4, 37)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0.05, atol=0.1)
