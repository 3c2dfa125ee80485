"""What the optimizer's tests share: a plain reference, and runs over made-up gradients."""

import io

import torch

import qlora_native as qn

ALL = [qn.optim.AdamW, qn.optim.AdamW8bit, qn.optim.Lion, qn.optim.Lion8bit]
SHAPES = [(64, 80), (1,), (4096,), (7, 1000), (0, 5), (255,), (257,)]


def parameters(shapes=SHAPES, dtype=torch.float32, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator).to(device, dtype))
        for shape in shapes
    ]


def set_gradients(params, step, scale=1.0, dtype=None):
    """Gradients that depend on the step and on the parameter's place alone."""
    generator = torch.Generator().manual_seed(1000 + step)
    for param in params:
        grad = torch.randn(param.shape, generator=generator) * scale
        param.grad = grad.to(param.device, dtype or param.dtype)


def run(optimizer, params, steps, first=0, **kwargs):
    for step in range(first, first + steps):
        set_gradients(params, step, **kwargs)
        optimizer.step()


def states(optimizer):
    """All of an optimizer's tensors, by parameter and name."""
    return {
        (i, name): value
        for i, state in optimizer.state_dict()["state"].items()
        for name, value in state.items()
    }


def assert_same_states(a, b):
    a, b = states(a), states(b)
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value.dtype == b[key].dtype, key
        torch.testing.assert_close(value.cpu(), b[key].cpu(), rtol=0, atol=0, msg=str(key))


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x.detach().cpu(), y.detach().cpu())


def lion_reference(param, grads, lr, betas, weight_decay):
    """Lion in fp64, from the paper's formulas."""
    p, m = param.detach().double().clone(), torch.zeros_like(param, dtype=torch.float64)
    for grad in grads:
        g = grad.double()
        p = p * (1 - lr * weight_decay) - lr * torch.sign(betas[0] * m + (1 - betas[0]) * g)
        m = betas[1] * m + (1 - betas[1]) * g
    return p


def relative_error(ours, reference):
    """The largest difference, relative to the largest element."""
    a = torch.cat([p.detach().double().cpu().view(-1) for p in ours])
    b = torch.cat([p.detach().double().cpu().view(-1) for p in reference])
    return ((a - b).abs().max() / b.abs().max()).item()


def through_a_file(obj):
    buffer = io.BytesIO()
    torch.save(obj, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)
