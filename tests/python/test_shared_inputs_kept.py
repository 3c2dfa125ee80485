"""What outlives a call of layers of one input: recomputations, and copies of the layers."""

import copy
import gc
import io
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import qlora_native as qn
from _eager_calls import needs_table
from _shared_inputs import (
    Attention,
    Cross,
    Net,
    assert_same,
    counted_groups,
    input_of,
    net,
    shared,
    step,
)
from qlora_native.nn import share_inputs

pytestmark = needs_table


@pytest.fixture
def groups(monkeypatch):
    return counted_groups(monkeypatch)


# ---- recomputations ----


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(device, groups, reentrant):
    class Checkpointed(Net):
        def forward(self, x):
            for block in self.blocks:
                x = checkpoint(block, x, use_reentrant=reentrant)
            return x

    x = input_of(device)
    model = net(device)
    expected = step(model, x)
    shared(model).__class__ = Checkpointed
    for _ in range(2):
        assert_same(step(model, x), expected)
    # A reentrant checkpoint has gradients in the second run only.
    assert groups == [3] * (4 if reentrant else 8)


@pytest.mark.parametrize("watched", ["forward", "backward"])
def test_one_pass_of_a_checkpoint_may_be_observed(groups, watched):
    x, model = input_of(), net()
    expected = step(model, x)
    shared(model)
    model.zero_grad()
    x.grad = None
    with FlopCounterMode(display=False) if watched == "forward" else nullcontext():
        y = checkpoint(model, x, use_reentrant=False)
    with FlopCounterMode(display=False) if watched == "backward" else nullcontext():
        y.square().sum().backward()
    assert_same({"x": x.grad}, {"x": expected["x"]})
    assert groups == [3] * 4


@pytest.mark.parametrize("warm", [False, True])
def test_a_checkpoint_of_layers_of_different_inputs_repeats_them(groups, warm):
    x, model, expected = input_of(), net(), net()
    for one in (model, expected):
        for block in one.blocks:
            block.__class__ = Cross
    wanted = step(expected, x)
    shared(model)
    if warm:
        step(model, x)
        groups.clear()
    for _ in range(2):
        model.zero_grad()
        x.grad = None
        y = checkpoint(model, x, use_reentrant=False)
        model(x)  # which learns that the inputs are different
        y.square().sum().backward()
        gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
        assert_same({"y": y.detach(), "x": x.grad} | gradients, wanted)
    # Each forward pass and recomputation, and the first call without a checkpoint.
    assert groups == ([] if warm else [3] * (2 * 4 + 2))


def test_a_checkpoint_within_the_holder_repeats_its_layers_alone(groups):
    class Inner(Attention):
        def forward(self, x):
            q = self.q_proj(x)
            return self.o_proj(checkpoint(self.rest, x, q, use_reentrant=False))

        def rest(self, x, q):
            return torch.tanh(q) * torch.cat([self.k_proj(x), self.v_proj(x).sigmoid()], dim=-1)

    class Whole(Inner):
        def forward(self, x):
            return self.o_proj(checkpoint(self.all, x, use_reentrant=False))

        def all(self, x):
            return self.rest(x, self.q_proj(x))

    for cls in (Inner, Whole):
        x, model, expected = input_of(), net(), net()
        for one in (model, expected):
            for block in one.blocks:
                block.__class__ = cls
        shared(model)
        for _ in range(2):
            assert_same(step(model, x), step(expected, x))


# ---- copies ----


@pytest.mark.parametrize("copied", [copy.deepcopy, "pickled"])
def test_copies_have_groups_of_their_own(groups, copied):
    x, model = input_of(), shared(net())
    expected = step(model, x)
    if copied == "pickled":
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        twin = torch.load(file, weights_only=False)
    else:
        twin = copied(model)
    groups.clear()
    with torch.no_grad():
        model.blocks[0].k_proj.lora_A["default"].weight.zero_()
    assert_same(step(twin, x), expected)
    assert groups == [3, 3]


def test_a_copy_of_one_layer_leaves_the_others_behind(groups):
    def saved_bytes(model):
        file = io.BytesIO()
        torch.save(model.blocks[0].q_proj, file)
        return len(file.getvalue())

    x, model = input_of(), shared(net())
    weights = sum(p.nbytes for p in model.blocks[0].k_proj.parameters())
    assert saved_bytes(model) < saved_bytes(net()) + weights / 2
    twin = copy.deepcopy(model.blocks[0].q_proj)
    assert_same({"y": twin(x)}, {"y": net().blocks[0].q_proj(x)})
    assert twin.base_layer._together.group is None
    step(model, x)
    assert groups == [3, 3]


def test_adapters_that_are_taken_off_are_not_kept(groups):
    x, model = input_of(), shared(net())
    step(model, x)
    adapters = [weakref.ref(m) for m in model.modules() if hasattr(m, "plain_adapters")]
    for block in model.blocks:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(block, name, getattr(block, name).base_layer)
    gc.collect()
    assert len(adapters) == 8 and not any(adapter() for adapter in adapters)
    groups.clear()
    model(x).sum().backward()
    assert not groups
    qn.nn.add_lora(model, r=4)
    assert share_inputs(model) == 6
    step(model, x)
    assert groups == [3, 3]
