"""What a step does with unusual parameters, gradients and options, and what it refuses."""

import pytest
import torch

import qlora_native as qn
from _optim import SHAPES, assert_same, parameters, relative_error, run, set_gradients


def test_missing_gradients_and_late_parameters(device):
    ours, theirs = parameters(device=device), parameters(device=device)
    a, b = qn.optim.AdamW(ours[:5]), torch.optim.AdamW(theirs[:5])
    for step in range(6):
        if step == 3:
            a.add_param_group({"params": ours[5:], "lr": 1e-2})
            b.add_param_group({"params": theirs[5:], "lr": 1e-2})
        for params, optimizer in ((ours, a), (theirs, b)):
            set_gradients(params, step)
            params[step % 3].grad = None
            optimizer.step()
    assert relative_error(ours, theirs) < 1e-6
    assert a.state[ours[0]]["step"].item() == 4


def test_a_step_without_gradients_does_nothing(device):
    params = parameters(device=device)
    before = [p.detach().clone() for p in params]
    optimizer = qn.optim.AdamW(params, max_norm=1.0)
    assert optimizer.step() is None
    assert_same(params, before)
    assert not optimizer.state


def test_a_closure_is_called_with_gradients_on(device):
    param = torch.nn.Parameter(torch.ones(3, device=device))
    optimizer = qn.optim.AdamW([param], lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (param**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3
    assert param[0].item() == pytest.approx(0.495)


def test_gradients_that_are_not_contiguous(device):
    ours, theirs = parameters([(30, 40)], device=device), parameters([(30, 40)], device=device)
    a, b = qn.optim.AdamW(ours), torch.optim.AdamW(theirs)
    for param in (*ours, *theirs):
        param.grad = torch.arange(1200.0, device=device).reshape(40, 30).t()
    a.step()
    b.step()
    assert relative_error(ours, theirs) < 1e-6


def test_addresses_without_alignment_and_moved_parameters(device):
    """Views at odd offsets, and a parameter that is given other memory between two steps."""
    memory = torch.zeros(4 * 1001 + 8, device=device)
    ours = [torch.nn.Parameter(memory[1 + i * 1001 : (i + 1) * 1001]) for i in range(4)]
    theirs = parameters([(1000,)] * 4, device=device)
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q)
    a, b = qn.optim.AdamW(ours), torch.optim.AdamW(theirs)
    run(a, ours, 3)
    ours[2].data = ours[2].data.clone()
    run(a, ours, 3, first=3)
    run(b, theirs, 6)
    assert relative_error(ours, theirs) < 1e-6
    assert memory[::1001][:5].eq(0).all()


def test_two_optimizers_do_not_touch_each_other(device):
    first, second, alone = (parameters(device=device, seed=s) for s in (0, 1, 0))
    a, b, c = (qn.optim.AdamW8bit(p, min_8bit_size=0) for p in (first, second, alone))
    for step in range(4):
        run(a, first, 1, first=step)
        run(b, second, 1, first=50 + step)
        run(c, alone, 1, first=step)
    assert_same(first, alone)


def test_a_freed_parameter_takes_its_state_along(device):
    params = parameters(device=device)
    optimizer = qn.optim.AdamW([{"params": [p]} for p in params])
    run(optimizer, params, 2)
    gone = params.pop(0)
    optimizer.param_groups.pop(0)
    del optimizer.state[gone], gone
    run(optimizer, params, 2)
    assert len(optimizer.state) == len(params)


def test_autograd_notices_that_a_parameter_changed(device):
    param = torch.nn.Parameter(torch.ones(4, device=device))
    loss = (param * param).sum()
    optimizer = qn.optim.AdamW([param])
    param.grad = torch.ones_like(param)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: torch.ones(4, 6, device=d).t(), "not contiguous"),
        (lambda d: torch.ones(4, device=d).double(), "float64"),
        (lambda d: torch.ones(4, device=d).to(torch.complex64), "complex64"),
    ],
)
def test_parameters_of_other_kinds_are_refused(device, make, message):
    good = torch.nn.Parameter(torch.ones(3, device=device))
    bad = torch.nn.Parameter(make(device))
    optimizer = qn.optim.AdamW([("fine", good), ("layer.bad", bad)])
    for param in (good, bad):
        param.grad = torch.ones_like(param)
    with pytest.raises(ValueError, match=message) as error:
        optimizer.step()
    assert "layer.bad" in str(error.value)
    assert torch.equal(good.detach(), torch.ones(3, device=device))
    assert not optimizer.state


def test_sparse_gradients_are_refused(device):
    table = torch.nn.Embedding(10, 4, sparse=True, device=device)
    optimizer = qn.optim.AdamW(table.parameters())
    table(torch.tensor([1, 2], device=device)).sum().backward()
    with pytest.raises(ValueError, match="sparse"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1.0}, "lr is -1"),
        ({"betas": (1.0, 0.9)}, r"betas\[0\] is 1"),
        ({"eps": -1e-9}, "eps"),
        ({"weight_decay": -0.1}, "weight_decay"),
        ({"bits": 4}, "bits is 4"),
        ({"max_norm": -1.0}, "max_norm"),
        ({"master_weights": True, "stochastic_rounding": True}, "master"),
        ({"lr": torch.ones(2)}, "lr is a tensor of 2"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        qn.optim.AdamW(parameters(), **options)


def test_a_scalar_state_of_every_shape_is_kept(device):
    params = parameters(device=device)
    optimizer = qn.optim.AdamW8bit(params, min_8bit_size=0)
    run(optimizer, params, 1)
    for shape, param in zip(SHAPES, params, strict=True):
        state = optimizer.state[param]
        assert state["exp_avg"].shape == torch.Size(shape)
        assert state["exp_avg"].dtype == torch.uint8
        assert state["exp_avg_absmax"].numel() == -(-param.numel() // 256)
        assert state["step"].shape == ()
