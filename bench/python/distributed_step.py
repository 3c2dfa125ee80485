"""Training steps on several GPUs: DDP and FSDP2 beside one process, and a 70B model in parts.

    python bench/python/distributed_step.py --device cuda --gpus 2 --cases ddp,fsdp,70b
    python bench/python/distributed_step.py --cases fsdp --layers 32 --checkpointing full
    python bench/python/distributed_step.py --device cpu --shape tiny --gpus 2 --length 32 --steps 2

NF4 with double quantization, LoRA r = 16 on all linear layers but the head, the loss by chunks of
tokens, random weights. Every GPU has --batch sequences of --length tokens; the 70B model has 1 x
1024 and checkpointing, and in "70b-packed" embeddings and head in 4 bits as well. Each run is in
processes of its own, started by torchrun with the caller's environment; a run that takes longer
than --timeout is ended. The split models are made as such: every rank draws a matrix, packs it, and
keeps its part.

Before anything is timed, one process takes the first steps over the batches of all ranks together;
ranks whose losses, or the norm of whose first gradient, are not the same within the noise of bf16
are reported as failed. The 70B model has no such reference: its loss has to fall.

Times are medians of single steps, as in training_step.py, of the slowest rank. GB are 10^9 bytes,
of the GPU that has most; GPUs have to be otherwise idle. In the table

* weights: the parameters that a rank keeps;
* peak: what torch has allocated at most in the timed steps;
* used: what the driver says is in use after them, with the context and NCCL's buffers;
* estimate: what `qlora-native estimate --gpus` says of that;
* gathered: what a rank receives of parameters in a step, and the formula of docs/scaling.md;
* B/param: what a gathered 4-bit parameter takes on the wire;
* gather GB/s: the rate at which a rank receives a layer with nothing beside it.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import distributed_rank
import random_models
import report
from distributed_rank import Run
from qlora_native import QLoRANativeConfig
from qlora_native.hf.optimizers import OPTIMIZERS

CASES = {
    "ddp": ("one", "ddp"),
    "fsdp": ("one", "fsdp"),
    "70b": ("70b",),
    "70b-packed": ("70b-packed",),
}
"""The runs that each needs, in their order."""
DEFAULT_CASES = ("ddp", "fsdp", "70b")

# By the loopback address: the machine's own name may mean nothing on it.
_TORCHRUN = ("torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0",
             "--local-addr", "127.0.0.1")  # fmt: skip
_STEPS_70B = 3
_GRACE_SECONDS = 45
"""torchrun gives its processes 30 before it kills them."""

SCALING, SPLIT_AGAINST_WHOLE, PEAK_70B_GB, WIRE_BYTES = 0.925, 0.9, 25.0, 0.53
"""What we want: of N GPUs with DDP so many times N the tokens of one, and of these so many with
FSDP2; memory of a GPU of two; bytes of a 4-bit parameter."""


def make_run(options: argparse.Namespace, name: str) -> Run:
    """Return a run by its name."""
    is_70b = _is_70b(name)
    shape = options.shape or ("llama-3-70b" if is_70b else "llama-3-8b")
    layers = random_models.SHAPES[shape].layers
    return Run(
        name=name,
        mode="fsdp" if is_70b else name,
        ranks=1 if name == "one" else options.gpus,
        parts=options.gpus,
        device=options.device,
        shape=shape,
        layers=layers if is_70b else min(options.layers, layers),
        batch=1 if is_70b else options.batch,
        length=1024 if is_70b else options.length,
        checkpointing="full" if is_70b else options.checkpointing,
        steps=min(_STEPS_70B, options.steps) if is_70b else options.steps,
        optim=options.optim,
        lora_r=options.lora_r,
        adapter_dtype=options.adapter_dtype,
        timeout=options.timeout,
        packs_vocabulary=name == "70b-packed",
    )


def _is_70b(name: str) -> bool:
    return name.startswith("70b")


def launch(run: Run) -> dict[str, Any]:
    """Start the ranks and wait for them; what failed there is in "error"."""
    record = dataclasses.asdict(run)
    # Unless the caller chose: torchrun would give each rank one thread, and torch all of them.
    environment = {"OMP_NUM_THREADS": str(max((os.cpu_count() or 1) // run.ranks, 1))}
    if not {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys():
        # Both names: the first is that of newer versions of torch.
        for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
            environment[name] = "expandable_segments:True"
    with tempfile.TemporaryDirectory(prefix="distributed-step-") as folder:
        command = [sys.executable, "-m", *_TORCHRUN, "--nproc-per-node", str(run.ranks)]
        command += [distributed_rank.__file__, json.dumps(dataclasses.asdict(run)), folder]
        status, _, errors = _run(command, {**environment, **os.environ}, run.timeout)
        files = sorted(Path(folder).glob("rank-*.json"), key=lambda path: path.stat().st_mtime_ns)
        found = [json.loads(path.read_text()) for path in files]
    # The first that wrote: the others may have failed for want of it.
    if failures := [rank["error"] for rank in found if "error" in rank]:
        return {**record, "error": failures[0]}
    if status != 0 or len(found) != run.ranks:
        return {**record, "error": _failure(run, status, errors)}
    return {**record, **merged(run, found)}


def _failure(run: Run, status: int | None, errors: str) -> str:
    if status is None:
        return f"took longer than {run.timeout} s"
    last = [line for line in errors.splitlines() if line.strip()][-1:]
    return last[0] if last else f"exit status {status}"


def _run(
    command: Sequence[str], environment: dict[str, str], timeout: int
) -> tuple[int | None, str, str]:
    """Return the exit status, None when it took too long, and what it wrote."""
    with subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        try:
            printed, errors = process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            return None, "", ""
        finally:
            if process.poll() is None:
                # torchrun takes its processes with it only if it can.
                process.send_signal(signal.SIGTERM)
                try:
                    process.communicate(timeout=_GRACE_SECONDS)
                except subprocess.TimeoutExpired:
                    process.kill()
    return process.returncode, printed, errors


def merged(run: Run, found: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return one record of all ranks: the slowest one's times, the most of bytes."""
    slowest = max(found, key=lambda rank: rank["median_ms"])
    most = {name: max(rank[name] for rank in found) for name in slowest if name.endswith("_bytes")}
    tokens = run.ranks * run.batch * run.length
    return {
        **slowest,
        **most,
        "tokens_per_s": tokens / slowest["median_ms"] * 1e3,
        "bytes_of_ranks": [{name: rank[name] for name in most if name in rank} for rank in found],
    }


def estimate(run: Run) -> dict[str, int]:
    """Return the bytes that `qlora-native estimate` says a GPU needs at most, by `Run.mode`.

    Raises:
        RuntimeError: it failed, or took longer than the run may.
    """
    with tempfile.TemporaryDirectory(prefix="distributed-step-") as folder:
        config = run.config()
        if run.packs_vocabulary:
            quantization = QLoRANativeConfig(modules_to_not_convert=[], quantize_embeddings=True)
            config.quantization_config = quantization.to_dict()
        config.save_pretrained(folder)
        command = [sys.executable, "-m", "qlora_native", "estimate", folder, "--json"]
        command += ["--gpus", str(run.parts), "--seq", str(run.length), "--batch", str(run.batch)]
        command += ["--lora-r", str(run.lora_r), "--adapter-dtype", run.adapter_dtype]
        command += ["--optim", run.optim]
        command.append("--no-checkpointing" if run.checkpointing == "none" else "--checkpointing")
        # It computes nothing: a context of its own would be counted as memory in use.
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        status, printed, errors = _run(command, environment, run.timeout)
    if status != 0:
        raise RuntimeError(_failure(run, status, errors))
    found = json.loads(printed)["estimates"]
    whole = found["each GPU, DDP"]["total"]
    return {"one": whole, "ddp": whole, "fsdp": found["each GPU, FSDP2"]["total"]}


def goals(options: argparse.Namespace, records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what we want of the runs that there were: the bar, what was found, whether it is met.

    Times and memory have a verdict on GPUs and with the shapes that they are wanted of alone.
    """
    runs = {record["name"]: record for record in records if "error" not in record}
    is_judged = options.device == "cuda" and options.shape is None

    def speed(name: str) -> float:
        return runs[name]["tokens_per_s"]

    found = []
    if {"one", "ddp"} <= runs.keys():
        bar = SCALING * options.gpus
        times = speed("ddp") / speed("one")
        found.append(("DDP, tokens/s of one GPU", f">= {bar:.2f}", times, times >= bar))
    if {"ddp", "fsdp"} <= runs.keys():
        part = speed("fsdp") / speed("ddp")
        met = part >= SPLIT_AGAINST_WHOLE
        found.append(("FSDP2, tokens/s of DDP", f">= {SPLIT_AGAINST_WHOLE}", part, met))
    for name, record in runs.items():
        if _is_70b(name) and "used_bytes" in record:
            size = record["used_bytes"] / 1e9
            met = size < PEAK_70B_GB
            found.append((f"{name}, GB in use on a GPU", f"< {PEAK_70B_GB}", size, met))
    result = [
        {"goal": goal, "bar": bar, "found": value, "met": met if is_judged else None}
        for goal, bar, value, met in found
    ]
    for name, record in runs.items():
        if "wire_bytes_per_parameter" in record:
            size = record["wire_bytes_per_parameter"]
            goal = f"{name}, bytes of a gathered 4-bit parameter"
            met = size <= WIRE_BYTES
            result.append({"goal": goal, "bar": f"<= {WIRE_BYTES}", "found": size, "met": met})
    return result


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return the records as a Markdown table."""
    heads = ["run", "model", "GPUs", "tokens of a GPU", "ms", "tokens/s"]
    heads += ["weights GB", "peak GB", "used GB", "estimate GB"]
    heads += ["gathered GB (formula)", "B/param", "gather GB/s"]
    lines = ["| " + " | ".join(heads) + " |", "|---|---|" + "---:|" * (len(heads) - 2)]
    for r in records:
        checkpointing = ", checkpointing" if r["checkpointing"] == "full" else ""
        cells = [r["name"], f"{r['shape']}, {r['layers']} layers{checkpointing}", str(r["ranks"])]
        cells.append(f"{r['batch']} x {r['length']}")
        if "error" in r:
            cells += [f"failed: {r['error']}"] + [""] * (len(heads) - len(cells) - 1)
        else:
            cells += [f"{r['median_ms']:.1f}", f"{r['tokens_per_s']:,.0f}"]
            cells += [_gb(r.get(f"{name}_bytes")) for name in ("held", "peak", "used", "estimated")]
            if "received_bytes" in r:
                predicted = _gb(r["predicted_received_bytes"])
                cells.append(f"{_gb(r['received_bytes'])} ({predicted})")
                cells.append(f"{r['wire_bytes_per_parameter']:.4f}")
                cells.append(f"{r['gather_bytes_per_s'] / 1e9:.1f}")
            else:
                cells += ["-"] * 3
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def goal_table(found: Sequence[dict[str, Any]]) -> str:
    """Return the goals as a Markdown table."""
    lines = ["| goal | bar | found | met |", "|---|---|---:|---|"]
    words = {True: "yes", False: "**no**", None: "-"}
    for g in found:
        lines.append(f"| {g['goal']} | {g['bar']} | {g['found']:.3f} | {words[g['met']]} |")
    return "\n".join(lines)


def _gb(size: float | None) -> str:
    return "-" if size is None else f"{size / 1e9:.3f}"


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--gpus", type=int, default=2, help="ranks, on a CPU as well")
    parser.add_argument("--cases", default=",".join(DEFAULT_CASES), help=", ".join(CASES))
    parser.add_argument("--shape", choices=random_models.SHAPES, help="of all runs")
    parser.add_argument("--layers", type=int, default=8, help="of all runs but 70b")
    parser.add_argument("--batch", type=int, default=4, help="of a GPU, of all runs but 70b")
    parser.add_argument("--length", type=int, default=2048, help="of all runs but 70b")
    parser.add_argument(
        "--checkpointing", choices=("none", "full"), default="none", help="of all runs but 70b"
    )
    parser.add_argument("--steps", type=int, default=8, help=f"70b has {_STEPS_70B} at most")
    parser.add_argument("--optim", choices=OPTIMIZERS, default="paged_adamw")
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--adapter-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--timeout", type=int, default=180, help="seconds of one run")
    parser.add_argument("--json", type=Path, help="where to write the records")
    options = parser.parse_args(arguments)
    options.cases = options.cases.split(",")
    if unknown := set(options.cases) - CASES.keys():
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    if options.gpus < 2:
        parser.error(f"--gpus {options.gpus}: must be 2 or more")
    if options.device == "cuda" and torch.cuda.device_count() < options.gpus:
        parser.error(f"--gpus {options.gpus}: there are {torch.cuda.device_count()}")
    return options


def add_estimates(runs: Sequence[Run], records: Sequence[dict[str, Any]]) -> None:
    """Put what is predicted into the records; where that fails, why.

    After all runs, since it takes the CPU of them.
    """

    def key(name: str) -> str:
        return name if _is_70b(name) else ""

    # One for all runs but those of the 70B model.
    by_key = {key(run.name): run for run in runs}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        estimates = {name: pool.submit(estimate, run) for name, run in by_key.items()}
    for record in records:
        try:
            record["estimated_bytes"] = estimates[key(record["name"])].result()[record["mode"]]
        except RuntimeError as error:
            record["estimate_error"] = str(error)
            print(f"no estimate of {record['name']}: {error}", file=sys.stderr)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    head = report.machine(torch.device(options.device), {})
    names = dict.fromkeys(name for case in options.cases for name in CASES[case])
    runs = [make_run(options, name) for name in names]
    records: list[dict[str, Any]] = []
    wanted: list[dict[str, Any]] = []

    def write() -> None:
        wanted[:] = goals(options, records)
        if options.json:
            report.write_json(options.json, {**head, "records": records, "goals": wanted})

    expected: dict[str, Any] | None = None
    for run in runs:
        needs_reference = run.mode != "one" and not _is_70b(run.name)
        if needs_reference and expected is None:
            record = {**dataclasses.asdict(run), "error": "there is nothing to compare with"}
        else:
            record = launch(dataclasses.replace(run, expected=expected) if needs_reference else run)
        if run.mode == "one" and "error" not in record:
            expected = {name: record[name] for name in ("losses", "gradient_norm")}
        records.append(record)
        print(table([record]).splitlines()[-1], file=sys.stderr, flush=True)
        write()
    add_estimates(runs, records)
    write()
    print(table(records), goal_table(wanted), sep="\n\n")
    is_good = not any({"error", "estimate_error"} & record.keys() for record in records)
    return 0 if is_good and not any(goal["met"] is False for goal in wanted) else 1


if __name__ == "__main__":
    sys.exit(main())
