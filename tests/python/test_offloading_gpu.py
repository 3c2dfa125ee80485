"""Offloading on a GPU: the same gradients, less memory, order against streams, nothing left."""

import contextlib
import gc

import pytest
import torch
from torch.utils.checkpoint import checkpoint

pytest.importorskip("transformers")

import qlora_native as qn
from _hf import tiny
from _models import randomize_adapters
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


def assert_same(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        assert torch.equal(mine, theirs)


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
    net = llama()
    ids = tokens()
    offload = offload_activations(min_bytes=ANY)
    use_checkpointing(net, "full", offload=offload)
    gradients(net, ids)
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
    net = llama()
    ids = tokens()
    offload = offload_activations(min_bytes=ANY)
    use_checkpointing(net, "full", offload=offload)
    gradients(net, ids)
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


def chain(count=12, width=512):
    torch.manual_seed(0)
    return [torch.nn.Linear(width, width, device="cuda") for _ in range(count)]


def run_chain(layers, x):
    """Layers that run again, without anything that waits for the device; as many tensors move.

    The first input is a leaf; the last output is saved for its square.
    """
    for layer in layers:
        x = checkpoint(
            lambda h, layer=layer: layer(h).tanh(), x, use_reentrant=False, preserve_rng_state=False
        )
    return x.square().sum()


def chain_gradients(layers, x, offload=None, between=lambda: None):
    for layer in layers:
        layer.zero_grad()
    with offload or contextlib.nullcontext():
        loss = run_chain(layers, x)
        between()
        loss.backward()
    return [p.grad for layer in layers for p in layer.parameters()]


def test_nothing_waits_for_the_device():
    layers, x = chain(), torch.randn(2048, 512, device="cuda", requires_grad=True)
    offload = offload_activations()
    chain_gradients(layers, x, offload)  # buffers are allocated
    torch.cuda.synchronize()
    torch.cuda._sleep(1_000_000_000)
    found = chain_gradients(layers, x, offload)
    waited = torch.cuda.current_stream().query()
    torch.cuda.synchronize()
    assert not waited, "the step waited for the device"
    assert offload.stats().tensors > 0
    assert_same(found, chain_gradients(layers, x))


@pytest.mark.parametrize("late", ["copies", "copies at the turn", "computation"])
def test_whoever_is_late_is_waited_for_on_the_device(late):
    """Memory is used again, in both directions, only after the copy."""
    layers, x = chain(), torch.randn(2048, 512, device="cuda", requires_grad=True)
    expected = [t.clone() for t in chain_gradients(layers, x)]
    offload = offload_activations()
    chain_gradients(layers, x, offload)
    (copies,) = offload._copies.values()

    def delay(*_):
        with torch.cuda.stream(copies._side):
            torch.cuda._sleep(20_000_000)

    hooks = []
    if late == "copies":
        hooks = [layer.register_forward_pre_hook(delay) for layer in layers]
    for _ in range(3):
        torch.cuda.synchronize()
        if late == "computation":
            torch.cuda._sleep(200_000_000)
        at_turn = delay if late == "copies at the turn" else lambda: None
        assert_same(chain_gradients(layers, x, offload, at_turn), expected)
    for hook in hooks:
        hook.remove()
    assert offload.stats().tensors == 4 * len(layers)


def test_steps_on_other_streams():
    layers, x = chain(), torch.randn(2048, 512, device="cuda", requires_grad=True)
    expected = [t.clone() for t in chain_gradients(layers, x)]
    offload = offload_activations()
    streams = [torch.cuda.Stream() for _ in range(2)]
    for stream in (*streams, *streams):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            found = chain_gradients(layers, x, offload)
        torch.cuda.current_stream().wait_stream(stream)
        assert_same(found, expected)
        torch.cuda.synchronize()
    assert offload.stats().tensors > 0


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


def test_a_graph_outlives_the_end_of_offloading():
    layers, x = chain(), torch.randn(2048, 512, device="cuda", requires_grad=True)
    expected = [t.clone() for t in chain_gradients(layers, x)]
    offload = offload_activations()
    for layer in layers:
        layer.zero_grad()
    with offload:
        loss = run_chain(layers, x)
    (copies,) = offload._copies.values()
    offload.close()
    assert copies.stats().buffers == len(layers)
    loss.backward()
    assert_same([p.grad for layer in layers for p in layer.parameters()], expected)
    del loss
    assert copies.stats().buffers == 0


def test_it_is_refused_in_a_cuda_graph():
    x = torch.randn(1024, 1024, device="cuda", requires_grad=True)
    offload = offload_activations()
    graph = torch.cuda.CUDAGraph()
    refused = pytest.raises(RuntimeError, match=r"CUDA graph is being captured on .*stream")
    with torch.cuda.graph(graph):
        y = x.detach() * 2
        with refused, offload:
            pass
    graph.replay()
    assert torch.equal(y, x.detach() * 2)
    with offload:
        (x * 2).exp().sum().backward()
    assert offload.stats().tensors > 0
