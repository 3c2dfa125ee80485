"""share_inputs: layers of one input are computed together, and nothing else is different."""

import copy
import gc
import io
import weakref
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import qlora_native as qn
from _eager_calls import needs_table
from qlora_native import _lora_eager
from qlora_native.nn import Linear4bit, share_inputs

pytestmark = needs_table


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


@pytest.fixture
def groups(monkeypatch):
    """Collects how many layers are computed together."""
    sizes, run = [], _lora_eager.linear_4bit_lora_group

    def counted(x, rng, dropout_p, bias, layers):
        if len(layers) > 1:
            sizes.append(len(layers))
        return run(x, rng, dropout_p, bias, layers)

    monkeypatch.setattr(_lora_eager, "linear_4bit_lora_group", counted)
    return sizes


def shared(model):
    assert share_inputs(model) == 6
    return model


# ---- together ----


@pytest.mark.parametrize("rows", [5, 300])
@pytest.mark.parametrize("compute_dtype", [None, torch.bfloat16])
def test_steps_are_those_of_the_layers(device, groups, rows, compute_dtype):
    x = input_of(device, (2, rows, 64))
    expected = step(net(device, compute_dtype), x)
    model = shared(net(device, compute_dtype))
    for _ in range(2):
        assert_same(step(model, x), expected, 2e-6 if compute_dtype is None else 2e-2)
    assert groups == [3] * 4


def test_under_autocast_the_input_is_cast_and_saved_once(device, groups):
    x = input_of(device)

    def saved_bytes(model):
        kept = {}
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), lambda t: t
        )
        with torch.autocast(device, dtype=torch.bfloat16), hooks:
            y = model(x)
        del y
        return sum(t.untyped_storage().nbytes() for t in kept.values())

    alone = saved_bytes(net(device))
    together = saved_bytes(shared(net(device)))
    assert groups == [3, 3]
    assert together == alone - 2 * 2 * x.numel() * 2  # two casts less in each of two blocks
    with torch.autocast(device, dtype=torch.bfloat16):
        assert_same(step(shared(net(device)), x), step(net(device), x), 2e-2)


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


def test_a_second_call_takes_new_adapters(groups):
    x, model = input_of(), shared(net())
    qn.nn.add_lora(model, r=3, adapter_name="second")
    hooks = len(model.blocks[0]._forward_hooks)
    assert share_inputs(model) == 6
    assert len(model.blocks[0]._forward_hooks) == hooks
    step(model, x)
    assert groups == [3, 3]


# ---- alone ----


def test_a_compiled_model_is_one_graph(groups):
    torch._dynamo.reset()
    x, model = input_of(), shared(net())
    expected = step(net(), x)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    y = compiled(x)
    torch.testing.assert_close(y.detach(), expected["y"], rtol=1e-5, atol=1e-5)
    model.zero_grad()
    x.grad = None
    y.square().sum().backward()
    torch.testing.assert_close(x.grad, expected["x"], rtol=1e-4, atol=1e-4)
    assert not groups


def test_without_gradients_nothing_is_shared(groups):
    x, model = input_of(), shared(net())
    with torch.no_grad():
        y = model(x)
    torch.testing.assert_close(y, net()(x), rtol=1e-5, atol=1e-5)
    assert not groups


@pytest.mark.parametrize(
    ("change", "size"),
    [
        (lambda block: block.k_proj.register_forward_hook(lambda m, i, o: o * 2), 2),
        (lambda block: block.k_proj.base_layer.register_forward_hook(lambda m, i, o: o * 2), 2),
        (lambda block: block.v_proj.set_adapter(()), 2),
        (lambda block: setattr(block.q_proj, "adapters_enabled", False), 2),
        (lambda block: block.k_proj.lora_dropout.update({"default": nn.Dropout(0.99)}), 2),
        (lambda block: block.k_proj.register_forward_pre_hook(lambda m, i: (i[0] * 2,)), 2),
        (lambda block: block.k_proj.merge(), 2),
        (lambda block: block.k_proj.lora_B["default"].requires_grad_(False), 3),
    ],
)
def test_a_layer_that_is_not_its_product_alone_is_by_itself(groups, change, size):
    x, model, expected = input_of(), shared(net()), net()
    for block in (model.blocks[1], expected.blocks[1]):
        change(block)
    torch.manual_seed(3)
    actual = step(model, x)
    torch.manual_seed(3)
    wanted = {name: grad for name, grad in step(expected, x).items() if grad is not None}
    assert_same({name: actual[name] for name in wanted}, wanted)
    assert groups == [3, size]


def test_what_changes_between_the_calls_is_honoured(groups):
    """Adapters, values and modes that change while the holder of the layers runs."""
    x = input_of()

    def other_adapter(block):
        block.k_proj.set_adapter("second")

    def other_input(block):
        with torch.no_grad():
            x.mul_(2)

    for change, undo in (
        (other_adapter, lambda block: block.k_proj.set_adapter("default")),
        (other_input, lambda block: None),
    ):
        outputs = []
        for sharing in (False, True):
            model = net()
            model.blocks[0].k_proj.add_adapter("second", qn.nn.LoraSettings(r=2))
            x = input_of()
            nn.init.normal_(model.blocks[0].k_proj.lora_B["second"].weight, std=1.0)
            torch.manual_seed(2)
            nn.init.normal_(model.blocks[0].k_proj.lora_A["second"].weight)
            nn.init.ones_(model.blocks[0].k_proj.lora_B["second"].weight)
            if sharing:
                shared(model)
            block = model.blocks[0]
            block.between = lambda block=block, change=change: change(block)
            outputs.append(model.blocks[0](x * 1.0 if change is other_adapter else x.detach()))
            undo(block)
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-5, atol=1e-5)


class Cross(Attention):
    """Queries have another input than keys and values."""

    def forward(self, x):
        q, k, v = self.q_proj(x), self.k_proj(x * 2), self.v_proj(x * 3)
        return x + self.o_proj(torch.tanh(q) * torch.cat([k, v.sigmoid()], dim=-1))


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


def test_layers_of_different_inputs_are_computed_together_once(groups):
    x, model, expected = input_of(), net(), net()
    for one in (model, expected):
        for block in one.blocks:
            block.__class__ = Cross
    shared(model)
    wanted = step(expected, x)
    for _ in range(3):
        assert_same(step(model, x), wanted)
    assert groups == [3, 3]


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_an_error_leaves_nothing_behind(groups, error):
    x, model = input_of(), shared(net())
    block = model.blocks[0]

    def fail():
        raise error("between")

    block.between = fail
    with pytest.raises(error):
        model(x)
    together = block.q_proj.base_layer._together.group()
    del block.between
    if error is KeyboardInterrupt:  # torch runs no hooks: the next call forgets, if only to infer
        with torch.no_grad():
            block(x)
    assert together._thread.ahead is None
    groups.clear()
    assert_same(step(model, x), step(net(), x))
    assert groups == [3, 3]


def test_inputs_of_inference_are_multiplied_alone(groups):
    model, expected = net(), net()
    for one in (model, expected):
        for name, parameter in one.named_parameters():
            parameter.requires_grad_("lora_B" in name)
    shared(model)
    with torch.inference_mode():
        x = input_of().detach()
    results = []
    for one in (model, expected):
        y = one(x)
        y.square().sum().backward()
        results.append({n: p.grad for n, p in one.named_parameters() if "lora_B" in n} | {"y": y})
    assert_same(*results)
    assert groups == [3]  # the second block's, whose input is ordinary


def test_outside_of_its_holder_a_layer_is_by_itself(groups):
    x, model = input_of(), shared(net())
    step(model, x)
    groups.clear()
    block = model.blocks[0]
    y = block.q_proj(x)
    torch.testing.assert_close(y, net().blocks[0].q_proj(x))
    assert not groups and block.q_proj.base_layer._together.group()._thread.ahead is None


def test_what_is_no_group(groups):
    model = Net()
    assert share_inputs(model) == 0
    model = net()
    model.blocks[0].k_proj = nn.Linear(64, 32)
    model.blocks[1].k_proj.base_layer = Linear4bit.from_linear(nn.Linear(96, 32))
    assert share_inputs(model) == 2  # of other numbers of features, none is taken
    assert share_inputs(model, [("up_proj", "gate_proj")]) == 0
    step(net(), input_of())
    assert not groups


def test_adapters_of_peft():
    peft = pytest.importorskip("peft")
    pytest.importorskip("transformers")
    from _hf import IDS, fill, loss_and_gradients, quantized

    def model():
        config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        torch.manual_seed(0)
        return fill(peft.get_peft_model(quantized("llama"), config))

    expected_loss, expected = loss_and_gradients(model())
    ours = model()
    assert share_inputs(ours) == 2 * (3 + 2)
    loss, gradients = loss_and_gradients(ours)
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-6)
    for name, gradient in expected.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6)
    with ours.disable_adapter(), torch.no_grad():
        alone = ours(IDS).logits
    torch.testing.assert_close(alone, quantized("llama")(IDS).logits, rtol=1e-5, atol=1e-5)
