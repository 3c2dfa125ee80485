"""share_inputs: layers of one input are computed together, and nothing else is different."""

import pytest
import torch
from torch import nn

import qlora_native as qn
from _eager_calls import needs_table
from _shared_inputs import Cross, Net, assert_same, counted_groups, input_of, net, shared, step
from qlora_native.nn import Linear4bit, share_inputs

pytestmark = needs_table


@pytest.fixture
def groups(monkeypatch):
    return counted_groups(monkeypatch)


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
