"""linear_4bit_lora against autograd over the decoded weight: values, gradients, dropout."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import qlora_native as qn
from _dropout import drawn_factor, dropout_factor
from _lora_case import DTYPES, IN, OUT, Case, assert_step, relative_error, saved_activations


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lead", [(1,), (7,), (2, 3, 4), (300,)])
def test_values_and_gradients(device, dtype, lead):
    case = Case(device, dtype, lead=lead)
    assert_step(case, case.run())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 3, 16, 70])
def test_adapters_of_any_rank_and_dtype(device, dtype, rank):
    for adapter_dtype in DTYPES:
        case = Case(device, dtype, rank, adapter_dtype=adapter_dtype)
        # Adapters of less precision than x lose nothing but in their own gradients.
        assert_step(case, case.run(), bound=4 * 2**-8 if adapter_dtype != torch.float32 else None)


def test_every_kernel(device):
    """Forced kernels; where none is, torch's products may take their place."""
    for op in ("lora_project", "lora_update", "lora_gradient"):
        for kernel in qn.kernels.list(op):
            if kernel.usable and kernel.device == device:
                # Tensor cores take 16 bits.
                dtype = torch.bfloat16 if kernel.name == "mma" else torch.float32
                case = Case(device, dtype, lead=(33,))
                with qn.kernels.force(op, kernel.name, device):
                    assert_step(case, case.run())
                    assert qn.kernels.last(op) == kernel.name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("p", [0.1, 0.5, 1.0])
def test_dropout_is_that_of_its_seed_forward_and_backward(device, dtype, p):
    case = Case(device, dtype)
    torch.manual_seed(11)
    y = case.run(p)
    torch.manual_seed(11)
    factor = drawn_factor(p, 15, IN).reshape(3, 5, IN).to(device)
    assert_step(case, y, factor)
    torch.manual_seed(11)
    assert torch.equal(case.run(p), y)
    if p < 1:
        assert not torch.equal(case.run(p), y)


def test_a_generator_of_ones_own(device):
    case = Case(device)
    state = torch.random.get_rng_state()
    y = case.run(0.5, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.random.get_rng_state(), state)
    seed, offset = torch.randint(
        2**63 - 1, (2,), generator=torch.Generator().manual_seed(3)
    ).tolist()
    factor = dropout_factor(0.5, seed, offset, 15, IN).reshape(3, 5, IN).to(device)
    assert_step(case, y, factor)


def test_without_dropout_nothing_is_drawn(device):
    case = Case(device)
    state = torch.random.get_rng_state()
    case.run()
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_replays_the_dropout(device, reentrant):
    case = Case(device)
    torch.manual_seed(4)
    expected = torch.autograd.grad(case.run(0.5).square().sum(), case.leaves)
    torch.manual_seed(4)
    y = torch.utils.checkpoint.checkpoint(
        lambda *leaves: case.run(0.5), *case.leaves, use_reentrant=reentrant
    )
    # Something draws between the two runs of the layer.
    torch.randn(5)
    y.square().sum().backward()
    for leaf, gradient in zip(case.leaves, expected, strict=True):
        assert torch.equal(leaf.grad, gradient)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_in_one_graph(device, backend):
    torch._dynamo.reset()
    case = Case(device)

    def f(x, p):
        y = qn.linear_4bit_lora(
            x * 2, case.q, case.a, case.b, case.scaling, bias=case.bias, dropout_p=p
        )
        return torch.nn.functional.gelu(y).sum()

    compiled = torch.compile(f, fullgraph=True, backend=backend)
    for actual, expected in zip(
        torch.autograd.grad(compiled(case.x, 0.0), case.leaves),
        torch.autograd.grad(f(case.x, 0.0), case.leaves),
        strict=True,
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    # Drawn in every call, and forward and backward pass agree: half of x, or nothing, is dropped.
    torch.manual_seed(1)
    first, second = compiled(case.x, 0.5), compiled(case.x, 0.5)
    assert first != second
    torch.manual_seed(1)
    assert compiled(case.x, 0.5) == first


def test_a_compiled_backward_pass_has_the_mask_of_the_forward_pass(device):
    torch._dynamo.reset()
    case = Case(device)
    zeros = qn.quantize_4bit(torch.zeros(OUT, IN, device=device))

    @torch.compile(fullgraph=True, backend="inductor")
    def f(x):
        return qn.linear_4bit_lora(x, zeros, case.a, case.b, 1.0, dropout_p=0.5)

    y = f(case.x)
    dx = torch.autograd.grad(y.sum(), case.x)[0]
    # Where x is dropped its gradient is zero, and y is what the rest gives.
    kept = (dx != 0).double()
    assert 0.3 < kept.mean() < 0.7
    expected = (case.x.double() * kept * 2) @ case.a.double().T @ case.b.double().T
    assert relative_error(y, expected) < 2e-6


def test_autocast(device):
    case = Case(device)
    with torch.autocast(device, dtype=torch.bfloat16):
        y = case.run()
    assert y.dtype == torch.bfloat16
    expected, exact_leaves = case.exact()
    assert relative_error(y, expected) < 4 * 2**-8
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad(y, case.leaves, dy)
    for got, want, leaf in zip(
        gradients,
        torch.autograd.grad(expected, exact_leaves, dy.double()),
        case.leaves,
        strict=True,
    ):
        assert got.dtype == leaf.dtype
        assert relative_error(got, want) < 4 * 2**-8


@pytest.mark.parametrize("p", [0.0, 0.5])
def test_unusual_layouts(device, p):
    plain = Case(device)
    torch.manual_seed(2)
    expected = plain.run(p)
    expected_gradients = torch.autograd.grad(expected.square().sum(), plain.leaves)
    for change in (
        lambda t: torch.stack([t, t], dim=-1)[..., 0],
        lambda t: torch.cat([t, t], dim=-1)[..., : t.shape[-1]],
        lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    ):
        torch.manual_seed(2)
        x, a, b, bias = (change(leaf) for leaf in plain.leaves)
        y = qn.linear_4bit_lora(x, plain.q, a, b, plain.scaling, bias=bias, dropout_p=p)
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-5)
        # A gradient that is expanded, too.
        for got, want in zip(
            torch.autograd.grad(y.square().sum(), plain.leaves), expected_gradients, strict=True
        ):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-3)
    dy = torch.ones((), device=device).expand_as(expected)
    torch.autograd.grad(plain.run(), plain.leaves, dy)


@pytest.mark.parametrize("frozen", ["a", "b", "x", "ab"])
def test_what_is_frozen_has_no_gradient_and_keeps_nothing(device, frozen):
    case = Case(device)
    for name in frozen:
        getattr(case, name).requires_grad_(False)
    saved = saved_activations(case.run)
    kept = {t.shape for t in saved}
    assert (case.x.shape in kept) == ("a" not in frozen)
    assert (torch.Size([15, 8]) in kept) == ("b" not in frozen)
    y = case.run()
    dy = torch.randn_like(y)
    y.backward(dy)
    exact_y, exact_leaves = case.exact()
    exact_y.backward(dy.double())
    for leaf, exact in zip(case.leaves, exact_leaves, strict=True):
        assert (leaf.grad is not None) == leaf.requires_grad
        if leaf.requires_grad:
            assert relative_error(leaf.grad, exact.grad) < 2e-6


@pytest.mark.parametrize("p", [0.0, 0.3])
def test_x_and_t_are_all_that_is_saved(device, p):
    case = Case(device, torch.bfloat16, lead=(50,))
    case.a, case.b = torch.nn.Parameter(case.a), torch.nn.Parameter(case.b)
    x = torch.nn.functional.gelu(case.x)

    def run():
        return qn.linear_4bit_lora(x, case.q, case.a, case.b, 1.0, bias=case.bias, dropout_p=p)

    constants = {t.data_ptr() for t in (case.q.absmax2, case.q.offset)}
    saved = [t for t in saved_activations(run) if t.data_ptr() not in constants]
    assert sorted(t.shape for t in saved) == [(50, 8), (50, IN)]
    assert all(t.dtype == torch.bfloat16 for t in saved)
    assert x.data_ptr() in {t.data_ptr() for t in saved}


def test_a_second_derivative_is_refused(device):
    case = Case(device)
    (dx,) = torch.autograd.grad(case.run().square().sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_opcheck(device):
    case = Case(device)
    x, a, b, bias = case.leaves
    q = case.q
    custom = qn.quantize_4bit(
        torch.randn(5, IN, device=device), "custom", 32, False, [i / 8 - 1 for i in range(16)]
    )
    lists = (
        [a, a], [b, torch.randn(5, 8, device=device)], [0.5, 2.0],
        [q.packed, custom.packed], [q.absmax, custom.absmax], [q.absmax2, None],
        [q.offset, None], [OUT, IN, 5, IN], [64, 32], ["nf4", "custom"], list(custom.codebook),
    )  # fmt: skip
    rng = torch.tensor([5, 6])
    ops = torch.ops.qlora_native
    forward = (x, rng, 0.5, [bias, None], *lists)
    t = ops.linear_4bit_lora(*forward)[-1]
    dy = [torch.randn(3, 5, OUT, device=device), torch.randn(3, 5, 5, device=device)]
    detached = ([a.detach(), a.detach()], [b.detach(), lists[1][1]], *lists[2:])
    x = x.detach()
    for op, arguments in (
        (ops.linear_4bit_lora, forward),
        (ops.linear_4bit_lora, (x, None, 0.0, [None, None], *lists)),
        (
            ops.linear_4bit_lora_backward,
            (dy, x, t.detach(), rng, 0.5, True, [True, True], [False, True], *detached),
        ),
        (
            ops.linear_4bit_lora_backward,
            (dy, None, None, None, 0.0, True, [False, False], [False, False], *detached),
        ),
    ):
        results = torch.library.opcheck(op.default, arguments)
        assert set(results.values()) == {"SUCCESS"}


def test_exports_and_trains():
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.case = Case("cpu")
            self.a = torch.nn.Parameter(self.case.a.detach())

        def forward(self, x):
            return qn.linear_4bit_lora(x, self.case.q, self.a, self.case.b.detach(), 0.5)

    layer, x = Layer(), torch.randn(3, IN)
    program = torch.export.export(layer, (x,)).module()
    expected = layer(x)
    expected.sum().backward()
    y = program(x)
    y.sum().backward()
    torch.testing.assert_close(y, expected)
    torch.testing.assert_close(program.a.grad, layer.a.grad)


def test_counts_flops(device):
    case = Case(device)
    with FlopCounterMode(display=False) as counter:
        case.run().sum().backward()
    rows, weight, a, b = 15, OUT * IN, 8 * IN, 8 * OUT
    forward = 2 * rows * (weight + a + b)
    backward = 2 * rows * (weight + 2 * a + 2 * b)
    assert counter.get_total_flops() == forward + backward


def test_empty_inputs_give_zero_gradients(device):
    case = Case(device, lead=(0, 4))
    y = case.run(0.5)
    assert y.shape == (0, 4, OUT)
    for leaf, gradient in zip(case.leaves, torch.autograd.grad(y.sum(), case.leaves), strict=True):
        assert gradient.shape == leaf.shape
        assert not gradient.any()


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"a": torch.zeros(8, IN - 1)}, ValueError, rf"\(8, {IN - 1}\)"),
        ({"b": torch.zeros(OUT, 7)}, ValueError, "rank 8, B 7"),
        ({"a": torch.zeros(8)}, ValueError, r"A has shape \(8,\)"),
        ({"x": torch.zeros(2, IN - 1)}, ValueError, str(IN - 1)),
        ({"x": torch.zeros(2, IN, dtype=torch.float64)}, TypeError, "float64"),
        ({"bias": torch.zeros(OUT + 1)}, ValueError, str(OUT + 1)),
        ({"dropout_p": 1.5}, ValueError, "1.5"),
        ({"dropout_p": -0.5}, ValueError, "-0.5"),
        ({"dropout_p": math.nan}, ValueError, "nan"),
        ({"scaling": math.nan}, ValueError, "nan"),
    ],
    ids=str,
)
def test_bad_arguments(change, error, message):
    case = Case("cpu")
    arguments = {
        "x": case.x, "q": case.q, "a": case.a, "b": case.b, "scaling": 1.0, "bias": case.bias,
    } | change  # fmt: skip
    with pytest.raises(error, match=message):
        qn.linear_4bit_lora(**arguments)
