"""The tensors by which bitsandbytes stores a 4-bit weight, from and to ours.

Beside `weight` (the packed bytes, in a dtype of the writer's choice) there are, each under the name
of the weight and a dot:

    absmax                          fp32 [blocks]; with double quantization uint8 codes
    quant_map                       fp32 [16]: the values of the codes
    nested_absmax                   fp32 [groups], with double quantization
    nested_quant_map                fp32 [256]: the values of the codes in absmax
    quant_state.bitsandbytes__nf4   uint8: JSON with quant_type, blocksize, dtype, shape and, with
                                    double quantization, nested_blocksize, nested_dtype and
                                    nested_offset (a float); "fp4" in place of "nf4" for that type
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from qlora_native import _C, _checks
from qlora_native.functional import QuantizedTensor

QUANT_TYPES = ("nf4", "fp4")
STATE_KEYS = tuple(f"quant_state.bitsandbytes__{name}" for name in QUANT_TYPES)
COMPANIONS = ("absmax", "quant_map", "nested_absmax", "nested_quant_map", *STATE_KEYS)
"""Names of the tensors beside the weight."""


def read_quantized(packed: Tensor, companions: Mapping[str, Tensor]) -> QuantizedTensor:
    """A weight as bitsandbytes stored it; it decodes to the same bits.

    The codes are used where they are. Where the map of the absmax codes is not ours (one computed
    by a processor that rounds otherwise), or its groups have another size, the absmax values are
    decoded by the file's own map, and the result has no double quantization.

    Args:
        packed: `weight`, of any shape and dtype.
        companions: the other tensors by their names in `COMPANIONS`.

    Raises:
        ValueError: parts are missing, do not fit each other, or are of another 4-bit code.
    """
    info = _read_info(companions)
    try:
        quant_type, block_size = info["quant_type"], info["blocksize"]
        shape, dtype = torch.Size(info["shape"]), getattr(torch, info["dtype"])
        absmax, quant_map = companions["absmax"], companions["quant_map"]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"the quantization state lacks {error}: it has {info}") from error
    if quant_type not in QUANT_TYPES:
        raise ValueError(f"quant_type {quant_type!r} is none of {QUANT_TYPES}")
    _checks.check_block_size(block_size)
    numel = shape.numel()
    flat = packed.detach().contiguous().view(torch.uint8).reshape(-1)
    _require_size("weight", flat, _checks.packed_bytes(numel))
    _require_size("absmax", absmax, _checks.num_blocks(numel, block_size))
    if not torch.equal(quant_map.float().cpu(), _quant_map(quant_type)):
        raise ValueError(f"its quant_map is not that of {quant_type}: {quant_map.tolist()}")
    absmax2 = offset = None
    absmax = absmax.reshape(-1)
    if "nested_absmax" in companions:
        absmax, absmax2, offset = _read_nested(absmax, companions, info)
    elif absmax.dtype != torch.float32:
        raise ValueError(f"absmax is {absmax.dtype}, and there is no nested_absmax to decode it")
    return QuantizedTensor(
        packed=flat,
        absmax=absmax,
        absmax2=absmax2,
        offset=offset,
        shape=shape,
        dtype=dtype,
        quant_type=quant_type,
        block_size=block_size,
    )


def write_quantized(q: QuantizedTensor) -> tuple[Tensor, dict[str, Tensor]]:
    """(`weight`, the companions) as bitsandbytes would store `q`.

    Raises:
        ValueError: bitsandbytes has no such quantization type.
    """
    if q.quant_type not in QUANT_TYPES:
        raise ValueError(f"bitsandbytes stores {QUANT_TYPES}, not quant_type {q.quant_type!r}")
    info: dict[str, Any] = {
        "quant_type": q.quant_type,
        "blocksize": q.block_size,
        "dtype": str(q.dtype).removeprefix("torch."),
        "shape": list(q.shape),
    }
    device = q.packed.device
    companions = {"absmax": q.absmax, "quant_map": _quant_map(q.quant_type).to(device)}
    if q.double_quant:
        # Copies: files hold no two tensors that share memory.
        companions["absmax"] = q.absmax.clone()
        companions["nested_absmax"] = q.absmax2.clone()
        companions["nested_quant_map"] = _nested_quant_map().to(device)
        info["nested_blocksize"] = _C.GROUP_SIZE
        info["nested_dtype"] = "float32"
        info["nested_offset"] = q.offset.item()
    state = torch.tensor(list(json.dumps(info).encode()), dtype=torch.uint8)
    companions[f"quant_state.bitsandbytes__{q.quant_type}"] = state
    return q.packed.reshape(-1, 1), companions


def _read_info(companions: Mapping[str, Tensor]) -> dict[str, Any]:
    states = [companions[key] for key in STATE_KEYS if key in companions]
    if len(states) != 1:
        raise ValueError(f"one of {STATE_KEYS} is expected, there are {sorted(companions)}")
    try:
        return dict(json.loads(bytes(states[0].cpu().contiguous().numpy())))
    except (ValueError, TypeError) as error:
        raise ValueError(f"the quantization state is not a JSON object: {error}") from error


def _read_nested(
    absmax: Tensor, companions: Mapping[str, Tensor], info: Mapping[str, Any]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(absmax, absmax2, offset); the latter None when absmax had to be decoded."""
    try:
        size, nested_map = info["nested_blocksize"], companions["nested_quant_map"]
        offset = torch.tensor(info["nested_offset"], dtype=torch.float32, device=absmax.device)
    except KeyError as error:
        raise ValueError(f"nested_absmax without {error}") from error
    groups = companions["nested_absmax"].float().reshape(-1)
    _require_size("nested_absmax", groups, -(-absmax.numel() // size))
    if size == _C.GROUP_SIZE and torch.equal(nested_map.float().cpu(), _nested_quant_map()):
        return absmax, groups, offset
    scales = groups.repeat_interleave(size)[: absmax.numel()]
    return nested_map.float()[absmax.int()] * scales + offset, None, None


def _require_size(name: str, tensor: Tensor, expected: int) -> None:
    if tensor.numel() != expected:
        raise ValueError(f"{name} has {tensor.numel()} elements, its state says {expected}")


def _quant_map(quant_type: str) -> Tensor:
    # bitsandbytes writes FP4's negative zero as 0.0.
    return torch.tensor(_C.named_codebook(quant_type).values, dtype=torch.float32) + 0.0


def _nested_quant_map() -> Tensor:
    return torch.tensor(_C.signed_dynamic_map(), dtype=torch.float32)
