"""Time of one optimizer step: ours, torch's fused AdamW and bitsandbytes' beside each other.

    python bench/python/optimizers.py --device cuda
    python bench/python/optimizers.py --device cpu --cases lora,full --json

Rivals take turns, step by step, on parameters of their own with the same values; medians. On a GPU
there are two times: of the device, between two events around a step that was queued while the
device was busy (bitsandbytes waits for the device within a step: its launches are in its time), and
eager, the wall time of a step, when steps follow each other without a wait. On a CPU there is the
wall time. "Of copy": the bytes that a step has to move, over the time, relative to a large copy.
Before the clock starts, each rival takes steps whose results are compared with torch's AdamW.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import measure
import qlora_native as qn
import report

_CHECKED_STEPS = 3
_LR = 1e-3
_MAX_NORM = 1.0
_BUSY_CYCLES = 10_000_000  # about five milliseconds, more than the host needs for any step
_EAGER_STEPS = 20

Make = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]


def lora_shapes() -> list[tuple[int, int]]:
    """Adapters of rank 16 on all linears of eight layers of Llama-3 8B: 112 tensors, 10.5 M."""
    linears = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096),
               (14336, 4096), (14336, 4096), (4096, 14336)]  # fmt: skip
    return [shape for n, k in linears for shape in ((16, k), (n, 16))] * 8


CASES: dict[str, list[tuple[int, ...]]] = {
    "lora": lora_shapes(),
    "full": [(1024, 1024)] * 16,
    "large": [(1_666_667,)] * 300,
    "tiny": [(64, 80), (4097,)],
}
DEFAULT_CASES = {"cpu": "lora,full", "cuda": "lora,full,large"}


def rivals(device: str) -> dict[str, Make]:
    """Return what is compared: bitsandbytes when it is installed."""

    def ours(cls: type, **options: Any) -> Make:
        return lambda params: cls(params, lr=_LR, **options)

    makes: dict[str, Make] = {
        "torch fused": ours(torch.optim.AdamW, fused=True),
        "AdamW": ours(qn.optim.AdamW),
        "AdamW, clipping": ours(qn.optim.AdamW, max_norm=_MAX_NORM),
        "AdamW8bit": ours(qn.optim.AdamW8bit),
        "PagedAdamW": ours(qn.optim.PagedAdamW),
        "PagedAdamW8bit": ours(qn.optim.PagedAdamW8bit),
        "Lion": ours(qn.optim.Lion),
    }
    try:
        import bitsandbytes as bnb
    except ImportError:
        return makes
    makes["bitsandbytes AdamW"] = ours(bnb.optim.AdamW)
    makes["bitsandbytes AdamW8bit"] = ours(bnb.optim.AdamW8bit)
    return makes


def bytes_per_element(name: str) -> float:
    """Return what a step has to move for each fp32 parameter."""
    moments = 1 if name == "Lion" else 2
    per_moment = 2 * (1 + 4 / 256) if "8bit" in name else 8
    norm = 4 if "clipping" in name else 0
    return 12 + moments * per_moment + norm


def parameters(shapes: Sequence[tuple[int, ...]], device: str) -> list[torch.nn.Parameter]:
    generator = torch.Generator(device).manual_seed(0)
    params = []
    for shape in shapes:
        params.append(torch.nn.Parameter(torch.randn(shape, generator=generator, device=device)))
        params[-1].grad = torch.randn(shape, generator=generator, device=device) * 0.01
    return params


def verify(name: str, make: Make, shapes: Sequence[tuple[int, ...]], device: str) -> None:
    """Raise unless a few steps of the first tensors go where torch's go.

    AdamW's to a hundredth of a step everywhere; 8-bit ones, whose small moments are coarse, to a
    quarter of the way in the norm; Lion's, which go elsewhere, have to be of size lr where there is
    a gradient.
    """
    few = list(shapes[:4])
    mine, reference = parameters(few, device), parameters(few, device)
    start = [p.detach().clone() for p in mine]
    a, b = make(mine), torch.optim.AdamW(reference, lr=_LR)
    for _ in range(_CHECKED_STEPS):
        a.step()
        if "clipping" in name:
            torch.nn.utils.clip_grad_norm_(reference, _MAX_NORM)
        b.step()
    for p, q, before in zip(mine, reference, start, strict=True):
        if name == "Lion":
            expected = _CHECKED_STEPS * _LR * p.grad.sign().abs()
            error = ((p - before).abs() - expected).abs().max() / _LR
        elif "8bit" in name:
            error = (p - q).norm() / (q - before).norm()
        else:
            error = (p - q).abs().max() / _LR
        allowed = 0.25 if "8bit" in name else 0.01
        if not error <= allowed:
            raise SystemExit(f"{name} is {error:.2e} steps away from torch, more than {allowed}")


def _device_us(step: Callable[[], object]) -> float:
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda._sleep(_BUSY_CYCLES)
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1000


def _wall_us(step: Callable[[], object], steps: int, device: str) -> float:
    start = time.perf_counter_ns()
    for _ in range(steps):
        step()
    if device == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter_ns() - start) / steps / 1000


def time_case(
    shapes: Sequence[tuple[int, ...]], device: str, rounds: int, makes: dict[str, Make]
) -> Iterator[dict[str, Any]]:
    """Yield a record per rival."""
    steps = {name: make(parameters(shapes, device)).step for name, make in makes.items()}
    samples: dict[str, list[float]] = {name: [] for name in steps}
    eager: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):
            step()
    for _ in range(rounds):
        for name, step in steps.items():
            if device == "cuda":
                samples[name].append(_device_us(step))
                eager[name].append(_wall_us(step, _EAGER_STEPS, device))
            else:
                samples[name].append(_wall_us(step, 1, device))
    numel = sum(torch.Size(shape).numel() for shape in shapes)
    for name in steps:
        median = statistics.median(samples[name])
        moved = numel * bytes_per_element(name)
        record = {
            "impl": name,
            "tensors": len(shapes),
            "parameters": numel,
            "median_us": median,
            "least_us": min(samples[name]),
            "rounds": rounds,
            "bytes": moved,
            "tb_per_s": moved / median / 1e6,
        }
        if device == "cuda":
            record["eager_us"] = statistics.median(eager[name])
        yield record


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--cases", help=f"of {', '.join(CASES)}; comma-separated")
    parser.add_argument("--rivals", help="names as in the table, comma-separated; all")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, help="torch's threads on a CPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    options.cases = (options.cases or DEFAULT_CASES[options.device]).split(",")
    unknown = set(options.cases) - CASES.keys()
    if unknown:
        parser.error(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_options(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    makes = rivals(options.device)
    if options.rivals:
        makes = {name: makes[name] for name in options.rivals.split(",")}
    copy = measure.copy_tb_per_s(device)
    head = report.machine(device, {"copy_tb_per_s": copy})
    records = []
    for case in options.cases:
        for name, make in makes.items():
            verify(name, make, CASES[case], options.device)
        for record in time_case(CASES[case], options.device, options.rounds, makes):
            records.append({"case": case, **record, "fraction_of_copy": record["tb_per_s"] / copy})
    if options.json:
        print(json.dumps({**head, "records": records}, indent=1))
        return
    print("\n".join(report.head_lines(head)))
    print(
        f"{'case':8}{'tensors':>8}{'M params':>10}  {'':24}{'us':>11}{'eager us':>11}{'of copy':>9}"
    )
    for r in records:
        eager = f"{r['eager_us']:11.1f}" if "eager_us" in r else f"{'':11}"
        print(
            f"{r['case']:8}{r['tensors']:8}{r['parameters'] / 1e6:10.1f}  {r['impl']:24}"
            f"{r['median_us']:11.1f}{eager}{r['fraction_of_copy']:9.0%}"
        )


if __name__ == "__main__":
    main()
