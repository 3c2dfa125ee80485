"""Offloading on a GPU: the same gradients with less memory, and nothing left over."""

import contextlib
import gc

import pytest
import torch

pytest.importorskip("transformers")

import qlora_native as qn
from _hf import tiny
from _models import randomize_adapters
from _optim import assert_same
from qlora_native.training import offload_activations, use_checkpointing
from qlora_native.training.offloading import WINDOW

pytestmark = pytest.mark.gpu

LAYERS = 8
ANY = 256
"""Bytes from which on tensors of tiny models move."""


def llama(**sizes):
    # Attention in plain products: fused ones may add gradients in any order.
    net = tiny("llama", num_hidden_layers=LAYERS, attn_implementation="eager", **sizes)
    qn.quantize_model(net)
    qn.add_lora(net, r=4)
    randomize_adapters(net)
    return net.cuda().train()


def tokens(length=24, sequences=2):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 64, (sequences, length), generator=generator).cuda()


def gradients(net, ids, around=None, inside=True):
    """Loss and gradients; `around` is entered for the forward pass, or for both."""
    net.zero_grad()
    around = contextlib.nullcontext() if around is None else around
    with around:
        loss = net(input_ids=ids, labels=ids).loss
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters() if p.requires_grad)]


def set_up(net, kind, offload=None):
    """Returns what has to be entered around the forward pass."""
    if kind == "reentrant":
        use_checkpointing(net, "full")
        net.gradient_checkpointing_enable({"use_reentrant": True})
        return offload
    if kind == "none":
        use_checkpointing(net, "none")
        return offload
    use_checkpointing(net, kind, offload=offload)
    return None


def after_a_step():
    """A model whose layers run again and offload, the tokens of its step, and what offloads."""
    net, ids, offload = llama(), tokens(), offload_activations(min_bytes=ANY)
    use_checkpointing(net, "full", offload=offload)
    gradients(net, ids)
    return net, ids, offload


@pytest.mark.parametrize("kind", ["none", "full", "selective", "reentrant"])
def test_gradients_are_the_same_bit_for_bit(kind):
    net = llama()
    offload = offload_activations(min_bytes=ANY)
    for ids in (tokens(), tokens(31), tokens(17)):
        set_up(net, kind)
        expected = gradients(net, ids)
        assert_same(gradients(net, ids), expected)  # else the model is not deterministic itself
        around = set_up(net, kind, offload)
        for inside in (True, False):
            before = offload.stats()
            assert_same(gradients(net, ids, around, inside), expected)
            after = offload.stats()
            moved = after.to_host_bytes - before.to_host_bytes
            assert moved > 0 and after.on_device_bytes == 0
            assert 0 < after.to_device_bytes - before.to_device_bytes <= moved
    offload.close()


def test_of_layers_that_run_again_the_inputs_move_but_for_the_last():
    _, ids, offload = after_a_step()
    found = offload.stats()
    nbytes = ids.numel() * 32 * 4
    # The first layer's input is a leaf, which its gradient's place keeps alive anyway.
    assert found.tensors == LAYERS - 1
    assert found.to_host_bytes == (LAYERS - 1) * nbytes
    assert found.to_device_bytes == (LAYERS - 1 - WINDOW) * nbytes


def test_buffers_are_used_again_from_step_to_step_and_freed_at_the_end():
    net = llama()
    offload = offload_activations(min_bytes=ANY)
    use_checkpointing(net, "full", offload=offload)
    held = []
    for length in (31, 31, 24, 8, 31):
        gradients(net, tokens(length))
        held.append((offload.stats().buffers, offload.stats().buffer_bytes))
    assert held == [(LAYERS - 1, (LAYERS - 1) * 2 * 31 * 32 * 4)] * 5
    assert offload.stats().tensors == 5 * (LAYERS - 1)
    offload.close()
    assert offload.stats().buffers == offload.stats().buffer_bytes == 0
    gradients(net, tokens(8))  # it begins anew
    assert offload.stats().buffers == LAYERS - 1


def test_the_buffers_are_pinned():
    offload = offload_activations(min_bytes=ANY)
    x = torch.randn(1000, device="cuda", requires_grad=True)
    with offload:
        y = (x * 2).exp().sum()
    (copies,) = offload._copies.values()
    hosts = [record.host for record in copies._records.values()]
    assert hosts and all(host.is_pinned() and not host.is_cuda for host in hosts)
    y.backward()


def peak_of(step):
    """Bytes above what was there before, at the most."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def test_the_peak_is_lower_by_the_inputs():
    net = llama(hidden_size=512, intermediate_size=512)
    ids = tokens(length=128, sequences=32)
    nbytes = ids.numel() * 512 * 4
    offload = offload_activations()
    peaks = {}
    for name, mode in (("plain", None), ("offloaded", offload)):
        use_checkpointing(net, "full", offload=mode)
        gradients(net, ids)  # workspaces, gradients' memory
        net.zero_grad()
        peaks[name] = peak_of(lambda: gradients(net, ids))
    assert offload.stats().to_host_bytes == 2 * (LAYERS - 1) * nbytes
    saved = peaks["plain"] - peaks["offloaded"]
    # Besides the first layer's there are two on the device at the peak.
    assert (LAYERS - 4) * nbytes <= saved <= LAYERS * nbytes, (saved / nbytes, peaks)


def test_device_memory_is_handed_back():
    net = llama()
    ids = tokens()
    offload = offload_activations(min_bytes=ANY)
    left = []
    for mode in (None, offload):
        use_checkpointing(net, "full", offload=mode)
        gradients(net, ids)
        net.zero_grad()
        gc.collect()
        left.append(torch.cuda.memory_allocated())
    assert left[1] == left[0]


def test_a_graph_without_a_backward_pass_leaves_nothing():
    net, ids, offload = after_a_step()
    net.zero_grad()
    gc.collect()
    before, buffers = torch.cuda.memory_allocated(), offload.stats().buffers
    loss = net(input_ids=ids, labels=ids).loss
    # It was on its way when the next one began.
    assert offload.stats().on_device_bytes == WINDOW * ids.numel() * 32 * 4
    del loss
    gc.collect()
    assert offload.stats().on_device_bytes == 0
    assert offload.stats().buffers == buffers
    assert torch.cuda.memory_allocated() == before


def fail(*_):
    raise KeyError("mine")


@pytest.mark.parametrize("kind", ["none", "full", "reentrant"])
def test_an_exception_in_the_forward_pass_leaves_nothing(kind):
    net = llama()
    ids = tokens()
    set_up(net, kind)
    expected = [t.clone() for t in gradients(net, ids)]
    offload = offload_activations(min_bytes=ANY)
    around = set_up(net, kind, offload)
    gradients(net, ids, around)
    net.zero_grad()
    gc.collect()
    before, buffers = torch.cuda.memory_allocated(), offload.stats().buffers
    hook = net.model.layers[LAYERS // 2].mlp.register_forward_pre_hook(fail)
    with pytest.raises(KeyError, match="mine"):
        gradients(net, ids, around)
    hook.remove()
    gc.collect()
    assert offload.stats().on_device_bytes == 0
    assert torch.cuda.memory_allocated() == before
    assert_same(gradients(net, ids, around), expected)
    assert offload.stats().buffers == buffers


def test_one_memory_moves_once_whatever_is_seen_of_it():
    def loss(x):
        h = (x * 2).bfloat16()
        parts = h[:, 100:300].T, h.view(-1)[7:], h[::2]
        # Each product saves both of its sides.
        return sum((part * part.exp()).float().sum() for part in parts)

    x = torch.randn(1024, 1024, device="cuda", requires_grad=True)
    loss(x).backward()
    expected, x.grad = x.grad, None
    offload = offload_activations()
    with offload:
        total = loss(x)
        moved = offload.stats()
    # h, and the exponential of two of its three parts: that of the first is below the size.
    assert moved.tensors == 3
    total.backward()
    assert torch.equal(x.grad, expected)
    assert offload.stats().on_device_bytes == 0


def test_what_is_held_elsewhere_stays():
    layer = torch.nn.Linear(1024, 1024, device="cuda")
    frozen = torch.nn.Linear(1024, 1024, device="cuda").requires_grad_(False)
    x = torch.randn(1024, 1024, device="cuda", requires_grad=True)
    small = torch.randn(100, 100, device="cuda", requires_grad=True)
    offload = offload_activations()
    with offload:
        y = frozen(layer(x)).sum() + (small * 2).exp().sum()
        assert offload.stats().tensors == 0
        z = layer(x * 2).sum()
        assert offload.stats().tensors == 1
    (y + z).backward()


def test_retained_graphs_and_gradients_of_gradients():
    x = torch.randn(1024, 1024, device="cuda", requires_grad=True)
    h = x.detach().double()
    offload = offload_activations()
    with offload:
        y = (x.sin() * x.cos()).sin().sum()
        (first,) = torch.autograd.grad(y, x, retain_graph=True)
        (again,) = torch.autograd.grad(y, x, retain_graph=True)
        (graph,) = torch.autograd.grad(y, x, create_graph=True)
        (second,) = torch.autograd.grad(graph.sum(), x)
    assert torch.equal(again, first) and torch.equal(graph, first)
    s = h.sin() * h.cos()
    slope = (2 * h).cos()
    torch.testing.assert_close(first, (s.cos() * slope).float())
    expected = -s.sin() * slope.square() - 2 * s.cos() * (2 * h).sin()
    torch.testing.assert_close(second, expected.float())
    del y, graph
    gc.collect()
    assert offload.stats().on_device_bytes == 0


def test_graphs_that_are_alive_at_once():
    """As with two losses: the first to be made is the first to go back."""
    net = llama()
    offload = offload_activations(min_bytes=ANY)
    use_checkpointing(net, "full")
    expected = [gradients(net, tokens(length))[1:] for length in (24, 31)]
    use_checkpointing(net, "full", offload=offload)
    net.zero_grad()
    losses = [net(input_ids=ids, labels=ids).loss for ids in (tokens(24), tokens(31))]
    for loss, theirs in zip(losses, expected, strict=True):
        net.zero_grad()
        loss.backward()
        assert_same([p.grad for p in net.parameters() if p.requires_grad], theirs)
    del losses, loss
    assert offload.stats().buffers == 2 * (LAYERS - 1)
    assert offload.stats().on_device_bytes == 0


def test_what_was_modified_after_it_was_saved_is_refused():
    x = torch.randn(1024, 1024, device="cuda", requires_grad=True)
    with offload_activations():
        y = x * 2
        z = y.square().sum()
        y.add_(1)
    with pytest.raises(RuntimeError, match=r"shape \(1024, 1024\) was saved .* version 0 .* 1"):
        z.backward()
