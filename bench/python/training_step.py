"""Training steps of a Llama with LoRA on all linear layers, beside bitsandbytes and dense bf16.

    python bench/python/training_step.py --device cuda
    python bench/python/training_step.py --device cuda --cases 8x1x512 --contestants "ours graphed"
    python bench/python/training_step.py --device cpu --shape tiny --cases tiny --steps 2

Every contestant runs in a process of its own, on the same random weights, adapters and batch; the
dense one has the weights that the 4 bits stand for. Ours have the loss by chunks of tokens, the
others transformers' own; --loss plain gives it to all. Those called liger have liger-kernel's
norms, rotary embedding and gates, bitsandbytes its loss too. "ours" comes first: a contestant whose
losses in the first steps are not ours within the noise of bf16 is reported as failed, and is not
timed.

Times are medians of single steps (forward, loss, backward, optimizer), between CUDA events that are
recorded while steps are queued one behind the other. Groups are of one step, from the profiler
(step_profile.py says how kernels are sorted); idle is the median step less the time in which
anything ran. Memory is what torch has allocated at most.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import itertools
import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import random_models
import report
import step_profile

_CHECKED_STEPS = 6
_LEARNING_RATE = 2e-3
_PROFILED_STEPS = 2
_LAYERS_COMPILED_WHOLE = 8

_RELATIVE_TOLERANCE = 2e-3
"""Of the first loss: bf16 rounds by 4e-3, and a mean over a batch has less of it."""

_TOLERANCE_AFTER_STEPS = 1e-2
"""Of later ones: AdamW's first steps have the size of the learning rate whatever the gradient, so
the noise of a small one is a whole step."""

_NOISE = 1e-4
"""Of the first loss: what is left for a batch learned by heart is the rounding of logits."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What a step is of."""

    layers: int
    batch: int
    length: int
    checkpointing: bool


CASES = {
    "8x4x2048": Case(8, 4, 2048, False),
    "8x4x2048-ckpt": Case(8, 4, 2048, True),
    "8x1x512": Case(8, 1, 512, False),
    "32x4x2048-ckpt": Case(32, 4, 2048, True),
    "tiny": Case(2, 2, 48, False),
    "tiny-ckpt": Case(2, 2, 48, True),
}
DEFAULT_CASES = ("8x4x2048", "8x4x2048-ckpt", "8x1x512", "32x4x2048-ckpt")

# The format of the weights, whose adapters they carry, and how the step runs.
CONTESTANTS = {
    "ours": ("ours", "native", "eager"),
    "ours compiled": ("ours", "native", "compiled"),
    "ours graphed": ("ours", "native", "graphed"),
    "ours liger": ("ours", "native", "liger"),
    "ours under PEFT": ("ours", "peft", "eager"),
    "bitsandbytes": ("bitsandbytes", "peft", "eager"),
    "bitsandbytes compiled": ("bitsandbytes", "peft", "compiled"),
    "bitsandbytes liger": ("bitsandbytes", "peft", "liger"),
    "bf16": ("dense", "peft", "eager"),
    "bf16 compiled": ("dense", "peft", "compiled"),
}
REFERENCE = "ours"

_PASSED_ON = ("device", "shape", "steps", "lora_r", "adapter_dtype", "loss", "compile_scope")
"""Options that a contestant's process gets, besides its case."""


class LossMismatchError(RuntimeError):
    """A contestant does not compute what the reference does."""


def check_losses(
    found: Sequence[float], expected: Sequence[float], reference: str = REFERENCE
) -> None:
    """Raise LossMismatchError unless losses agree but for the noise of bf16."""
    for step, (mine, theirs) in enumerate(zip(found, expected, strict=True)):
        allowed = (_TOLERANCE_AFTER_STEPS if step else _RELATIVE_TOLERANCE) * abs(theirs)
        allowed = max(allowed, _NOISE * abs(expected[0]))
        if not abs(mine - theirs) <= allowed:
            raise LossMismatchError(
                f"the loss of step {step} is {mine:.4f} and {theirs:.4f} for {reference}, "
                f"more than {allowed:.4f} apart"
            )


def make_model(options: argparse.Namespace, case: Case, contestant: str) -> nn.Module:
    """Return the contestant's model, ready to train."""
    weights, adapters, mode = CONTESTANTS[contestant]
    shape = dataclasses.replace(random_models.SHAPES[options.shape], layers=case.layers)
    device = torch.device(options.device)
    config = shape.config(positions=max(case.length, 4096))
    model = random_models.build(config, getattr(random_models, weights), device)
    # PEFT's sign of which layers to expect.
    model.is_loaded_in_4bit = weights == "bitsandbytes"
    dtype = getattr(torch, options.adapter_dtype)
    if adapters == "native":
        random_models.add_native_adapters(model, options.lora_r, dtype)
        if options.share_inputs:
            from qlora_native.nn import share_inputs

            share_inputs(model)
    else:
        random_models.add_peft_adapters(model, options.lora_r, dtype)
    model.train()
    if case.checkpointing:
        # Nothing is random in a step, and a graph cannot hold the state of a generator.
        model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    asked = ("liger",) if weights == "ours" else ("liger", "chunked")
    has_liger_loss = mode == "liger" and options.loss in asked
    if mode == "liger":
        from qlora_native.hf.liger import use_liger_kernels

        use_liger_kernels(model, loss=has_liger_loss)
    if weights == "ours" and options.loss != "plain" and not has_liger_loss:
        from qlora_native.training import use_chunked_loss

        use_chunked_loss(model)
    if mode == "compiled":
        scope = options.compile_scope
        if scope == "auto":
            scope = "model" if case.layers <= _LAYERS_COMPILED_WHOLE else "layers"
        for module in [model] if scope == "model" else model.model.layers:
            module.compile()
    return model


def make_optimizer(model: nn.Module, contestant: str, device: str) -> torch.optim.Optimizer:
    """Return the optimizer that goes with the contestant, each with fp32 state."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    weights, _, mode = CONTESTANTS[contestant]
    common = {"lr": _LEARNING_RATE, "weight_decay": 0.0}
    if weights == "ours":
        from qlora_native import optim

        # Paged memory moves, which a captured graph could not repeat.
        cls = optim.AdamW if mode == "graphed" else optim.PagedAdamW
        return cls(parameters, **common)
    if weights == "bitsandbytes" and device == "cuda":
        from bitsandbytes.optim import PagedAdamW32bit

        return PagedAdamW32bit(parameters, **common)
    return torch.optim.AdamW(parameters, fused=True, **common)


def make_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, graphed: bool = False
) -> Callable[[], torch.Tensor]:
    """Return a function that takes a step and returns its loss, on the device."""

    def step(batch: dict[str, torch.Tensor]) -> torch.Tensor:
        ids = batch["input_ids"]
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    if not graphed:
        return lambda: step({"input_ids": ids})
    from qlora_native.training import GraphedStep

    replayed = GraphedStep(step)
    return lambda: replayed({"input_ids": ids})


def step_times_ms(step: Callable[[], object], steps: int, device: str) -> list[float]:
    """Return the time of each of so many steps."""
    if device == "cpu":
        stamps = [time.perf_counter()]
        for _ in range(steps):
            step()
            stamps.append(time.perf_counter())
        return [(b - a) * 1e3 for a, b in itertools.pairwise(stamps)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(steps + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    return [a.elapsed_time(b) for a, b in itertools.pairwise(events)]


def measure(options: argparse.Namespace, case: Case, contestant: str) -> dict[str, Any]:
    """Build, check and time one contestant in this process."""
    on_gpu = options.device == "cuda"
    if on_gpu:
        torch.cuda.set_device(0)
    model = make_model(options, case, contestant)
    shape = random_models.SHAPES[options.shape]
    device = torch.device(options.device)
    ids = random_models.batch(shape.vocab, case.batch, case.length, device)
    graphed = CONTESTANTS[contestant][2] == "graphed"
    step = make_step(model, make_optimizer(model, contestant, options.device), ids, graphed)
    built_bytes = torch.cuda.memory_allocated() if on_gpu else None
    # A graph is recorded among these.
    losses = [step().item() for _ in range(_CHECKED_STEPS)]
    check_losses(losses, options.expected or losses)
    for _ in range(2):
        step()
    if on_gpu:
        torch.cuda.synchronize()
        if not graphed:  # a replay allocates nothing that is counted; its capture did
            torch.cuda.reset_peak_memory_stats()
    times = step_times_ms(step, options.steps, options.device)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    found = step_profile.profile(step, _PROFILED_STEPS, device, options.lora_r, shape.vocab)
    median = statistics.median(times)
    return {
        "losses": losses,
        "median_ms": median,
        "quartiles_ms": statistics.quantiles(times, n=4)[::2] if len(times) > 1 else times * 2,
        "steps": len(times),
        "tokens_per_s": case.batch * case.length / median * 1e3,
        "idle_ms": max(median - found["busy_ms"], 0.0),
        "model_bytes": built_bytes,
        "peak_bytes": peak,
        **found,
    }


def run_child(options: argparse.Namespace, case: str, contestant: str) -> dict[str, Any]:
    """Measure in a fresh process; what failed there is in "error"."""
    command = [sys.executable, __file__, "--child", case, contestant]
    for name in _PASSED_ON:
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    command += ["--share-inputs"] * options.share_inputs
    command += ["--expected", json.dumps(options.expected)]
    record: dict[str, Any] = {"case": case, "contestant": contestant}
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=options.timeout)
    except subprocess.TimeoutExpired:
        return {**record, "error": f"took longer than {options.timeout} s"}
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        return {**record, "error": last[0] if last else f"exit status {done.returncode}"}
    return record | json.loads(done.stdout.splitlines()[-1])


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return the records as a Markdown table."""
    heads = ["case", "contestant", "ms", "tokens/s", *step_profile.GROUPS, "idle", "kernels",
             "launches", "peak GB"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|" + "---|" * len(heads)]
    for r in records:
        cells = [r["case"], r["contestant"]]
        if "error" in r:
            cells += [f"failed: {r['error']}"] + [""] * (len(heads) - 3)
        else:
            cells += [f"{r['median_ms']:.1f}", f"{r['tokens_per_s']:,.0f}"]
            cells += [f"{r['groups_ms'][group]:.1f}" for group in step_profile.GROUPS]
            cells += [f"{r['idle_ms']:.1f}", _or_dash(r["kernels"]), _or_dash(r["launches"])]
            cells += [_or_dash(r["peak_bytes"] and f"{r['peak_bytes'] / 1e9:.2f}")]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _or_dash(value: Any) -> str:
    return "-" if value is None else str(value)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--cases", default=",".join(DEFAULT_CASES), help=", ".join(CASES))
    parser.add_argument("--contestants", help=f"of {', '.join(CONTESTANTS)}; comma-separated")
    parser.add_argument("--shape", choices=random_models.SHAPES, default="llama-3-8b")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--lora-r", type=int, default=16)
    parser.add_argument("--adapter-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--loss",
        choices=("chunked", "liger", "plain"),
        default="chunked",
        help="of ours: by chunks of tokens (liger: but for liger's contestants, which then have "
        "liger-kernel's), or transformers' own, which the others have",
    )
    parser.add_argument(
        "--share-inputs", action="store_true", help="ours: q/k/v and gate/up as groups of layers"
    )
    parser.add_argument(
        "--compile-scope",
        choices=("auto", "model", "layers"),
        default="auto",
        help="the whole model, or each of its layers; auto: the model up to 8 layers",
    )
    parser.add_argument("--timeout", type=int, default=400, help="seconds of one contestant")
    parser.add_argument("--json", type=Path, help="where to write the records")
    parser.add_argument("--expected", type=json.loads, help=argparse.SUPPRESS)
    parser.add_argument("--child", nargs=2, metavar=("CASE", "NAME"), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.cases = options.cases.split(",")
    options.contestants = (options.contestants or ",".join(_runnable(options.device))).split(",")
    for asked, known in ((options.cases, CASES), (options.contestants, CONTESTANTS)):
        if unknown := set(asked) - known.keys():
            parser.error(f"unknown: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    if unrunnable := set(options.contestants) - set(_runnable(options.device)):
        needed = "graphed and liger need --device cuda, and liger liger-kernel"
        parser.error(f"{', '.join(sorted(unrunnable))} cannot run: {needed}")
    return options


def _runnable(device: str) -> list[str]:
    modes = {"eager", "compiled"}
    if device == "cuda":
        modes.add("graphed")
        if importlib.util.find_spec("liger_kernel") is not None:
            modes.add("liger")
    return [name for name, (_, _, mode) in CONTESTANTS.items() if mode in modes]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    if options.child:
        case, contestant = options.child
        print(json.dumps(measure(options, CASES[case], contestant)))
        return 0
    of_steps = {name: getattr(options, name) for name in (*_PASSED_ON, "share_inputs")}
    head = {**report.machine(torch.device(options.device), {}), "options": of_steps}
    records: list[dict[str, Any]] = []
    for case in options.cases:
        options.expected = None
        # The reference runs in any case: the others are compared with it.
        for name in dict.fromkeys([REFERENCE, *options.contestants]):
            record = run_child(options, case, name)
            records.append(record)
            print(table(records).splitlines()[-1], file=sys.stderr, flush=True)
            if options.json:
                report.write_json(options.json, {**head, "records": records})
            if name == REFERENCE:
                options.expected = record.get("losses")
                if options.expected is None or not all(map(math.isfinite, options.expected)):
                    break
    print(table(records))
    return 1 if any("error" in record for record in records) else 0


if __name__ == "__main__":
    sys.exit(main())
