"""What outlives a step: checkpoints of ours and of others, copies, overrides."""

import copy
import pickle
import subprocess
import sys

import pytest
import torch

import qlora_native as qn
from _optim import (
    ALL,
    assert_same,
    assert_same_states,
    parameters,
    run,
    set_gradients,
    through_a_file,
)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cls", ALL)
def test_a_resumed_run_goes_on_bit_for_bit(device, cls, dtype):
    def make(params):
        options = {"stochastic_rounding": True} if dtype != torch.float32 else {}
        return cls([{"params": params[:3]}, {"params": params[3:], "lr": 1e-2}], **options)

    params = parameters(dtype=dtype, device=device)
    optimizer = make(params)
    run(optimizer, params, 5)
    saved = through_a_file(optimizer.state_dict())
    values = [p.detach().clone() for p in params]
    run(optimizer, params, 5, first=5)

    resumed = [torch.nn.Parameter(v) for v in values]
    other = make(resumed)
    other.load_state_dict(saved)
    run(other, resumed, 5, first=5)
    assert_same(params, resumed)
    assert_same_states(optimizer, other)


def test_a_master_copy_survives_a_checkpoint(device):
    params = parameters(dtype=torch.bfloat16, device=device)
    optimizer = qn.optim.AdamW(params, lr=1e-4, master_weights=True)
    run(optimizer, params, 5)
    resumed = [torch.nn.Parameter(p.detach().clone()) for p in params]
    other = qn.optim.AdamW(resumed, lr=1e-4, master_weights=True)
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    run(optimizer, params, 5, first=5)
    run(other, resumed, 5, first=5)
    assert_same(params, resumed)
    assert_same_states(optimizer, other)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
@pytest.mark.parametrize("cls", ALL)
def test_copies_go_on_alike_and_apart(device, cls, how):
    model = torch.nn.Sequential(torch.nn.Linear(70, 70), torch.nn.Linear(70, 3)).to(device)
    optimizer = cls(model.parameters(), max_norm=1.0)
    optimizer.register_override(model[0])
    run(optimizer, list(model.parameters()), 2)
    twin, copied = how((model, optimizer))
    before = [p.detach().clone() for p in twin.parameters()]
    run(optimizer, list(model.parameters()), 3, first=2)
    assert_same(before, list(twin.parameters()))
    run(copied, list(twin.parameters()), 3, first=2)
    assert_same(list(model.parameters()), list(twin.parameters()))
    assert_same_states(optimizer, copied)


def test_torchs_checkpoint_loads_and_ours_loads_in_torch(device):
    ours, theirs = parameters(device=device), parameters(device=device)
    a, b = qn.optim.AdamW(ours, lr=1e-2), torch.optim.AdamW(theirs, lr=1e-2)
    run(b, theirs, 4)
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q)
    a.load_state_dict(through_a_file(b.state_dict()))
    run(a, ours, 4, first=4)
    run(b, theirs, 4, first=4)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-6, atol=1e-6)
    assert a.state[ours[0]]["step"].item() == 8

    back = [torch.nn.Parameter(p.detach().clone()) for p in ours]
    c = torch.optim.AdamW(back, lr=1e-2)
    saved = a.state_dict()
    saved["param_groups"] = [{**c.param_groups[0], **g} for g in saved["param_groups"]]
    c.load_state_dict(through_a_file(saved))
    run(a, ours, 2, first=8)
    run(c, back, 2, first=8)
    torch.testing.assert_close(ours[0], back[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["AdamW8bit", "Lion8bit", "AdamW"])
def test_bitsandbytes_checkpoint_loads(name):
    bnb = pytest.importorskip("bitsandbytes")
    shapes = [(64, 80), (100,)]
    ours, theirs = parameters(shapes), parameters(shapes)
    a = getattr(qn.optim, name)(ours, lr=1e-3)
    b = getattr(bnb.optim, name)(theirs, lr=1e-3)
    run(b, theirs, 4)
    for p, q in zip(ours, theirs, strict=True):
        p.data.copy_(q)
    a.load_state_dict(through_a_file(b.state_dict()))
    state, reference = a.state[ours[0]], b.state[theirs[0]]
    assert torch.equal(state["exp_avg"], reference["state1"])
    if name != "AdamW":
        assert state["exp_avg"].dtype == torch.uint8
        assert torch.equal(state["exp_avg_absmax"], reference["absmax1"])
    assert a.state[ours[1]]["exp_avg"].dtype == torch.float32
    assert state["step"].item() == 4
    run(a, ours, 1, first=4)
    run(b, theirs, 1, first=4)
    torch.testing.assert_close(ours[0], theirs[0], rtol=1e-5, atol=1e-6)


def test_a_state_with_another_map_is_refused():
    params = parameters([(64, 80)])
    optimizer = qn.optim.AdamW8bit(params)
    saved = {
        "state1": torch.zeros(64, 80, dtype=torch.uint8),
        "absmax1": torch.zeros(20),
        "qmap1": torch.linspace(-1, 1, 256),
        "step": 1,
    }
    groups = optimizer.state_dict()["param_groups"]
    with pytest.raises(ValueError, match="qmap1"):
        optimizer.load_state_dict({"state": {0: saved}, "param_groups": groups})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[0].pop("exp_avg_sq"), "exp_avg_sq"),
        (lambda s: s[0].update(exp_avg=torch.zeros(3)), "3 elements"),
        (lambda s: s[0].update(momentum_buffer=torch.zeros(3)), "momentum_buffer"),
        (lambda s: s[0].update(exp_avg_absmax=torch.zeros(1)), "exp_avg_absmax"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, message):
    params = parameters([(64, 80)])
    optimizer = qn.optim.AdamW8bit(params)
    run(optimizer, params, 2)
    before = copy.deepcopy(optimizer)
    saved = copy.deepcopy(optimizer.state_dict())
    change(saved["state"])
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert_same_states(optimizer, before)


def test_loading_copies(device):
    params = parameters(device=device)
    optimizer = qn.optim.AdamW8bit(params)
    run(optimizer, params, 2)
    saved = copy.deepcopy(optimizer.state_dict())
    reference = copy.deepcopy(saved)
    optimizer.load_state_dict(saved)
    run(optimizer, params, 2, first=2)
    assert torch.equal(saved["state"][0]["exp_avg"], reference["state"][0]["exp_avg"])


def test_hooks_of_load_state_dict_see_tensors():
    params = parameters()
    optimizer = qn.optim.AdamW(params)
    run(optimizer, params, 1)
    seen = []
    optimizer.register_load_state_dict_pre_hook(
        lambda _, state_dict: seen.append(type(state_dict["state"][0]["exp_avg"]))
    )
    optimizer.register_load_state_dict_post_hook(
        lambda o: seen.append(type(o.state[params[0]]["exp_avg"]))
    )
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [torch.Tensor, torch.Tensor]


def test_overrides_by_name_and_by_module(device):
    model = torch.nn.ModuleDict(
        {
            "embed": torch.nn.Embedding(100, 64),
            "head": torch.nn.Linear(64, 100),
            "mid": torch.nn.Linear(64, 80),
        }
    ).to(device)
    optimizer = qn.optim.AdamW8bit(model.named_parameters())
    optimizer.register_override("embed")
    optimizer.register_override(model["head"])
    run(optimizer, list(model.parameters()), 1)
    dtypes = {n: optimizer.state[p]["exp_avg"].dtype for n, p in model.named_parameters()}
    assert dtypes == {
        "embed.weight": torch.float32,
        "head.weight": torch.float32,
        "head.bias": torch.float32,
        "mid.weight": torch.uint8,
        "mid.bias": torch.float32,
    }
    with pytest.raises(RuntimeError, match="before the first step"):
        optimizer.register_override("mid.weight")


def test_an_override_can_ask_for_8_bits():
    params = parameters([(64, 80), (64, 80)])
    optimizer = qn.optim.AdamW(params)
    optimizer.register_override(params[1], bits=8)
    run(optimizer, params, 1)
    assert [optimizer.state[p]["exp_avg"].dtype for p in params] == [torch.float32, torch.uint8]


def test_overrides_of_what_is_not_there_are_refused():
    model = torch.nn.Linear(4, 4)
    named = qn.optim.AdamW8bit(model.named_parameters())
    with pytest.raises(ValueError, match=r"'wieght'.*weight, bias"):
        named.register_override("wieght")
    with pytest.raises(ValueError, match="knows no names"):
        qn.optim.AdamW8bit(model.parameters()).register_override("weight")
    with pytest.raises(ValueError, match="no parameter of Linear"):
        named.register_override(torch.nn.Linear(4, 4))
    with pytest.raises(ValueError, match="bits is 16"):
        named.register_override("weight", bits=16)


def test_without_torchs_table_of_functions_it_is_the_same(device, monkeypatch):
    """torch may have none (or another version of it): tensors are then read through attributes."""
    results = []
    for _ in range(2):
        params = parameters(device=device)
        optimizer = qn.optim.AdamW8bit(params, max_norm=1.0)
        run(optimizer, params, 3)
        results.append(params)
        monkeypatch.delattr(torch.Tensor, "__dlpack_c_exchange_api__", raising=False)
    assert_same(*results)


SHARDED = """
import os, torch, torch.distributed as dist
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
import qlora_native as qn

os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0", RANK="0", WORLD_SIZE="1")
dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
start = torch.randn(64, 80)
grad = torch.randn(64, 80)
plain = torch.nn.Parameter(start.clone())
sharded = torch.nn.Parameter(distribute_tensor(start.clone(), mesh, [Shard(0)]))
for param, value in ((plain, grad), (sharded, distribute_tensor(grad.clone(), mesh, [Shard(0)]))):
    param.grad = value
    optimizer = qn.optim.AdamW8bit([param])
    optimizer.step()
    optimizer.step()
assert torch.equal(sharded.full_tensor(), plain), "the shard was not updated"
state = optimizer.state[sharded]
assert type(state["exp_avg"]).__name__ == "DTensor" and state["exp_avg"].dtype == torch.uint8
dist.destroy_process_group()
"""


def test_sharded_parameters(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", SHARDED], capture_output=True, text=True, cwd=tmp_path, timeout=120
    )
    assert done.returncode == 0, done.stderr


def test_the_gradient_is_left_alone(device):
    params = parameters(device=device)
    optimizer = qn.optim.AdamW(params, max_norm=0.1, maximize=True)
    set_gradients(params, 0)
    before = [p.grad.clone() for p in params]
    optimizer.step()
    assert_same([p.grad for p in params], before)
