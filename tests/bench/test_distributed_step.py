"""bench/python/distributed_step.py: what ranks check and count, and what is made of it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")

import distributed_rank
import distributed_step
import random_models
import training_step

CPU = torch.device("cpu")
TINY = [
    "--device", "cpu", "--shape", "tiny", "--gpus", "2", "--batch", "1", "--length", "48",
    "--steps", "2", "--lora-r", "3",
]  # fmt: skip
MATRICES = [(64, 64), (32, 64), (32, 64), (64, 64), (192, 64), (192, 64), (64, 192)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A whole run: its status, what it printed, and its JSON."""
    file = tmp_path_factory.mktemp("distributed") / "records.json"
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = distributed_step.main(
            [*TINY, "--cases", "ddp,fsdp,70b-packed", "--timeout", "200", "--json", str(file)]
        )
    return status, printed.getvalue(), json.loads(file.read_text())


def test_the_ranks_have_the_losses_of_one_process(finished):
    status, printed, found = finished
    assert status == 0, printed
    runs = {record["name"]: record for record in found["records"]}
    assert list(runs) == ["one", "ddp", "fsdp", "70b-packed"]
    for name in ("ddp", "fsdp"):
        assert runs[name]["expected"]["losses"] == runs["one"]["losses"]
        assert runs[name]["losses"] == pytest.approx(runs["one"]["losses"], rel=2e-3)
        norm = runs["one"]["gradient_norm"]
        assert runs[name]["expected"]["gradient_norm"] == norm > 0
        assert runs[name]["gradient_norm"] == pytest.approx(norm, rel=5e-3)
    assert [run["ranks"] for run in runs.values()] == [1, 2, 2, 2]
    # Of two halves of a batch, not of one: the loss of half of it is another one.
    assert runs["one"]["parts"] == 2
    assert (runs["70b-packed"]["length"], runs["70b-packed"]["checkpointing"]) == (1024, "full")


def test_split_models_are_split_and_gathered_as_bytes(finished):
    runs = {record["name"]: record for record in finished[2]["records"]}
    elements = sum(out * k for out, k in MATRICES)
    packed = sum(
        out * k // 2 + out * k // 64 + 4 * (-(-out * k // 64 // 256) + 1) for out, k in MATRICES
    )
    adapters = 4 * sum(3 * (out + k) for out, k in MATRICES)
    layers = 2 * (packed + adapters + 2 * 2 * 64) + 2 * 64
    table = 256 * 64
    whole = layers + 2 * 2 * table
    assert runs["one"]["held_bytes"] == runs["ddp"]["held_bytes"] == whole
    packed_table = table // 2 + table // 64 + 4 * 2
    for name, vocabulary in (("fsdp", 2 * table), ("70b-packed", packed_table)):
        run, whole = runs[name], layers + 2 * vocabulary
        # Three rows of a factor make two and one.
        assert whole / 2 <= run["held_bytes"] <= 1.02 * whole / 2 + adapters / 3
        assert run["layer_gathers"] == 2
        assert run["wire_bytes_per_parameter"] == pytest.approx(packed / elements, rel=2e-3)
        assert run["predicted_received_bytes"] == whole
        # Embeddings or head are gathered once more or less than layers.
        assert abs(run["received_bytes"] - whole) < vocabulary + 0.2 * whole
        assert run["gather_bytes_per_s"] > 0
        assert len(run["bytes_of_ranks"]) == 2
    assert all(run["estimated_bytes"] > run["held_bytes"] for run in runs.values())


def test_tables_of_a_run(finished):
    _, printed, found = finished
    runs, wanted = (part.splitlines() for part in printed.split("\n\n"))
    assert len(runs) == 2 + 4
    assert len({line.count("|") for line in runs}) == 1
    assert runs[2].startswith("| one | tiny, 2 layers | 1 | 1 x 48 | ")
    assert runs[5].startswith("| 70b-packed | tiny, 2 layers, checkpointing | 2 | 1 x 1024 | ")
    assert len(wanted) == 2 + len(found["goals"])
    # Nothing is said of times on a CPU, and there is no memory of a device.
    assert [goal["met"] for goal in found["goals"]] == [None, None, True, True]
    assert all("peak_bytes" not in record for record in found["records"])


def test_a_model_made_in_parts_is_the_one_made_whole():
    config = random_models.SHAPES["tiny"].config()
    whole = random_models.build(config, random_models.ours, CPU)
    random_models.add_native_adapters(whole, 3, torch.float32)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        split = random_models.build_sharded(config, 3, torch.float32, CPU)
        expected = dict(whole.named_parameters())
        found = {name: p.full_tensor() for name, p in split.named_parameters()}
        assert found.keys() == expected.keys()
        for name, value in found.items():
            assert torch.equal(value, expected[name]), name
        assert [p.requires_grad for p in split.parameters()] == [
            p.requires_grad for p in whole.parameters()
        ]
    finally:
        dist.destroy_process_group()


def test_losses_have_to_fall_and_to_be_those_expected():
    run = distributed_step.make_run(distributed_step.parse_options(TINY), "ddp")

    def check(run, losses, norm=1.0):
        distributed_rank.check(run, {"losses": losses, "gradient_norm": norm})

    check(run, [3.0, 2.9, 2.8])
    for wrong in ([3.0, 2.9, 3.1], [float("nan"), 2.9, 2.8], [3.0, 2.9, float("inf")]):
        with pytest.raises(training_step.LossMismatchError, match="does not learn"):
            check(run, wrong)
    expected = {"losses": [3.0, 2.9, 2.8], "gradient_norm": 0.5}
    run = dataclasses.replace(run, expected=expected)
    check(run, [3.001, 2.9, 2.8], 0.501)
    with pytest.raises(training_step.LossMismatchError, match=r"step 0.*for one process"):
        check(run, [3.03, 2.9, 2.8], 0.5)
    with pytest.raises(training_step.LossMismatchError, match=r"norm is 0\.7071"):
        check(run, [3.0, 2.9, 2.8], 0.5**0.5)


def test_the_callers_environment_goes_to_the_ranks(monkeypatch):
    seen = []
    monkeypatch.setattr(
        distributed_step, "_run", lambda command, environment, timeout: seen.append(environment)
        or (1, "", "Traceback\nNCCL error: nothing to talk to\n\n"),
    )  # fmt: skip
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NCCL_NVLS_ENABLE", "0")
    run = distributed_step.make_run(distributed_step.parse_options(TINY), "one")
    assert distributed_step.launch(run)["error"] == "NCCL error: nothing to talk to"
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    distributed_step.launch(run)
    first, second = seen
    assert first["NCCL_NVLS_ENABLE"] == second["NCCL_NVLS_ENABLE"] == "0"
    assert first["PYTORCH_CUDA_ALLOC_CONF"] == "expandable_segments:True"
    assert second["PYTORCH_CUDA_ALLOC_CONF"] == "max_split_size_mb:64"
    assert "PYTORCH_ALLOC_CONF" not in second
    assert (first["OMP_NUM_THREADS"], second["OMP_NUM_THREADS"]) == (str(os.cpu_count()), "7")


def test_the_rank_that_failed_first_is_named(monkeypatch):
    def failing(command, environment, timeout):
        for rank, error in ((1, "OutOfMemoryError: 7 GB"), (0, "RuntimeError: connection closed")):
            file = Path(command[-1]) / f"rank-{rank}.json"
            file.write_text(json.dumps({"error": error}))
            os.utime(file, ns=(0, 1000 - rank))
        return 1, "", "torchrun's own words"

    monkeypatch.setattr(distributed_step, "_run", failing)
    run = distributed_step.make_run(distributed_step.parse_options(TINY), "ddp")
    assert distributed_step.launch(run)["error"] == "OutOfMemoryError: 7 GB"


def test_runs_of_the_70b_model_have_sizes_of_their_own():
    options = distributed_step.parse_options(["--device", "cpu", "--layers", "8"])
    assert options.cases == ["ddp", "fsdp", "70b"]
    small, dense, packed = (
        distributed_step.make_run(options, name) for name in ("ddp", "70b", "70b-packed")
    )
    assert (small.shape, small.layers, small.batch, small.length) == ("llama-3-8b", 8, 4, 2048)
    for run in (dense, packed):
        assert (run.shape, run.layers, run.batch, run.length) == ("llama-3-70b", 80, 1, 1024)
        assert (run.mode, run.ranks, run.checkpointing) == ("fsdp", 2, "full")
    assert (dense.packs_vocabulary, packed.packs_vocabulary) == (False, True)


def test_what_takes_too_long_is_ended():
    command = [sys.executable, "-c", "import time; time.sleep(100)"]
    assert distributed_step._run(command, dict(os.environ), 1) == (None, "", "")


def test_what_failed_is_named_and_nothing_runs_unchecked(monkeypatch, capsys):
    launched = []

    def failing(run):
        launched.append(run.name)
        return {**vars(run), "error": "OutOfMemoryError: 7 GB"}

    def no_estimate(run):
        raise RuntimeError("no such option")

    monkeypatch.setattr(distributed_step, "launch", failing)
    monkeypatch.setattr(distributed_step, "estimate", no_estimate)
    assert distributed_step.main([*TINY, "--cases", "ddp,70b"]) == 1
    assert launched == ["one", "70b"]
    printed = capsys.readouterr()
    lines = printed.out.splitlines()
    assert "| one | tiny, 2 layers | 1 | 1 x 48 | failed: OutOfMemoryError: 7 GB |" in lines[2]
    assert "failed: there is nothing to compare with" in lines[3]
    assert "no estimate of ddp: no such option" in printed.err


@pytest.mark.parametrize(("seconds", "met"), [(1.05, True), (1.2, False)])
def test_goals_are_judged_on_gpus(seconds, met):
    options = distributed_step.parse_options(TINY)
    options.device, options.shape = "cuda", None
    runs = [distributed_step.make_run(options, name) for name in ("one", "ddp", "fsdp", "70b")]
    ranks = [
        {"median_ms": 1000.0},
        {"median_ms": 1000 * seconds},
        {"median_ms": 1000 * seconds**2, "wire_bytes_per_parameter": 0.5 * seconds},
        {"median_ms": 1.0, "wire_bytes_per_parameter": 0.51, "used_bytes": 24e9 * seconds**0.5},
    ]  # fmt: skip
    records = [
        {**vars(run), **distributed_step.merged(run, [rank] * run.ranks)}
        for run, rank in zip(runs, ranks, strict=True)
    ]
    found = distributed_step.goals(options, records)
    assert found[0]["found"] == pytest.approx(2 / seconds)
    assert found[1]["found"] == pytest.approx(1 / seconds)
    assert [goal["met"] for goal in found] == [met] * 4 + [True]
    assert distributed_step.goal_table(found).count("**no**") == (0 if met else 4)


def test_the_slowest_rank_and_the_most_bytes_count():
    run = distributed_step.make_run(distributed_step.parse_options(TINY), "ddp")
    ranks = [{"median_ms": 20.0, "peak_bytes": 5}, {"median_ms": 40.0, "peak_bytes": 3}]
    found = distributed_step.merged(run, ranks)
    assert (found["median_ms"], found["peak_bytes"]) == (40.0, 5)
    assert found["tokens_per_s"] == pytest.approx(2 * 48 / 0.040)
    assert found["bytes_of_ranks"] == [{"peak_bytes": 5}, {"peak_bytes": 3}]


@pytest.mark.parametrize("wrong", [["--cases", "405b"], ["--gpus", "1"]])
def test_options_that_cannot_be(wrong):
    with pytest.raises(SystemExit):
        distributed_step.parse_options([*TINY, *wrong])
