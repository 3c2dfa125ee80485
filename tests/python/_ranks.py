"""One rank of a run that test_distributed.py starts: what is compared, and what is written down."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import AutoConfig, AutoModelForCausalLM

import qlora_native as qn
from qlora_native.cli.parallel import ranks
from qlora_native.hf.meta import meta_model
from qlora_native.nn import Linear4bit
from qlora_native.nn.sharding import shard_from_rank_0

CONFIG = {"compute_dtype": torch.float32}


def reference(folder: Path, device: torch.device) -> torch.nn.Module:
    model = AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=qn.QLoRANativeConfig(**CONFIG),
        dtype=torch.float32,
        device_map={"": "cpu"},
    )
    adapt(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 20)
    return model.to(device)


def adapt(model: torch.nn.Module) -> None:
    qn.add_lora(model, r=70)  # some parameters are large enough for 8 bits, also when split
    qn.prepare_for_training(model)
    model.train()


def optimizer_of(model: torch.nn.Module) -> torch.optim.Optimizer:
    trained = [p for p in model.parameters() if p.requires_grad]
    return qn.optim.PagedAdamW8bit(trained, lr=1e-2)


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor) -> float:
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 0.3)
    optimizer.step()
    optimizer.zero_grad()
    return loss.item()


def count_gathered() -> list[int]:
    """The bytes of every gathering from now on."""
    # Since torch 2.13 FSDP2 calls another function.
    name = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
    found, gather = [], getattr(dist, name)

    def counting(*args, **kwargs):
        tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
        found.append(max(tensor.nbytes for tensor in tensors))
        return gather(*args, **kwargs)

    setattr(dist, name, counting)
    return found


def sharded(folder: Path, place, device: torch.device) -> None:
    """Split over the ranks, against the whole model in the same process."""
    whole = reference(folder, device)
    if place.is_main:
        model = reference(folder, torch.device("cpu"))
    else:
        config = AutoConfig.from_pretrained(folder)
        model = meta_model(config, qn.QLoRANativeConfig(**CONFIG), torch.float32, counts=False)
        adapt(model)
    shard_from_rank_0(model, device)
    expected = dict(whole.named_parameters())
    same = {n: torch.equal(p.full_tensor(), expected[n]) for n, p in model.named_parameters()}
    buffers = dict(whole.named_buffers())
    same |= {n: torch.equal(b, buffers[n]) for n, b in model.named_buffers()}
    parts = sum(p.to_local().nbytes for p in model.parameters())
    optimizers = optimizer_of(model), optimizer_of(whole)
    rows = torch.randint(3, 90, (2 * place.size, 12), generator=torch.Generator().manual_seed(1))
    mine = rows[2 * place.rank : 2 * place.rank + 2].to(device)
    gathered = count_gathered()
    losses = []
    for number in range(3):
        own = step(model, optimizers[0], mine)
        losses.append(
            (place.sum([own / place.size])[0], step(whole, optimizers[1], rows.to(device)))
        )
        if number == 0:
            first = sum(gathered)
    qn.save_adapter(model, folder / f"adapter-{place.rank}")
    qn.optim.save_distributed(optimizers[0], folder / "shards")
    again = optimizer_of(model)
    qn.optim.load_distributed(again, folder / "shards")
    kept = all(
        torch.equal(getattr(t, "_local_tensor", t), getattr(s[n], "_local_tensor", s[n]))
        for p, s in optimizers[0].state.items()
        for n, t in again.state[p].items()
    )
    packed = [layer for layer in whole.modules() if isinstance(layer, Linear4bit)]
    report = {
        "different": [name for name, is_same in same.items() if not is_same],
        "parts": parts,
        "whole": sum(p.nbytes for p in whole.parameters()),
        "gathered": first,
        "packed": sum(layer.quantized_weight().nbytes for layer in packed),
        "elements": sum(layer.in_features * layer.out_features for layer in packed),
        "losses": losses,
        "bits": [str(s["exp_avg"].dtype) for s in optimizers[0].state.values()],
        "whole_bits": [str(s["exp_avg"].dtype) for s in optimizers[1].state.values()],
        "kept": kept,
    }
    (folder / f"report-{place.rank}.json").write_text(json.dumps(report))
    if place.is_main:
        torch.save(optimizers[1].state_dict(), folder / "whole.pt")


def lost(folder: Path, place, device: torch.device) -> None:
    """Rank 1 is killed while all exchange tensors."""
    value = torch.ones(4, device=device)
    for number in range(1000):
        if place.rank == 1 and number == 3:
            os.kill(os.getpid(), 9)
        dist.all_reduce(value)
        if device.type == "cuda":
            torch.cuda.synchronize()


def main() -> None:
    what, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    on_gpu = torch.cuda.device_count() >= int(os.environ["WORLD_SIZE"])
    kind = "cuda" if on_gpu else "cpu"
    with ranks(kind, timeout_seconds=60) as place:
        device = torch.device(kind, torch.cuda.current_device()) if on_gpu else torch.device("cpu")
        {"sharded": sharded, "lost": lost}[what](folder, place, device)


if __name__ == "__main__":
    main()
