"""qlora_native, bitsandbytes and a dense weight, side by side in one process.

    python bench/python/compare.py --device cpu
    python bench/python/compare.py --device cuda --json bench/results/machine.json

Every rival is checked before it is timed. See bench/README.md for the method.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import report
import verify
from implementations import Implementation, available
from measure import OutputMemory, Timing, Work, copy_tb_per_s, time_works

OPS = ("quantize", "dequantize", "linear", "linear_backward")
SHAPES = {
    ("cuda", False): ["4096x4096", "14336x4096", "4096x14336", "28672x8192"],
    ("cuda", True): ["4096x4096", "14336x4096"],
    ("cpu", False): ["4096x4096"],
    ("cpu", True): ["1024x1024"],
}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
L2_MULTIPLE = 4
"""The weights that a GPU work rotates over take more than this many times its L2 cache."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One row of the table; m is None for ops that have no activations."""

    op: str
    shape: tuple[int, int]
    m: int | None


class Bench:
    """Runs problems on one device and collects records."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.dtype = DTYPES[options.dtype]
        self.implementations = [
            implementation
            for implementation in available(options.quant_type, options.block_size)
            if not options.impl or implementation.name in options.impl
        ]
        memory = OutputMemory()
        self._memory = memory if self.device.type == "cpu" and memory.available else None
        self.modes = OutputMemory.MODES if self._memory else (None,)
        self._mode: str | None = None
        self.use(self.modes[0])
        self.copy_tb_per_s = copy_tb_per_s(self.device)
        self.records: list[dict[str, Any]] = []

    def use(self, mode: str | None) -> None:
        """From now on, take the memory of outputs by `mode`."""
        self._mode = mode
        if self._memory and mode:
            self._memory.use(mode)

    def run(self, shape: tuple[int, int]) -> None:
        n, k = shape
        generator = torch.Generator(self.device).manual_seed(n * 31 + k)
        weight = (
            torch.randn(n, k, device=self.device, generator=generator).mul_(0.02).to(self.dtype)
        )
        held = {impl.name: impl.quantize(weight) for impl in self.implementations}
        for impl in self.implementations:
            if impl.quantizes:
                verify.check_dequantized(
                    impl.name,
                    weight,
                    impl.dequantize(held[impl.name]),
                    self.options.quant_type,
                    self.options.block_size,
                )
        for op in self.options.ops:
            for m in self.options.m if op.startswith("linear") else [None]:
                self._run_problem(Problem(op, shape, m), weight, held, generator)

    def _run_problem(
        self,
        problem: Problem,
        weight: torch.Tensor,
        held: dict[str, Any],
        generator: torch.Generator,
    ) -> None:
        x = dy = None
        if problem.m is not None:
            n, k = problem.shape
            x, dy = (
                torch.randn(problem.m, size, device=self.device, generator=generator).to(self.dtype)
                for size in (k, n)
            )
        rivals = [i for i in self.implementations if i.quantizes or problem.m is not None]
        works: dict[str, Work] = {}
        moved: dict[str, int] = {}
        for impl in rivals:
            if x is not None and dy is not None:
                verify.check_linear(impl, x, dy, held[impl.name])
            works[impl.name] = self._work(problem, impl, weight, held[impl.name], x, dy)
            moved[impl.name] = self._bytes(problem, impl.nbytes(held[impl.name]))
        timings = time_works(works, self.device, self.options.rounds, self.options.budget)
        for impl in rivals:
            self._record(problem, impl.name, timings[impl.name], moved[impl.name])

    def _work(
        self,
        problem: Problem,
        impl: Implementation,
        weight: torch.Tensor,
        quantized: Any,
        x: torch.Tensor | None,
        dy: torch.Tensor | None,
    ) -> Work:
        if problem.op == "quantize":
            weights = [weight, *(weight.clone() for _ in range(self._copies(weight.nbytes) - 1))]
            calls = [lambda w=w: impl.result(impl.quantize(w)) for w in weights]
            return Work(calls, impl.quantize_is_capturable)
        copies = self._copies(impl.nbytes(quantized))
        rotation = [quantized, *(impl.clone(quantized) for _ in range(copies - 1))]
        if problem.op == "dequantize":
            return Work([lambda q=q: impl.dequantize(q) for q in rotation])
        if problem.op == "linear":
            return Work([lambda q=q: impl.linear(x, q) for q in rotation])

        def forward_and_dx(q: Any) -> torch.Tensor:
            leaf = x.detach().requires_grad_()
            return torch.autograd.grad(impl.linear(leaf, q), leaf, dy)[0]

        return Work([lambda q=q: forward_and_dx(q) for q in rotation])

    def _copies(self, weight_bytes: int) -> int:
        if self.device.type != "cuda":
            return 1
        l2_bytes = torch.cuda.get_device_properties(self.device).L2_cache_size
        return max(2, math.ceil((L2_MULTIPLE * l2_bytes + 1) / weight_bytes))

    def _bytes(self, problem: Problem, weight_bytes: int) -> int:
        """Return the bytes that the problem has to read and write, each once."""
        n, k = problem.shape
        size = self.dtype.itemsize
        if problem.m is None:
            return weight_bytes + n * k * size
        activations = problem.m * (n + k) * size
        passes = 2 if problem.op == "linear_backward" else 1
        return passes * (weight_bytes + activations)

    def _record(self, problem: Problem, name: str, timing: Timing, moved: int) -> None:
        tb_per_s = moved / timing.median_us / 1e6
        record: dict[str, Any] = {
            "op": problem.op,
            "shape": list(problem.shape),
            "m": problem.m,
            "dtype": self.options.dtype,
            "quant_type": self.options.quant_type,
            "block_size": self.options.block_size,
            "impl": name,
            "median_us": round(timing.median_us, 3),
            "quartiles_us": [round(value, 3) for value in timing.quartiles_us],
            "rounds": timing.rounds,
            "method": timing.method,
            "bytes": moved,
            "tb_per_s": round(tb_per_s, 4),
            "fraction_of_copy": round(tb_per_s / self.copy_tb_per_s, 4),
        }
        if problem.m is not None:
            n, k = problem.shape
            products = 2 if problem.op == "linear_backward" else 1
            flops = 2 * products * problem.m * n * k
            record["tflop_per_s"] = round(flops / timing.median_us / 1e6, 3)
        if self._mode is not None:
            record["memory"] = self._mode
        self.records.append(record)


def parse_shape(text: str) -> tuple[int, int]:
    rows, _, cols = text.partition("x")
    if not (rows.isdigit() and cols.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape like 4096x14336")
    return int(rows), int(cols)


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:1 (default: cpu)")
    parser.add_argument("--quick", action="store_true", help="fewer shapes and rounds")
    parser.add_argument("--shapes", nargs="+", type=parse_shape, metavar="NxK")
    parser.add_argument("--m", nargs="+", type=int, default=[1, 4, 16, 64, 512])
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--impl", nargs="+", choices=["qlora_native", "bitsandbytes", "dense"])
    parser.add_argument("--dtype", choices=DTYPES, default="bf16")
    parser.add_argument("--quant-type", choices=["nf4", "fp4", "int4"], default="nf4")
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--threads", type=int, help="CPU threads (default: torch's)")
    parser.add_argument("--rounds", type=int, help="most rounds (default: 200, quick 50)")
    parser.add_argument("--budget", type=float, help="seconds a problem (default: 10, quick 2)")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the records here")
    options = parser.parse_args(arguments)
    kind = torch.device(options.device).type
    if kind not in ("cpu", "cuda"):
        parser.error(f"--device {options.device}: only cpu and cuda are measured")
    if kind == "cuda" and not torch.cuda.is_available():
        parser.error(f"--device {options.device}: torch sees no CUDA device")
    if options.shapes is None:
        options.shapes = [parse_shape(text) for text in SHAPES[kind, options.quick]]
    for shape in options.shapes:
        if shape[0] * shape[1] % options.block_size:
            parser.error(f"shape {shape} is not a whole number of blocks of {options.block_size}")
    options.rounds = options.rounds or (50 if options.quick else 200)
    options.budget = options.budget or (2.0 if options.quick else 10.0)
    return options


def head_lines(head: dict[str, Any]) -> Iterator[str]:
    yield f"{head['device']}  (commit {head['commit'][:12]}, {head['date']})"
    if "threads" in head:
        yield f"threads: {head['threads']}"
    if head["driver"]:
        yield f"driver: {head['driver']}"
    yield "  ".join(f"{name} {version}" for name, version in head["versions"].items() if version)
    yield f"copy: {head['copy_tb_per_s']:.4f} TB/s, bytes read plus written"


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(options.device).index or 0)
    bench = Bench(options)
    head = report.machine(bench.device, bench.copy_tb_per_s)
    print("\n".join(head_lines(head)), flush=True)
    for mode in bench.modes:
        bench.use(mode)
        for shape in options.shapes:
            done = len(bench.records)
            bench.run(shape)
            print("\n" + report.table(bench.records[done:]), flush=True)
    if options.json:
        report.write_json(options.json, {**head, "records": bench.records})
        print(f"\nwrote {options.json}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
