"""The same bytes as bitsandbytes, in both directions, on CPU and on CUDA."""

import numpy as np
import pytest
import torch

import qlora_native as qn
import reference

bnb = pytest.importorskip("bitsandbytes.functional")

SHAPES = [(256, 256), (33, 77), (1, 1), (1, 63), (64, 65), (300, 100), (7, 4096), (5, 129), (1000,)]


def near_a_decision_point(w, absmax, block_size, quant_type):
    """Elements whose scaled value lies within two ulp of a decision point.

    bitsandbytes multiplies full blocks by 1 / absmax but divides a short last block by absmax, and
    its CUDA build divides approximately: only such elements may get another code.
    """
    values = np.sort(np.unique(reference.code_values(quant_type))).astype(np.float64)
    points = (values[:-1] + values[1:]) / 2
    flat = w.float().cpu().reshape(-1).numpy().astype(np.float64)
    scaled = flat / np.repeat(absmax.astype(np.float64), block_size)[: flat.size]
    distance = np.abs(scaled[:, None] - points[None, :]).min(1)
    return distance <= 2 * np.finfo(np.float32).eps * np.maximum(np.abs(scaled), 0.1)


def nibbles(packed, n):
    flat = packed.cpu().reshape(-1).numpy()
    return np.stack([flat >> 4, flat & 15], axis=1).reshape(-1)[:n]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("block_size", [32, 64, 128, 4096])
@pytest.mark.parametrize("shape", SHAPES)
def test_nf4_bytes_and_absmax_are_equal(device, shape, block_size, dtype):
    w = torch.randn(shape, device=device).to(dtype)
    theirs, state = bnb.quantize_4bit(w, blocksize=block_size, quant_type="nf4")
    ours = qn.quantize_4bit(w, "nf4", block_size, double_quant=False)
    np.testing.assert_array_equal(ours.absmax.cpu().numpy(), state.absmax.cpu().view(-1).numpy())
    different = nibbles(ours.packed, w.numel()) != nibbles(theirs, w.numel())
    full = w.numel() // block_size * block_size
    if device == "cpu":
        assert not different[:full].any()
    excused = near_a_decision_point(w, ours.absmax.cpu().numpy(), block_size, "nf4")
    assert not (different & ~excused).any()
    if w.numel() % 2:
        assert ours.packed.view(-1)[-1] & 15 == 7


def test_zero_blocks_and_ties_are_equal():
    w = torch.zeros(4, 64)
    points = (reference.NF4[:-1] + reference.NF4[1:]) / np.float32(2)
    w[1, :15] = torch.from_numpy(points)
    w[1, 63] = 1.0
    w[3, 0] = -2.0
    theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4")
    ours = qn.quantize_4bit(w, double_quant=False)
    assert torch.equal(ours.packed, theirs.view(-1))
    assert torch.equal(ours.absmax, state.absmax.view(-1))


@pytest.mark.parametrize("shape", SHAPES)
def test_fp4_is_equal_up_to_the_sign_of_zero(device, shape):
    """bitsandbytes' CPU code picks either zero; its CUDA code keeps the sign, as ours does."""
    w = torch.randn(shape, device=device)
    theirs, state = bnb.quantize_4bit(w, blocksize=64, quant_type="fp4")
    ours = qn.quantize_4bit(w, "fp4", double_quant=False)
    np.testing.assert_array_equal(ours.absmax.cpu().numpy(), state.absmax.cpu().view(-1).numpy())
    a, b = nibbles(ours.packed, w.numel()), nibbles(theirs, w.numel())
    if device == "cpu":
        a, b = np.where(a == 8, 0, a), np.where(b == 8, 0, b)
    different = a != b
    excused = near_a_decision_point(w, ours.absmax.cpu().numpy(), 64, "fp4")
    assert not (different & ~excused).any()


@pytest.mark.parametrize("shape", [(512, 512), (1024, 300), (4096, 256)])
def test_nested_state(device, shape):
    w = torch.randn(shape, device=device)
    _, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=True)
    ours = qn.quantize_4bit(w)
    ulp = np.spacing(np.float32(state.offset.item()))
    assert abs(ours.offset.item() - state.offset.item()) <= 2 * ulp
    # absmax2 is a difference to the offset: it inherits the offset's ulps.
    torch.testing.assert_close(ours.absmax2, state.state2.absmax.view(-1), rtol=0, atol=2 * ulp)
    equal = (ours.absmax == state.absmax.view(-1)).float().mean().item()
    assert equal >= 0.997
    distance = (ours.absmax.int() - state.absmax.view(-1).int()).abs().max().item()
    assert distance <= 1
    # With their offset pinned, absmax2 is theirs to the bit.
    pinned = qn.quantize_4bit(w, offset=state.offset.float())
    assert torch.equal(pinned.absmax2, state.state2.absmax.view(-1))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_we_read_what_they_wrote(device, quant_type, nested, dtype):
    w = torch.randn(256, 320, device=device).to(dtype)
    packed, state = bnb.quantize_4bit(
        w, blocksize=64, quant_type=quant_type, compress_statistics=nested
    )
    q = qn.QuantizedTensor(
        packed=packed,
        absmax=state.absmax,
        absmax2=state.state2.absmax if nested else None,
        offset=state.offset if nested else None,
        shape=w.shape,
        dtype=dtype,
        quant_type=quant_type,
    )
    assert torch.equal(q.dequantize(), bnb.dequantize_4bit(packed, state))


@pytest.mark.parametrize("nested", [False, True])
def test_they_read_what_we_wrote(device, nested):
    w = torch.randn(256, 320, device=device)
    _, state = bnb.quantize_4bit(w, blocksize=64, quant_type="nf4", compress_statistics=nested)
    q = qn.quantize_4bit(w, double_quant=nested)
    state.absmax = q.absmax
    if nested:
        state.state2.absmax, state.offset = q.absmax2, q.offset
    assert torch.equal(bnb.dequantize_4bit(q.packed.view(-1, 1), state), q.dequantize())


@pytest.mark.parametrize("signed", [True, False])
def test_the_dynamic_maps_are_theirs(signed):
    from qlora_native import _C

    theirs = bnb.create_dynamic_map(signed=signed)
    ours = torch.tensor(_C.signed_dynamic_map() if signed else _C.unsigned_dynamic_map())
    # PyTorch's linspace rounds differently on a CPU without AVX2; the map moves by an ulp there.
    torch.testing.assert_close(ours, theirs, rtol=2e-7, atol=0)
    if "AVX" in torch.backends.cpu.get_cpu_capability():
        assert torch.equal(ours, theirs)
