"""bench/python/headline_memory.py: what it counts, and that it says what is too much."""

from __future__ import annotations

import json

import pytest
import torch

import headline_memory
import random_models
from qlora_native.footprint import Footprint

pytest.importorskip("transformers")
TINY = ["--device", "cpu", "--sizes", "tiny", "--length", "32", "--lora-r", "3"]


def test_the_loss_in_chunks_is_the_loss():
    torch.manual_seed(0)
    head = torch.nn.Linear(8, 50, bias=False)
    hidden = torch.randn(2, 7, 8, requires_grad=True)
    labels = torch.randint(50, (2, 7))
    loss = headline_memory.chunked_loss(head, hidden, labels, chunk=5)
    loss.backward()
    found, hidden.grad = hidden.grad, None
    logits = head(hidden)[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, labels[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, hidden.grad)


def test_parts_are_those_of_the_tensors():
    found = headline_memory.measure(headline_memory.parse_options(TINY), "tiny")
    shape = random_models.SHAPES["tiny"]
    linears = [(64, 64), (32, 64), (32, 64), (64, 64), (192, 64), (192, 64), (64, 192)]
    weights = sum(out * k for out, k in linears)
    adapters = sum(3 * (out + k) for out, k in linears) * shape.layers
    # Codes, a byte per block of 64, and a float per group of 256 blocks and for the offset.
    packed = sum(
        out * k // 2 + out * k // 64 + 4 * (-(-out * k // 64 // 256) + 1) for out, k in linears
    )
    rotary = 2 * 4 * (shape.hidden // shape.heads // 2)
    norms = 2 * 64 * (2 * shape.layers + 1)
    parts = found["parts"]
    assert parts["weights"] == packed * shape.layers
    assert found["bits_per_weight"] == pytest.approx(8 * packed / weights)
    assert parts["dense"] == 2 * 2 * shape.vocab * shape.hidden + norms + rotary
    assert parts["adapters"] == parts["gradients"] == 2 * adapters
    # Two moments and the master in fp32, and a step for each of the tensors.
    assert parts["optimizer"] == 12 * adapters + 4 * 2 * 7 * shape.layers
    assert found["lora_parameters"] == adapters
    assert found["losses"][1] < found["losses"][0]
    estimated = found["estimated_parts"]
    for part in ("weights", "dense", "adapters", "gradients"):
        assert estimated[part] == parts[part], part
    assert estimated["activations"] > 0


def test_what_the_device_says_is_divided():
    tensors = Footprint(weights=50, dense=10, adapters=5, gradients=5, optimizer=12, host=7)
    found = headline_memory.on_device(tensors, staged=10, peak=100, used=130)
    # 72 are allocated by torch for tensors that stay; the staging cache is beside its peak.
    assert found.activations == 100 - 72
    assert found.workspace == 130 - 100 - 10
    assert found.total == 130


@pytest.mark.parametrize(("bar", "status"), [(1.0, 0), (1e-6, 1)])
def test_a_missed_bar_is_said(monkeypatch, capsys, tmp_path, bar, status):
    options = headline_memory.parse_options(TINY)
    found = headline_memory.measure(options, "tiny")

    class Done:
        returncode, stderr, stdout = 0, "", "a warning\n" + json.dumps(found)

    monkeypatch.setattr(headline_memory.subprocess, "run", lambda *_, **__: Done)
    monkeypatch.setitem(headline_memory.GOALS, "tiny", headline_memory.Goal(1.0, bar, 2.0))
    file = tmp_path / "memory.json"
    monkeypatch.setattr(headline_memory.report, "machine", lambda *_: {"device": "none"})
    assert headline_memory.main([*TINY, "--json", str(file)]) == status
    assert ("too much" in capsys.readouterr().out) == bool(status)
    record = json.loads(file.read_text())["records"][0]
    assert record["total_bytes"] == sum(record["parts"].values())
    Done.returncode, Done.stderr = 1, "Traceback\ntorch.OutOfMemoryError: too large\n\n"
    assert headline_memory.main(TINY) == 1
    assert "failed: torch.OutOfMemoryError: too large" in capsys.readouterr().out


def test_sizes_that_do_not_exist():
    with pytest.raises(SystemExit):
        headline_memory.parse_options(["--sizes", "llama-1t"])


def test_shapes_have_the_parameters_of_their_names():
    for size, billions in (
        ("llama-7b", 6.74), ("llama-13b", 13.02), ("llama-33b", 32.53), ("llama-65b", 65.29),
        ("llama-3-8b", 8.03), ("llama-3-70b", 70.55),
    ):  # fmt: skip
        from transformers import LlamaForCausalLM

        with torch.device("meta"):
            model = LlamaForCausalLM(random_models.SHAPES[size].config())
        assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)
