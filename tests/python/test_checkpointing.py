"""How much a step keeps changes what it computes again, and no number."""

import collections
import copy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("transformers")

import qlora_native as qn
from _hf import tiny
from qlora_native.training import offload_activations, use_checkpointing

LAYERS = 4


class Executed(TorchDispatchMode):
    """Counts what really runs: an operation whose result was kept does not."""

    def __init__(self):
        super().__init__()
        self.counts = collections.Counter()
        self.widths = collections.Counter()

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.name()
        if "scaled_dot_product" in name and "backward" not in name:
            self.counts["attention"] += 1
        result = operator(*args, **(kwargs or {}))
        if name == "qlora_native::linear_4bit_lora":
            self.counts["product"] += 1
            first = result[0][0] if isinstance(result[0], (list, tuple)) else result[0]
            self.widths[first.shape[-1]] += 1
        return result


def model(kind="llama", **sizes):
    net = tiny(kind, num_hidden_layers=LAYERS, **sizes)
    qn.quantize_model(net)
    torch.manual_seed(1)
    qn.add_lora(net, r=4)
    for name, parameter in net.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.1)
    return net.train()


def step(net):
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(0))
    net.zero_grad()
    with Executed() as executed:
        loss = net(input_ids=ids, labels=ids).loss
        loss.backward()
    return loss.item(), [p.grad for p in net.parameters() if p.requires_grad], executed


@pytest.mark.parametrize("kind", ["llama", "opt", "mixtral"])
def test_gradients_do_not_depend_on_it(kind):
    net = model(kind)
    found = {}
    for setting in (("none", 1), ("full", 1), ("full", 3), ("selective", 1), ("selective", 2)):
        use_checkpointing(net, setting[0], every=setting[1])
        found[setting] = step(net)
    loss, gradients, _ = found["none", 1]
    for setting, (other_loss, other_gradients, _) in found.items():
        assert other_loss == loss, setting
        for mine, theirs in zip(other_gradients, gradients, strict=True):
            assert torch.equal(mine, theirs), setting


def test_what_runs_again():
    net = model()
    runs = {}
    for setting in (("none", 1), ("full", 1), ("full", 2), ("selective", 1)):
        use_checkpointing(net, setting[0], every=setting[1])
        runs[setting] = step(net)[2]
    attention = {setting: run.counts["attention"] for setting, run in runs.items()}
    assert attention == {
        ("none", 1): LAYERS,
        ("full", 1): 2 * LAYERS,
        ("full", 2): LAYERS + LAYERS // 2,
        ("selective", 1): LAYERS,
    }
    # gate and up, 48 wide, run again; q, k, v, o and down do not.
    widths = {setting: run.widths for setting, run in runs.items()}
    assert widths["none", 1][48] == 2 * LAYERS
    assert widths["selective", 1][48] == 4 * LAYERS
    for width in (16, 32):
        assert widths["selective", 1][width] == widths["none", 1][width]
        assert widths["full", 1][width] > widths["none", 1][width]


def test_without_dropout_the_state_of_the_generator_is_not_asked_for(monkeypatch):
    net = model()
    use_checkpointing(net, "full", preserve_rng_state=False)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_rng_state", lambda: pytest.fail("asked"))
        step(net)
    use_checkpointing(net, "full")
    with monkeypatch.context() as patch:
        patch.setattr(torch, "get_rng_state", lambda: pytest.fail("asked"))
        with pytest.raises(pytest.fail.Exception, match="asked"):
            step(net)


class Counting(torch.autograd.graph.saved_tensors_hooks):
    """Stands in for offloading where nothing moves: sees what it would be given."""

    def __init__(self):
        self.shapes = []
        super().__init__(self.pack, lambda tensor: tensor)

    def pack(self, tensor):
        self.shapes.append(tuple(tensor.shape))
        return tensor.detach()


@pytest.mark.parametrize(("mode", "every"), [("full", 1), ("full", 2), ("selective", 1)])
def test_offloading_gets_the_inputs_of_layers_that_run_again_and_nothing_else(mode, every):
    net = model()
    use_checkpointing(net, mode, every=every)
    loss, gradients, _ = step(net)
    counting = Counting()
    for offload in (offload_activations(min_bytes=1), counting):
        use_checkpointing(net, mode, every=every, offload=offload)
        other_loss, other_gradients, _ = step(net)
        assert other_loss == loss
        for mine, theirs in zip(other_gradients, gradients, strict=True):
            assert torch.equal(mine, theirs)
    # Of scalars and the empty tensors by which some versions of torch mark a checkpoint: nothing.
    inputs = [shape for shape in counting.shapes if shape and 0 not in shape]
    assert inputs == [(2, 24, 32)] * (LAYERS // every)
    seen = len(counting.shapes)
    use_checkpointing(net, mode, every=every)
    step(net)
    assert len(counting.shapes) == seen


def test_a_model_that_offloads_can_be_copied():
    net = model()
    use_checkpointing(net, "full", offload=offload_activations())
    loss, gradients, _ = step(net)
    other_loss, other_gradients, _ = step(copy.deepcopy(net))
    assert other_loss == loss
    for mine, theirs in zip(other_gradients, gradients, strict=True):
        assert torch.equal(mine, theirs)


def test_what_cannot_be_is_refused():
    net = model()
    with pytest.raises(ValueError, match="mode is 'half', expected one of none, full, selective"):
        use_checkpointing(net, "half")
    with pytest.raises(ValueError, match="every is 0"):
        use_checkpointing(net, "full", every=0)
    with pytest.raises(NotImplementedError):
        use_checkpointing(torch.nn.Linear(2, 2), "selective")
    offload = offload_activations(window=3)
    with pytest.raises(NotImplementedError, match="Linear has no"):
        use_checkpointing(torch.nn.Linear(2, 2), "full", offload=offload)
    with pytest.raises(
        ValueError, match=r"offload is ActivationOffload\(min_bytes=1048576, window=3"
    ):
        use_checkpointing(net, "none", offload=offload)
    use_checkpointing(torch.nn.Linear(2, 2), "none")
