"""Optimizer steps against torch's, over dtypes, hyperparameters, clipping and rounding."""

import itertools

import pytest
import torch

import qlora_native as qn
from _optim import (
    ALL,
    assert_same,
    lion_reference,
    parameters,
    relative_error,
    run,
    set_gradients,
    states,
)

HALVES = [torch.float16, torch.bfloat16]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torchs_for_a_thousand_steps(device, weight_decay):
    ours, theirs = parameters(device=device), parameters(device=device)
    options = {"lr": 1e-2, "weight_decay": weight_decay}
    a, b = qn.optim.AdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    for step in range(1000):
        set_gradients(ours, step)
        for x, y in zip(ours, theirs, strict=True):
            y.grad = x.grad
        a.step()
        b.step()
    assert relative_error(ours, theirs) < 1e-6
    state, reference = a.state[ours[0]], b.state[theirs[0]]
    for name in ("exp_avg", "exp_avg_sq"):
        torch.testing.assert_close(state[name], reference[name], rtol=1e-5, atol=1e-7)
    assert state["step"].item() == 1000


@pytest.mark.parametrize(
    "options",
    [
        {"betas": (0.0, 0.5), "eps": 1e-3},
        {"betas": (0.3, 0.9999)},
        {"maximize": True, "weight_decay": 0.3},
        {"lr": torch.tensor(3e-3)},
        {"lr": 0.0, "weight_decay": 1.0},
    ],
    ids=str,
)
def test_hyperparameters_mean_what_they_do_in_torch(device, options):
    ours, theirs = parameters(device=device), parameters(device=device)
    a, b = qn.optim.AdamW(ours, **options), torch.optim.AdamW(theirs, **options)
    run(a, ours, 20)
    run(b, theirs, 20)
    assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("kernel", ["avx512", "avx2", "scalar"])
@pytest.mark.parametrize("cls", ALL)
def test_kernels_give_the_same_bits(cls, kernel):
    if not any(k.usable and k.name == kernel for k in qn.kernels.list("optimizer_step")):
        pytest.skip(f"this processor has no {kernel}")
    variants = itertools.product(
        (torch.float32, *HALVES), ({}, {"stochastic_rounding": True}, {"master_weights": True})
    )
    for dtype, options in variants:
        results = []
        for name in (kernel, "scalar"):
            params = parameters(dtype=dtype)
            optimizer = cls(params, lr=1e-2, weight_decay=0.1, min_8bit_size=0, **options)
            with qn.kernels.force("optimizer_step", name):
                run(optimizer, params, 3)
                assert qn.kernels.last("optimizer_step") == name
            results.append([*params, *states(optimizer).values()])
        assert_same(*results)


def test_lion_follows_its_formulas(device):
    ours = parameters(device=device)
    reference = [p.detach().clone() for p in ours]
    options = {"lr": 1e-3, "betas": (0.9, 0.98), "weight_decay": 0.1}
    optimizer = qn.optim.Lion(ours, **options)
    grads = []
    for step in range(50):
        set_gradients(ours, step)
        grads.append([p.grad for p in ours])
        optimizer.step()
    for i, start in enumerate(reference):
        expected = lion_reference(start, [g[i] for g in grads], **options)
        torch.testing.assert_close(ours[i].double(), expected, rtol=1e-5, atol=1e-6)


def test_groups_have_their_own_hyperparameters(device):
    ours, theirs = parameters(device=device), parameters(device=device)

    def groups(params):
        return [
            {"params": params[:2], "lr": 1e-2, "betas": (0.8, 0.9)},
            {"params": params[2:5], "weight_decay": 0.5},
            {"params": params[5:], "maximize": True, "eps": 1e-2},
        ]

    a, b = qn.optim.AdamW(groups(ours)), torch.optim.AdamW(groups(theirs))
    run(a, ours, 10)
    run(b, theirs, 10)
    assert relative_error(ours, theirs) < 1e-6


def test_schedulers_drive_it(device):
    ours, theirs = parameters(device=device), parameters(device=device)
    a, b = qn.optim.AdamW(ours, lr=1e-1), torch.optim.AdamW(theirs, lr=1e-1)
    schedulers = [torch.optim.lr_scheduler.CosineAnnealingLR(o, T_max=10) for o in (a, b)]
    for step in range(10):
        for optimizer, params, scheduler in zip((a, b), (ours, theirs), schedulers, strict=True):
            run(optimizer, params, 1, first=step)
            scheduler.step()
    assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_clipping_is_torchs(device, scale):
    ours, theirs = parameters(device=device), parameters(device=device)
    a = qn.optim.AdamW(ours, lr=1e-2, eps=1e-2, max_norm=2.0)
    b = torch.optim.AdamW(theirs, lr=1e-2, eps=1e-2)
    for step in range(5):
        set_gradients(ours, step, scale)
        set_gradients(theirs, step, scale)
        before = [p.grad.clone() for p in ours]
        a.step()
        norm = torch.nn.utils.clip_grad_norm_(theirs, 2.0)
        b.step()
        torch.testing.assert_close(a.grad_norm, norm, rtol=1e-6, atol=0)
        assert_same([p.grad for p in ours], before)
    assert relative_error(ours, theirs) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_the_norm_is_right_and_repeats(device, dtype):
    params = parameters([(300_001,), (8192,), (3,), (0,)], dtype, device)
    optimizer = qn.optim.Lion(params, lr=0.0, skip_nonfinite=True)
    norms = []
    for _ in range(3):
        set_gradients(params, 7)
        optimizer.step()
        norms.append(optimizer.grad_norm.item())
    exact = torch.cat([p.grad.double().view(-1) for p in params]).norm().item()
    assert norms[0] == pytest.approx(exact, rel=1e-6)
    assert len(set(norms)) == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("cls", ALL)
def test_a_step_that_is_not_finite_is_skipped(device, cls, bad):
    params = parameters(device=device)
    optimizer = cls(params, skip_nonfinite=True, max_norm=1.0)
    run(optimizer, params, 2)
    before = [t.clone() for t in [*params, *states(optimizer).values()]]
    set_gradients(params, 5)
    params[3].grad.view(-1)[4321] = bad
    optimizer.step()
    assert_same([*params, *states(optimizer).values()], before)
    run(optimizer, params, 1)
    assert optimizer.state[params[0]]["step"].item() == 3


@pytest.mark.parametrize("cls", ALL)
def test_grad_scaler_lends_scale_and_verdict(device, cls):
    ours, plain = parameters(device=device), parameters(device=device)
    a, b = cls(ours, weight_decay=0.1), cls(plain, weight_decay=0.1)
    scaler = torch.amp.GradScaler(device, init_scale=1024.0, growth_interval=1)
    for step in range(6):
        set_gradients(ours, step)
        if step == 3:
            ours[0].grad[0, 0] = float("inf")
        scale = scaler.get_scale()
        scaler.scale(torch.zeros((), device=device))
        for param in ours:
            param.grad *= scale
        scaler.step(a)
        scaler.update()
        if step != 3:
            run(b, plain, 1, first=step)
    assert scaler.get_scale() == 1024.0 * 2**5 / 2
    assert_same(ours, plain)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("grad_dtype", [None, torch.float32])
def test_halves_are_updated_in_fp32_and_rounded_once(device, dtype, grad_dtype):
    ours = parameters(dtype=dtype, device=device)
    exact = [torch.nn.Parameter(p.detach().float()) for p in ours]
    a, b = qn.optim.AdamW(ours, lr=1e-2), torch.optim.AdamW(exact, lr=1e-2)
    if grad_dtype is not None:
        if not hasattr(torch.Tensor, "grad_dtype"):
            pytest.skip("this torch has gradients of the parameter's dtype alone")
        for p in ours:
            p.grad_dtype = None  # any
    for step in range(5):
        for p, q in zip(ours, exact, strict=True):
            if q.numel():
                q.data.copy_(p)  # from the rounded parameter
        set_gradients(ours, step, dtype=dtype)
        for p, q in zip(ours, exact, strict=True):
            q.grad = p.grad.float()
            if grad_dtype is not None:
                p.grad = q.grad.clone()
        a.step()
        b.step()
        for p, q in zip(ours, exact, strict=True):
            spacing = torch.finfo(dtype).eps * q.detach().abs() + torch.finfo(dtype).tiny
            # Where a step cancels the parameter, what is left of it is the rounding of fp32.
            assert ((p.float() - q).abs() <= spacing * 0.51 + 1e-8).all()


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("dtype", HALVES)
def test_a_master_copy_makes_halves_as_good_as_fp32(device, dtype, cls):
    ours = parameters(dtype=dtype, device=device)
    exact = [torch.nn.Parameter(p.detach().float()) for p in ours]
    a = cls(ours, lr=1e-5, master_weights=True)
    b = cls(exact, lr=1e-5)
    for step in range(30):
        set_gradients(ours, step)
        for p, q in zip(ours, exact, strict=True):
            q.grad = p.grad.float()
        a.step()
        b.step()
    assert_same([a.state[p]["master"] for p in ours], exact)
    assert_same(ours, [p.to(dtype) for p in exact])


@pytest.mark.parametrize("dtype", HALVES)
def test_stochastic_rounding_is_right_on_average_and_repeats(device, dtype):
    def trained(seed, stochastic):
        param = torch.nn.Parameter(torch.ones(100_000, device=device, dtype=dtype))
        # Steps of a tenth of the spacing: rounding to nearest would undo each.
        optimizer = qn.optim.Lion(
            [param], lr=torch.finfo(dtype).eps / 20, stochastic_rounding=stochastic, seed=seed
        )
        for _ in range(40):
            param.grad = torch.ones_like(param)
            optimizer.step()
        return param.detach()

    a, b, c = trained(1, True), trained(1, True), trained(2, True)
    assert torch.equal(a, b)
    assert not torch.equal(a, c)
    moved = (1 - a.double()).mean().item() / (40 * torch.finfo(dtype).eps / 20)
    assert moved == pytest.approx(1, rel=0.02)
    assert torch.equal(trained(1, False), torch.ones_like(a))


def test_two_parameters_get_different_random_numbers(device):
    params = [torch.nn.Parameter(torch.ones(5000, device=device).bfloat16()) for _ in range(2)]
    optimizer = qn.optim.Lion(params, lr=1e-3, stochastic_rounding=True)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    assert not torch.equal(*params)
    assert abs((params[0] == params[1]).double().mean().item() - 0.6) < 0.3
