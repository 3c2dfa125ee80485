"""Parameters that are split over the ranks of a mesh, as FSDP2 makes them."""

import pytest
import torch
import torch.distributed as dist

import qlora_native as qn
from _optim import ALL

tensors = pytest.importorskip("torch.distributed.tensor")
fake_pg = pytest.importorskip("torch.testing._internal.distributed.fake_pg")


@pytest.fixture
def mesh():
    """Two ranks, of which the other does not exist: what is asked for here is the same on both."""
    dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=2)
    try:
        yield tensors.init_device_mesh("cpu", (2,))
    finally:
        dist.destroy_process_group()


def parameter(mesh, placement):
    def tensor(value):
        local = torch.full((64, 80), value)
        return tensors.DTensor.from_local(local, mesh, [placement], run_check=False)

    param = torch.nn.Parameter(tensor(1.0))
    param.grad = tensor(0.5)
    return param


@pytest.mark.parametrize("options", [{"max_norm": 1.0}, {"skip_nonfinite": True}])
@pytest.mark.parametrize("cls", ALL)
def test_the_norm_of_one_rank_alone_is_refused(mesh, cls, options):
    param = parameter(mesh, tensors.Shard(0))
    optimizer = cls([torch.nn.Parameter(torch.ones(3)), param], **options)
    with pytest.raises(ValueError, match="clip_grad_norm_"):
        optimizer.step()
    assert not optimizer.state
    assert param.to_local().eq(1).all()


def test_every_rank_has_the_norm_of_what_is_replicated(mesh):
    param = parameter(mesh, tensors.Replicate())
    optimizer = qn.optim.AdamW([param], max_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm.item() == pytest.approx(0.5 * (64 * 80) ** 0.5)
    assert param.to_local().lt(1).all()


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"bits": 8}, "exp_avg_absmax, exp_avg_sq_absmax as"),
        ({"paged": True}, "exp_avg, exp_avg_sq as"),
        ({"bits": 8, "paged": True}, "exp_avg, exp_avg_absmax, exp_avg_sq, exp_avg_sq_absmax as"),
    ],
)
def test_a_checkpoint_of_one_rank_alone_is_refused(mesh, options, names):
    param = parameter(mesh, tensors.Shard(0))
    optimizer = qn.optim.AdamW([param], **options)
    optimizer.state_dict()
    optimizer.step()
    with pytest.raises(NotImplementedError, match=names):
        optimizer.state_dict()
    optimizer.step()


def test_split_states_of_32_bits_are_in_the_checkpoint(mesh):
    param = parameter(mesh, tensors.Shard(0))
    optimizer = qn.optim.AdamW([param])
    optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    state = optimizer.state_dict()["state"][0]
    assert all(isinstance(state[name], tensors.DTensor) for name in ("exp_avg", "exp_avg_sq"))


def test_every_rank_has_the_scales_of_what_is_replicated(mesh):
    param = parameter(mesh, tensors.Replicate())
    optimizer = qn.optim.AdamW8bit([param])
    optimizer.step()
    assert "exp_avg_absmax" in optimizer.state_dict()["state"][0]


def test_shards_that_begin_inside_of_a_storage(mesh):
    """As FSDP2's gradients do: the wrapper then has an address that is none, plus an offset."""
    param = parameter(mesh, tensors.Shard(0))
    storage = torch.full((64 * 80 + 160,), 0.5)
    local = storage[160:].view(64, 80)
    assert local.storage_offset()
    param.grad = tensors.DTensor.from_local(local, mesh, [tensors.Shard(0)], run_check=False)
    same = parameter(mesh, tensors.Shard(0))
    for one in (param, same):
        qn.optim.AdamW([one]).step()
    assert param.to_local().lt(1).all()
    torch.testing.assert_close(param.to_local(), same.to_local(), rtol=0, atol=0)
