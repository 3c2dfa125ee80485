"""Device memory of one QLoRA step of Llamas from 7B to 70B, under a hard cap.

    python bench/python/headline_memory.py                     # all sizes, on one GPU
    python bench/python/headline_memory.py --sizes llama-65b --json memory.json
    python bench/python/headline_memory.py --device cpu --sizes tiny --length 32

Each size runs in a process of its own: random weights in NF4 with double quantization, LoRA r = 64
on all linear layers but the head, batch 1, sequence 512, gradient checkpointing, AdamW. What keeps
the peak low, and is not what every program does:

* adapters are bf16; their fp32 masters and AdamW's fp32 moments are paged, on the pinned backing,
  in host memory, so that the device sees a staging cache of a fixed size (--staging-mb);
* logits exist for --loss-chunk tokens at a time, and are computed again in the backward pass;
* torch's allocator has expandable segments.

Embeddings and the head are frozen bf16. Gradients stay allocated between the steps, as they do
when they are accumulated over several batches. The cap is the context, the staging cache, and what
torch's allocator may have beside them: beyond it, it raises. The total is what the driver says is
in use after two steps, with what the allocator keeps, so nothing of the process is left out; the
GPU has to be otherwise idle. The estimate is `qlora-native estimate`'s, from the configuration
alone. GB are 10^9 bytes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import qlora_native as qn
import random_models
import report
from qlora_native import footprint, memory, optim
from qlora_native.footprint import Footprint, held
from qlora_native.hf.meta import meta_model
from qlora_native.training import chunked_cross_entropy


@dataclasses.dataclass(frozen=True)
class Goal:
    """Of one size, in GB: the hard cap, what we want to stay under, and what the paper has."""

    cap: float
    bar: float | None = None
    paper: float | None = None


GOALS = {
    "llama-7b": Goal(8.0, 6.2, 6.9),
    "llama-13b": Goal(12.0, 10.2, 11.3),
    "llama-33b": Goal(24.0, 22.5, 24.7),
    "llama-65b": Goal(48.0, 42.0, 45.0),
    "llama-3-70b": Goal(48.0),
    "tiny": Goal(1.0),
}
DEFAULT_SIZES = tuple(size for size in GOALS if size != "tiny")
_STEPS = 2


def chunked_loss(
    head: nn.Module, hidden: torch.Tensor, labels: torch.Tensor, chunk: int
) -> torch.Tensor:
    """Return the mean loss of predicting each next token, with the logits of `chunk` at a time.

    Args:
        hidden: [batch, length, hidden], what the head is applied to.
        labels: [batch, length], the tokens themselves.
    """
    rows = hidden[:, :-1].flatten(0, 1)
    targets = labels[:, 1:].flatten()
    return chunked_cross_entropy(head, head.out_features, rows, targets, chunk_tokens=chunk).mean()


def used_bytes() -> int:
    """Return what is in use on the current GPU, by whomever."""
    free, total = torch.cuda.mem_get_info()
    return total - free


def cap_device_memory(cap_bytes: float, staging_bytes: int) -> int:
    """Let torch's allocator have what the cap leaves; return the bytes of the context."""
    torch.empty(1, device="cuda")
    context = used_bytes() - torch.cuda.memory_reserved()
    _, total = torch.cuda.mem_get_info()
    left = cap_bytes - context - staging_bytes
    if left <= 0:
        raise RuntimeError(
            f"the context ({context / 1e9:.2f} GB) and the staging cache leave nothing of the cap "
            f"of {cap_bytes / 1e9:.2f} GB"
        )
    torch.cuda.set_per_process_memory_fraction(min(left / total, 1.0))
    return context


def measure(options: argparse.Namespace, size: str) -> dict[str, Any]:
    """Build a model and take steps in this process; return its footprint and what else was seen."""
    device = torch.device(options.device)
    on_gpu = device.type == "cuda"
    started = time.perf_counter()
    goal, shape = GOALS[size], random_models.SHAPES[size]
    staging = options.staging_mb * 10**6
    context = cap_device_memory(goal.cap * 1e9, staging) if on_gpu else 0
    model = random_models.build(shape.config(options.length), random_models.ours, device)
    random_models.add_native_adapters(model, options.lora_r, getattr(torch, options.adapter_dtype))
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False, "preserve_rng_state": False})
    pool = memory.PagedPool(device, "pinned", device_budget=staging)
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = optim.PagedAdamW(adapters, lr=1e-4, paged=pool, master_weights=True)
    ids = random_models.batch(shape.vocab, 1, options.length, device)
    built = time.perf_counter()
    if on_gpu:
        built_peak = torch.cuda.max_memory_reserved()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    losses = []
    for _ in range(_STEPS):
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state
        loss = chunked_loss(model.lm_head, hidden, ids, options.loss_chunk)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        del hidden, loss
        if len(losses) < _STEPS:
            optimizer.zero_grad(set_to_none=False)
    if not all(map(math.isfinite, losses)) or len(set(losses)) == 1:
        raise RuntimeError(f"the model does not learn: losses are {losses}")
    parts = held(model, optimizer, [pool])
    found = {
        "losses": losses,
        "bits_per_weight": 8 * parts.weights / _packed_elements(model),
        "lora_parameters": sum(p.numel() for p in adapters),
        "build_s": built - started,
        "steps_s": time.perf_counter() - built,
    }
    if on_gpu:
        parts = on_device(
            parts, pool.stats().device_reserved_bytes,
            peak=torch.cuda.max_memory_allocated(), used=used_bytes(),
        )  # fmt: skip
        found |= {"context_bytes": context, "built_peak_bytes": built_peak}
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
    estimated = estimate(options, size)
    found |= {"estimated_parts": estimated.parts(), "estimated_bytes": estimated.total}
    return {**found, "parts": parts.parts(), "host_bytes": parts.host}


def estimate(options: argparse.Namespace, size: str) -> Footprint:
    """Return what `qlora-native estimate` would say of the same step."""
    config = random_models.SHAPES[size].config(options.length)
    quantization = qn.QLoRANativeConfig(modules_to_not_convert=["lm_head"])
    model = meta_model(config, quantization, torch.bfloat16).train()
    qn.add_lora(model, r=options.lora_r, adapter_dtype=getattr(torch, options.adapter_dtype))
    adapters = [p for p in model.parameters() if p.requires_grad]
    return footprint.estimate(
        model,
        optim.PagedAdamW(adapters, master_weights=True),
        footprint.trace(model, 1, options.length),
        loss_share=min(options.loss_chunk / options.length, 1.0),
        staging=options.staging_mb * 10**6,
    )


def _packed_elements(model: nn.Module) -> int:
    layers = (layer for layer in model.modules() if hasattr(layer, "quantized_weight"))
    return sum(layer.in_features * layer.out_features for layer in layers)


def on_device(tensors: Footprint, staged: int, peak: int, used: int) -> Footprint:
    """Complete what tensors hold by what was seen on the device.

    Args:
        staged: bytes of the staging cache, which is not torch's.
        peak: what torch's allocator had given out at most.
        used: what the driver says is in use.
    """
    return dataclasses.replace(
        tensors, activations=peak - (tensors.total - staged), workspace=used - peak - staged
    )


def run_child(options: argparse.Namespace, size: str) -> dict[str, Any]:
    """Measure in a fresh process; what failed there is in "error"."""
    command = [sys.executable, __file__, "--child", size]
    for name in ("device", "length", "lora_r", "adapter_dtype", "staging_mb", "loss_chunk"):
        command += [f"--{name.replace('_', '-')}", str(getattr(options, name))]
    # Both names: the first is that of newer versions of torch.
    allocator = dict.fromkeys(
        ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"), "expandable_segments:True"
    )
    goal = dataclasses.asdict(GOALS[size])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **allocator})
    if done.returncode:
        last = [line for line in done.stderr.splitlines() if line.strip()][-1:]
        return {"size": size, **goal, "error": last[0] if last else f"exit {done.returncode}"}
    record = {"size": size, **goal, **json.loads(done.stdout.splitlines()[-1])}
    record["total_bytes"] = sum(record["parts"].values())
    bar = record["bar"]
    record["under_bar"] = None if bar is None else record["total_bytes"] < bar * 1e9
    return record


def table(records: Sequence[dict[str, Any]]) -> str:
    """Return the records as a Markdown table, in GB."""
    parts = [field.name for field in dataclasses.fields(Footprint) if field.name != "host"]
    heads = ["size", *parts, "total", "estimate", "bar", "paper", "cap", "on the host", "build s",
             "steps s"]  # fmt: skip
    lines = ["| " + " | ".join(heads) + " |", "|---|" + "---:|" * (len(heads) - 1)]
    for r in records:
        if "error" in r:
            cells = [r["size"], f"failed: {r['error']}"] + [""] * (len(heads) - 2)
        else:
            total = f"{r['total_bytes'] / 1e9:.2f}"
            cells = [r["size"], *(f"{r['parts'][part] / 1e9:.2f}" for part in parts)]
            cells += [f"**{total}**" if r["under_bar"] is not False else f"{total} (too much)"]
            cells += [f"{r['estimated_bytes'] / 1e9:.2f}"]
            cells += ["-" if r[name] is None else f"{r[name]:.1f}" for name in ("bar", "paper")]
            cells += [f"{r['cap']:.0f}", f"{r['host_bytes'] / 1e9:.2f}"]
            cells += [f"{r['build_s']:.1f}", f"{r['steps_s']:.1f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--sizes", default=",".join(DEFAULT_SIZES), help=", ".join(GOALS))
    parser.add_argument("--length", type=int, default=512, help="tokens of the one sequence")
    parser.add_argument("--lora-r", type=int, default=64)
    parser.add_argument("--adapter-dtype", choices=("float32", "bfloat16"), default="bfloat16")
    parser.add_argument("--staging-mb", type=int, default=128, help="10^6 bytes")
    parser.add_argument("--loss-chunk", type=int, default=128, help="tokens")
    parser.add_argument("--json", type=Path, help="where to write the records")
    parser.add_argument("--child", metavar="SIZE", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.sizes = options.sizes.split(",")
    if unknown := set(options.sizes) - GOALS.keys():
        parser.error(f"no size {', '.join(sorted(unknown))}; there are {', '.join(GOALS)}")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse_options(arguments)
    if options.child:
        print(json.dumps(measure(options, options.child)))
        return 0
    records = []
    for size in options.sizes:
        records.append(run_child(options, size))
        print(table(records[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    if options.json:
        settings = {"length": options.length, "lora_r": options.lora_r}
        head = report.machine(torch.device(options.device), {})
        report.write_json(options.json, {**head, **settings, "records": records})
    print(table(records))
    return 1 if any("error" in r or r["under_bar"] is False for r in records) else 0


if __name__ == "__main__":
    sys.exit(main())
