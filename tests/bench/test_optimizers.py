"""bench/python/optimizers.py: what it checks, counts and prints."""

from __future__ import annotations

import json

import pytest
import torch

import optimizers
import qlora_native as qn


def test_the_lora_case_is_what_it_says():
    shapes = optimizers.CASES["lora"]
    assert len(shapes) == 112
    assert sum(a * b for a, b in shapes) == 10_485_760


def test_a_wrong_optimizer_ends_the_run():
    def wrong(params):
        return torch.optim.AdamW(params, lr=2e-3)

    with pytest.raises(SystemExit, match="steps away from torch"):
        optimizers.verify("AdamW", wrong, optimizers.CASES["tiny"], "cpu")
    for name, make in optimizers.rivals("cpu").items():
        if not name.startswith("bitsandbytes"):
            optimizers.verify(name, make, optimizers.CASES["tiny"], "cpu")


def test_bytes_are_those_of_the_formulas():
    assert optimizers.bytes_per_element("AdamW") == 28
    assert optimizers.bytes_per_element("AdamW8bit") == pytest.approx(16.06, abs=0.01)
    assert optimizers.bytes_per_element("Lion") == 20


def test_records(capsys, monkeypatch):
    monkeypatch.setattr(optimizers.measure, "copy_tb_per_s", lambda _: 0.01)
    options = ["--cases", "tiny", "--rounds", "2", "--rivals", "torch fused,AdamW8bit"]
    optimizers.main([*options, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [r["impl"] for r in found["records"]] == ["torch fused", "AdamW8bit"]
    for record in found["records"]:
        assert record["tensors"] == 2
        assert record["parameters"] == 64 * 80 + 4097
        assert record["median_us"] >= record["least_us"] > 0
        assert record["fraction_of_copy"] == pytest.approx(record["tb_per_s"] / 0.01)
    assert qn.kernels.last("optimizer_step")
    optimizers.main(options)
    assert "AdamW8bit" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        optimizers.main(["--cases", "huge"])
