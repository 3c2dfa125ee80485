"""Several ranks: over gloo on the CPU, over NCCL where there is a GPU for each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("torch.distributed.checkpoint")

import qlora_native as qn
from _cli import finetune_arguments, make_model, sentences, write_jsonl
from _hf_models import MODELS, save
from _ranks import optimizer_of, reference
from qlora_native.cli.loss import _share
from qlora_native.cli.parallel import Ranks, is_lost
from qlora_native.optim._distributed import decode, encode

HERE = Path(__file__).parent
TORCHRUN = ("torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0")
ACCELERATE = (
    "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
    "--dynamo_backend", "no", "--main_process_port", "0",
)  # fmt: skip


def launch(launcher, count, *command, **environment):
    several = "--num_processes" if launcher is ACCELERATE else "--nproc-per-node"
    return subprocess.run(
        [sys.executable, "-m", *launcher, several, str(count), *map(str, command)],
        capture_output=True,
        text=True,
        timeout=600,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
    )


@pytest.fixture(scope="module", params=[2, 3])
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    # 98 rows are split unevenly over three ranks, the scales of most weights over any.
    save(MODELS["llama"](intermediate_size=98), folder, torch.float32)
    done = launch(TORCHRUN, request.param, HERE / "_ranks.py", "sharded", folder)
    assert done.returncode == 0, done.stderr[-4000:]
    reports = [
        json.loads((folder / f"report-{rank}.json").read_text()) for rank in range(request.param)
    ]
    return folder, reports


def test_every_rank_has_its_part_of_the_same_bytes(run):
    _, reports = run
    assert [report["different"] for report in reports] == [[]] * len(reports)
    parts = [report["parts"] for report in reports]
    assert sum(parts) == reports[0]["whole"]
    assert max(parts) < 1.2 * min(parts)


def test_weights_are_gathered_as_bytes(run):
    for report in run[1]:
        assert report["packed"] <= 0.53 * report["elements"]
        # In a step with checkpointing a layer is gathered twice; padding is a few bytes a tensor.
        assert report["whole"] <= report["gathered"] < 2 * 1.02 * report["whole"]


def test_losses_are_those_of_one_process(run):
    losses = run[1][0]["losses"]
    # The first two differ by the order of sums; then by 8-bit blocks, which begin elsewhere.
    for (split, whole), tolerance in zip(losses, (1e-6, 1e-5, 1e-4), strict=True):
        assert split == pytest.approx(whole, rel=tolerance)
    assert losses[-1][1] < losses[0][1]


def test_the_size_of_the_whole_parameter_decides_its_bits(run):
    for report in run[1]:
        assert report["bits"] == report["whole_bits"]
        assert set(report["bits"]) == {"torch.uint8", "torch.float32"}


def test_a_state_of_several_ranks_is_read_by_one(run):
    folder, reports = run
    assert all(report["kept"] for report in reports)
    model = reference(folder, torch.device("cpu"))
    optimizer = optimizer_of(model)
    qn.optim.load_distributed(optimizer, folder / "shards")
    expected = torch.load(folder / "whole.pt", weights_only=True, map_location="cpu")["state"]
    for state, other in zip(optimizer.state.values(), expected.values(), strict=True):
        assert state["step"] == other["step"] == 3
        assert state.keys() == other.keys()
        for name in ("exp_avg", "exp_avg_sq"):
            assert state[name].dtype == other[name].dtype
            values, theirs = (
                decode(s[name], s[name + "_absmax"], name)
                if s[name].dtype == torch.uint8
                else s[name]
                for s in (state, other)
            )
            # Blocks of a rank's part are not those of the whole: each rounds by its own scales.
            tolerance = 0.1 if state[name].dtype == torch.uint8 else 2e-2
            assert (values - theirs).norm() <= tolerance * theirs.norm()
    before = [p.detach().clone() for p in optimizer.param_groups[0]["params"]]
    ids = torch.arange(3, 15)[None]
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    after = optimizer.param_groups[0]["params"]
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_every_rank_can_write_the_whole_adapter(run):
    folder, reports = run
    peft = pytest.importorskip("peft")
    from transformers import AutoModelForCausalLM

    files = [
        (folder / f"adapter-{rank}" / "adapter_model.safetensors").read_bytes()
        for rank in range(len(reports))
    ]
    assert len(set(files)) == 1
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model = peft.PeftModel.from_pretrained(base, folder / "adapter-0")
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_the_others_notice_a_rank_that_was_killed(tmp_path):
    done = launch(TORCHRUN, 2, HERE / "_ranks.py", "lost", tmp_path)
    assert done.returncode != 0
    assert "RankLostError: rank 0 of 2 lost another one" in done.stderr or "SIGTERM" in done.stderr
    assert is_lost(RuntimeError("[gloo/transport/tcp/pair.cc:5] Connection closed by peer"))
    assert not is_lost(RuntimeError("size mismatch"))


# ---- the command ----


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finetune")
    make_model(folder / "model")
    rows = [{"text": text} for text in sentences(60)]
    return folder, folder / "model", write_jsonl(folder / "data.jsonl", rows)


def command(inputs, name, batch, **changes):
    folder, model, data = inputs
    changes = {"lora_dropout": 0, "max_steps": 4, "save_steps": 2, **changes}
    options = {"per_device_train_batch_size": batch, "optim": "paged_adamw8bit", **changes}
    return ["-m", "qlora_native", *finetune_arguments(model, data, folder / name, **options)]


def report_of(inputs, name):
    return json.loads((inputs[0] / name / "report.json").read_text())


def test_finetune_is_the_same_on_one_rank_and_on_several(inputs):
    alone = subprocess.run(
        [sys.executable, *map(str, command(inputs, "one", 4))], capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr[-3000:]
    runs = {
        "ddp": launch(TORCHRUN, 2, *command(inputs, "ddp", 2)),
        # accelerate's own switch for FSDP, which the command takes for --fsdp.
        "fsdp": launch(ACCELERATE, 2, *command(inputs, "fsdp", 2), ACCELERATE_USE_FSDP="true"),
    }
    expected = report_of(inputs, "one")
    for name, done in runs.items():
        assert done.returncode == 0, done.stderr[-4000:]
        found = report_of(inputs, name)
        assert found["processes"] == 2
        for key in ("train_loss", "eval_loss"):
            torch.testing.assert_close(
                torch.tensor(found[key]), torch.tensor(expected[key]), rtol=1e-4, atol=0
            )
    folder = inputs[0] / "fsdp"
    assert (folder / "checkpoint-2" / "optimizer_shards").is_dir()
    assert not (inputs[0] / "ddp" / "checkpoint-2" / "optimizer_shards").exists()
    # From the middle, on as many ranks: as if nothing had happened.
    before = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "adapter_model.safetensors").unlink()
    for path in sorted((folder / "checkpoint-4").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    (folder / "checkpoint-4").rmdir()
    done = launch(TORCHRUN, 2, *command(inputs, "fsdp", 2, fsdp=True, resume=True))
    assert done.returncode == 0, done.stderr[-4000:]
    assert report_of(inputs, "fsdp")["resumed_from"] == "checkpoint-2"
    assert (folder / "adapter_model.safetensors").read_bytes() == before


# ---- parts of it ----


@pytest.mark.parametrize("moment", ["exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("count", [1, 256, 700])
def test_codes_are_near_the_values(moment, count):
    generator = torch.Generator().manual_seed(count)
    values = torch.randn(count, generator=generator) * 1e-3
    values = values.square() if moment == "exp_avg_sq" else values
    codes, absmax = encode(values, moment)
    decoded = decode(codes, absmax, moment)
    assert (decoded - values).abs().max() <= 0.02 * values.abs().max()
    zeros, none = encode(torch.zeros(count), moment)
    assert torch.equal(decode(zeros, none, moment), torch.zeros(count))


def test_a_second_moment_above_zero_stays_above_zero():
    values = torch.tensor([1.0, 1e-12, 0.0])
    codes, absmax = encode(values, "exp_avg_sq")
    decoded = decode(codes, absmax, "exp_avg_sq")
    assert decoded[1] > 0
    assert decoded[2] == 0


def test_every_batch_counts_once_and_every_rank_runs_as_many():
    for batches in range(8):
        shares = []
        for rank in range(3):
            place = Ranks.__new__(Ranks)
            place.rank, place.size = rank, 3
            shares.append(list(_share(list(range(batches)), place)))
        assert len({len(share) for share in shares}) == 1
        counted = sorted(batch for share in shares for batch, counts in share if counts)
        assert counted == list(range(batches))
