"""LoRA on whole models: choosing layers, freezing, counting, switching."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from _adapted import SUFFIXES, quantized_net, same, state
from _models import randomize_adapters, tiny_net, token_ids
from qlora_native.nn import (
    Linear4bit,
    LoraLinear,
    add_lora,
    count_parameters,
    delete_adapter,
    disable_adapters,
    lora_parameters,
    set_adapter,
)


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
