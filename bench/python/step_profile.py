"""Where the device time of training steps goes, from torch.profiler.

A kernel belongs to the first group that fits its name, the operation that launched it, or a size of
that operation's arguments (the adapters' rank and the vocabulary are sizes that nothing else has).
What cannot be told so is approximate: an elementwise pass over an adapter's full-size result counts
as elementwise, and kernels of a replayed graph have their names alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

GROUPS = ("base GEMM", "LoRA", "attention", "elementwise", "loss", "optimizer")

_OPTIMIZER = ("optimizer", "adam", "multi_tensor_apply")
_OUR_OPTIMIZER = ("step_kernel", "prepare_kernel", "sum_kernel", "root_kernel")
_ATTENTION = ("flash", "fmha", "attention", "sdpa")
_LOSS = ("log_softmax", "logsoftmax", "softmaxforward", "softmaxbackward", "nll_loss",
         "cross_entropy")  # fmt: skip
_PRODUCTS = ("gemm", "gemv", "nvjet", "cutlass", "xmma", "splitk", "::mm", "addmm", "::bmm",
             "matmul", "linear", "dequantize")  # fmt: skip
_LOOKUPS = ("embedding", "index_select")

Launch = tuple[str, str, list[Any]]
"""The kernel's name, that of the operation that launched it, and the sizes of its arguments."""


def group_of(launch: Launch, r: int, vocab: int) -> str:
    """Return the group of a kernel, for adapters of rank r and a vocabulary of that size."""
    kernel, op, shapes = launch
    names = f"{kernel} {op}".lower().replace("qlora_native", "")
    sizes = _sizes(shapes)
    words = _OPTIMIZER + (_OUR_OPTIMIZER if "qlora_native" in kernel else ())
    if any(word in names for word in words):
        return "optimizer"
    if any(word in names for word in _ATTENTION):
        return "attention"
    if any(word in names for word in _LOOKUPS):
        return "elementwise"
    if vocab in sizes or any(word in names for word in _LOSS):
        return "loss"
    if r in sizes or "lora" in names:
        return "LoRA"
    return "base GEMM" if any(word in names for word in _PRODUCTS) else "elementwise"


def _sizes(shapes: Any) -> set[int]:
    if isinstance(shapes, int):
        return {shapes}
    if isinstance(shapes, (list, tuple)):
        return set().union(*(_sizes(part) for part in shapes))
    return set()


def profile(
    step: Callable[[], object], steps: int, device: torch.device, r: int, vocab: int
) -> dict[str, Any]:
    """Profile `steps` steps; return milliseconds by group, and counts, of one step."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities, record_shapes=True) as session:
        for _ in range(steps):
            step()
        if device.type == "cuda":
            torch.cuda.synchronize()
    if device.type == "cpu":
        return _of_cpu(session.key_averages(group_by_input_shape=True), steps, r, vocab)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        session.export_chrome_trace(str(file))
        return of_trace(json.loads(file.read_text())["traceEvents"], steps, r, vocab)


def _of_cpu(averages: Iterable[Any], steps: int, r: int, vocab: int) -> dict[str, Any]:
    """The time of torch's operations; what runs outside of them, as our products, is not seen."""
    groups = dict.fromkeys(GROUPS, 0.0)
    for entry in averages:
        group = group_of(("", entry.key, entry.input_shapes), r, vocab)
        groups[group] += entry.self_cpu_time_total / 1e3 / steps
    return {"groups_ms": groups, "busy_ms": sum(groups.values()), "launches": None, "kernels": None}


def of_trace(events: Iterable[dict[str, Any]], steps: int, r: int, vocab: int) -> dict[str, Any]:
    """Sum up a Chrome trace of `steps` steps on one GPU.

    Returns:
        groups_ms: device time by group, of one step.
        busy_ms: time in which anything ran, of one step.
        kernels: kernels, copies and fills of one step.
        launches: calls of the driver or the runtime that started work, of one step.
        top: the names of the kernels that took most, with their milliseconds.
    """
    events = list(events)
    ops = {
        event["args"]["External id"]: event
        for event in events
        if event.get("cat") == "cpu_op" and "External id" in event.get("args", {})
    }
    groups = dict.fromkeys(GROUPS, 0.0)
    names: dict[str, float] = {}
    spans, kernels, launches = [], 0, 0
    for event in events:
        category = event.get("cat")
        if category in ("cuda_runtime", "cuda_driver"):
            launches += _starts_work(event["name"])
        if category not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        op = ops.get(event.get("args", {}).get("External id"), {"name": ""})
        shapes = op.get("args", {}).get("Input Dims", [])
        milliseconds = event["dur"] / 1e3 / steps
        groups[group_of((event["name"], op["name"], shapes), r, vocab)] += milliseconds
        names[event["name"]] = names.get(event["name"], 0.0) + milliseconds
        spans.append((event["ts"], event["ts"] + event["dur"]))
        kernels += 1
    top = sorted(names.items(), key=lambda item: -item[1])[:8]
    return {
        "groups_ms": groups,
        "busy_ms": _covered(spans) / 1e3 / steps,
        "kernels": round(kernels / steps),
        "launches": round(launches / steps),
        "top": [[name[:120], round(value, 3)] for name, value in top],
    }


def _starts_work(call: str) -> bool:
    return "Launch" in call or "Memcpy" in call or "Memset" in call


def _covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, end = 0.0, float("-inf")
    for begin, until in sorted(spans):
        if until > end:
            total += until - max(begin, end)
            end = until
    return total
