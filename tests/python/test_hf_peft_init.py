"""LoftQ over 4-bit layers, from original weights on disk or in memory."""

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers")

from peft import LoraConfig, get_peft_model

import qlora_native as qn
from _hf import logits, tiny
from qlora_native.hf import init_loftq, peft_lora

OPTIONS = {"target_modules": "all-linear", "task_type": "CAUSAL_LM", "r": 8, "lora_alpha": 24}


def quantized_with_lora(**options):
    dense = tiny("llama")
    model = tiny("llama")
    qn.quantize_model(model)
    return dense, get_peft_model(model, LoraConfig(**(OPTIONS | options))).eval()


def test_is_the_best_low_rank_correction():
    dense, model = quantized_with_lora()
    before = (logits(model) - logits(dense)).norm()
    report = init_loftq(model, dense.state_dict())
    assert (logits(model) - logits(dense)).norm() < 0.8 * before
    layers = [m for m in model.modules() if isinstance(m, peft_lora.Linear)]
    assert len(report.errors) == len(layers)
    for (path, (error_before, error_after)), layer in zip(
        report.errors.items(), layers, strict=True
    ):
        weight = dense.get_submodule(path).weight.double()
        residual = weight - layer.base_layer.dequantize().double()
        # Eckart and Young: the rest is the singular values beyond the rank.
        best = torch.linalg.svdvals(residual)[8:].norm() / weight.norm()
        rest = (residual - layer.get_delta_weight("default").double()).norm() / weight.norm()
        torch.testing.assert_close(rest, best, rtol=1e-4, atol=1e-5)
        assert error_after == pytest.approx(float(rest), rel=1e-3)
        assert error_before == pytest.approx(float(residual.norm() / weight.norm()), rel=1e-3)
    assert "LoftQ on 14 layers" in str(report)


def test_more_iterations_requantize_and_reduce_the_error():
    one = init_loftq(quantized_with_lora()[1], quantized_with_lora()[0].state_dict())
    dense, model = quantized_with_lora()
    five = init_loftq(model, dense.state_dict(), iterations=5)
    after = [sum(after for _, after in report.errors.values()) for report in (one, five)]
    assert after[1] < after[0]


@pytest.mark.parametrize("alpha", [24, -8])
@pytest.mark.parametrize("shard", ["10GB", "20KB"])
def test_reads_checkpoints(tmp_path, alpha, shard):
    dense, model = quantized_with_lora(lora_alpha=alpha)
    dense.save_pretrained(tmp_path, max_shard_size=shard)
    init_loftq(model, tmp_path)
    _, other = quantized_with_lora(lora_alpha=alpha)
    init_loftq(other, dense.state_dict())
    assert torch.equal(logits(model), logits(other))
    if shard == "10GB":
        init_loftq(other, tmp_path / "model.safetensors")


def test_large_layers_take_the_largest_singular_values(monkeypatch):
    dense, model = quantized_with_lora()
    exact = init_loftq(model, dense.state_dict())
    monkeypatch.setattr("qlora_native.hf.peft_init._FULL_SVD_SIZE", 0)
    _, model = quantized_with_lora(r=4)
    approximate = init_loftq(model, dense.state_dict())
    for path, (before, after) in approximate.errors.items():
        assert exact.errors[path][1] < after < before


def test_says_what_is_wrong(tmp_path):
    dense, model = quantized_with_lora()
    with pytest.raises(ValueError, match="iterations must be at least 1, got 0"):
        init_loftq(model, dense.state_dict(), iterations=0)
    with pytest.raises(ValueError, match="no 4-bit layer of the model has a LoRA adapter 'x'"):
        init_loftq(model, dense.state_dict(), adapter_name="x")
    with pytest.raises(KeyError, match=r"no tensor 'model.layers.0.self_attn.q_proj.weight'"):
        init_loftq(model, {"other": torch.zeros(1)})
    with pytest.raises(FileNotFoundError, match="no safetensors file"):
        init_loftq(model, tmp_path)
    with pytest.raises(ValueError, match="is 0: nothing can show"):
        init_loftq(quantized_with_lora(lora_alpha=0)[1], dense.state_dict())
    model.merge_adapter()
    with pytest.raises(ValueError, match="are merged into"):
        init_loftq(model, dense.state_dict())
    config = LoraConfig(**OPTIONS)
    config.init_lora_weights = "loftq"  # PEFT's own check of it wants scipy
    quantized = tiny("llama")
    qn.quantize_model(quantized)
    with pytest.raises(NotImplementedError, match="init_loftq"):
        get_peft_model(quantized, config)
