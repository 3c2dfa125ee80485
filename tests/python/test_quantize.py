"""quantize_4bit and dequantize_4bit against the format's description, on every device."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import qlora_native as qn
import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
CUSTOM = tuple(np.linspace(-1, 1, 16, dtype=np.float32).tolist())


def codebook_for(quant_type):
    return CUSTOM if quant_type == "custom" else None


def assert_equals_reference(w, q):
    packed, absmax = reference.quantize(w, q.quant_type, q.block_size, q.codebook)
    np.testing.assert_array_equal(q.packed.cpu().numpy(), packed)
    if not q.double_quant:
        np.testing.assert_array_equal(q.absmax.cpu().numpy(), absmax)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("quant_type", qn.QUANT_TYPES)
@pytest.mark.parametrize("shape", [(1,), (2, 3), (64,), (65,), (33, 77), (3, 5, 7), (130, 192)])
def test_bytes_equal_the_description(device, shape, quant_type, dtype):
    w = torch.randn(shape, device=device).to(dtype)
    for double_quant in (False, True):
        q = qn.quantize_4bit(
            w, quant_type, 64, double_quant=double_quant, codebook=codebook_for(quant_type)
        )
        assert_equals_reference(w, q)
        assert q.shape == w.shape and q.dtype == dtype and q.device.type == device


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 3000),
    block_size=st.sampled_from([32, 64, 128, 256, 512, 1024, 2048, 4096]),
    quant_type=st.sampled_from(["nf4", "fp4", "int4"]),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-30, 30),
    seed=st.integers(0, 2**31),
)
def test_bytes_equal_the_description_for_any_size(n, block_size, quant_type, dtype, exponent, seed):
    generator = torch.Generator().manual_seed(seed)
    w = (torch.randn(n, generator=generator) * 2.0**exponent).to(dtype)
    w = torch.where(torch.isfinite(w), w, 0)
    assert_equals_reference(w, qn.quantize_4bit(w, quant_type, block_size, double_quant=False))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
def test_ties_go_to_the_lower_interval(device, quant_type):
    """Values exactly on every decision point, and one step to either side of it."""
    values = np.sort(np.unique(reference.code_values(quant_type)))
    points = ((values[:-1] + values[1:]) / np.float32(2)).astype(np.float32)
    around = np.concatenate(
        [points, np.nextafter(points, np.float32(2)), np.nextafter(points, np.float32(-2))]
    )
    w = torch.zeros(64)
    w[: around.size] = torch.from_numpy(around.astype(np.float32))
    w[63] = 1.0  # absmax 1: the values are compared as they are
    w = w.to(device)
    assert_equals_reference(w, qn.quantize_4bit(w, quant_type, 64, double_quant=False))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("double_quant", [False, True])
def test_dequantize_rounds_once(device, dtype, double_quant):
    w = torch.randn(37, 129, device=device)
    for quant_type in qn.QUANT_TYPES:
        q = qn.quantize_4bit(
            w, quant_type, 32, double_quant=double_quant, codebook=codebook_for(quant_type)
        )
        torch.testing.assert_close(
            q.dequantize(dtype).cpu(), reference.dequantize(q).to(dtype), rtol=0, atol=0
        )


def test_double_quantization_is_the_nearest_entry(device):
    """absmax codes against an exact search in fp64 over all 256 entries, a tie to the lower."""
    from qlora_native import _C

    w = torch.randn(1200, 257, device=device)
    plain = qn.quantize_4bit(w, double_quant=False)
    q = qn.quantize_4bit(w, double_quant=True)
    absmax = plain.absmax.cpu().numpy()
    offset = np.float32(absmax.astype(np.float64).mean())
    assert abs(q.offset.item() - offset) <= np.spacing(offset)
    difference = absmax - np.float32(q.offset.item())
    groups = -(-absmax.size // 256)
    padded = np.zeros(groups * 256, dtype=np.float32)
    padded[: absmax.size] = difference
    absmax2 = np.abs(padded.reshape(groups, 256)).max(1)
    np.testing.assert_array_equal(q.absmax2.cpu().numpy(), absmax2)
    scale = np.repeat(np.float32(1) / absmax2, 256)[: absmax.size]
    x = (difference * scale).astype(np.float64)
    table = np.array(_C.signed_dynamic_map(), dtype=np.float64)
    expected = np.abs(x[:, None] - table[None, :]).argmin(1)
    np.testing.assert_array_equal(q.absmax.cpu().numpy(), expected)


def test_the_offset_does_not_depend_on_the_thread_count():
    w = torch.randn(2000, 1000)
    threads = torch.get_num_threads()
    try:
        states = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            q = qn.quantize_4bit(w)
            assert qn._C.cpu_threads() == count
            states.append((q.packed, q.absmax, q.absmax2, q.offset))
    finally:
        torch.set_num_threads(threads)
    for state in states[1:]:
        assert all(torch.equal(a, b) for a, b in zip(state, states[0], strict=True))


def test_a_pinned_offset_is_used(device):
    w = torch.randn(64, 256, device=device)
    q = qn.quantize_4bit(w, offset=0.5)
    assert q.offset.item() == 0.5
    error = (q.dequantize() - qn.quantize_4bit(w).dequantize()).abs().max()
    assert 0 < error < 0.2


def test_zero_blocks(device):
    w = torch.zeros(3, 70, device=device)
    for quant_type, byte in (("nf4", 0x77), ("fp4", 0x00), ("int4", 0x88)):
        for double_quant in (False, True):
            q = qn.quantize_4bit(w, quant_type, double_quant=double_quant)
            assert (q.packed == byte).all()
            assert (q.dequantize() == 0).all()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_value_spoils_its_block_and_no_other(device, bad):
    w = torch.randn(100, 640, device=device)
    w[3, 5] = bad
    block = (3 * 640 + 5) // 64
    q = qn.quantize_4bit(w, double_quant=False)
    d = q.dequantize().view(-1, 64)
    assert d[block].isnan().all()
    assert d.isnan().sum() == 64
    clean = torch.where(torch.isfinite(w), w, 0)
    others = torch.arange(d.shape[0], device=device) != block
    reference_blocks = qn.quantize_4bit(clean, double_quant=False).dequantize().view(-1, 64)
    assert torch.equal(d[others], reference_blocks[others])
    # With double quantization the group's 256 blocks share one absmax2: they all say NaN.
    d = qn.quantize_4bit(w).dequantize().view(-1, 64)
    assert d[:256].isnan().all() and d[256:].isfinite().all()


@pytest.mark.parametrize("value", [1e-45, 1e-40, 2.0**-128, 2.0**-127, 1e-37, 3e38])
def test_extreme_magnitudes(device, value):
    w = torch.full((64,), value, device=device)
    w[1] = -value
    q = qn.quantize_4bit(w, double_quant=False)
    assert_equals_reference(w, q)
    d = q.dequantize()
    assert d.isfinite().all()
    if value > 2.0**-128:
        assert torch.equal(d, w)  # +-absmax are exact
    else:
        assert (d == 0).all()  # 1 / absmax would overflow


def test_check_finite_counts():
    w = torch.randn(10, 64)
    w[0, 0], w[5, 1] = float("nan"), float("inf")
    with pytest.raises(ValueError, match=r"\(10, 64\), holds 2 values"):
        qn.quantize_4bit(w, check_finite=True)
    qn.quantize_4bit(torch.randn(10, 64), check_finite=True)


@pytest.mark.parametrize("shape", [(0,), (0, 64), (64, 0)])
def test_empty(device, shape):
    q = qn.quantize_4bit(torch.empty(shape, device=device))
    assert q.dequantize().shape == shape
    assert q.packed.numel() == 0


def test_layouts_that_are_not_contiguous(device):
    w = torch.randn(96, 200, device=device)
    for view in (w.t(), w[:, 3:67], w[::2]):
        q = qn.quantize_4bit(view)
        copy = qn.quantize_4bit(view.contiguous())
        assert torch.equal(q.packed, copy.packed) and torch.equal(q.absmax, copy.absmax)


def test_unaligned_input(device):
    """A view that starts one element into its storage: 16-byte loads would fault or misread."""
    for dtype in DTYPES:
        w = torch.randn(64 * 33 + 1, device=device).to(dtype)[1:]
        q = qn.quantize_4bit(w, double_quant=False)
        assert_equals_reference(w, q)


def test_bits_per_parameter():
    q = qn.quantize_4bit(torch.randn(4096, 1024))
    assert q.nbytes * 8 / q.numel() == pytest.approx(4.127, abs=1e-3)
    assert qn.quantize_4bit(torch.randn(512, 64), double_quant=False).nbytes * 16 == 512 * 64 * 9


def test_input_is_not_touched_and_needs_no_grad():
    w = torch.randn(8, 64, requires_grad=True)
    before = w.detach().clone()
    q = qn.quantize_4bit(w)
    assert not q.packed.requires_grad and torch.equal(w, before)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"quant_type": "nf5"}, ValueError, "'nf5'.*nf4, fp4, int4"),
        ({"block_size": 48}, ValueError, "48 is not a power of two from 32 to 4096"),
        ({"block_size": 8192}, ValueError, "8192"),
        ({"block_size": 64.0}, ValueError, "64.0"),
        ({"quant_type": "custom"}, ValueError, "needs a codebook"),
        ({"quant_type": "custom", "codebook": [0.0] * 15}, ValueError, "has 15"),
        ({"quant_type": "custom", "codebook": [0.0] * 16}, ValueError, "must ascend"),
        ({"quant_type": "custom", "codebook": [*range(15), float("nan")]}, ValueError, "finite"),
        ({"quant_type": "nf4", "codebook": CUSTOM}, ValueError, "codebook of its own"),
        ({"double_quant": False, "offset": 1.0}, ValueError, "double_quant is off"),
    ],
)
def test_wrong_arguments(arguments, error, message):
    with pytest.raises(error, match=message):
        qn.quantize_4bit(torch.randn(4, 64), **arguments)


def test_wrong_dtypes():
    with pytest.raises(TypeError, match="float64"):
        qn.quantize_4bit(torch.randn(4, 64, dtype=torch.float64))
    with pytest.raises(TypeError, match="int8"):
        qn.dequantize_4bit(qn.quantize_4bit(torch.randn(4, 64)), torch.int8)


def test_parts_that_do_not_fit():
    import dataclasses

    q = qn.quantize_4bit(torch.randn(64, 64))
    for change, message in (
        ({"packed": q.packed[:-1]}, "2047 elements, expected 2048"),
        ({"absmax": q.absmax[1:]}, "63 elements, expected 64"),
        ({"absmax2": None}, "come together"),
        ({"block_size": 128}, "64 elements, expected 32"),
        ({"packed": q.packed[::1].repeat(2)[::2]}, "not contiguous"),
    ):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(q, **change).dequantize()
    with pytest.raises(TypeError, match=r"int8, expected torch\.uint8"):
        dataclasses.replace(q, packed=q.packed.view(torch.int8)).dequantize()


@pytest.mark.slow
def test_more_than_2_31_elements():
    n = 2**31 + 2**20 + 3
    w = torch.empty(n, dtype=torch.bfloat16)
    tail = 64 * 1000 + 3
    w.zero_()
    w[-tail:] = torch.randn(tail).bfloat16()
    q = qn.quantize_4bit(w, double_quant=False)
    expected, absmax = reference.quantize(w[-tail:], "nf4", 64)
    first = (n - tail) // 64
    assert (n - tail) % 64 == 0
    np.testing.assert_array_equal(q.packed[-expected.size :].numpy(), expected)
    np.testing.assert_array_equal(q.absmax[first:].numpy(), absmax)
    assert (q.packed[: (n - tail) // 2] == 0x77).all()
    del w
    d = q.dequantize(torch.bfloat16)
    assert d[-tail:].float().norm() > 0 and (d[: n - tail] == 0).all()
