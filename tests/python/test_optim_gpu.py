"""What only a GPU can show of the optimizers: equality with the CPU, streams, graphs."""

import pytest
import torch

import qlora_native as qn
from _optim import ALL, assert_same, parameters, run, set_gradients, states

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
VARIANTS = [{}, {"stochastic_rounding": True}, {"master_weights": True}]
MANY = [(300, 700), (1,), (255,), (256,), (257,), (8193,), (0,)] * 70


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cls", ALL)
def test_bits_equal_the_cpus(cls, dtype, options):
    """490 tensors: more than a launch takes."""
    results = []
    for device in ("cpu", "cuda"):
        params = parameters(MANY, dtype, device)
        optimizer = cls(params, weight_decay=0.1, min_8bit_size=256, **options)
        run(optimizer, params, 3)
        results.append([*params, *states(optimizer).values()])
    assert_same(*results)


def test_it_runs_on_the_current_stream_and_waits_for_nothing():
    reference = parameters(MANY, device="cuda")
    a = qn.optim.AdamW8bit(reference, max_norm=1.0)
    run(a, reference, 2)
    params = parameters(MANY, device="cuda")
    optimizer = qn.optim.AdamW8bit(params, max_norm=1.0, skip_nonfinite=True)
    run(optimizer, params, 1)
    set_gradients(params, 1)
    wanted = [p.grad.clone() for p in params]
    for param in params:
        param.grad.fill_(float("nan"))
    side = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(side):
        torch.cuda._sleep(500_000_000)
        for param, grad in zip(params, wanted, strict=True):
            param.grad.copy_(grad)
        optimizer.step()
        waited = side.query()
    side.synchronize()
    assert not waited, "the step waited for the device"
    assert_same(params, reference)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("cls", ALL)
def test_a_captured_step_counts_and_follows_the_learning_rate(cls, paged):
    if paged and qn.memory.automatic_backing("cuda")[0] != "managed":
        pytest.skip("pinned state cannot be captured")
    plain, captured = parameters(device="cuda"), parameters(device="cuda")
    rates = [1e-2, 3e-3, 1e-3]
    a = cls(plain, lr=torch.tensor(rates[0], device="cuda"), max_norm=1.0, skip_nonfinite=True)
    lr = torch.tensor(rates[0], device="cuda")
    b = cls(captured, lr=lr, max_norm=1.0, skip_nonfinite=True, paged=paged)
    set_gradients(plain, 0)
    set_gradients(captured, 0)
    for optimizer in (a, b):
        optimizer.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        b.step()
    for step, rate in enumerate(rates, 1):
        set_gradients(plain, step)
        for p, q in zip(plain, captured, strict=True):
            q.grad.copy_(p.grad)
        a.param_groups[0]["lr"].fill_(rate)
        lr.fill_(rate)
        a.step()
        graph.replay()
    assert b.state[captured[0]]["step"].item() == 4
    assert_same(plain, captured)


def test_a_first_step_cannot_be_captured():
    params = parameters(device="cuda")
    set_gradients(params, 0)
    optimizer = qn.optim.AdamW(params)
    torch.cuda.synchronize()
    with (
        pytest.raises(RuntimeError, match="before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        optimizer.step()


def test_parameters_on_the_cpu_and_the_gpu():
    cpu, cuda = parameters(), parameters(device="cuda")
    optimizer = qn.optim.AdamW([*cpu, *cuda])
    run(optimizer, cpu, 0)
    for step in range(3):
        set_gradients(cpu, step)
        set_gradients(cuda, step)
        optimizer.step()
    assert_same(cpu, cuda)
    with pytest.raises(ValueError, match="one device"):
        run(qn.optim.AdamW([*cpu, *cuda], max_norm=1.0), cpu, 1)


def test_no_memory_is_allocated_after_the_first_steps():
    params = parameters(MANY, device="cuda")
    optimizer = qn.optim.AdamW8bit(params, max_norm=1.0)
    set_gradients(params, 0)
    optimizer.step()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    for _ in range(5):
        optimizer.step()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before
