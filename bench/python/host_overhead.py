"""Host time of one eager call, us: what Python, the library and the launch take of the CPU.

    python bench/python/host_overhead.py --device cuda
    python bench/python/host_overhead.py --device cpu

A call returns when its kernel is queued. On a GPU the calls of a batch fill no queue, and the wait
for the device at the batch's end is not counted. On a CPU the kernel runs within the call: a tiny
weight leaves little but the glue. The figure is the median over batches; the least is beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

import qlora_native as qn

SHAPES = {"cpu": "64x256", "cuda": "4096x4096"}
BATCHES = 40
CALLS = 200
"""Fewer than a GPU's queue holds (1024 launches)."""

CHAIN = 16
"""Layers of a step with adapters."""


def host_us(call: Callable[[], object], device: str, batches: int = BATCHES) -> dict[str, float]:
    """Time one call: the median and the least over the batches, in us."""
    samples = []
    for batch in range(batches + 3):
        start = time.perf_counter_ns()
        for _ in range(CALLS):
            call()
        elapsed = time.perf_counter_ns() - start
        if device == "cuda":
            torch.cuda.synchronize()
        if batch >= 3:  # The first ones load kernels and fill caches.
            samples.append(elapsed / CALLS / 1000)
    return {"median_us": statistics.median(samples), "least_us": min(samples)}


def empty_like_the_output(rows: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """Return the allocation that every product makes."""
    return lambda: torch.empty_strided((1, rows), (rows, 1), dtype=dtype, device=device)


def bitsandbytes_calls(w: torch.Tensor, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return bitsandbytes' calls of the same kind; none when it is not installed."""
    try:
        import bitsandbytes as bnb
        import bitsandbytes.functional as bnb_functional
    except ImportError:
        return {}
    packed, state = bnb_functional.quantize_4bit(
        w, blocksize=64, compress_statistics=True, quant_type="nf4"
    )
    layer = bnb.nn.Linear4bit(w.shape[1], w.shape[0], bias=False, compute_dtype=w.dtype)
    layer.weight = bnb.nn.Params4bit(w.cpu(), requires_grad=False, quant_type="nf4")
    layer = layer.to(w.device)
    return {
        "bitsandbytes matmul_4bit": lambda: bnb.matmul_4bit(x, packed.t(), quant_state=state),
        "bitsandbytes nn.Linear4bit": lambda: layer(x),
        "bitsandbytes dequantize_4bit": lambda: bnb_functional.dequantize_4bit(packed, state),
    }


def inference_calls(w: torch.Tensor, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return what is timed under inference_mode."""
    q = qn.quantize_4bit(w)
    layer = qn.nn.Linear4bit.from_quantized(q)
    adapted = qn.nn.LoraLinear(qn.nn.Linear4bit.from_quantized(q))
    adapted.add_adapter("default", qn.nn.LoraSettings(r=16), dtype=w.dtype)
    adapted.set_adapter("default")
    parts = (
        q.packed, q.absmax, q.absmax2, q.offset, q.shape, q.block_size, q.quant_type, q.codebook
    )  # fmt: skip
    return {
        "torch.empty_strided": empty_like_the_output(w.shape[0], w.dtype, w.device.type),
        "torch linear, dense": lambda: torch.nn.functional.linear(x, w),
        "linear_4bit": lambda: qn.linear_4bit(x, q),
        "nn.Linear4bit": lambda: layer(x),
        "nn.LoraLinear": lambda: adapted(x),
        "dequantize_4bit": lambda: qn.dequantize_4bit(q),
        "operator linear_4bit": lambda: torch.ops.qlora_native.linear_4bit(x, None, *parts),
        **bitsandbytes_calls(w, x),
    }


def training_calls(w: torch.Tensor, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return what is timed with gradients."""
    q = qn.quantize_4bit(w)
    leaf = x.detach().clone().requires_grad_()
    dy = torch.ones(*x.shape[:-1], w.shape[0], dtype=x.dtype, device=x.device)
    linear = torch.nn.functional.linear
    return {
        "torch linear, dense, forward": lambda: linear(leaf, w),
        "torch linear, dense, and backward": lambda: torch.autograd.grad(linear(leaf, w), leaf, dy),
        "linear_4bit forward": lambda: qn.linear_4bit(leaf, q),
        "linear_4bit forward and backward": lambda: torch.autograd.grad(
            qn.linear_4bit(leaf, q), leaf, dy
        ),
    }


def adapted_calls(w: torch.Tensor, x: torch.Tensor) -> dict[str, Callable[[], object]]:
    """Return steps over CHAIN layers with fp32 adapters of rank 16, forward and backward.

    A backward pass begins once for many layers, so a chain of them shows what one costs. Beside
    ours: the same products as calls of torch, over the decoded weight, alone and under autograd.
    """
    features = w.shape[1]
    weights = [qn.quantize_4bit(torch.randn_like(w[:1]).expand(features, -1)) for _ in range(CHAIN)]
    dense = [q.dequantize() for q in weights]
    modules = []
    for q in weights:
        module = qn.nn.LoraLinear(qn.nn.Linear4bit.from_quantized(q))
        module.add_adapter("default", qn.nn.LoraSettings(r=16, alpha=32))
        module.set_adapter("default")
        modules.append(module)
    adapters = [(m.lora_A["default"].weight, m.lora_B["default"].weight) for m in modules]
    x = x.reshape(1, -1, features)
    leaf = x.detach().clone().requires_grad_()
    leaves = [leaf, *(factor for pair in adapters for factor in pair)]
    dy = torch.ones_like(x)

    def gradients(layer: Callable[[int, torch.Tensor], torch.Tensor]) -> object:
        h = leaf
        for i in range(CHAIN):
            h = layer(i, h)
        return torch.autograd.grad(h, leaves, dy)

    def torch_layer(i: int, h: torch.Tensor) -> torch.Tensor:
        a, b = (factor.to(h.dtype) for factor in adapters[i])
        linear = torch.nn.functional.linear
        return linear(h, dense[i]) + linear(linear(h, a), b) * 2.0

    return {
        "torch calls, adapted": torch.no_grad()(lambda: torch_step(x, dy, dense, adapters)),
        "torch autograd, adapted": lambda: gradients(torch_layer),
        "linear_4bit_lora": lambda: gradients(
            lambda i, h: qn.linear_4bit_lora(h, weights[i], *adapters[i], 2.0)
        ),
        "nn.LoraLinear, forward and backward": lambda: gradients(lambda i, h: modules[i](h)),
    }


def torch_step(
    x: torch.Tensor,
    dy: torch.Tensor,
    dense: list[torch.Tensor],
    adapters: list[tuple[torch.Tensor, torch.Tensor]],
) -> torch.Tensor:
    """Do what a step over layers with adapters takes at least, as calls of torch; return dx."""
    kept = []
    for w, (a, b) in zip(dense, adapters, strict=True):
        rows = x.view(-1, x.shape[-1])
        y = torch.nn.functional.linear(x, w)
        t = torch.nn.functional.linear(rows, a.to(x.dtype))
        y.view(-1, y.shape[-1]).addmm_(t, b.to(x.dtype).t(), alpha=2.0)
        kept.append((rows, t))
        x = y
    for w, (a, b), (rows, t) in zip(*map(reversed, (dense, adapters, kept)), strict=True):
        gradient = dy.view(-1, dy.shape[-1])
        factor = b.to(dy.dtype)
        u = torch.addmm(t, gradient, factor, beta=0, alpha=2.0)
        dx = torch.mm(gradient, w).addmm_(u, a.to(dy.dtype))
        torch.mm(u.t(), rows).to(a.dtype)
        torch.addmm(factor, gradient.t(), t, beta=0, alpha=2.0).to(b.dtype)
        dy = dx.view(dy.shape)
    return dy


def interleaved_us(calls: dict[str, Callable[[], object]], device: str) -> dict[str, dict]:
    """Time calls over a chain of layers in turns, as others may use the machine; us a layer."""
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for batch in range(BATCHES + 3):
        for name, call in calls.items():
            start = time.perf_counter_ns()
            call()
            elapsed = time.perf_counter_ns() - start
            if device == "cuda":
                torch.cuda.synchronize()
            if batch >= 3:
                samples[name].append(elapsed / CHAIN / 1000)
    return {
        name: {"median_us": statistics.median(times), "least_us": min(times)}
        for name, times in samples.items()
    }


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--shape", help="[out]x[in] of the weight; a default for each device")
    parser.add_argument("--m", type=int, default=1, help="rows of the activations")
    parser.add_argument("--batches", type=int, default=BATCHES)
    parser.add_argument("--threads", type=int, help="torch's threads on a CPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = options.device
    rows, cols = map(int, (options.shape or SHAPES[device]).split("x"))
    w = torch.randn(rows, cols, dtype=torch.bfloat16, device=device)
    x = torch.randn(options.m, cols, dtype=torch.bfloat16, device=device)
    results = {}
    with torch.inference_mode():
        for name, call in inference_calls(w, x).items():
            results[name] = host_us(call, device, options.batches)
    for name, call in training_calls(w, x).items():
        results[name] = host_us(call, device, options.batches)
    results |= interleaved_us(adapted_calls(w, x), device)
    if options.json:
        print(json.dumps({"shape": [rows, cols], "m": options.m, "host_us": results}))
        return
    print(f"host time of one call, us: {device}, weight {rows}x{cols}, M = {options.m}, bf16")
    print(f"{'':36}{'median':>9}{'least':>9}")
    for name, result in results.items():
        print(f"{name:36}{result['median_us']:9.2f}{result['least_us']:9.2f}")


if __name__ == "__main__":
    main()
