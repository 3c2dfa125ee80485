"""Eager calls: which go around torch's dispatcher, and that none of those shows a difference."""

import threading

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import qlora_native as qn
from _eager_calls import direct, indirect, needs_table, parts_of, weight
from qlora_native import _eager
from qlora_native.nn import Linear4bit

OPS = torch.ops.qlora_native
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SETTINGS = [
    {},
    {"double_quant": False},
    {"quant_type": "fp4", "block_size": 32},
    {"quant_type": "custom", "codebook": tuple(i / 8 - 1 for i in range(16))},
]

pytestmark = needs_table


class Operators(TorchDispatchMode):
    """Collects the names of operators."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


# ---- the calls that go around the dispatcher ----


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [False, True])
def test_a_direct_product_is_the_operators(device, settings, dtype, bias):
    linear = torch.nn.Linear(128, 48, bias=bias, device=device, dtype=dtype)
    layer = Linear4bit.from_linear(linear, **settings)
    q = layer.quantized_weight()
    for shape in ((128,), (1, 128), (3, 128), (2, 1, 2, 128)):
        x = torch.randn(shape, device=device).to(dtype)
        expected = indirect(lambda x=x: OPS.linear_4bit(x, linear.bias, *parts_of(q)))
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                y = direct(lambda x=x: qn.linear_4bit(x, q, linear.bias))
                z = direct(lambda x=x: layer(x))
                assert y.is_inference() == (mode is torch.inference_mode)
            assert y.dtype == dtype and y.device == x.device and y.is_contiguous()
            assert torch.equal(y, expected) and torch.equal(z, expected)
            assert not y.requires_grad


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_direct_gradient_is_the_operators(settings):
    q = weight(**settings)
    for shape in ((48,), (1, 48), (2, 3, 48)):
        dy = torch.randn(shape)
        expected = indirect(lambda dy=dy: OPS.linear_4bit_dx(dy, *parts_of(q)))
        with qn.kernels.force("matmul_4bit_transposed", "scalar"):
            assert direct(lambda dy=dy: _eager.linear_4bit_dx(dy, *parts_of(q))).shape == (
                *shape[:-1], 128,
            )  # fmt: skip
        assert torch.equal(_eager.linear_4bit_dx(dy, *parts_of(q)), expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_direct_dense_products_are_the_operators(device, dtype):
    q = weight(device)
    bias = torch.randn(48, device=device).to(dtype)
    for shape in ((64, 128), (2, 300, 128)):
        x = torch.randn(shape, device=device).to(dtype)
        for b in (None, bias):
            y = direct(lambda x=x, b=b: qn.linear_4bit(x, q, b))
            torch.testing.assert_close(y, OPS.linear_4bit(x, b, *parts_of(q)))
        dx = direct(lambda y=y: _eager.linear_4bit_dx(y, *parts_of(q)))
        torch.testing.assert_close(dx, OPS.linear_4bit_dx(y, *parts_of(q)))
        assert dx.shape == x.shape and not dx.requires_grad


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("shape", [(48, 128), (5, 33), (130,), (2, 3, 64)])
def test_direct_decoding_is_the_operators(device, settings, shape):
    q = qn.quantize_4bit(torch.randn(shape, device=device), **settings)
    for dtype in DTYPES:
        dense = direct(lambda dtype=dtype: q.dequantize(dtype))
        assert torch.equal(dense, OPS.dequantize_4bit(*parts_of(q), dtype))
        assert dense.shape == shape


def test_rows_may_lie_apart(device):
    q = weight(device)
    base = torch.randn(2, 5, 256, device=device)
    for x in (base[..., :128], base[:, 2, 128:], base[1:2, 1:2, :128], base[:, :1, :128]):
        y = direct(lambda x=x: qn.linear_4bit(x, q))
        torch.testing.assert_close(y, qn.linear_4bit(x.contiguous(), q), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[..., ::2],  # elements apart
        lambda x: x[..., :128].transpose(0, 1),  # rows in two directions
        lambda x: x[:1, :1, :128].expand(4, 5, 128),  # one row many times
    ],
)
def test_other_layouts_go_the_long_way(change):
    q, x = weight(), change(torch.randn(4, 5, 256))
    y = indirect(lambda: qn.linear_4bit(x, q))
    torch.testing.assert_close(y, qn.linear_4bit(x.contiguous(), q))


def test_the_result_is_memory_of_torch(device):
    y = direct(lambda: qn.linear_4bit(torch.randn(1, 128, device=device), weight(device)))
    storage = y.untyped_storage()
    assert storage.resizable() and storage.nbytes() == y.nbytes and y.grad_fn is None
    y.add_(1).resize_(100, 100)


def test_forced_kernels_and_errors_of_the_core():
    q, x = weight(cols=96), torch.randn(1, 96)
    with qn.kernels.force("matmul_4bit", "scalar"):
        direct(lambda: qn.linear_4bit(x, q))
        assert qn.kernels.last("matmul_4bit") == "scalar"
    vector = [k.name for k in qn.kernels.list("matmul_4bit") if k.usable and "gemv" in k.name]
    for name in vector:
        with (
            qn.kernels.force("matmul_4bit", name),
            pytest.raises(NotImplementedError, match="K = 96 is not a multiple"),
        ):
            qn.linear_4bit(x, q)


def test_many_threads_at_once():
    q, wrong = weight(), []
    inputs = [torch.randn(1, 128) for _ in range(4)]
    expected = [qn.linear_4bit(x, q) for x in inputs]

    def work(i):
        for _ in range(200):
            if not torch.equal(qn.linear_4bit(inputs[i], q), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# ---- those that something of torch has to see ----


def test_gradients_flow():
    q, x = weight(), torch.randn(2, 128, requires_grad=True)
    bias = torch.randn(48, requires_grad=True)
    w = q.dequantize()
    for arguments in ((x, None), (x.detach(), bias), (x, bias)):
        leaves = [t for t in arguments if t is not None and t.requires_grad]
        y = qn.linear_4bit(arguments[0], q, arguments[1])
        expected = torch.nn.functional.linear(arguments[0], w, arguments[1])
        actual = torch.autograd.grad(y.square().sum(), leaves)
        for a, e in zip(actual, torch.autograd.grad(expected.square().sum(), leaves), strict=True):
            torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-3)
    layer = Linear4bit.from_linear(torch.nn.Linear(128, 48))
    assert layer(x.detach()).requires_grad  # of the bias


def test_dispatch_modes_see_the_operators():
    q, x = weight(), torch.randn(2, 128, requires_grad=True)
    layer = Linear4bit.from_linear(torch.nn.Linear(128, 48, bias=False))
    with Operators() as seen:
        indirect(lambda: qn.linear_4bit(x, q).sum().backward())
        indirect(lambda: layer(x.detach()))
        indirect(q.dequantize)
    ours = [name for name in seen.names if name.startswith("qlora_native::")]
    assert ours == [
        "qlora_native::linear_4bit", "qlora_native::linear_4bit_dx",
        "qlora_native::linear_4bit", "qlora_native::dequantize_4bit",
    ]  # fmt: skip


def test_function_modes_see_the_operator():
    seen = []

    class Names(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    with Names():
        indirect(lambda: qn.linear_4bit(torch.ones(1, 128), weight()))
    assert any("linear_4bit" in name for name in seen)


def test_flops_are_counted_without_gradients():
    q, x = weight(), torch.randn(5, 128)
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        indirect(lambda: qn.linear_4bit(x, q))
    assert counter.get_total_flops() == 2 * 5 * 48 * 128


def test_the_profiler_shows_the_operator():
    q, x = weight(), torch.randn(1, 128)
    with torch.profiler.profile() as profile:
        indirect(lambda: qn.linear_4bit(x, q))
    assert any(event.key == "qlora_native::linear_4bit" for event in profile.key_averages())


@pytest.mark.parametrize("layer", [False, True])
def test_compiled_code_holds_the_operator(layer):
    torch._dynamo.reset()
    q, x, graphs = weight(), torch.randn(1, 128), []
    function = Linear4bit.from_quantized(q) if layer else lambda x: qn.linear_4bit(x, q)

    def backend(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return graph.forward

    expected = direct(lambda: function(x))
    y = indirect(lambda: torch.compile(function, backend=backend, fullgraph=True)(x))
    assert torch.equal(y, expected)
    assert any("linear_4bit" in target for target in set.union(*graphs))


def test_make_fx_and_jit_traces_hold_the_operator():
    q, x = weight(), torch.randn(1, 128)

    def function(x):
        return qn.linear_4bit(x, q)

    graph = torch.fx.experimental.proxy_tensor.make_fx(function)(x)
    assert "qlora_native.linear_4bit" in graph.code
    traced = indirect(lambda: torch.jit.trace(function, (x,), check_trace=False))
    assert "qlora_native::linear_4bit" in str(traced.graph)
    assert torch.equal(traced(x + 1), function(x + 1))


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_transforms():
    q, x = weight(), torch.randn(3, 2, 128)
    y = indirect(lambda: torch.func.vmap(lambda x: qn.linear_4bit(x, q))(x))
    torch.testing.assert_close(y, qn.linear_4bit(x, q))
    g = torch.func.grad(lambda x: qn.linear_4bit(x, q).sum())(x[0])
    torch.testing.assert_close(g, q.dequantize().sum(0).expand(2, -1), rtol=1e-4, atol=1e-4)


def test_forward_mode_is_refused():
    q, x = weight(), torch.randn(1, 128)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: qn.linear_4bit(x, q), (x,), (x,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, x)
        with pytest.raises(NotImplementedError, match="jvp"):
            qn.linear_4bit(dual, q)
        indirect(lambda: _eager.dequantize_4bit(*parts_of(q), x.dtype))


def test_subclasses_go_through_the_operator():
    class Named(torch.Tensor):
        pass

    q, x = weight(), torch.randn(1, 128)
    y = indirect(lambda: qn.linear_4bit(x.as_subclass(Named), q))
    assert type(y) is Named and torch.equal(y.as_subclass(torch.Tensor), qn.linear_4bit(x, q))
    parameter = torch.nn.Parameter(x, requires_grad=False)
    assert type(direct(lambda: qn.linear_4bit(parameter, q))) is torch.Tensor


def test_fake_and_meta_tensors():
    q, x = weight(), torch.randn(1, 128)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
        y = indirect(lambda: qn.linear_4bit(torch.empty(1, 128), q))
    assert type(y) is torch._subclasses.FakeTensor and y.shape == (1, 48)
    meta = indirect(lambda: qn.linear_4bit(x.to("meta"), q.to("meta")))
    assert meta.is_meta


def test_values_that_memory_holds_negated():
    q = weight()
    negated = torch.randn(2, 128, dtype=torch.complex64).conj().imag
    packed_rows = torch._neg_view(torch.randn(2, 128))
    for x in (negated, packed_rows, negated[:1]):
        assert x.is_neg()
        y = indirect(lambda x=x: qn.linear_4bit(x, q))
        assert torch.equal(y, qn.linear_4bit(x.resolve_neg().contiguous(), q))
    bias = torch._neg_view(torch.randn(48))
    x = torch.randn(1, 128)
    y = indirect(lambda: qn.linear_4bit(x, q, bias))
    assert torch.equal(y, qn.linear_4bit(x, q, bias.resolve_neg()))


def test_autocast_casts_as_before(device):
    layer = Linear4bit.from_linear(torch.nn.Linear(128, 48, device=device))
    x = torch.randn(2, 128, device=device)
    for dtype in (torch.bfloat16, torch.float16):
        with torch.no_grad(), torch.autocast(device, dtype=dtype):
            y = direct(lambda: layer(x))
            z = direct(lambda: qn.linear_4bit(x, layer.quantized_weight(), layer.bias))
        assert y.dtype == z.dtype == dtype
        with torch.no_grad():
            expected = qn.linear_4bit(x.to(dtype), layer.quantized_weight(), layer.bias.to(dtype))
        assert torch.equal(y, expected) and torch.equal(z, expected)


def test_a_bias_of_another_dtype_is_cast():
    q, x, bias = weight(), torch.randn(1, 128, dtype=torch.bfloat16), torch.randn(48)
    y = direct(lambda: qn.linear_4bit(x, q, bias))
    assert torch.equal(y, qn.linear_4bit(x, q, bias.bfloat16()))
