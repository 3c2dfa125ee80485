"""Folding adapters into the base weights, and back."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from torch import nn

from _adapted import SUFFIXES, adapted, dense_weight, quantized_net, same, state
from _models import randomize_adapters, tiny_net, token_ids
from qlora_native.nn import (
    Linear4bit,
    LoraLinear,
    add_lora,
    delete_adapter,
    disable_adapters,
    merge_lora,
    prepare_for_training,
    set_adapter,
    unmerge_lora,
)


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


def test_state_dicts_do_not_mix_merged_and_unmerged(tmp_path):
    merged, fresh = quantized_net(), quantized_net()
    for model in (merged, fresh):
        add_lora(model, r=2, target_modules=SUFFIXES)
        randomize_adapters(model)
    torch.save(merged.state_dict(), tmp_path / "unmerged.pt")
    expected = state(merged)
    merge_lora(merged)
    torch.save(merged.state_dict(), tmp_path / "merged.pt")

    # The adapters would be applied twice.
    file = torch.load(tmp_path / "merged.pt", weights_only=True)
    for arguments in ({}, {"strict": False}, {"assign": True}):
        with pytest.raises(
            RuntimeError, match=r"layers\.1\.down_proj: .*\['default'\].*unmerge before saving"
        ):
            copy.deepcopy(fresh).load_state_dict(file, **arguments)

    # Unmerging would undo the load.
    plain = torch.load(tmp_path / "unmerged.pt", weights_only=True)
    for source in (plain, file, dict(file)):
        with pytest.raises(
            RuntimeError, match=r"layers\.1\.down_proj: .*\['default'\].*unmerge before loading"
        ):
            copy.deepcopy(merged).load_state_dict(source)

    unmerge_lora(merged)
    for model in (merged, fresh):
        model.load_state_dict(plain, strict=True)
        assert same(state(model), expected)
        # Formats that keep tensors alone come back as plain dicts.
        model.load_state_dict(dict(plain), strict=True)


def test_a_layer_that_is_loaded_by_itself_is_named_by_its_kind():
    layer, other = adapted("dense"), adapted("dense")
    layer.merge()
    with pytest.raises(RuntimeError, match=r"LoraLinear: .*unmerge before saving"):
        other.load_state_dict(layer.state_dict())


@pytest.mark.parametrize("kind", ["4bit", "dense"])
def test_a_pickled_merged_layer_can_unmerge(kind):
    layer = adapted(kind)
    before = state(layer)
    layer.merge()
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    other = torch.load(buffer, weights_only=False)
    assert other.merged_adapters == ("default",)
    assert same(state(other), state(layer))
    other.unmerge()
    assert same(before, state(other))
