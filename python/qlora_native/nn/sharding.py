"""Models whose parameters are split over ranks by FSDP2 (torch's `fully_shard`).

4-bit weights are frozen uint8 parameters, so they are split and gathered as the bytes that they
are. Each layer that gradient checkpointing would run again is a unit: whole while it computes. So
are the token embeddings, and the final norm with the head.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def whole(tensor: Tensor) -> Tensor:
    """The full tensor of one that is split (every rank has to ask); any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


@torch.no_grad()
def copy_whole_(parameter: Tensor, value: Tensor) -> None:
    """Copies a full tensor, which every rank has, into a parameter that may be split."""
    if not hasattr(parameter, "full_tensor"):
        parameter.copy_(value)
        return
    from torch.distributed.tensor import distribute_tensor

    value = value.to(parameter.device, parameter.dtype)
    # Every rank cuts its own part: nothing has to be sent.
    mesh, placements = parameter.device_mesh, parameter.placements
    mine = distribute_tensor(value, mesh, placements, src_data_rank=None)
    parameter.to_local().copy_(mine.to_local())


def shard_model(model: nn.Module, mesh: Any = None) -> None:
    """Splits the parameters over the ranks of a mesh, in place; all of them by default.

    Adapters are to be there already; an optimizer is made afterwards.

    Raises:
        ValueError: the model has no layer that gradient checkpointing could run again, so that all
            of it would be whole at a time.
    """
    layers = [m for m in model.modules() if is_checkpointed_layer(m)]
    if not layers:
        raise ValueError(f"{type(model).__name__} has no layers that could be sharded one by one")
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    shared = {id(p) for p in embedding.parameters()} & {id(p) for p in head.parameters()}
    with _split_of_integers() as fully_shard:
        for layer in layers:
            fully_shard(layer, mesh=mesh)
        if not shared:
            fully_shard(embedding, mesh=mesh)
            # Used last and first again: gathered once.
            fully_shard(head, mesh=mesh, reshard_after_forward=False)
        fully_shard(model, mesh=mesh)


@contextmanager
def _split_of_integers() -> Iterator[Callable[..., Any]]:
    """Gives torch's `fully_shard`, which within it takes frozen integer parameters.

    torch up to 2.12 makes every part a parameter that needs a gradient, for as long as it takes to
    set what the whole one says; of integers there is no such parameter.
    """
    from torch.distributed.fsdp import fully_shard

    version = tuple(int(part) for part in torch.__version__.split(".")[:2])
    if version >= (2, 13):
        yield fully_shard
        return
    from torch.distributed.fsdp._fully_shard import _fsdp_param

    def parameter(data: Tensor, requires_grad: bool = True) -> nn.Parameter:
        return nn.Parameter(data, requires_grad and data.is_floating_point())

    modules = types.ModuleType("nn")
    modules.__dict__.update(vars(nn), Parameter=parameter)
    vars(_fsdp_param)["nn"] = modules
    try:
        yield fully_shard
    finally:
        vars(_fsdp_param)["nn"] = nn


def is_checkpointed_layer(module: nn.Module) -> bool:
    """Whether the module is a layer that transformers' gradient checkpointing runs again."""
    # By name: transformers is optional, and must not be imported to be asked.
    return any(kind.__name__ == "GradientCheckpointingLayer" for kind in type(module).__mro__)


def shard_from_rank_0(model: nn.Module, device: torch.device, mesh: Any = None) -> None:
    """`shard_model` for a model that rank 0 alone has read; the others get their parts from it.

    No rank but 0 ever holds more than its parts and one tensor.

    Args:
        model: on rank 0 with its weights, wherever they are; on the others the same model on the
            meta device.
        device: where the parts are going to be.

    Raises:
        ValueError: the models differ; on every rank.
    """
    if mesh is None:
        mesh = dist.init_device_mesh(device.type, (dist.get_world_size(),))
    is_source = dist.get_rank() == 0
    mine = [(n, p.shape, p.dtype, p.requires_grad) for n, p in model.named_parameters()]
    buffers = {n: b.to(device) for n, b in model.named_buffers()} if is_source else {}
    described = [(mine, [(n, b.shape, b.dtype) for n, b in buffers.items()])]
    dist.broadcast_object_list(described, src=0)
    _require_same(mine, described[0][0])
    values = {n: p.detach() for n, p in model.named_parameters()} if is_source else {}
    model.to("meta")
    model.tie_weights()
    shard_model(model, mesh)
    model.to_empty(device=device)
    model.tie_weights()
    _scatter(model, values, device)
    found = dict(model.named_buffers())
    for name, _, _ in described[0][1]:
        if is_source:
            found[name].copy_(buffers[name])
        dist.broadcast(found[name], src=0)


@torch.no_grad()
def _scatter(model: nn.Module, values: dict[str, Tensor], device: torch.device) -> None:
    from torch.distributed.tensor import distribute_tensor

    for name, parameter in model.named_parameters():
        if name in values:
            full = values.pop(name).to(device)
        else:
            full = torch.empty(parameter.shape, dtype=parameter.dtype, device=device)
        part = distribute_tensor(full, parameter.device_mesh, parameter.placements)
        parameter.to_local().copy_(part.to_local())


def _require_same(mine: list[Any], theirs: list[Any]) -> None:
    differences = [a for a, b in zip(mine, theirs, strict=False) if a != b]
    message = None
    if len(mine) != len(theirs) or differences:
        message = (
            f"rank {dist.get_rank()} has {len(mine)} parameters, rank 0 {len(theirs)}; the first "
            f"that differs: {differences[:1]}"
        )
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, message)
    if messages := [text for text in found if text]:
        raise ValueError(messages[0])
