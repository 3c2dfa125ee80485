"""Mixtures of experts through from_pretrained: packed while loading, saved, loaded, dequantized."""

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from safetensors.torch import load_file, save_file

import qlora_native as qn
from _hf import MIXTURES, dense_twin, logits, tiny
from qlora_native.hf import QLoRANativeConfig, moe
from qlora_native.nn import Experts4bit


def load(folder, **options):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, **options).eval()


def saved(kind, folder, dtype=torch.bfloat16):
    model = tiny(kind).to(dtype)
    model.save_pretrained(folder)
    return model


def state(model):
    return {n: t.clone() for n, t in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


@pytest.mark.parametrize("kind", MIXTURES)
@pytest.mark.parametrize("double_quant", [True, False])
def test_loading_packs_what_quantize_model_packs(tmp_path, kind, double_quant):
    model = saved(kind, tmp_path / "dense")
    config = QLoRANativeConfig(double_quant=double_quant)
    loaded = load(tmp_path / "dense", quantization_config=config, dtype=torch.bfloat16)
    total = sum(p.numel() for p in model.parameters())
    qn.quantize_model(model, double_quant=double_quant)
    assert same(state(loaded), state(model))
    assert sum(isinstance(m, Experts4bit) for m in loaded.modules()) == 2
    layer = next(m for m in loaded.modules() if isinstance(m, Experts4bit))
    assert layer.formats["down_proj"].dtype == torch.bfloat16
    assert loaded.num_parameters() == total
    loaded.save_pretrained(tmp_path / "packed")
    again = load(tmp_path / "packed")
    assert same(state(again), state(loaded))
    torch.testing.assert_close(logits(again), logits(loaded))
    again.save_pretrained(tmp_path / "packed again")
    assert same(state(load(tmp_path / "packed again")), state(loaded))
    expected = logits(dense_twin(loaded))
    again.dequantize()
    assert not any(isinstance(m, Experts4bit) for m in again.modules())
    torch.testing.assert_close(logits(again), expected)
    assert loaded.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=4).shape == (1, 7)


def test_no_dense_stack_exists_while_loading(tmp_path, monkeypatch):
    """Experts are packed one by one, and their matrices dropped."""
    saved("mixtral", tmp_path)

    def no_stacks(*arguments, **others):
        raise AssertionError("a dense stack was made")

    monkeypatch.setattr(moe.MergeModulelist, "convert", no_stacks)
    alive = []
    pack = Experts4bit._packed

    def counting(self, weight, check_finite):
        alive.append(tuple(weight.shape))
        return pack(self, weight, check_finite)

    monkeypatch.setattr(Experts4bit, "_packed", counting)
    load(tmp_path, quantization_config=QLoRANativeConfig(), dtype=torch.bfloat16)
    assert alive.count((96, 32)) == alive.count((32, 48)) == 2 * 4


def test_skipped_experts_stay_dense(tmp_path):
    model = saved("mixtral", tmp_path / "dense")
    config = QLoRANativeConfig(modules_to_not_convert=["model.layers.0.mlp.experts", "lm_head"])
    loaded = load(tmp_path / "dense", quantization_config=config, dtype=torch.bfloat16)
    first, second = (layer.mlp.experts for layer in loaded.model.layers)
    assert not isinstance(first, Experts4bit)
    assert torch.equal(first.gate_up_proj, model.model.layers[0].mlp.experts.gate_up_proj)
    assert isinstance(second, Experts4bit)
    loaded.save_pretrained(tmp_path / "packed")
    assert same(state(load(tmp_path / "packed")), state(loaded))


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_bad_experts_are_named(tmp_path, kind):
    saved(kind, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    name = next(n for n in sorted(tensors) if "experts" in n and "bias" not in n)
    tensors[name].view(-1)[5] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.experts\..*_proj of expert 0: .* 1 val"):
        load(tmp_path, quantization_config=QLoRANativeConfig(), dtype=torch.bfloat16)


def test_a_missing_expert_is_told(tmp_path):
    saved("mixtral", tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.block_sparse_moe.experts.3.w3.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"gate_up_proj has \[3, 4\] experts in the file and 4"):
        load(tmp_path, quantization_config=QLoRANativeConfig(), dtype=torch.bfloat16)


def test_bitsandbytes_has_no_such_format(tmp_path):
    saved("mixtral", tmp_path / "dense")
    loaded = load(tmp_path / "dense", quantization_config=QLoRANativeConfig())
    with pytest.raises(ValueError, match="in 4 bits, which bitsandbytes does for linear layers"):
        qn.hf.save_for_bitsandbytes(loaded, tmp_path / "packed")


def test_the_experts_implementation_has_a_name(tmp_path):
    saved("mixtral", tmp_path, torch.float32)
    named = load(tmp_path, experts_implementation="qlora_native")
    torch.testing.assert_close(logits(named), logits(load(tmp_path)), rtol=1e-5, atol=1e-6)
    options = {"quantization_config": QLoRANativeConfig(), "dtype": torch.float32}
    packed = load(tmp_path, experts_implementation="qlora_native", **options)
    torch.testing.assert_close(logits(packed), logits(load(tmp_path, **options)))
