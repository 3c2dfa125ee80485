"""Products of groups of rows with their own 4-bit weights, against fp64."""

import pytest
import torch
import torch.utils.checkpoint

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


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("sizes", [(7, 1, 12), (0, 90, 40)], ids=str)
def test_half_precisions(device, dtype, index_dtype, sizes):
    stack = stack_of((3, 64, 128), device, dtype)
    ends = torch.tensor(sizes).cumsum(0)
    x = torch.randn(int(ends[-1]), 128).to(device, dtype).requires_grad_()
    bias = torch.randn(3, 64).to(device, dtype)
    y = grouped_linear_4bit(x, ends.to(device, index_dtype), stack, bias)
    assert y.dtype == dtype
    reference_x = x.detach().double().cpu().requires_grad_()
    reference = expected(reference_x, ends.tolist(), stack)
    reference = reference + bias.double().cpu().repeat_interleave(torch.tensor(sizes), 0)
    assert (y.cpu().double() - reference).norm() < 0.006 * reference.norm()
    dy = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, x, dy)
    (reference_gradient,) = torch.autograd.grad(reference, reference_x, dy.double().cpu())
    assert gradient.dtype == dtype
    error = (gradient.cpu().double() - reference_gradient).norm()
    assert error < 0.006 * reference_gradient.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_each_group_is_the_linear_of_its_matrix(device, dtype):
    stack = stack_of((4, 64, 128), device, dtype)
    x = torch.randn(30, 128).to(device, dtype).requires_grad_()
    bias = torch.randn(4, 64).to(device, dtype).requires_grad_()
    rows = (slice(0, 4), slice(4, 4), slice(4, 5), slice(5, 30))
    y = grouped_linear_4bit(x, torch.tensor([4, 4, 5, 30], device=device), stack, bias)
    parts = [qn.linear_4bit(x[part], stack[e], bias[e]) for e, part in enumerate(rows)]
    # In 16 bits kernels may round a weight, and have their own order of sums of 128 such products.
    is_exact = dtype == torch.float32
    tolerance = {"rtol": 1e-5 if is_exact else 2**-6, "atol": 1e-5 if is_exact else 0.1}
    torch.testing.assert_close(y, torch.cat(parts), **tolerance)
    dy = torch.randn_like(y)
    for got, wanted in zip(
        torch.autograd.grad(y, (x, bias), dy),
        torch.autograd.grad(torch.cat(parts), (x, bias), dy),
        strict=True,
    ):
        torch.testing.assert_close(got, wanted, **tolerance)


def test_one_call_of_the_core_on_every_device(device):
    """Every kernel that takes the call, and not a product for each group."""
    stack = stack_of((3, 64, 128), device, torch.bfloat16)
    x, ends = torch.randn(20, 128).to(device, torch.bfloat16), torch.tensor([7, 8, 20]).to(device)
    reference = expected(x, [7, 8, 20], stack)
    for op in ("grouped_matmul_4bit", "grouped_matmul_4bit_transposed"):
        names = [k.name for k in qn.kernels.list(op) if k.device == device and k.usable]
        assert names
        for name in names:
            with qn.kernels.force(op, name, device):
                if op == "grouped_matmul_4bit":
                    y = grouped_linear_4bit(x, ends, stack)
                    assert (y.cpu().double() - reference).norm() < 0.006 * reference.norm()
                else:
                    weight = (stack.packed, stack.absmax, stack.absmax2, stack.offset)
                    form = (stack.shape, stack.block_size, stack.quant_type, stack.codebook)
                    dy = torch.randn(20, 64).to(device, torch.bfloat16)
                    torch.ops.qlora_native.grouped_linear_4bit_dx(dy, ends, *weight, *form)
            assert qn.kernels.last(op) == name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_holds_it_and_replays_it_with_other_groups():
    stack = stack_of((4, 64, 128), "cuda", torch.bfloat16)
    x = torch.randn(40, 128).to("cuda", torch.bfloat16)
    ends = torch.tensor([10, 20, 30, 40], device="cuda")
    grouped_linear_4bit(x, ends, stack)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = grouped_linear_4bit(x, ends, stack)
    for groups in ([40, 40, 40, 40], [0, 1, 2, 39], [0, 0, 33, 33]):
        ends.copy_(torch.tensor(groups))
        graph.replay()
        reference = expected(x, groups, stack)
        assert (y.cpu().double() - reference).norm() < 0.006 * reference.norm()


@pytest.mark.parametrize("op", ["grouped_matmul_4bit", "grouped_matmul_4bit_transposed"])
def test_the_kernel_of_one_group_can_be_asked_for(device, op):
    names = {kernel.name for kernel in qn.kernels.list(op) if kernel.device == device}
    assert qn.kernels.selected_for(op, (64, 128), m=3, device=device) in names
    with qn.kernels.force(op, "scalar"):
        assert qn.kernels.selected_for(op, (64, 128), m=300) == "scalar"


def test_the_bias_is_that_of_the_group(device):
    stack = stack_of((3, 24, 64), device)
    ends, sizes = torch.tensor([2, 2, 9], device=device), torch.tensor([2, 0, 7])
    x = torch.randn(11, 64).to(device)
    bias = torch.randn(3, 24).to(device).requires_grad_()
    y = grouped_linear_4bit(x, ends, stack, bias)
    reference = expected(x, ends.tolist(), stack)
    reference[:9] += bias.detach().double().cpu().repeat_interleave(sizes, 0)
    torch.testing.assert_close(y.detach().cpu().double(), reference, rtol=1e-5, atol=1e-4)
    dy = torch.randn_like(y)
    (gradient,) = torch.autograd.grad(y, bias, dy)
    wanted = torch.stack([dy[:2].sum(0), torch.zeros_like(dy[0]), dy[2:9].sum(0)])
    torch.testing.assert_close(gradient, wanted, rtol=1e-5, atol=1e-5)


def test_compiled_and_checkpointed_it_is_the_same(device):
    stack = stack_of((3, 24, 64), device)
    ends, x = torch.tensor([2, 2, 9], device=device), torch.randn(9, 64).to(device)
    bias = torch.randn(3, 24).to(device).requires_grad_()
    x.requires_grad_()

    def layer(x):
        return grouped_linear_4bit(x.tanh(), ends, stack, bias).square()

    def checkpointed(x):
        return torch.utils.checkpoint.checkpoint(layer, x, use_reentrant=False)

    results = []
    for one in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager"), checkpointed):
        y = one(x)
        results.append((y, *torch.autograd.grad(y.sum(), (x, bias))))
    for other in results[1:]:
        for got, wanted in zip(other, results[0], strict=True):
            torch.testing.assert_close(got, wanted)


def test_no_matrices_and_no_rows(device):
    empty = stack_of((1, 24, 64), device)
    none = QuantizedStack(
        **(vars(empty) | {"shape": torch.Size((0, 24, 64))})
        | {name: getattr(empty, name)[:0] for name in ("packed", "absmax", "absmax2", "offset")}
    )
    ends = torch.zeros(0, dtype=torch.int64, device=device)
    assert torch.equal(
        grouped_linear_4bit(torch.ones(3, 64, device=device), ends, none).cpu(), torch.zeros(3, 24)
    )
    y = grouped_linear_4bit(torch.ones(0, 64, device=device), ends.new_zeros(1), empty)
    assert y.shape == (0, 24)


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
    weight = (
        stack.packed, stack.absmax, stack.absmax2, stack.offset, [2, 6, 8], 64, "nf4", None
    )  # fmt: skip
    bias = torch.randn(2, 6).requires_grad_()
    operators = torch.ops.qlora_native
    for operator, arguments in (
        (operators.grouped_linear_4bit, (x.requires_grad_(), ends, None)),
        (operators.grouped_linear_4bit, (x, ends, bias)),
        (operators.grouped_linear_4bit_dx, (torch.randn(5, 6).requires_grad_(), ends)),
    ):
        torch.library.opcheck(operator.default, (*arguments, *weight))


def test_wrong_arguments_are_named():
    stack = stack_of((2, 6, 8))
    x, ends = torch.randn(5, 8), torch.tensor([2, 5])
    with pytest.raises(ValueError, match=r"x has shape \(5, 7\), but the weights are \(2, 6, 8\)"):
        grouped_linear_4bit(x[:, :7], ends, stack)
    with pytest.raises(ValueError, match="expected rows sorted by group"):
        grouped_linear_4bit(x[None], ends, stack)
    with pytest.raises(ValueError, match=r"group_ends is \(3,\) torch.int64, expected \(2,\)"):
        grouped_linear_4bit(x, torch.tensor([1, 2, 5]), stack)
    with pytest.raises(ValueError, match=r"group_ends is \(2,\) torch.int16, .* torch.int32 or"):
        grouped_linear_4bit(x, ends.short(), stack)
    for bad in ([3, 2], [2, 6], [-1, 3]):
        with pytest.raises(ValueError, match=r"group [01] ends at row -?\d, after \d, of 5 rows"):
            grouped_linear_4bit(x, torch.tensor(bad), stack)
    with pytest.raises(ValueError, match=r"bias has shape \(6,\), expected \(2, 6\)"):
        grouped_linear_4bit(x, ends, stack, torch.randn(6))
    with pytest.raises(TypeError, match=r"x is torch\.float64"):
        grouped_linear_4bit(x.double(), ends, stack)
    with pytest.raises(ValueError, match="expected a row for each of 3 matrices"):
        grouped_linear_4bit(
            x, torch.tensor([1, 2, 5]), QuantizedStack(**(vars(stack) | {"shape": (3, 6, 8)}))
        )
    with pytest.raises(ValueError, match="three dimensions"):
        grouped_linear_4bit(x, ends, QuantizedStack(**(vars(stack) | {"shape": (6, 8)})))
