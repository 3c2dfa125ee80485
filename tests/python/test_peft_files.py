"""Adapter files both ways with PEFT: it loads ours, we load its."""

from __future__ import annotations

import json
import warnings

import pytest
import safetensors.torch
import torch

from _adapted import SUFFIXES, same, state, trained_net
from _models import randomize_adapters, tiny_llama, tiny_net, token_ids
from qlora_native.checkpoint import load_adapter, save_adapter
from qlora_native.nn import LoraLinear, add_lora

peft = pytest.importorskip("peft")

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@pytest.fixture(autouse=True)
def _no_warnings_from_peft():
    # PEFT warns about models that are not from transformers; that is no concern of these tests.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_peft_loads_our_file_and_computes_the_same(tmp_path, use_rslora, bias):
    model = trained_net(use_rslora=use_rslora, bias=bias)
    save_adapter(model, tmp_path)
    other = peft.PeftModel.from_pretrained(tiny_net(), str(tmp_path)).eval()
    ids = token_ids()
    assert not torch.equal(model(ids), tiny_net()(ids))
    assert torch.equal(model(ids), other(ids))
    adapted = {n for n, m in other.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    ours = {n for n, m in model.named_modules() if isinstance(m, LoraLinear)}
    assert adapted == {f"base_model.model.{n}" for n in ours}


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
@pytest.mark.parametrize("use_rslora", [False, True])
def test_we_load_peft_files_and_compute_the_same(tmp_path, use_rslora, bias):
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=SUFFIXES, bias=bias, use_rslora=use_rslora
    )
    theirs = peft.get_peft_model(tiny_net(), config)
    randomize_adapters(theirs)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            if parameter.requires_grad and "lora_" not in name:
                parameter.add_(0.25)
    theirs.eval().save_pretrained(str(tmp_path))
    model = tiny_net().eval()
    report = load_adapter(model, tmp_path)
    assert len(report.targets) == 4
    ids = token_ids()
    assert torch.equal(model(ids), theirs(ids))
    # And what we write is what they wrote.
    save_adapter(model, tmp_path / "again")
    first = safetensors.torch.load_file(tmp_path / WEIGHTS)
    assert same(first, safetensors.torch.load_file(tmp_path / "again" / WEIGHTS))


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": "all-linear"},
        {"target_modules": r"layers\.1\..*_proj"},
        {"target_modules": SUFFIXES, "exclude_modules": ["layers.0.q_proj"]},
        {"target_modules": SUFFIXES, "init_lora_weights": "gaussian"},
    ],
)
def test_we_read_every_way_peft_has_of_choosing_layers(tmp_path, options):
    theirs = peft.get_peft_model(tiny_net(), peft.LoraConfig(r=2, lora_alpha=4, **options))
    randomize_adapters(theirs)
    theirs.eval().save_pretrained(str(tmp_path))
    model = tiny_net().eval()
    load_adapter(model, tmp_path)
    assert torch.equal(model(token_ids()), theirs(token_ids()))


def test_we_read_adapters_on_some_of_the_layers(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], layers_to_transform=[1])
    theirs = peft.get_peft_model(tiny_llama(), config)
    randomize_adapters(theirs)
    theirs.eval().save_pretrained(str(tmp_path))
    model = tiny_llama().eval()
    assert load_adapter(model, tmp_path).targets == ("model.layers.1.self_attn.q_proj",)
    ids = token_ids(vocabulary=64)
    assert torch.equal(model(ids).logits, theirs(ids).logits)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["norm"]}, "modules_to_save"),
        ({"rank_pattern": {"q_proj": 4}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 4}}, "alpha_pattern"),
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "olora"}, "init_lora_weights"),
        ({"trainable_token_indices": {"embed": [1]}}, "trainable_token_indices"),
    ],
)
def test_options_we_cannot_honour_are_refused_by_name(tmp_path, options, named):
    config = peft.LoraConfig(r=3, target_modules=SUFFIXES, **options)
    peft.get_peft_model(tiny_net(), config).save_pretrained(str(tmp_path))
    model = tiny_net()
    before = state(model)
    with pytest.raises(NotImplementedError, match=named):
        load_adapter(model, tmp_path)
    assert same(before, state(model))


def test_other_kinds_of_adapters_are_refused(tmp_path):
    config = peft.IA3Config(target_modules=SUFFIXES, feedforward_modules=[])
    peft.get_peft_model(tiny_net(), config).save_pretrained(str(tmp_path))
    with pytest.raises(NotImplementedError, match="IA3"):
        load_adapter(tiny_net(), tmp_path)


def test_llama_with_peft(tmp_path):
    model = tiny_llama().eval()
    model.config._name_or_path = "some/base"
    add_lora(model, r=4)
    randomize_adapters(model)
    save_adapter(model, tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert config["base_model_name_or_path"] == "some/base"
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    other = peft.PeftModel.from_pretrained(tiny_llama(), str(tmp_path)).eval()
    assert type(other) is peft.PeftModelForCausalLM
    ids = token_ids(vocabulary=64)
    assert torch.equal(model(ids).logits, other(ids).logits)


def test_targets_that_no_list_of_names_can_say(tmp_path):
    # Only one of two layers called q_proj: PEFT must not adapt the other.
    model = trained_net(target_modules=["layers.1.q_proj"])
    save_adapter(model, tmp_path)
    other = peft.PeftModel.from_pretrained(tiny_net(), str(tmp_path)).eval()
    layers = [n for n, m in other.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert layers == ["base_model.model.layers.1.q_proj"]
    assert torch.equal(model(token_ids()), other(token_ids()))
    reloaded = tiny_net().eval()
    assert load_adapter(reloaded, tmp_path).targets == ("layers.1.q_proj",)
