"""The scripts of examples/hugging_face, on tiny models."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import _hf_models
from _cli import make_model, sentences, write_jsonl

EXAMPLES = Path(__file__).parents[2] / "examples" / "hugging_face"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """{"llama", "opt": folder of a tiny model with a tokenizer}."""
    from transformers import AutoTokenizer

    llama = make_model(tmp_path_factory.mktemp("llama"))
    tokenizer = AutoTokenizer.from_pretrained(llama)
    torch.manual_seed(0)
    model = _hf_models.opt(vocab_size=len(tokenizer), bos_token_id=0, eos_token_id=0)
    opt = _hf_models.save(model, tmp_path_factory.mktemp("opt"), torch.float16)
    tokenizer.save_pretrained(opt)
    return {"llama": llama, "opt": opt}


def run(script, *arguments):
    result = subprocess.run(
        [sys.executable, EXAMPLES / script, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert result.returncode == 0, result.stderr[-3000:]
    return result.stdout


@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_loading_and_generating(models, kind):
    out = run("load_opt.py", models[kind])
    assert "Hello, my name is" in out
    assert " MiB for " in out


def test_loading_saving_and_reloading(models, tmp_path):
    assert "reloaded bit for bit: True" in run("load_llama.py", models["llama"], tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (config["quant_type"], config["double_quant"]) == ("nf4", True)
    assert config["compute_dtype"] == "bfloat16"


def test_training(models, tmp_path):
    data = write_jsonl(tmp_path / "data.jsonl", [{"quote": text} for text in sentences(50)])
    out = run("finetune.py", models["opt"], data, tmp_path / "out")
    losses = [float(loss) for loss in re.findall(r"'loss': '?([0-9.]+)", out)]
    assert len(losses) == 10
    assert all(0 < loss < 10 for loss in losses)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["r"] == 8 and sorted(config["target_modules"]) == ["q_proj", "v_proj"]
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert all(tensor.any() for name, tensor in tensors.items() if "lora_B" in name)
