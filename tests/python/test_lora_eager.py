"""Steps of adapted layers around torch's dispatcher: which they are, and that none is different."""

import contextlib
import copy

import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import qlora_native as qn
from _eager_calls import Everything, calls_of, needs_table
from _lora_case import DTYPES, assert_step
from _lora_case import Case as LoraCase
from qlora_native.nn import Linear4bit, LoraLinear, LoraSettings

pytestmark = needs_table

SETTINGS = [
    {},
    {"double_quant": False},
    {"quant_type": "fp4", "block_size": 32},
    {"quant_type": "custom", "codebook": tuple(i / 8 - 1 for i in range(16))},
]


class Functions(TorchFunctionMode):
    """Wants to see every function, and changes none."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


def adapted(device="cpu", dtype=torch.float32, adapter_dtype=None, dropout=0.0, **settings):
    """Return an adapted layer of 128 to 48 features, all of it but the weight trained."""
    linear = torch.nn.Linear(128, 48, device=device, dtype=dtype)
    layer = LoraLinear(Linear4bit.from_linear(linear, **settings))
    layer.add_adapter("default", LoraSettings(r=8, alpha=12, dropout=dropout), dtype=adapter_dtype)
    layer.set_adapter("default")
    torch.nn.init.normal_(layer.lora_B["default"].weight)
    return layer


def leaves_of(layer, x):
    return [x, *(p for p in layer.parameters() if p.requires_grad)]


def step(layer, x, dy=None):
    """Return y and the gradients of everything that has one."""
    y = layer(x)
    gradients = torch.autograd.grad(
        y, leaves_of(layer, x), torch.ones_like(y) if dy is None else dy
    )
    return [y.detach(), *gradients]


def assert_same(actual, expected, dtype=torch.float32):
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    for got, want in zip(actual, expected, strict=True):
        assert got.dtype == want.dtype and got.shape == want.shape
        assert (got - want).float().norm() <= bound * want.float().norm()


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16])
def test_a_step_of_a_layer_is_the_operators(device, settings, dtype, adapter_dtype):
    layer = adapted(device, dtype, adapter_dtype, **settings)
    for shape in ((128,), (5, 128), (2, 3, 128), (2, 1, 2, 128)):
        x = torch.randn(shape, device=device).to(dtype).requires_grad_()
        dy = torch.randn(*shape[:-1], 48, device=device).to(dtype)
        actual, calls = calls_of(lambda x=x, dy=dy: step(layer, x, dy))
        with Everything():
            expected, long_way = calls_of(lambda x=x, dy=dy: step(layer, x, dy))
        assert calls == 2 and long_way == 0
        assert_same(actual, expected, dtype)


def test_a_step_of_the_function_goes_around_the_dispatcher(device):
    case = LoraCase(device)
    y, calls = calls_of(case.run)
    assert calls == 1
    _, calls = calls_of(lambda: assert_step(case, y))
    # The product of the gradient; the case's own decoding is the other.
    assert calls == 2


@pytest.mark.parametrize("rows", [3, 600])
@pytest.mark.parametrize("bias", [False, True])
def test_a_group_is_the_operators(device, rows, bias):
    cases = [LoraCase(device, rank=rank, lead=(rows,)) for rank in (8, 3, 16)]
    x = cases[0].x
    leaves = [x, *(leaf for case in cases for leaf in case.leaves[1 : 4 if bias else 3])]

    def run():
        outputs = qn.linear_4bit_lora_group(
            x,
            [(case.q, case.a, case.b, 0.5 + i) for i, case in enumerate(cases)],
            biases=[case.bias if bias else None for case in cases],
        )
        loss = sum((y * (i + 1)).sum() for i, y in enumerate(outputs))
        return [*(y.detach() for y in outputs), *torch.autograd.grad(loss, leaves)]

    actual, calls = calls_of(run)
    with Everything():
        expected = run()
    assert calls == 6
    assert_same(actual, expected)


@pytest.mark.parametrize("p", [0.3, 1.0])
def test_dropout_is_the_operators(device, p):
    layer = adapted(device, dropout=0.0)
    layer.lora_dropout["default"] = torch.nn.Dropout(p)
    x = torch.randn(4, 128, device=device, requires_grad=True)
    torch.manual_seed(3)
    actual, calls = calls_of(lambda: step(layer, x))
    torch.manual_seed(3)
    with Everything():
        expected = step(layer, x)
    assert calls == 2
    assert_same(actual, expected)


def test_forced_kernels_run(device):
    layer = adapted(device)
    x = torch.randn(4, 128, device=device, requires_grad=True)
    expected = step(layer, x)
    for op in ("lora_project", "lora_update", "lora_gradient", "matmul_4bit"):
        kernel = next(k for k in reversed(qn.kernels.list(op)) if k.usable and k.device == device)
        with qn.kernels.force(op, kernel.name, device):
            actual, calls = calls_of(lambda: step(layer, x))
            assert calls == 2 and qn.kernels.last(op) == kernel.name
        assert_same(actual, expected)


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B", "bias", "x"])
def test_what_is_frozen_has_no_gradient(device, frozen):
    layer = adapted(device)
    x = torch.randn(4, 128, device=device, requires_grad=frozen != "x")
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(parameter.requires_grad and frozen not in name)
    wanted = [leaf for leaf in leaves_of(layer, x) if leaf.requires_grad]
    actual = torch.autograd.grad(layer(x).sum(), wanted)
    with Everything():
        expected = torch.autograd.grad(layer(x).sum(), wanted)
    assert_same(actual, expected)


# ---- around it ----


def test_autocast_computes_in_its_dtype(device):
    layer = adapted(device)
    for rows in (4, 600):
        x = torch.randn(rows, 128, device=device, requires_grad=True)
        with torch.autocast(device, dtype=torch.bfloat16):
            actual, calls = calls_of(lambda x=x: step(layer, x))
            with Everything():
                expected = step(layer, x)
        assert calls == 2 and actual[0].dtype == torch.bfloat16
        assert_same(actual, expected, torch.bfloat16)


@pytest.mark.parametrize("rows", [4, 600])
def test_a_backward_pass_inside_autocast_has_the_dtype_of_its_forward(device, rows):
    layer = adapted(device)
    x = torch.randn(rows, 128, device=device, requires_grad=True)
    expected = step(layer, x)[1:]
    y = layer(x)
    with torch.autocast(device, dtype=torch.bfloat16):
        actual = torch.autograd.grad(y, leaves_of(layer, x), torch.ones_like(y))
    assert_same(actual, expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda dy: dy.mT.contiguous().mT,
        lambda dy: torch.stack([dy, dy], dim=-1)[..., 0],
        lambda dy: dy[:1].expand(dy.shape[0], -1),
        torch._neg_view,
    ],
)
def test_unusual_gradients_go_the_long_way(change):
    layer, x = adapted(), torch.randn(4, 128, requires_grad=True)
    dy = change(torch.randn(4, 48))
    actual, calls = calls_of(lambda: step(layer, x, dy))
    assert calls == 1  # the forward pass
    assert_same(actual, step(layer, x, dy.contiguous().resolve_neg()))


def test_unusual_inputs_go_the_long_way():
    layer, base = adapted(), torch.randn(4, 256)
    x = base[:, ::2].requires_grad_()
    actual, calls = calls_of(lambda: step(layer, x))
    assert calls == 0
    plain = x.detach().contiguous().requires_grad_()
    assert_same(actual, step(layer, plain))
    empty = torch.randn(0, 128, requires_grad=True)
    for gradient in step(layer, empty):
        assert not gradient.any()


def test_the_result_may_be_changed_in_place(device):
    layer = adapted(device)
    x = torch.randn(2, 3, 128, device=device, requires_grad=True)
    y = layer(x)
    expected = y.detach() * 2
    y.mul_(2)
    assert torch.equal(y, expected)
    y.sum().backward()
    assert_same([x.grad], [step(layer, x, torch.full_like(y, 2))[1]])


def test_a_weight_that_changed_since_is_an_error():
    layer, x = adapted(), torch.randn(2, 128, requires_grad=True)
    y = layer(x)
    with torch.no_grad():
        layer.base_layer.weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_second_derivative_is_refused():
    layer, x = adapted(), torch.randn(2, 128, requires_grad=True)
    (dx,) = torch.autograd.grad(layer(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_a_forward_derivative_is_refused():
    layer, x = adapted(), torch.randn(2, 128)
    with (
        torch.autograd.forward_ad.dual_level(),
        pytest.raises((RuntimeError, NotImplementedError), match=r"forward mode|jvp"),
    ):
        layer(torch.autograd.forward_ad.make_dual(x, x))


def gradients_of_seed_2(layer, x):
    """What a checkpoint, begun with the same masks, has to return."""
    torch.manual_seed(2)
    return torch.autograd.grad(layer(x).square().sum(), leaves_of(layer, x))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_checkpointing(device, reentrant, dropout):
    layer = adapted(device, dropout=dropout)
    x = torch.randn(4, 128, device=device, requires_grad=True)
    leaves = leaves_of(layer, x)
    expected = gradients_of_seed_2(layer, x)
    torch.manual_seed(2)
    y = checkpoint(layer, x, use_reentrant=reentrant)
    torch.randn(3)
    y.square().sum().backward()
    # Without gradients, as a reentrant checkpoint calls it first, another kernel may compute y.
    assert_same([leaf.grad for leaf in leaves], expected)


OBSERVERS = [
    Everything,
    Functions,
    lambda: FlopCounterMode(display=False),
    lambda: torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]),
]


@pytest.mark.parametrize("observer", OBSERVERS)
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_one_pass_of_a_checkpoint_may_be_observed(device, observer, dropout):
    layer = adapted(device, dropout=dropout)
    x = torch.randn(4, 128, device=device, requires_grad=True)
    leaves = leaves_of(layer, x)
    expected = gradients_of_seed_2(layer, x)
    for watched in ("forward", "backward"):
        for leaf in leaves:
            leaf.grad = None
        torch.manual_seed(2)
        with observer() if watched == "forward" else contextlib.nullcontext():
            y = checkpoint(layer, x, use_reentrant=False)
        with observer() if watched == "backward" else contextlib.nullcontext():
            y.square().sum().backward()
        assert_same([leaf.grad for leaf in leaves], expected)


def test_a_dispatch_mode_sees_the_operators(device):
    layer, x = adapted(device), torch.randn(4, 128, device=device, requires_grad=True)
    with Everything() as everything:
        step(layer, x)
    ops = torch.ops.qlora_native
    assert {ops.linear_4bit_lora.default, ops.linear_4bit_lora_backward.default} <= set(
        everything.seen
    )


def test_hooks_see_what_they_should(device):
    layer, seen = adapted(device), []
    x = torch.randn(4, 128, device=device, requires_grad=True)
    layer.register_full_backward_hook(lambda module, into, out: seen.append((into, out)))
    layer.lora_A["default"].weight.register_hook(lambda grad: seen.append(grad))
    y = layer(x)
    y.sum().backward()
    into, out = next(entry for entry in seen if isinstance(entry, tuple))
    assert torch.equal(into[0], x.grad) and torch.equal(out[0], torch.ones_like(y))
    assert any(torch.equal(e, layer.lora_A["default"].weight.grad) for e in seen if e is not into)


def test_parameters_that_were_replaced_are_honoured():
    layer, other = adapted(), adapted()
    x = torch.randn(2, 128, requires_grad=True)
    step(layer, x)  # what a cache would remember
    expected = step(copy.deepcopy(other), x)
    layer.load_state_dict(other.state_dict())
    assert_same(step(layer, x), expected)
    with torch.no_grad():
        for parameter in other.parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter)
    for mine, new in zip(layer.parameters(), other.parameters(), strict=True):
        mine.data = new.data
    assert_same(step(layer, x), step(other, x))
