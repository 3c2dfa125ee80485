"""The format, written a second time from its description, in numpy: slow and independent.

The 4-bit values are the published ones, the decision points are recomputed.
"""

import numpy as np
import torch

NF4 = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
        0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
        0.7229568362236023, 1.0,
    ],
    dtype=np.float32,
)  # fmt: skip
FP4_MAGNITUDES = np.array([0, 1 / 192, 2 / 3, 1, 1 / 3, 1 / 2, 1 / 6, 1 / 4], dtype=np.float32)
FP4 = np.concatenate([FP4_MAGNITUDES, -FP4_MAGNITUDES])
INT4 = (np.arange(16, dtype=np.float32) - 8) / np.float32(7)


def code_values(quant_type, codebook=None):
    named = {"nf4": NF4, "fp4": FP4, "int4": INT4}
    return named[quant_type] if codebook is None else np.asarray(codebook, dtype=np.float32)


def _encode_sorted(values, x):
    points = (values[:-1] + values[1:]) / np.float32(2)
    return (x[:, None] > points[None, :]).sum(1).astype(np.uint8)


def _encode_fp4(x):
    thresholds = np.array(
        [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333],
        dtype=np.float32,
    )
    rank = (np.abs(x)[:, None] > thresholds[None, :]).sum(1)
    by_rank = np.array([0, 1, 6, 7, 4, 5, 2, 3], dtype=np.uint8)
    return by_rank[rank] | np.where(x < 0, 8, 0).astype(np.uint8)


def quantize(w, quant_type, block_size, codebook=None):
    """Return (packed, absmax) of a finite tensor, as uint8 and float32 arrays."""
    flat = w.detach().float().cpu().reshape(-1).numpy()
    n = flat.size
    blocks = -(-n // block_size)
    padded = np.zeros(blocks * block_size, dtype=np.float32)
    padded[:n] = flat
    absmax = np.abs(padded.reshape(blocks, block_size)).max(1).astype(np.float32)
    with np.errstate(divide="ignore", over="ignore"):
        scale = np.float32(1) / absmax
    absmax[np.isinf(scale)] = 0
    scale[np.isinf(scale)] = 0
    x = (padded.reshape(blocks, block_size) * scale[:, None]).reshape(-1)[:n]
    if quant_type == "fp4":
        codes, zero = _encode_fp4(x), 0
    else:
        values = code_values(quant_type, codebook)
        codes, zero = _encode_sorted(values, x), int(_encode_sorted(values, np.zeros(1))[0])
    if n % 2:
        codes = np.append(codes, np.uint8(zero))
    return codes[0::2] << 4 | codes[1::2], absmax


def decode_absmax(q):
    """Return the fp32 absmax of every block, from the parts of a QuantizedTensor and the map."""
    if q.absmax2 is None:
        return q.absmax.cpu().numpy()
    from qlora_native import _C

    table = np.array(_C.signed_dynamic_map(), dtype=np.float32)
    scale = np.repeat(q.absmax2.cpu().numpy(), 256)[: q.absmax.numel()]
    product = table[q.absmax.cpu().numpy()] * scale
    return product + q.offset.cpu().numpy()


def dequantize(q):
    """Return the dense tensor in float32, before any rounding to another dtype."""
    packed = q.packed.cpu().reshape(-1).numpy()
    codes = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[: q.numel()]
    absmax = np.repeat(decode_absmax(q), q.block_size)[: q.numel()]
    values = code_values(q.quant_type, q.codebook)[codes]
    return torch.from_numpy(values * absmax).reshape(q.shape)
