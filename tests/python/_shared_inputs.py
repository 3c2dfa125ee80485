"""A model whose layers of one input can be computed together, and what its steps give."""

import torch
from torch import nn

import qlora_native as qn
from qlora_native import _lora_eager
from qlora_native.nn import share_inputs


class Attention(nn.Module):
    """What has queries, keys and values in it, and an output."""

    def __init__(self, dim=64, bias=True):
        super().__init__()
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.k_proj = nn.Linear(dim, 32, bias=bias)
        self.v_proj = nn.Linear(dim, 32, bias=bias)
        self.o_proj = nn.Linear(dim, dim, bias=bias)

    def between(self):
        """Replaced by tests: what happens between the calls."""

    def forward(self, x):
        q = self.q_proj(x)
        self.between()
        k, v = self.k_proj(x), self.v_proj(x)
        return x + self.o_proj(torch.tanh(q) * torch.cat([k, v.sigmoid()], dim=-1))


class Cross(Attention):
    """Queries have another input than keys and values."""

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x * 2), self.v_proj(x * 3)
        return x + self.o_proj(torch.tanh(q) * torch.cat([k, v.sigmoid()], dim=-1))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Attention(bias=True), Attention(bias=False)])

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


def net(device="cpu", compute_dtype=None, **settings):
    torch.manual_seed(0)
    model = Net().to(device)
    qn.quantize_model(model, compute_dtype=compute_dtype)
    qn.nn.add_lora(model, **({"r": 4, "bias": "all"} | settings))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return model


def input_of(device="cpu", shape=(2, 5, 64)):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(shape, generator=generator).to(device).requires_grad_()


def step(model, x):
    """Return y, dx and the gradients of all parameters that have one, by name."""
    model.zero_grad()
    x.grad = None
    y = model(x)
    y.float().square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    return {"y": y.detach(), "x": x.grad} | gradients


def assert_same(actual, expected, bound=2e-6):
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        assert actual[name].dtype == want.dtype, name
        assert (actual[name] - want).float().norm() <= bound * want.float().norm() + 1e-6, name


def shared(model):
    assert share_inputs(model) == 6
    return model


def counted_groups(monkeypatch):
    """Return a list that collects how many layers are computed together."""
    sizes, run = [], _lora_eager.linear_4bit_lora_group

    def counted(x, rng, dropout_p, bias, layers):
        if len(layers) > 1:
            sizes.append(len(layers))
        return run(x, rng, dropout_p, bias, layers)

    monkeypatch.setattr(_lora_eager, "linear_4bit_lora_group", counted)
    return sizes
