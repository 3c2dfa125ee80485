"""linear_4bit: values against fp64, gradients, and how torch's machinery sees it."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

import qlora_native as qn
import reference

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def fp64(x, q, bias=None):
    w = reference.dequantize(q).double().to(x.device)
    return torch.nn.functional.linear(x.double(), w, None if bias is None else bias.double())


def assert_as_good_as_dense(y, exact, dense, terms):
    """The error against fp64 is no larger than that of the dense layer over the rounded weight.

    Summation orders differ, so an fp32 sum of `terms` products may also err by a random walk of
    that many roundings.
    """
    assert y.dtype == dense.dtype and y.shape == exact.shape
    error = (y.double() - exact).norm()
    dense_error = (dense.double() - exact).norm()
    rounding = max(torch.finfo(y.dtype).eps, torch.finfo(torch.float32).eps * terms**0.5)
    assert error <= 1.05 * dense_error + exact.norm() * rounding, (error, dense_error)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 2, 7, 16, 33, 200])
@pytest.mark.parametrize(
    ("n", "k"), [(64, 64), (1, 64), (96, 192), (33, 65), (130, 31), (7, 1), (300, 4160)]
)
def test_forward_and_dx(device, n, k, m, dtype):
    q = qn.quantize_4bit(torch.randn(n, k, device=device).to(dtype))
    x = torch.randn(m, k, device=device).to(dtype).requires_grad_()
    bias = torch.randn(n, device=device).to(dtype).requires_grad_()
    y = qn.linear_4bit(x, q, bias)
    dense_w = q.dequantize(dtype)
    assert_as_good_as_dense(y, fp64(x, q, bias), torch.nn.functional.linear(x, dense_w, bias), k)
    dy = torch.randn_like(y)
    y.backward(dy)
    exact = dy.double() @ reference.dequantize(q).double().to(device)
    assert_as_good_as_dense(x.grad, exact, dy @ dense_w, n)
    torch.testing.assert_close(bias.grad, dy.sum(0))


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 40),
    n=st.integers(1, 150),
    k=st.integers(1, 300),
    block_size=st.sampled_from([32, 64, 256, 4096]),
    quant_type=st.sampled_from(["nf4", "fp4", "int4"]),
    double_quant=st.booleans(),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_any_shape(m, n, k, block_size, quant_type, double_quant, dtype, seed):
    torch.manual_seed(seed)
    q = qn.quantize_4bit(torch.randn(n, k), quant_type, block_size, double_quant)
    x = torch.randn(m, k).to(dtype)
    y = qn.linear_4bit(x, q)
    dense = torch.nn.functional.linear(x, q.dequantize(dtype))
    assert_as_good_as_dense(y, fp64(x, q), dense, k)


# Kernels of bfloat16 round the weights to it, and the result.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}


@pytest.mark.parametrize("op", ["matmul_4bit", "matmul_4bit_transposed"])
def test_every_kernel_gives_the_same_answer(device, op):
    q = qn.quantize_4bit(torch.randn(72, 192, device=device))  # rows of dy are 16-byte aligned
    w = reference.dequantize(q).to(device)
    usable = {k.name for k in qn.kernels.list(op) if k.device == device and k.usable}
    ran = set()
    for kernel in usable:
        for dtype, m in itertools.product(TOLERANCES, (1, 5, 40)):
            x = torch.randn(m, 192, device=device, dtype=dtype, requires_grad=True)
            with qn.kernels.force(op, kernel, device):
                try:
                    y = qn.linear_4bit(x, q)
                    (dx,) = torch.autograd.grad(y.sum(), x)
                except NotImplementedError:
                    continue  # not for this dtype, or not for so many rows
                assert qn.kernels.last(op) == kernel
            tolerance = TOLERANCES[dtype]
            magnitude = x.detach().double().abs() @ w.double().abs().t()
            assert ((y.double() - fp64(x, q)).abs() <= tolerance * magnitude.clamp(min=1)).all()
            expected = w.double().sum(0)
            bound = tolerance * w.double().abs().sum(0).clamp(min=1)
            assert ((dx.double() - expected).abs() <= bound).all()
            ran.add(kernel)
    assert ran == usable


def test_leading_dimensions_and_layouts(device):
    q = qn.quantize_4bit(torch.randn(48, 96, device=device))
    base = torch.randn(4, 5, 192, device=device)
    for x in (
        base[..., :96],
        base[..., ::2],
        base[:, :, 96:].transpose(0, 1),
        base[0, 0, :96],
        base[:1, :1, :96].expand(3, 5, 96),
    ):
        y = qn.linear_4bit(x, q)
        assert y.shape == (*x.shape[:-1], 48)
        torch.testing.assert_close(y.double(), fp64(x, q), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96)])
def test_empty_batch(device, shape):
    q = qn.quantize_4bit(torch.randn(48, 96, device=device))
    x = torch.empty(shape, device=device, requires_grad=True)
    y = qn.linear_4bit(x, q)
    assert y.shape == (*shape[:-1], 48)
    y.sum().backward()
    assert x.grad.shape == x.shape


def test_no_features(device):
    bias = torch.randn(4, device=device)
    y = qn.linear_4bit(
        torch.empty(3, 0, device=device), qn.quantize_4bit(torch.empty(4, 0, device=device)), bias
    )
    assert torch.equal(y, bias.expand(3, 4))


def test_deterministic(device):
    q = qn.quantize_4bit(torch.randn(512, 1024, device=device))
    for m in (1, 8, 100):
        x = torch.randn(m, 1024, device=device)
        assert torch.equal(qn.linear_4bit(x, q), qn.linear_4bit(x, q))


@pytest.mark.filterwarnings("ignore:Input #.* requires gradient and is not a double precision")
def test_gradcheck():
    q = qn.quantize_4bit(torch.randn(5, 33))
    x = torch.randn(3, 33, requires_grad=True)
    bias = torch.randn(5, requires_grad=True)

    def f(x, bias):
        return qn.linear_4bit(x, q, bias)

    # The function is linear: a large step has no truncation error, and fp32 is exact enough.
    assert torch.autograd.gradcheck(f, (x, bias), eps=0.25, atol=1e-3, check_undefined_grad=True)
    assert torch.autograd.gradgradcheck(f, (x, bias), eps=0.25, atol=1e-3)


def test_only_packed_tensors_are_saved():
    q = qn.quantize_4bit(torch.randn(128, 256))
    x = torch.randn(600, 256, requires_grad=True)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        qn.linear_4bit(x, q)
    assert {t.data_ptr() for t in saved} == {
        t.data_ptr() for t in (q.packed, q.absmax, q.absmax2, q.offset)
    }


def operator_samples(device):
    q = qn.quantize_4bit(torch.randn(16, 64, device=device))
    nested = (q.packed, q.absmax, q.absmax2, q.offset, [16, 64], 64, "nf4", None)
    p = qn.quantize_4bit(
        torch.randn(5, 33, device=device),
        "custom",
        32,
        False,
        codebook=[i / 8 - 1 for i in range(16)],
    )
    plain = (p.packed, p.absmax, None, None, [5, 33], 32, "custom", p.codebook)
    ops = torch.ops.qlora_native
    x = torch.randn(2, 3, 64, device=device, requires_grad=True)
    return [
        (ops.quantize_4bit, (torch.randn(9, 64, device=device), "nf4", 64, True, None, None)),
        (ops.quantize_4bit, (torch.randn(9, 33, device=device), "fp4", 32, False, None, None)),
        (ops.dequantize_4bit, (*nested, torch.bfloat16)),
        (ops.dequantize_4bit, (*plain, torch.float32)),
        (ops.linear_4bit, (x, None, *nested)),
        (
            ops.linear_4bit,
            (torch.randn(3, 33, device=device), torch.randn(5, device=device), *plain),
        ),
        (ops.linear_4bit_dx, (torch.randn(3, 16, device=device), *nested)),
    ]


def test_opcheck(device):
    for op, arguments in operator_samples(device):
        results = torch.library.opcheck(op.default, arguments)
        assert set(results.values()) == {"SUCCESS"}


@pytest.mark.skipif(
    torch.__version__.startswith(("2.9.", "2.10.")),
    reason="its compiler loses an argument of a Function where shapes are dynamic",
)
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph_forward_and_backward(device, backend):
    torch._dynamo.reset()
    q = qn.quantize_4bit(torch.randn(64, 128, device=device))
    bias = torch.randn(64, device=device, requires_grad=True)

    def f(x):
        return torch.nn.functional.gelu(qn.linear_4bit(x * 2, q, bias)).sum()

    compiled = torch.compile(f, fullgraph=True, backend=backend, dynamic=True)
    for m in (1, 9, 300):
        x = torch.randn(m, 128, device=device, requires_grad=True)
        expected = torch.autograd.grad(f(x), (x, bias))
        actual = torch.autograd.grad(compiled(x), (x, bias))
        for a, e in zip(actual, expected, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), f(x), rtol=1e-4, atol=1e-4)


def test_exports():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.q = qn.quantize_4bit(torch.randn(32, 64))

        def forward(self, x):
            return qn.linear_4bit(x, self.q)

    layer, x = Layer(), torch.randn(3, 64)
    program = torch.export.export(layer, (x,))
    targets = {str(node.target) for node in program.graph.nodes}
    assert "qlora_native.linear_4bit.default" in targets
    assert torch.equal(program.module()(x), layer(x))


@pytest.mark.parametrize("m", [2, 64])  # a kernel of ours; a dense product
def test_an_exported_program_has_gradients(m):
    model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.GELU(), torch.nn.Linear(64, 32))
    qn.quantize_model(model)
    qn.add_lora(model, r=4)
    x = torch.randn(m, 64)
    parameters = [p for p in model.parameters() if p.requires_grad]
    with torch.no_grad():
        for parameter in parameters:
            parameter.normal_(std=0.1)
    expected = torch.autograd.grad(model(x).square().sum(), parameters)
    exported = torch.export.export(model, (x,)).module()
    exported(x).square().sum().backward()
    actual = [p.grad for p in exported.parameters() if p.requires_grad]
    assert len(actual) == len(expected) == 4
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e)


def test_the_bare_operator_has_gradients():
    op, (x, bias, *weight) = operator_samples("cpu")[4]
    y = op(x, bias, *weight)
    (dx,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    expected = torch.autograd.grad(
        torch.nn.functional.linear(
            x, torch.ops.qlora_native.dequantize_4bit(*weight, x.dtype)
        ).sum(),
        x,
    )[0]
    torch.testing.assert_close(dx, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(device, dtype):
    q = qn.quantize_4bit(torch.randn(32, 64, device=device))
    x = torch.randn(3, 64, device=device, requires_grad=True)
    bias = torch.randn(32, device=device, requires_grad=True)
    with torch.autocast(device, dtype=dtype):
        y = qn.linear_4bit(x, q, bias)
    assert y.dtype == dtype
    assert torch.equal(y, qn.linear_4bit(x.to(dtype), q, bias.to(dtype)))
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32 and bias.grad.dtype == torch.float32


def test_flops_are_counted():
    q = qn.quantize_4bit(torch.randn(32, 64))
    x = torch.randn(5, 64, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        qn.linear_4bit(x, q).sum().backward()
    assert counter.get_total_flops() == 2 * (2 * 5 * 32 * 64)


def test_wrong_arguments():
    q = qn.quantize_4bit(torch.randn(32, 64))
    with pytest.raises(ValueError, match=r"\(5, 63\).*\(32, 64\).*must be 64"):
        qn.linear_4bit(torch.randn(5, 63), q)
    with pytest.raises(TypeError, match="float64"):
        qn.linear_4bit(torch.randn(5, 64, dtype=torch.float64), q)
    with pytest.raises(TypeError, match="int64"):
        qn.linear_4bit(torch.ones(5, 64, dtype=torch.int64), q)
    with pytest.raises(ValueError, match=r"bias has shape \(31,\), expected \(32,\)"):
        qn.linear_4bit(torch.randn(5, 64), q, torch.randn(31))
    with pytest.raises(ValueError, match="two dimensions"):
        qn.linear_4bit(torch.randn(5, 64), qn.quantize_4bit(torch.randn(64)))
    with pytest.raises(ValueError, match="last dimension must be 64"):
        qn.linear_4bit(torch.tensor(1.0), q)


def test_tensors_on_another_device():
    q = qn.quantize_4bit(torch.randn(32, 64))
    with pytest.raises(ValueError, match="x is on meta, the 4-bit weight on cpu"):
        qn.linear_4bit(torch.randn(5, 64, device="meta"), q)


def test_meta_tensors_have_shapes():
    q = qn.quantize_4bit(torch.randn(32, 64)).to("meta")
    y = qn.linear_4bit(torch.randn(5, 64, device="meta", dtype=torch.bfloat16), q)
    assert y.shape == (5, 32) and y.dtype == torch.bfloat16 and y.device.type == "meta"


def test_forced_kernel_errors():
    with (
        pytest.raises(ValueError, match=r"no kernel named 'nonesuch' on cpu; there are: .*scalar"),
        qn.kernels.force("matmul_4bit", "nonesuch"),
    ):
        pass
    with pytest.raises(ValueError, match="no operation named 'matmul'"):
        qn.kernels.list("matmul")
    many_rows = {"m": 4096, "dtype": torch.float32}
    assert qn.kernels.selected_for("matmul_4bit", (4096, 4096), **many_rows) == qn.kernels.DENSE
    with qn.kernels.force("matmul_4bit", "scalar"):
        assert qn.kernels.selected_for("matmul_4bit", (4096, 4096), **many_rows) == "scalar"
