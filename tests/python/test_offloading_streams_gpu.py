"""Offloading on a GPU: copies in order against streams, waited for on the device alone."""

import contextlib

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from _optim import assert_same
from qlora_native.training import offload_activations

pytestmark = pytest.mark.gpu


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
