"""Offloading on the CPU: what may move, host buffers, and that nothing changes where none moves.

What moves, and that it comes back, is in test_offloading_gpu.py.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from _models import tiny_net, token_ids
from qlora_native.training import ActivationOffload, OffloadStats, offload_activations
from qlora_native.training.host_buffers import HostBuffers
from qlora_native.training.offloading import is_activation

NOTHING = OffloadStats(
    tensors=0, to_host_bytes=0, to_device_bytes=0, buffers=0, buffer_bytes=0, on_device_bytes=0
)


def bytes_buffers():
    made = []

    def allocate(nbytes):
        made.append(nbytes)
        return torch.empty(nbytes, dtype=torch.uint8)

    return HostBuffers(allocate), made


def test_the_smallest_buffer_that_suffices_is_taken_again():
    buffers, made = bytes_buffers()
    taken = [buffers.take(nbytes) for nbytes in (100, 300, 200)]
    assert made == [100, 300, 200] and buffers.count == 3 and buffers.nbytes == 600
    for buffer in taken:
        buffers.give_back(buffer)
    assert [buffers.take(n).nbytes for n in (150, 100, 300)] == [200, 100, 300]
    assert len(made) == 3


def test_buffers_that_are_too_small_make_room_for_a_larger_one():
    buffers, made = bytes_buffers()
    for buffer in [buffers.take(100) for _ in range(4)]:
        buffers.give_back(buffer)
    larger = buffers.take(150)
    assert buffers.count == 3 and buffers.nbytes == 150 + 2 * 100
    buffers.give_back(larger)
    buffers.take(100)
    assert made == [100] * 4 + [150]


@pytest.mark.parametrize("seed", range(3))
def test_the_buffers_never_hold_more_than_steps_of_their_largest_tensors(seed):
    generator = torch.Generator().manual_seed(seed)
    buffers, _ = bytes_buffers()
    for _ in range(50):
        # A batch: layers of one size, which differs from batch to batch.
        nbytes = int(torch.randint(1, 1000, (), generator=generator))
        taken = [buffers.take(nbytes) for _ in range(7)]
        assert all(buffer.nbytes >= nbytes for buffer in taken)
        assert len({buffer.data_ptr() for buffer in taken}) == 7
        for buffer in reversed(taken):
            buffers.give_back(buffer)
        assert buffers.count <= 7 and buffers.nbytes <= 7 * 1000


def test_only_free_buffers_are_freed():
    buffers, _ = bytes_buffers()
    mine, other = buffers.take(10), buffers.take(20)
    buffers.give_back(other)
    buffers.clear()
    assert buffers.count == 1 and buffers.nbytes == 10
    buffers.give_back(mine)
    buffers.clear()
    assert buffers.count == 0 and buffers.nbytes == 0


def test_a_buffer_that_cannot_be_had_is_not_counted():
    def refuse(nbytes):
        raise MemoryError(f"no memory for {nbytes} bytes")

    buffers = HostBuffers(refuse)
    with pytest.raises(MemoryError, match="no memory for 10 bytes"):
        buffers.take(10)
    assert buffers.count == 0 and buffers.nbytes == 0


def test_what_is_an_activation():
    weight = torch.nn.Parameter(torch.randn(8, 8))
    frozen = torch.nn.Parameter(torch.zeros(64, dtype=torch.uint8), requires_grad=False)
    leaf = torch.randn(8, 8, requires_grad=True)
    hidden = leaf * 2
    for tensor in (hidden, hidden[1:].T, torch.randn(8, 8), hidden.detach()):
        assert is_activation(tensor, 256)
    for tensor in (weight, weight.t(), weight[2:], frozen, frozen.view(8, 8), leaf):
        assert not is_activation(tensor, 1)
    assert not is_activation(hidden, 257)
    # What counts is what would stay alive: all of the memory, however little of it is seen.
    assert is_activation(hidden[0, :1], 256)
    assert not is_activation(torch.zeros(1).expand(100), 256)
    assert not is_activation(torch.eye(8).to_sparse(), 1)
    assert not is_activation(torch.randn(8, dtype=torch.complex64).conj(), 1)
    assert not is_activation(torch.nn.UninitializedParameter(), 1)


def gradients(net, run):
    ids = token_ids(shape=(4, 6))
    net.zero_grad()
    loss = run(net, ids).square().mean()
    loss.backward()
    return [loss.detach(), *(p.grad for p in net.parameters())]


def plain(net, ids):
    return net(ids)


def checkpointed(reentrant):
    def run(net, ids):
        x = net.embed(ids)
        for layer in net.layers:
            x = checkpoint(layer, x, use_reentrant=reentrant)
        return net.lm_head(x)

    return run


@pytest.mark.parametrize("run", [plain, checkpointed(True), checkpointed(False)])
def test_on_the_cpu_nothing_moves_and_nothing_changes(run):
    net = tiny_net()
    expected = gradients(net, run)
    offload = offload_activations(min_bytes=1)
    with offload:
        inside = gradients(net, run)

    def forward_inside(net, ids):
        with offload:
            return run(net, ids)

    for found in (inside, gradients(net, forward_inside)):
        for mine, theirs in zip(found, expected, strict=True):
            assert torch.equal(mine, theirs)
    assert offload.stats() == NOTHING
    offload.close()


def test_gradients_of_gradients_and_retained_graphs_go_through_it():
    x = torch.randn(5, requires_grad=True)
    with offload_activations(min_bytes=1):
        y = (x.exp() * x).sum()
        (first,) = torch.autograd.grad(y, x, create_graph=True, retain_graph=True)
        (second,) = torch.autograd.grad(first.sum(), x, retain_graph=True)
        (again,) = torch.autograd.grad(y, x)
    torch.testing.assert_close(first, x.exp() * (x + 1))
    torch.testing.assert_close(second, x.exp() * (x + 2))
    assert torch.equal(again, first)


def test_a_tensor_that_was_modified_after_it_was_saved_is_refused_as_without_it():
    x = torch.randn(5, requires_grad=True)
    with offload_activations():
        y = x.exp()
        z = y.exp()
        y.add_(1)
        with pytest.raises(RuntimeError, match=r"shape \(5,\) was saved .* version 0 .* version 1"):
            z.sum().backward()


def test_the_graph_dies_with_its_last_user():
    """An operation that saves its own result must not keep itself alive."""
    x = torch.randn(5, requires_grad=True)
    gc.disable()
    try:
        with offload_activations():
            y = x.exp()
        died = weakref.ref(y)
        del y
        assert died() is None
    finally:
        gc.enable()


def test_an_exception_leaves_no_hooks_behind():
    x = torch.randn(5, requires_grad=True)
    with pytest.raises(KeyError), offload_activations():
        x.exp()
        raise KeyError("mine")
    packed = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        x.exp()
    x.exp()
    assert len(packed) == 1


def test_it_may_be_entered_twice():
    x = torch.randn(5, requires_grad=True)
    offload = offload_activations()
    with offload:
        y = x.exp()
        with offload:
            y = y.exp()
        y = y.exp()
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach() * y.detach().log() * x.exp())


def test_arguments_are_checked():
    with pytest.raises(ValueError, match="min_bytes is 0, expected 1 or more"):
        offload_activations(min_bytes=0)
    with pytest.raises(ValueError, match="window is -1, expected 1 or more"):
        offload_activations(window=-1)


def test_a_graph_that_is_captured_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "stream 7")
    offload = offload_activations()
    with pytest.raises(RuntimeError, match="captured on stream 7, and activations cannot"), offload:
        pass
    monkeypatch.undo()
    with offload:  # nothing was left behind
        pass


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_a_copy_has_the_settings(copied):
    found = copied(ActivationOffload(min_bytes=5, window=3))
    assert (found.min_bytes, found.window) == (5, 3)
    assert repr(found) == "ActivationOffload(min_bytes=5, window=3)"
    assert found.stats() == NOTHING
