"""One rank of a run that distributed_step.py starts: it builds, checks, counts and times.

The arguments are the run, as JSON, and the folder that rank-<number>.json is written to.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import headline_memory
import random_models
import training_step
from qlora_native.cli.parallel import Ranks, ranks
from qlora_native.hf.optimizers import OPTIMIZERS
from qlora_native.nn import Linear4bit
from qlora_native.nn.sharding import is_checkpointed_layer
from qlora_native.training import use_checkpointing, use_chunked_loss
from training_step import LossMismatchError

CHECKED_STEPS = 3
_WARM_UP_STEPS = 2
_LEARNING_RATE = 2e-3
_TIMED_GATHERS = 10

_NORM_TOLERANCE = 2e-2
"""Of a gradient that bf16 rounds; that of half of a global batch is 1.4 times as large."""

# Since torch 2.13 it has another name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclasses.dataclass(frozen=True)
class Run:
    """What the ranks do together.

    Attributes:
        mode: "one" process, "ddp", or "fsdp".
        parts: of the global batch, each `batch` sequences of `length` tokens; ranks have one each,
            a process alone takes the checked steps over all of them.
        checkpointing: "none" or "full".
        packs_vocabulary: embeddings and head are in 4 bits too; of "fsdp" alone.
        expected: of one process: "losses" of the first steps, which only have to fall where there
            is none, and "gradient_norm" of the first.
    """

    name: str
    mode: str
    ranks: int
    parts: int
    device: str
    shape: str
    layers: int
    batch: int
    length: int
    checkpointing: str
    steps: int
    optim: str
    lora_r: int
    adapter_dtype: str
    timeout: int
    packs_vocabulary: bool = False
    expected: dict[str, Any] | None = None

    def config(self) -> Any:
        """Return transformers' configuration of the model."""
        shape = dataclasses.replace(random_models.SHAPES[self.shape], layers=self.layers)
        return shape.config(positions=max(self.length, 4096))


def make_model(run: Run, device: torch.device) -> nn.Module:
    """Return this rank's model, ready to train."""
    dtype = getattr(torch, run.adapter_dtype)
    if run.mode == "fsdp":
        model = random_models.build_sharded(
            run.config(), run.lora_r, dtype, device, packs_vocabulary=run.packs_vocabulary
        )
    else:
        model = random_models.build(run.config(), random_models.ours, device)
        random_models.add_native_adapters(model, run.lora_r, dtype)
    model.train()
    use_checkpointing(model, run.checkpointing, preserve_rng_state=False)
    use_chunked_loss(model)
    if run.mode == "ddp":
        devices = [device] if device.type == "cuda" else None
        model = nn.parallel.DistributedDataParallel(model, device_ids=devices)
    return model


def backward(model: nn.Module, batches: Sequence[torch.Tensor]) -> torch.Tensor:
    """Compute gradients over batches of one size; return the mean loss, on the device."""
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss / len(batches)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


def first_steps(
    run: Run,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[torch.Tensor],
    place: Ranks,
) -> dict[str, Any]:
    """Take the steps that are compared; return what `Run.expected` is of, of all ranks."""
    losses, norms = [], []
    for _ in range(CHECKED_STEPS):
        loss = backward(model, batches).item()
        squares = sum(
            _local(p.grad).float().square().sum().item()
            for p in model.parameters()
            if p.requires_grad
        )
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss, squares = place.sum([loss / place.size, squares])
        losses.append(loss)
        # Of split gradients each rank has a part, of others all.
        norms.append(math.sqrt(squares if run.mode == "fsdp" else squares / place.size))
    return {"losses": losses, "gradient_norm": norms[0]}


class Gatherings:
    """Counts the bytes that FSDP2 gathers, for its layers and for what is outside of them."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._ranks = dist.get_world_size()
        self.of_layers, self.of_others = _CountingAllGather(), _CountingAllGather()
        for module in model.modules():
            if hasattr(module, "set_custom_all_gather"):
                is_layer = is_checkpointed_layer(module)
                module.set_custom_all_gather(self.of_layers if is_layer else self.of_others)

    def clear(self) -> None:
        """Forget what has been gathered until now."""
        self.of_layers.sizes.clear()
        self.of_others.sizes.clear()

    def report(self) -> dict[str, Any]:
        """Return what was gathered since `clear`, beside what docs/scaling.md says of a step."""
        layers = [m for m in self._model.modules() if is_checkpointed_layer(m)]
        packed = [m for m in layers[0].modules() if isinstance(m, Linear4bit)]
        elements = sum(m.in_features * m.out_features for m in packed)
        others = sum(
            self._padded_bytes(p) for p in layers[0].parameters() if p.dtype != torch.uint8
        )
        sizes = self.of_layers.sizes
        whole = sum(p.numel() * p.element_size() for p in self._model.parameters())
        received = (self._ranks - 1) / self._ranks
        return {
            "layer_gathers": len(sizes) / len(layers),
            "layer_bytes": max(sizes),
            "wire_bytes_per_parameter": (sum(sizes) / len(sizes) - others) / elements,
            "received_bytes": received * sum(sizes + self.of_others.sizes),
            "predicted_received_bytes": received * 2 * whole,
        }

    def _padded_bytes(self, parameter: torch.Tensor) -> int:
        # Rows are split in parts of one size, the last ones filled up.
        rows, *rest = parameter.shape
        rows = -(-rows // self._ranks) * self._ranks
        return rows * math.prod(rest) * parameter.element_size()


class _CountingAllGather:
    """torch's interface of a gathering, for `FSDPModule.set_custom_all_gather`."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def allocate(
        self, size: Sequence[int], *, dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self, output_tensor: torch.Tensor, input_tensor: torch.Tensor, group: Any, async_op: bool
    ) -> Any:
        self.sizes.append(output_tensor.nbytes)
        return _all_gather(output_tensor, input_tensor, group=group, async_op=async_op)


def gather_bytes_per_s(size: int, device: torch.device) -> float:
    """Return the rate at which a rank receives, gathering `size` bytes with nothing beside it."""
    count = dist.get_world_size()
    mine = torch.zeros(size // count, dtype=torch.uint8, device=device)
    whole = torch.empty(count * mine.nbytes, dtype=torch.uint8, device=device)

    def gather() -> None:
        _all_gather(whole, mine)

    training_step.step_times_ms(gather, 2, device.type)
    times = training_step.step_times_ms(gather, _TIMED_GATHERS, device.type)
    return (count - 1) * mine.nbytes / statistics.median(times) * 1e3


def check(run: Run, found: dict[str, Any]) -> None:
    """Compare what `first_steps` found with what is expected.

    The norm is compared as well, for AdamW hides how large gradients are, and the losses of a few
    steps whose batches they are of.

    Raises:
        LossMismatchError: the losses do not fall, or something is not as expected.
    """
    losses, norm = found["losses"], found["gradient_norm"]
    if not all(map(math.isfinite, losses)) or not losses[-1] < losses[0]:
        raise LossMismatchError(f"the model does not learn: losses are {losses}")
    if run.expected is None:
        return
    training_step.check_losses(losses, run.expected["losses"], "one process")
    expected = run.expected["gradient_norm"]
    if not abs(norm - expected) <= _NORM_TOLERANCE * expected:
        raise LossMismatchError(
            f"the first gradient's norm is {norm:.6g} and {expected:.6g} for one process, "
            f"more than {_NORM_TOLERANCE:.0%} apart"
        )


def measure(run: Run, place: Ranks) -> dict[str, Any]:
    """Build, check, count and time; return what this rank saw."""
    on_gpu = run.device == "cuda"
    device = torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
    model = make_model(run, device)
    optimizer = OPTIMIZERS[run.optim](
        [p for p in model.parameters() if p.requires_grad], lr=_LEARNING_RATE
    )
    built_peak = torch.cuda.max_memory_allocated() if on_gpu else None
    shape = random_models.SHAPES[run.shape]
    rows = random_models.batch(shape.vocab, run.parts * run.batch, run.length, device)
    batches = rows.split(run.batch)[place.rank :: place.size]
    gatherings = Gatherings(model) if run.mode == "fsdp" else None
    if on_gpu:
        torch.cuda.empty_cache()
    found = first_steps(run, model, optimizer, batches, place)
    check(run, found)

    def step() -> None:
        backward(model, batches[:1])
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    for _ in range(_WARM_UP_STEPS):
        if gatherings is not None:
            gatherings.clear()
        step()
    if gatherings is not None:
        found |= gatherings.report()
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    place.wait()
    times = training_step.step_times_ms(step, run.steps, run.device)
    if on_gpu:
        found["peak_bytes"] = torch.cuda.max_memory_allocated()
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
        found["used_bytes"] = headline_memory.used_bytes()
        found["built_peak_bytes"] = built_peak
    place.wait()
    if gatherings is not None:
        found["gather_bytes_per_s"] = gather_bytes_per_s(found["layer_bytes"], device)
    return {
        "median_ms": statistics.median(times),
        "times_ms": times,
        "held_bytes": sum(_local(p).nbytes for p in model.parameters()),
        **found,
    }


def _local(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.to_local() if hasattr(parameter, "to_local") else parameter


def main() -> None:
    run, folder = Run(**json.loads(sys.argv[1])), Path(sys.argv[2])
    found: dict[str, Any] = {"error": "was stopped"}
    try:
        with ranks(run.device, run.timeout) as place:
            found = measure(run, place)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        found = {"error": f"{type(error).__name__}: {first}"}
        raise
    finally:
        (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main()
