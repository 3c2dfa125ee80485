"""Steps in a CUDA graph: on a GPU the graph itself, anywhere what is around it."""

import copy

import pytest
import torch

from qlora_native.training import GraphedStep, graphs


class Replay:
    """In place of a graph: runs what was recorded, on the tensors it was recorded with."""

    def __init__(self, step, batch):
        self.step, self.batch, self.loss = step, batch, torch.zeros(())

    def replay(self):
        self.loss.copy_(self.step(self.batch).detach())


@pytest.fixture
def without_gpu(monkeypatch):
    recorded = []

    def record(step, batch):
        recorded.append(Replay(step, batch))
        return recorded[-1], recorded[-1].loss

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(graphs, "_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(graphs, "_beside", lambda step, batch: step(batch).detach().clone())
    monkeypatch.setattr(graphs, "_record", record)
    return recorded


def batches(device, count=7):
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(5, 8, generator=generator).to(device)} for _ in range(count)]


def model(device):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).to(
        device
    )


def backward(net):
    def step(batch):
        loss = net(batch["x"]).square().mean()
        loss.backward()
        return loss

    return step


def check_accumulation(device, set_to_none):
    """Gradients of two calls at a time, an eager optimizer, gradients dropped or zeroed."""
    plain = model(device)
    graphed = copy.deepcopy(plain)
    step = GraphedStep(backward(graphed), graphed.parameters(), eager_steps=3)
    optimizers = [torch.optim.SGD(net.parameters(), lr=0.1) for net in (plain, graphed)]
    losses = []
    for number, batch in enumerate(batches(device), 1):
        expected = backward(plain)(batch)
        losses.append(step(batch))
        torch.testing.assert_close(losses[-1], expected.detach())
        if number % 2 == 0:
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=set_to_none)
    for mine, theirs in zip(graphed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)
        torch.testing.assert_close(mine.grad, theirs.grad)
    assert len({loss.item() for loss in losses}) == len(losses)


def check_whole_steps(device):
    plain = model(device)
    graphed = copy.deepcopy(plain)

    def whole(net):
        optimizer = torch.optim.SGD(net.parameters(), lr=0.1)

        def step(batch):
            loss = backward(net)(batch)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            return loss

        return step

    expected, found = whole(plain), GraphedStep(whole(graphed), eager_steps=2)
    for batch in batches(device):
        torch.testing.assert_close(found(batch), expected(batch).detach())
    for mine, theirs in zip(graphed.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("set_to_none", [True, False])
def test_gradients_are_added_up_as_without_it(without_gpu, set_to_none):
    check_accumulation("cpu", set_to_none)
    assert len(without_gpu) == 1


def test_a_whole_step_is_recorded_once(without_gpu):
    check_whole_steps("cpu")
    assert len(without_gpu) == 1


def test_gradients_of_somebody_else_are_added_to(without_gpu):
    net = model("cpu")
    step = GraphedStep(backward(net), net.parameters())
    (batch,) = batches("cpu", 1)
    step(batch)
    mine = [p.grad.clone() for p in net.parameters()]
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    step(batch)
    for parameter, gradient in zip(net.parameters(), mine, strict=True):
        torch.testing.assert_close(parameter.grad, gradient + 1)


def test_another_shape_is_refused(without_gpu):
    net = model("cpu")
    step = GraphedStep(backward(net))
    step({"x": torch.zeros(5, 8)})
    with pytest.raises(ValueError, match=r"one shape: this batch is \{'x': \(4, 8\)\}, the first"):
        step({"x": torch.zeros(4, 8)})
    with pytest.raises(ValueError, match="one shape"):
        step({"y": torch.zeros(5, 8)})


def test_without_a_gpu_it_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="a CUDA graph needs a GPU"):
        GraphedStep(lambda batch: batch["x"])


@pytest.mark.gpu
@pytest.mark.parametrize("set_to_none", [True, False])
def test_on_a_gpu_gradients_are_added_up_as_without_it(set_to_none):
    check_accumulation("cuda", set_to_none)


@pytest.mark.gpu
def test_on_a_gpu_a_whole_step_is_recorded_once():
    check_whole_steps("cuda")
