"""8-bit state: its codes and scales, its trajectory, and bitsandbytes' beside it."""

import numpy as np
import pytest
import torch

import qlora_native as qn
from _optim import parameters, run, set_gradients
from qlora_native import _C

SIGNED = np.array(_C.signed_dynamic_map(), dtype=np.float32)
UNSIGNED = np.array(_C.unsigned_dynamic_map(), dtype=np.float32)


def decoded(state, name):
    table = SIGNED if name == "exp_avg" else UNSIGNED
    codes = state[name].cpu().numpy().reshape(-1)
    scales = np.repeat(state[f"{name}_absmax"].cpu().numpy(), 256)[: codes.size]
    return table[codes] * scales


def nearest(table, x):
    """The index of the nearest entry, in fp64; a tie goes to the lower."""
    distance = np.abs(x.astype(np.float64)[:, None] - table.astype(np.float64)[None])
    return distance.argmin(1)


@pytest.mark.parametrize("n", [1, 255, 256, 257, 1000, 4099])
def test_codes_are_the_nearest_to_the_exact_moments(device, n):
    """Two steps, each from the decoded state of the one before, in numpy."""
    param = torch.nn.Parameter(torch.zeros(n, device=device))
    optimizer = qn.optim.AdamW8bit([param], betas=(0.9, 0.99), min_8bit_size=0)
    moment = square = np.zeros(n, dtype=np.float32)
    for step in range(2):
        set_gradients([param], step)
        g = param.grad.cpu().numpy()
        optimizer.step()
        state = optimizer.state[param]
        m = moment + np.float32(0.1) * (g - moment)
        v = square * np.float32(0.99) + np.float32(1 - 0.99) * g * g
        for name, exact, table in (("exp_avg", m, SIGNED), ("exp_avg_sq", v, UNSIGNED)):
            codes = state[name].cpu().numpy()
            for block in range(0, n, 256):
                part = exact[block : block + 256]
                absmax = state[f"{name}_absmax"][block // 256].item()
                assert absmax == pytest.approx(np.abs(part).max(), rel=1e-6)
                expected = nearest(table, part * (np.float32(1) / np.float32(absmax)))
                if name == "exp_avg_sq":
                    expected = np.maximum(expected, part > 0)
                difference = np.abs(codes[block : block + 256].astype(int) - expected)
                # A product that is rounded otherwise in numpy may fall on the other side.
                assert difference.max() <= 1
                assert (difference > 0).sum() <= 1
        moment, square = decoded(state, "exp_avg"), decoded(state, "exp_avg_sq")


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit"])
def test_it_is_bitsandbytes_update_within_a_code(name):
    bnb = pytest.importorskip("bitsandbytes")
    ours, theirs = (parameters([(64, 80), (4099,)]) for _ in range(2))
    options = {"lr": 1e-3, "weight_decay": 0.1}
    a = getattr(qn.optim, name)(ours, **options)
    b = getattr(bnb.optim, name)(theirs, **options)
    for step in range(3):
        set_gradients(ours, step)
        set_gradients(theirs, step)
        # From one state: what differs is one step's.
        for p, q in zip(ours, theirs, strict=True):
            p.data.copy_(q)
        if step:
            a.load_state_dict(b.state_dict())
        a.step()
        b.step()
        for p, q in zip(ours, theirs, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
            state, reference = a.state[p], b.state[q]
            pairs = [("exp_avg", "state1", "absmax1"), ("exp_avg_sq", "state2", "absmax2")]
            for own, codes, absmax in pairs[: 2 if name == "AdamW8bit" else 1]:
                torch.testing.assert_close(
                    state[f"{own}_absmax"], reference[absmax], rtol=1e-6, atol=0
                )
                difference = (state[own].int() - reference[codes].int()).abs()
                # Its table of 65,536 bins cannot tell the codes of small values apart.
                scaled = torch.tensor(UNSIGNED if own == "exp_avg_sq" else SIGNED)[
                    reference[codes].long()
                ]
                assert difference[scaled.abs() > 1e-3].max() <= 1


@pytest.mark.parametrize("steps", [30, 300])
@pytest.mark.parametrize("probability", [1.0, 0.05])
def test_four_decades_of_gradients_in_a_block(device, steps, probability):
    """The parameters move as far as torch's, though gradients differ by 10,000 within a block."""
    generator = torch.Generator().manual_seed(0)
    n = 2048
    scale = 10 ** (-4 * torch.rand(n, generator=generator))
    ours, theirs = (torch.nn.Parameter(torch.zeros(n, device=device)) for _ in range(2))
    options = {"lr": 1e-3, "weight_decay": 0.0}
    a = qn.optim.AdamW8bit([ours], min_8bit_size=0, **options)
    b = torch.optim.AdamW([theirs], **options)
    for _ in range(steps):
        grad = torch.randn(n, generator=generator) * scale
        grad = grad * (torch.rand(n, generator=generator) < probability)
        ours.grad, theirs.grad = grad.to(device), grad.to(device)
        a.step()
        b.step()
    assert ours.abs().max() < 2 * theirs.abs().max()
    assert 0.5 * theirs.norm() < ours.norm() < 2 * theirs.norm()


@pytest.mark.parametrize("small", [1e-4, 1e-6, 1e-12, 1e-18])
def test_the_second_moment_does_not_become_zero(device, small):
    """One large gradient in the block, and gradients that come but once: v rounds up to code 1."""
    param = torch.nn.Parameter(torch.zeros(256, device=device))
    optimizer = qn.optim.AdamW8bit([param], lr=1e-3, weight_decay=0.0, min_8bit_size=0)
    for step in range(20):
        param.grad = torch.full((256,), small if step == 0 else 0.0, device=device)
        param.grad[0] = 1.0
        optimizer.step()
        squares = optimizer.state[param]["exp_avg_sq"]
        assert squares.min() >= 1
    # torch's own step is of size lr at first; m / eps would be 1e4 times as much and more.
    assert param.abs().max() < 0.03


@pytest.mark.parametrize("value", [0.0, 1e-20, 1e-30, 1e-44])
def test_tiny_gradients_leave_everything_finite(device, value):
    param = torch.nn.Parameter(torch.ones(300, device=device))
    optimizer = qn.optim.AdamW8bit([param], weight_decay=0.0, min_8bit_size=0)
    for _ in range(5):
        param.grad = torch.full((300,), value, device=device)
        optimizer.step()
    assert param.isfinite().all()
    assert all(t.isfinite().all() for t in optimizer.state[param].values())


def test_the_moment_of_a_short_last_block_crosses_zero(device):
    """Its scale falls by seven decades in a step; what lies behind the end has no part in it."""
    param = torch.nn.Parameter(torch.ones(4097, device=device))
    optimizer = qn.optim.Lion8bit([param], betas=(0.9, 0.99), min_8bit_size=0)
    for last in (1.0, -0.9900001):
        param.grad = torch.full((4097,), 0.5, device=device)
        param.grad[-1] = last
        optimizer.step()
    state = optimizer.state[param]
    assert 0 < state["exp_avg_absmax"][-1] < 1e-8
    assert decoded(state, "exp_avg")[-1] == pytest.approx(-9.3e-10, rel=0.1)
    assert param.isfinite().all()


def test_a_nan_spoils_its_block_alone(device):
    param = torch.nn.Parameter(torch.ones(1000, device=device))
    optimizer = qn.optim.AdamW8bit([param], min_8bit_size=0)
    run(optimizer, [param], 1)
    param.grad[300] = float("nan")
    optimizer.step()
    run(optimizer, [param], 1)
    bad = param.isnan().nonzero().view(-1).tolist()
    assert bad == list(range(256, 512))


@pytest.mark.parametrize("cls", [qn.optim.AdamW8bit, qn.optim.Lion8bit])
def test_small_parameters_keep_32_bits(device, cls):
    params = parameters([(64, 64), (63, 64)], device=device)
    optimizer = cls(params)
    run(optimizer, params, 1)
    dtypes = [optimizer.state[p]["exp_avg"].dtype for p in params]
    assert dtypes == [torch.uint8, torch.float32]


def test_training_converges_as_with_32_bits(device):
    torch.manual_seed(0)
    x = torch.randn(512, 64, device=device)
    y = x @ torch.randn(64, 64, device=device)
    losses = {}
    for cls in (qn.optim.AdamW, qn.optim.AdamW8bit):
        torch.manual_seed(1)
        layer = torch.nn.Linear(64, 64, device=device)
        optimizer = cls(layer.parameters(), lr=2e-2, weight_decay=0.0)
        for _ in range(400):
            loss = (layer(x) - y).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[cls] = loss.item()
    assert losses[qn.optim.AdamW8bit] < 1e-2
    assert losses[qn.optim.AdamW] < 1e-2
