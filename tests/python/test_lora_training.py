"""Training adapters: checkpointing, accumulation, a whole model on every device."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from _adapted import quantized_net, same, state
from _models import Block, randomize_adapters, tiny_llama, tiny_net, token_ids
from qlora_native.convert import quantize_model
from qlora_native.nn import (
    add_lora,
    lora_parameters,
    merge_lora,
    prepare_for_training,
    unmerge_lora,
)


class Checkpointed(nn.Module):
    def __init__(self, block: nn.Module, use_reentrant: bool | None) -> None:
        super().__init__()
        self.block, self.use_reentrant = block, use_reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.use_reentrant is None:
            return self.block(x)
        return checkpoint(self.block, x, use_reentrant=self.use_reentrant)


def test_both_kinds_of_checkpointing_give_equal_gradients():
    torch.manual_seed(0)
    block = nn.ModuleDict({"b": Block(24, 37, True)})
    quantize_model(block)
    add_lora(block, r=2)
    randomize_adapters(block)
    x = torch.randn(3, 24)
    gradients = []
    for use_reentrant in (None, True, False):
        block.zero_grad()
        Checkpointed(block["b"], use_reentrant)(
            x.clone().requires_grad_()
        ).square().sum().backward()
        gradients.append([p.grad.clone() for p in lora_parameters(block)])
    assert any(g.any() for g in gradients[0])
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


def test_accumulated_gradients_are_those_of_the_whole_batch():
    model = quantized_net()
    add_lora(model, r=2)
    randomize_adapters(model)
    ids = token_ids(shape=(4, 5))

    def gradients(batches):
        model.zero_grad()
        for batch in batches:
            (model(batch).square().sum() / 4).backward()
        return [p.grad.clone() for p in lora_parameters(model)]

    for a, b in zip(gradients([ids]), gradients(ids.split(1)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_llama_trains_end_to_end_with_checkpointing(use_reentrant):
    model = tiny_llama()
    quantize_model(model)
    ids = token_ids(shape=(2, 9), vocabulary=64)
    plain = copy.deepcopy(model)
    for m in (plain, model):
        torch.manual_seed(3)
        add_lora(m, r=4, alpha=16)
        m.train()
    prepare_for_training(model, use_reentrant=use_reentrant)
    assert model.config.use_cache is False
    # Twice is as once: one hook.
    prepare_for_training(model, use_reentrant=use_reentrant)
    assert len(model.get_input_embeddings()._forward_hooks) == 1

    losses = []
    for m in (plain, model):
        optimizer = torch.optim.AdamW(lora_parameters(m), lr=1e-2)
        run = []
        for _ in range(6):
            loss = m(input_ids=ids, labels=ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            run.append(loss.item())
        losses.append(run)
    assert losses[0] == losses[1]
    assert losses[1][-1] < losses[1][0] - 0.3
    out = model.eval()(ids).logits
    merge_lora(model, dense=True)
    torch.testing.assert_close(model(ids).logits, out, rtol=1e-3, atol=1e-3)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (2, 12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_lowers_the_loss_on_every_device(device, dtype):
    model = tiny_net().to(dtype)
    quantize_model(model, device=device)
    add_lora(model, r=4)
    assert {p.device.type for p in lora_parameters(model)} == {device}
    ids = token_ids().to(device)
    optimizer = torch.optim.AdamW(lora_parameters(model), lr=1e-2)
    losses = []
    for _ in range(12):
        loss = F.cross_entropy(model(ids).flatten(0, 1).float(), ids.flatten())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.3
    before, out = state(model), model(ids)
    merge_lora(model)
    unmerge_lora(model)
    assert same(before, state(model))
    assert torch.equal(model(ids), out)


def test_prepare_needs_the_interface_of_transformers():
    model = quantized_net()
    with pytest.raises(NotImplementedError, match="TinyNet"):
        prepare_for_training(model)
    prepare_for_training(model, gradient_checkpointing=False)
