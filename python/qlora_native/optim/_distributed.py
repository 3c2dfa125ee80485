"""Optimizer states as distributed checkpoints, which any number of ranks can read.

8-bit states are blocks of what a rank holds, so other numbers of ranks would cut them elsewhere.
They are written decoded, in fp32, and coded again by who reads them. Beside that every rank writes
its codes as they are, for a run that goes on with the same parts: it gets the same bits.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from qlora_native import _C
from qlora_native.optim import _state
from qlora_native.optim._optimizer import NativeOptimizer

_MAPS = {"exp_avg": _C.signed_dynamic_map, "exp_avg_sq": _C.unsigned_dynamic_map}


def save_distributed(optimizer: NativeOptimizer, folder: str | os.PathLike[str]) -> None:
    """Writes the states of all parameters to a folder; every rank calls it, and writes its parts.

    Without a process group, this process is the only rank. The hyperparameters are not in it.
    """
    import torch.distributed.checkpoint as dcp

    optimizer._synchronize()
    content = {}
    for key, param in _parameters(optimizer):
        for name, value in _decoded_state(param, optimizer.state.get(param, {})).items():
            content[f"{key}.{name}"] = value
        for name, value in _codes(optimizer.state.get(param, {})).items():
            content[f"{key}.{name}{_own_suffix()}"] = value
    dcp.save(content, checkpoint_id=folder, no_dist=not torch.distributed.is_initialized())


def load_distributed(optimizer: NativeOptimizer, folder: str | os.PathLike[str]) -> None:
    """Reads what `save_distributed` wrote, by any number of ranks; every rank calls it.

    States get the bits that this optimizer keeps them in.

    Raises:
        torch.distributed.checkpoint.api.CheckpointException: something is missing, or of another
            size.
    """
    import torch.distributed.checkpoint as dcp

    group = {"no_dist": not torch.distributed.is_initialized()}
    stored = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    places, content = [], {}
    for place, (key, param) in zip(_places(optimizer), _parameters(optimizer), strict=True):
        if f"{key}.step" in stored:
            places.append((place, key, param))
            for name, value in _template(optimizer, param).items():
                content[f"{key}.{name}"] = value
            if optimizer._bits_of(place, param) == 8:
                content |= _own_codes(optimizer, key, param, stored)
    dcp.load(content, checkpoint_id=folder, **group)
    entries = []
    for place, key, param in places:
        found = {name: content[f"{key}.{name}"] for name in _template(optimizer, param)}
        own = _entries(param, found, optimizer._bits_of(place, param))
        for name, entry in own.items():
            if (codes := content.get(f"{key}.{name}{_own_suffix()}")) is not None:
                is_moment = name in optimizer.moments
                entry.content = _like(param, codes) if is_moment else codes
        entries.append(own)
    params = [param for _, _, param in places]
    for param, state in zip(params, optimizer._states_of(params, entries), strict=True):
        optimizer.state[param] = state


def _own_suffix() -> str:
    """Marks what a rank keeps for itself: another one, or of another number, has other parts."""
    if not torch.distributed.is_initialized():
        return "@0of1"
    return f"@{torch.distributed.get_rank()}of{torch.distributed.get_world_size()}"


def _codes(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """This rank's codes and scales, by their names in the state."""
    found = {}
    for name, value in state.items():
        local = _state.local_part(value)
        if name in _MAPS and local.dtype == torch.uint8:
            scales = name + _state.ABSMAX_SUFFIX
            found |= {name: local.clone(), scales: state[scales].clone()}
    return found


def _own_codes(
    optimizer: NativeOptimizer, key: str, param: Tensor, stored: dict[str, Any]
) -> dict[str, Tensor]:
    """Places for what `_codes` gave, if it is stored and of this rank's part."""
    local = _state.local_part(param)
    places = {}
    for name in optimizer.moments:
        codes = torch.empty_like(local, dtype=torch.uint8).detach()
        absmax = torch.empty(_state.num_blocks(local.numel()), device=local.device)
        places |= {name: codes, name + _state.ABSMAX_SUFFIX: absmax}
    named = {f"{key}.{name}{_own_suffix()}": value for name, value in places.items()}
    if any(n not in stored or stored[n].size != v.shape for n, v in named.items()):
        return {}
    return named


def _places(optimizer: NativeOptimizer) -> list[tuple[int, int]]:
    groups = optimizer.param_groups
    return [(i, j) for i, group in enumerate(groups) for j in range(len(group["params"]))]


def _parameters(optimizer: NativeOptimizer) -> list[tuple[str, Tensor]]:
    groups = optimizer.param_groups
    return [(f"{i}.{j}", groups[i]["params"][j]) for i, j in _places(optimizer)]


def _like(param: Tensor, local: Tensor) -> Tensor:
    """A rank's part as the tensor of all ranks that `param` is a part of."""
    if _state.local_part(param) is param:
        return local
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        local, param.device_mesh, param.placements, run_check=False, shape=param.shape,
        stride=param.stride(),
    )  # fmt: skip


def _decoded_state(param: Tensor, state: dict[str, Tensor]) -> dict[str, Tensor]:
    decoded = {}
    for name, value in state.items():
        if name.endswith(_state.ABSMAX_SUFFIX):
            continue
        value = _state.local_part(value)
        if name == "step":
            decoded[name] = value
            continue
        if value.dtype == torch.uint8:
            value = decode(value, state[name + _state.ABSMAX_SUFFIX], name)
        decoded[name] = _like(param, value)
    return decoded


def _template(optimizer: NativeOptimizer, param: Tensor) -> dict[str, Tensor]:
    local = _state.local_part(param)
    names = list(optimizer.moments)
    if optimizer._options["master_weights"] and param.dtype != torch.float32:
        names.append("master")
    template = {
        name: _like(param, torch.empty_like(local, dtype=torch.float32)).detach() for name in names
    }
    return template | {"step": torch.empty((), device=local.device)}


def _entries(param: Tensor, found: dict[str, Tensor], bits: int) -> _state.Entries:
    entries = {}
    for name, value in found.items():
        local = _state.local_part(value)
        if name not in _MAPS or bits == 32:
            entries[name] = _state.Entry(value, local.shape, torch.float32)
            continue
        codes, absmax = encode(local, name)
        entries[name] = _state.Entry(_like(param, codes), local.shape, torch.uint8)
        scales = name + _state.ABSMAX_SUFFIX
        entries[scales] = _state.Entry(absmax, absmax.shape, torch.float32)
    return entries


def decode(codes: Tensor, absmax: Tensor, moment: str) -> Tensor:
    """The fp32 values of 8-bit codes, of any shape, with an absmax per 256 of them."""
    table = torch.tensor(_MAPS[moment](), dtype=torch.float32, device=codes.device)
    scales = absmax.repeat_interleave(_C.STATE_BLOCK_SIZE)[: codes.numel()]
    return (table[codes.flatten().int()] * scales).view(codes.shape)


def encode(values: Tensor, moment: str) -> tuple[Tensor, Tensor]:
    """The nearest codes of fp32 values, and an absmax per 256 of them.

    A second moment above zero does not get the code of zero, as in the optimizers' steps.
    """
    size = _C.STATE_BLOCK_SIZE
    blocks = _state.num_blocks(values.numel())
    padded = values.new_zeros(blocks * size)
    padded[: values.numel()] = values.flatten()
    padded = padded.view(blocks, size)
    absmax = padded.abs().amax(1) if blocks else values.new_zeros(0)
    table = torch.tensor(_MAPS[moment](), dtype=torch.float32, device=values.device)
    scaled = padded / torch.where(absmax > 0, absmax, 1)[:, None]
    codes = torch.bucketize(scaled, (table[1:] + table[:-1]) / 2)
    if moment == "exp_avg_sq":
        codes = torch.where((padded > 0) & (codes == 0), 1, codes)
    return codes.flatten()[: values.numel()].view(values.shape).to(torch.uint8), absmax
