"""qlora_native, bitsandbytes, torchao and a dense weight, side by side in one process.

    python bench/python/peers.py --device cpu
    python bench/python/peers.py --device cuda --json bench/results/machine.json

Rivals that are not installed are left out. Each is checked before it is timed. See bench/README.md
for the method.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

import torch

import accuracy
import records
import report
import verify
from implementations import NAMES, OPS, PRODUCTS, Implementation, Setting, available
from measure import (
    OutputMemory,
    Timing,
    Work,
    copy_tb_per_s,
    graph_node_us,
    time_eagerly,
    time_works,
)

SHAPES = {
    ("cuda", False): ["4096x4096", "14336x4096", "4096x14336", "28672x8192"],
    ("cuda", True): ["4096x4096", "14336x4096"],
    ("cpu", False): ["4096x4096"],
    ("cpu", True): ["1024x1024"],
}
ROWS = {False: [1, 2, 4, 8, 16, 32, 64, 512], True: [1, 4, 16, 64, 512]}
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
L2_MULTIPLE = 4
"""The weights that a GPU work rotates over take more than this many times its L2 cache."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """One row of the table; m is None for ops that have no activations."""

    op: str
    shape: tuple[int, int]
    m: int | None


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What every rival gets: the dense weight, and activations where the op has some."""

    weight: torch.Tensor
    x: torch.Tensor | None = None
    dy: torch.Tensor | None = None


class Bench:
    """Runs problems on one device and collects records."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.device = torch.device(options.device)
        self.dtype = DTYPES[options.dtype]
        setting = Setting(options.quant_type, options.block_size, self.dtype, self.device)
        self.implementations = [
            implementation
            for implementation in available(setting)
            if not options.impl or implementation.name in options.impl
        ]
        memory = OutputMemory()
        self._memory = memory if self.device.type == "cpu" and memory.available else None
        self.modes = OutputMemory.MODES if self._memory else (None,)
        self._mode: str | None = None
        self.use(self.modes[0])
        self.ceilings = {"copy_tb_per_s": copy_tb_per_s(self.device)}
        if self.device.type == "cuda":
            self.ceilings["graph_node_us"] = graph_node_us()
        self.records: list[dict[str, Any]] = []

    def use(self, mode: str | None) -> None:
        """From now on, take the memory of outputs by `mode`."""
        self._mode = mode
        if self._memory and mode:
            self._memory.use(mode)

    def run(self, shape: tuple[int, int]) -> None:
        """Measure every operation on a weight of this shape."""
        n, k = shape
        generator = torch.Generator(self.device).manual_seed(n * 31 + k)
        weight = (
            torch.randn(n, k, device=self.device, generator=generator).mul_(0.02).to(self.dtype)
        )
        held = {impl.name: impl.quantize(weight) for impl in self.implementations}
        for impl in self.implementations:
            if "dequantize" in impl.ops:
                verify.check_dequantized(
                    impl.name,
                    weight,
                    impl.dequantize(held[impl.name]),
                    self.options.quant_type,
                    self.options.block_size,
                )
        for op in self.options.ops:
            if op not in PRODUCTS:
                self._run_problem(Problem(op, shape, None), Inputs(weight), held)
                continue
            for m in self.options.m:
                x, dy = (
                    torch.randn(m, size, device=self.device, generator=generator).to(self.dtype)
                    for size in (k, n)
                )
                self._run_problem(Problem(op, shape, m), Inputs(weight, x, dy), held)

    def _run_problem(self, problem: Problem, inputs: Inputs, held: dict[str, Any]) -> None:
        rivals = [impl for impl in self.implementations if problem.op in impl.ops]
        works: dict[str, Work] = {}
        extra: dict[str, dict[str, Any]] = {}
        for impl in rivals:
            quantized = held[impl.name]
            extra[impl.name] = found = {"weight_bytes": impl.nbytes(quantized)}
            if inputs.x is not None and inputs.dy is not None:
                verify.check_linear(impl, inputs.x, inputs.dy, quantized)
                error, plain = accuracy.errors(problem.op, impl, inputs.x, inputs.dy, quantized)
                found["relative_error"] = float(f"{error:.4g}")
                found["relative_error_dequantized"] = float(f"{plain:.4g}")
            kernel = impl.kernel(problem.op, problem.shape, problem.m)
            if kernel:
                found["kernel"] = kernel
            works[impl.name] = self._work(problem, impl, inputs, quantized)
        timings = time_works(works, self.device, self.options.rounds, self.options.budget)
        if self.device.type == "cuda":
            eager_rounds = max(5, self.options.rounds // 4)
            for name, timing in time_eagerly(works, eager_rounds, self.options.budget).items():
                extra[name]["eager_us"] = round(timing.median_us, 3)
                extra[name]["eager_quartiles_us"] = [round(us, 3) for us in timing.quartiles_us]
        for impl in rivals:
            self._record(problem, impl, timings[impl.name], extra[impl.name])

    def _work(self, problem: Problem, impl: Implementation, inputs: Inputs, quantized: Any) -> Work:
        capturable = problem.op not in impl.eager_ops
        if problem.op == "quantize":
            weight = inputs.weight
            weights = [weight, *(weight.clone() for _ in range(self._copies(weight.nbytes) - 1))]
            calls = [lambda w=w: impl.result(impl.quantize(w)) for w in weights]
            return Work(calls, capturable)
        copies = self._copies(impl.nbytes(quantized))
        rotation = [quantized, *(impl.clone(quantized) for _ in range(copies - 1))]
        if problem.op == "dequantize":
            return Work([lambda q=q: impl.dequantize(q) for q in rotation], capturable)
        if problem.op == "linear":
            return Work([lambda q=q: impl.linear(inputs.x, q) for q in rotation], capturable)

        def forward_and_dx(q: Any) -> torch.Tensor:
            leaf = inputs.x.detach().requires_grad_()
            return torch.autograd.grad(impl.linear(leaf, q), leaf, inputs.dy)[0]

        return Work([lambda q=q: forward_and_dx(q) for q in rotation], capturable)

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

    def _record(
        self, problem: Problem, impl: Implementation, timing: Timing, extra: dict[str, Any]
    ) -> None:
        moved = self._bytes(problem, extra["weight_bytes"])
        tb_per_s = moved / timing.median_us / 1e6
        record: dict[str, Any] = {
            "op": problem.op,
            "shape": list(problem.shape),
            "m": problem.m,
            "dtype": self.options.dtype,
            "quant_type": self.options.quant_type,
            "block_size": self.options.block_size,
            "impl": impl.name,
            "median_us": round(timing.median_us, 3),
            "quartiles_us": [round(value, 3) for value in timing.quartiles_us],
            "rounds": timing.rounds,
            "method": timing.method,
            "bytes": moved,
            "tb_per_s": round(tb_per_s, 6),
            "fraction_of_copy": round(tb_per_s / self.ceilings["copy_tb_per_s"], 4),
            **extra,
        }
        if problem.m is not None:
            n, k = problem.shape
            products = 2 if problem.op == "linear_backward" else 1
            flops = 2 * products * problem.m * n * k
            record["tflop_per_s"] = round(flops / timing.median_us / 1e6, 3)
            weight_rate = products * extra["weight_bytes"] / timing.median_us / 1e6
            record["weight_tb_per_s"] = round(weight_rate, 6)
        if self._mode is not None:
            record["memory"] = self._mode
        self.records.append(record)


def parse_shape(text: str) -> tuple[int, int]:
    rows, _, cols = text.partition("x")
    if not (rows.isdigit() and cols.isdigit()):
        raise argparse.ArgumentTypeError(f"{text!r} is not a shape like 4096x14336")
    return int(rows), int(cols)


def parse_rows(text: str) -> int:
    if not (text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number of rows")
    return int(text)


def _best_device() -> str:
    import qlora_native

    has_cuda = torch.cuda.is_available() and not qlora_native.cuda_unavailable_reason()
    return "cuda" if has_cuda else "cpu"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    add = parser.add_argument
    add("--device", help="cpu, cuda or cuda:1 (default: cuda where there is one)")
    add("--quick", action="store_true", help="fewer shapes, rows of activations and rounds")
    add("--shapes", nargs="+", type=parse_shape, metavar="NxK")
    add("--m", nargs="+", type=parse_rows, help="rows of activations", metavar="M")
    add("--ops", nargs="+", choices=OPS, default=list(OPS))
    add("--impl", nargs="+", choices=NAMES)
    add("--dtype", choices=DTYPES, default="bf16")
    add("--quant-type", choices=["nf4", "fp4", "int4"], default="nf4")
    add("--block-size", type=int, default=64)
    add("--threads", type=int, help="CPU threads (default: torch's)")
    add("--rounds", type=int, help="most rounds (default: 100, quick 30)")
    add("--budget", type=float, help="seconds a problem (default: 5, quick 2)")
    add("--json", type=Path, metavar="FILE", help="write the records here")
    add("--save", action="store_true", help="write them to bench/results/<machine>.json")
    options = parser.parse_args(arguments)
    options.device = options.device or _best_device()
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
    options.m = options.m or ROWS[options.quick]
    options.rounds = options.rounds or (30 if options.quick else 100)
    options.budget = options.budget or (2.0 if options.quick else 5.0)
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.device.startswith("cuda"):
        torch.cuda.set_device(torch.device(options.device).index or 0)
    bench = Bench(options)
    head = report.machine(bench.device, bench.ceilings)
    print("\n".join(report.head_lines(head)), flush=True)
    targets = [options.json] if options.json else []
    if options.save:
        targets.append(records.RESULTS / f"{report.slug(head)}.json")
    for mode in bench.modes:
        bench.use(mode)
        for shape in options.shapes:
            done = len(bench.records)
            bench.run(shape)
            print("\n" + report.tables(bench.records[done:]), flush=True)
            # After every shape: a run that is cut short keeps what it has measured.
            for target in targets:
                report.write_json(target, {**head, "records": bench.records})
    for target in targets:
        print(f"\nwrote {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
