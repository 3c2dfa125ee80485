"""A spike in activations beside optimizer state: what paging it is for.

    python bench/python/spike.py
    python bench/python/spike.py --width 1024 --layers 8 --tokens 64,8192,64

An MLP in fp32 trains on batches of which one is long. Three runs, each in a process of its own:

* spare: AdamW's state on the device, and memory to spare;
* paged: the state on the pinned backing with a staging cache of --staging-mb, under a cap on what
  the process has of the device;
* unpaged: as spare, under that cap.

By default the cap is what parameters, gradients, the staging cache and the activations of the long
batch take, and 15 percent of it: the state, twice the parameters, does not fit beside them. The
paged run must end, with spare's losses bit for bit; the unpaged one must run out of memory. GB are
10^9 bytes.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from qlora_native import memory, optim

_RUNS = ("spare", "paged", "unpaged")
_SLACK = 1.15
_OUT_OF_MEMORY = "out of memory"


def parameter_bytes(options: argparse.Namespace) -> int:
    """Return the bytes of the model's parameters."""
    return options.layers * options.width * (options.width + 1) * 4


def cap_bytes(options: argparse.Namespace) -> int:
    """Return the cap on the allocator of torch and the staging cache together."""
    if options.cap_gb is not None:
        return int(options.cap_gb * 1e9)
    # Of each layer the input of the product and that of the activation; the gradient's few more.
    activations = (2 * options.layers + 4) * max(options.tokens) * options.width * 4
    return int(_SLACK * (2 * parameter_bytes(options) + activations)) + options.staging_mb * 10**6


def model(options: argparse.Namespace) -> nn.Module:
    """Return the MLP on the device, the same in every process."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(options.layers):
        layers += [nn.Linear(options.width, options.width, device="cuda"), nn.GELU()]
    return nn.Sequential(*layers)


def train(options: argparse.Namespace, run: str) -> dict[str, Any]:
    """Take a step for each batch; return the losses, the peak and what was moved."""
    staging = options.staging_mb * 10**6 if run == "paged" else 0
    if run != "spare":
        _, total = torch.cuda.mem_get_info()
        torch.cuda.set_per_process_memory_fraction(min((cap_bytes(options) - staging) / total, 1.0))
    mlp = model(options)
    pool = memory.PagedPool("cuda", "pinned", device_budget=staging) if staging else None
    optimizer = optim.AdamW(mlp.parameters(), lr=1e-4, paged=pool or False)
    generator = torch.Generator("cuda").manual_seed(1)
    losses, failure = [], None
    try:
        for tokens in options.tokens:
            x = torch.randn(tokens, options.width, device="cuda", generator=generator)
            loss = (mlp(x) - x).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item().hex())
    except torch.OutOfMemoryError:
        failure = _OUT_OF_MEMORY
    stats = pool.stats() if pool else None
    return {
        "run": run,
        "losses": losses,
        "failure": failure,
        "peak_gb": (torch.cuda.max_memory_reserved() + staging) / 1e9,
        "host_gb": stats.used_bytes / 1e9 if stats else 0.0,
        "to_device_gb": stats.bytes_to_device / 1e9 if stats else 0.0,
        "to_host_gb": stats.bytes_to_host / 1e9 if stats else 0.0,
    }


def verdict(records: dict[str, dict[str, Any]]) -> str | None:
    """Return what is not as it should be, or None."""
    spare, paged, unpaged = (records[run] for run in _RUNS)
    for record in (spare, paged):
        if record["failure"]:
            return f"{record['run']} failed: {record['failure']}"
    if paged["losses"] != spare["losses"]:
        return f"the losses differ: {paged['losses']} paged, {spare['losses']} with memory to spare"
    if unpaged["failure"] != _OUT_OF_MEMORY:
        return "the unpaged run did not run out of memory: the cap is too wide for a comparison"
    return None


def table(options: argparse.Namespace, records: dict[str, dict[str, Any]]) -> str:
    """Return the runs as Markdown."""
    lines = [
        "| run | cap, GB | peak, GB | state on the host, GB | to the device, GB | to the host, GB "
        "| steps | result |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
    ]
    for run, found in records.items():
        cap = "-" if run == "spare" else f"{cap_bytes(options) / 1e9:.2f}"
        result = found["failure"] or f"last loss {float.fromhex(found['losses'][-1]):.9f}"
        lines.append(
            f"| {run} | {cap} | {found['peak_gb']:.2f} | {found['host_gb']:.2f} "
            f"| {found['to_device_gb']:.2f} | {found['to_host_gb']:.2f} "
            f"| {len(found['losses'])} of {len(options.tokens)} | {result} |"
        )
    return "\n".join(lines)


def parse_options(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument(
        "--tokens",
        type=lambda text: [int(part) for part in text.split(",")],
        default=[512, 512, 6144, 512],
        help="of each batch; comma-separated",
    )
    parser.add_argument("--staging-mb", type=int, default=256, help="10^6 bytes")
    parser.add_argument("--cap-gb", type=float, help="10^9 bytes")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--child", choices=_RUNS, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run all three, compare, print."""
    options = parse_options(arguments)
    if options.child:
        print(json.dumps(train(options, options.child)))
        return
    if not torch.cuda.is_available():
        raise SystemExit("this needs a GPU: on a CPU there is no memory to run out of")
    given = list(sys.argv[1:] if arguments is None else arguments)
    records = {}
    for run in _RUNS:
        child = subprocess.run(
            [sys.executable, __file__, *given, "--child", run], capture_output=True, text=True
        )
        if child.returncode:
            raise SystemExit(f"{run}: {child.stderr.strip()}")
        records[run] = json.loads(child.stdout)
    print(json.dumps(records) if options.json else table(options, records))
    problem = verdict(records)
    if problem:
        raise SystemExit(problem)


if __name__ == "__main__":
    main()
