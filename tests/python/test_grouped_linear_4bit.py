"""Products of groups of rows with their own 4-bit weights, against fp64."""

import pytest
import torch

import qlora_native as qn
from qlora_native.functional import QuantizedStack, grouped_linear_4bit

SETTINGS = [
    {},
    {"double_quant": False},
    {"quant_type": "fp4", "block_size": 128},
    {"block_size": 4096},
]


def stack_of(shape, device="cpu", dtype=torch.float32, **settings):
    weights = torch.randn(shape, dtype=dtype)
    parts = [qn.quantize_4bit(w.to(device), **settings) for w in weights]
    first = parts[0]

    def stacked(name):
        values = [getattr(q, name) for q in parts]
        return None if values[0] is None else torch.stack(values)

    return QuantizedStack(
        packed=stacked("packed"),
        absmax=stacked("absmax"),
        absmax2=stacked("absmax2"),
        offset=stacked("offset"),
        shape=torch.Size(shape),
        dtype=dtype,
        quant_type=first.quant_type,
        block_size=first.block_size,
    )


def dense(stack):
    return torch.stack([stack[e].dequantize(torch.float32) for e in range(len(stack))])


def expected(x, ends, stack):
    weights, start, rows = dense(stack).double().cpu(), 0, []
    for weight, end in zip(weights, ends, strict=True):
        rows.append(x[start:end].double().cpu() @ weight.T)
        start = end
    rows.append(torch.zeros(len(x) - start, weights.shape[1], dtype=torch.float64))
    return torch.cat(rows)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(
    ("ends", "rows"),
    [
        ([3, 3, 10, 11], 11),  # an empty group, rows of one
        ([0, 0, 0, 0], 0),
        ([0, 0, 0, 5], 5),
        ([1, 2, 3, 4], 7),  # rows of no group
        ([40, 140, 140, 200], 200),
    ],
    ids=str,
)
@pytest.mark.parametrize("shape", [(4, 24, 64), (4, 37, 50), (4, 96, 320)], ids=str)
def test_forward_and_gradient_are_those_of_fp64(device, settings, ends, rows, shape):
    stack = stack_of(shape, device, **settings)
    group_ends = torch.tensor(ends, device=device)
    x = torch.randn(rows, shape[2]).to(device).requires_grad_()
    y = grouped_linear_4bit(x, group_ends, stack)
    reference_x = x.detach().cpu().double().requires_grad_()
    reference = expected(reference_x, ends, stack)
    torch.testing.assert_close(y.cpu().double(), reference, rtol=1e-5, atol=1e-4)
    dy = torch.randn(rows, shape[1])
    (gradient,) = torch.autograd.grad(y, x, dy.to(device))
    (reference_gradient,) = torch.autograd.grad(reference, reference_x, dy.double())
    torch.testing.assert_close(gradient.cpu().double(), reference_gradient, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precisions(device, dtype):
    stack = stack_of((3, 64, 128), device, dtype)
    x = torch.randn(20, 128).to(device, dtype)
    y = grouped_linear_4bit(x, torch.tensor([7, 8, 20], device=device), stack)
    assert y.dtype == dtype
    error = (y.cpu().double() - expected(x, [7, 8, 20], stack)).norm()
    assert error < 0.01 * expected(x, [7, 8, 20], stack).norm()


def test_each_group_is_the_linear_of_its_matrix(device):
    """The very kernel: one product per group."""
    stack = stack_of((3, 64, 128), device)
    x = torch.randn(9, 128).to(device)
    y = grouped_linear_4bit(x, torch.tensor([4, 5, 9], device=device), stack)
    parts = [qn.linear_4bit(x[rows], stack[e]) for e, rows in enumerate((slice(4), slice(4, 5)))]
    assert torch.equal(y[:5], torch.cat(parts))


def test_gradients_of_gradients_and_strided_rows():
    stack = stack_of((2, 6, 8))
    ends = torch.tensor([2, 5])
    x = torch.randn(5, 16, dtype=torch.float32)[:, ::2].requires_grad_()
    # Linear in x: numerical differences are exact but for rounding.
    assert torch.autograd.gradcheck(
        lambda x: grouped_linear_4bit(x, ends, stack), x, eps=1e-1, atol=1e-3, rtol=1e-3
    )
    assert torch.autograd.gradgradcheck(
        lambda x: grouped_linear_4bit(x, ends, stack) ** 2, x, eps=1e-1, atol=1e-2, rtol=1e-2
    )


def test_autocast_and_operator_checks():
    stack = stack_of((2, 6, 8))
    ends, x = torch.tensor([2, 5]), torch.randn(5, 8)
    with torch.autocast("cpu", torch.bfloat16):
        assert grouped_linear_4bit(x, ends, stack).dtype == torch.bfloat16
    arguments = (
        ends, stack.packed, stack.absmax, stack.absmax2, stack.offset, [2, 6, 8], 64, "nf4", None
    )  # fmt: skip
    for name, first in (("grouped_linear_4bit", x), ("grouped_linear_4bit_dx", torch.randn(5, 6))):
        operator = getattr(torch.ops.qlora_native, name).default
        torch.library.opcheck(operator, (first.requires_grad_(), *arguments))


def test_wrong_arguments_are_named():
    stack = stack_of((2, 6, 8))
    x, ends = torch.randn(5, 8), torch.tensor([2, 5])
    with pytest.raises(ValueError, match=r"x has shape \(5, 7\), but the weights are \(2, 6, 8\)"):
        grouped_linear_4bit(x[:, :7], ends, stack)
    with pytest.raises(ValueError, match="expected rows sorted by group"):
        grouped_linear_4bit(x[None], ends, stack)
    with pytest.raises(ValueError, match=r"group_ends is \(3,\) torch.int64, expected \(2,\)"):
        grouped_linear_4bit(x, torch.tensor([1, 2, 5]), stack)
    with pytest.raises(ValueError, match=r"group_ends is \(2,\) torch.int32"):
        grouped_linear_4bit(x, ends.int(), stack)
    for bad in ([3, 2], [2, 6], [-1, 3]):
        with pytest.raises(ValueError, match=r"group_ends\[[01]\] is -?\d, after \d, of 5 rows"):
            grouped_linear_4bit(x, torch.tensor(bad), stack)
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        grouped_linear_4bit(x.double(), ends, stack)
    with pytest.raises(ValueError, match="expected a row for each of 3 matrices"):
        grouped_linear_4bit(
            x, torch.tensor([1, 2, 5]), QuantizedStack(**(vars(stack) | {"shape": (3, 6, 8)}))
        )
    with pytest.raises(ValueError, match="three dimensions"):
        grouped_linear_4bit(x, ends, QuantizedStack(**(vars(stack) | {"shape": (6, 8)})))
