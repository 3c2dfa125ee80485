"""The command `doctor`: what is built, what is there, and what can be used."""

from __future__ import annotations

import json
from typing import Any

import torch
from rich.table import Table

import qlora_native as qn
from qlora_native.cli.loading import cuda_obstacle
from qlora_native.cli.progress import stdout
from qlora_native.cli.report import versions


def examine() -> dict[str, Any]:
    """Everything `doctor` knows, ready for JSON.

    `problems` lists what keeps the library from working; no GPU is none, since the CPU does all.
    """
    kernels = [
        {
            "op": kernel.op,
            "device": kernel.device,
            "name": kernel.name,
            "usable": kernel.usable,
            "why_not": kernel.why_not,
        }
        for kernel in qn.kernels.list()
    ]
    problems = [
        f"no kernel of {op} is usable on the CPU"
        for op in dict.fromkeys(kernel["op"] for kernel in kernels)
        if not any(k["usable"] for k in kernels if k["op"] == op and k["device"] == "cpu")
    ]
    problems += _self_test()
    return {
        "usable": not problems,
        "problems": problems,
        "versions": versions(),
        "build": qn.build_info(),
        "devices": [
            {
                "device": device.device,
                "name": device.name,
                "features": device.features,
                "memory_bytes": device.memory_bytes,
            }
            for device in qn.list_devices()
        ],
        "cuda": {
            "torch_sees_gpu": torch.cuda.is_available(),
            "library_sees_gpu": not qn.cuda_unavailable_reason(),
            "usable": cuda_obstacle() is None,
            "why_not": cuda_obstacle(),
        },
        "paged_memory": [_paged_memory(device.device) for device in qn.list_devices()],
        "kernels": kernels,
    }


def _paged_memory(device: str) -> dict[str, str]:
    """Which backing paged memory has on a device, and why."""
    backing, reason = qn.memory.automatic_backing(device)
    return {"device": device, "backing": backing, "reason": reason}


def _self_test() -> list[str]:
    """Quantizes and multiplies on each usable device, against torch's own arithmetic."""
    problems = []
    for device in ("cpu", *(["cuda"] if cuda_obstacle() is None else [])):
        generator = torch.Generator().manual_seed(0)
        weight = torch.randn(64, 128, generator=generator).to(device)
        x = torch.randn(3, 128, generator=generator).to(device)
        try:
            quantized = qn.quantize_4bit(weight)
            error = (qn.linear_4bit(x, quantized) - x @ quantized.dequantize().T).abs().max().item()
        except Exception as failure:
            problems.append(
                f"a 4-bit product on {device} failed: {type(failure).__name__}: {failure}"
            )
            continue
        if not error < 1e-3:
            problems.append(f"a 4-bit product on {device} is off by {error}")
    return problems


def show(findings: dict[str, Any]) -> None:
    """Prints the findings as tables."""
    facts = Table(title="qlora-native", show_header=False, title_style="bold")
    facts.add_column(style="cyan")
    facts.add_column(overflow="fold")
    for name, value in (findings["versions"] | findings["build"]).items():
        facts.add_row(name, str(value) if value else "none")
    for device in findings["devices"]:
        memory = f"{device['memory_bytes'] / 2**30:.1f} GiB"
        facts.add_row(device["device"], f"{device['name']}, {memory}, {device['features']}")
    for pool in findings["paged_memory"]:
        facts.add_row(f"paged memory of {pool['device']}", f"{pool['backing']}: {pool['reason']}")
    cuda = findings["cuda"]
    facts.add_row("torch sees a GPU", "yes" if cuda["torch_sees_gpu"] else "no")
    facts.add_row("the library sees a GPU", "yes" if cuda["library_sees_gpu"] else "no")
    facts.add_row("--device cuda", "usable" if cuda["usable"] else f"not usable: {cuda['why_not']}")
    stdout.print(facts)
    kernels = Table(title="Kernels, in the order in which they are tried", title_style="bold")
    for column in ("operation", "device", "kernel", "usable"):
        kernels.add_column(column, overflow="fold")
    for kernel in findings["kernels"]:
        usable = "[green]yes" if kernel["usable"] else f"[yellow]no: {kernel['why_not']}"
        kernels.add_row(kernel["op"], kernel["device"], kernel["name"], usable)
    stdout.print(kernels)
    for problem in findings["problems"]:
        stdout.print(f"[red]problem:[/] {problem}")
    stdout.print("[green]Everything works." if findings["usable"] else "[red]Not usable.")


def doctor(as_json: bool) -> bool:
    """Prints the findings; returns whether the library is usable."""
    findings = examine()
    if as_json:
        print(json.dumps(findings, indent=2))
    else:
        show(findings)
    return findings["usable"]
