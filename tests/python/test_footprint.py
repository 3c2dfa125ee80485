"""Estimates from a configuration against the tensors of models and steps."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("transformers")

import qlora_native as qn
from _cli import run_cli
from _hf import tiny
from _hf_models import MODELS, ids, save
from qlora_native import footprint
from qlora_native.hf.meta import meta_model

BF16 = torch.bfloat16


def loaded(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=qn.QLoRANativeConfig(), dtype=BF16, device_map={"": "cpu"}
    )


def on_meta(folder, r=5):
    from transformers import AutoConfig

    model = meta_model(AutoConfig.from_pretrained(folder), qn.QLoRANativeConfig(), BF16)
    qn.add_lora(model, r=r)
    return model.train()


def after_a_step(model, make):
    optimizer = make([p for p in model.parameters() if p.requires_grad])
    model(input_ids=ids(), labels=ids()).loss.backward()
    optimizer.step()
    return optimizer


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("make", [qn.optim.AdamW, qn.optim.Lion8bit])
def test_tensors_are_estimated_to_the_byte(tmp_path, name, make):
    torch.manual_seed(0)
    save(MODELS[name](), tmp_path)
    model = loaded(tmp_path)
    qn.add_lora(model, r=70)  # some parameters are large enough for 8 bits
    held = footprint.held(model, after_a_step(model, make))
    meta = on_meta(tmp_path, r=70)
    optimizer = make([p for p in meta.parameters() if p.requires_grad])
    found = footprint.estimate(meta, optimizer, None)
    for part in ("weights", "dense", "adapters", "gradients", "optimizer"):
        assert getattr(found, part) == getattr(held, part) > 0, part


@pytest.mark.parametrize("kind", ["mixtral", "gpt_oss"])
def test_experts_are_counted(tmp_path, kind):
    tiny(kind).to(BF16).save_pretrained(tmp_path)
    held = footprint.held(loaded(tmp_path))
    from transformers import AutoConfig

    model = meta_model(AutoConfig.from_pretrained(tmp_path), qn.QLoRANativeConfig(), BF16)
    assert footprint.held(model) == held


def test_states_of_every_kind_are_counted():
    shapes = [(100, 60), (3, 5)]
    for options in ({}, {"bits": 8}, {"master_weights": True}, {"bits": 8, "master_weights": True}):
        params = [torch.nn.Parameter(torch.ones(shape, dtype=BF16)) for shape in shapes]
        optimizer = qn.optim.AdamW(params, **options)
        estimated = optimizer.state_bytes()
        for param in params:
            param.grad = torch.ones_like(param)
        optimizer.step()
        held = footprint.held(torch.nn.ParameterList(params), optimizer)
        assert estimated == held.optimizer > 0


class _Counter:
    """Counts what autograd saves on a CPU, apart from parameters."""

    def __init__(self, model):
        self.known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self.storages = {}

    def pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self.known:
            self.storages[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    @property
    def nbytes(self):
        return sum(size for size, _ in self.storages.values())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_what_is_saved_is_what_autograd_saves(tmp_path, checkpointing):
    # Without groups of queries: the CPU's attention would save repeated keys and values.
    save(MODELS["llama"](num_key_value_heads=4, num_hidden_layers=3), tmp_path)
    model = loaded(tmp_path).train()
    qn.add_lora(model, r=5)
    qn.prepare_for_training(model, gradient_checkpointing=checkpointing)
    batch = ids((2, 40))
    counter = _Counter(model)
    with torch.autograd.graph.saved_tensors_hooks(counter.pack, lambda tensor: tensor):
        model(input_ids=batch, labels=batch, use_cache=False)
    saved = footprint.trace(on_meta(tmp_path), 2, 40)
    assert len(saved.layers) == 3
    assert saved.logits == 2 * 40 * model.config.vocab_size
    layers = sum(layer[0 if checkpointing else 1] for layer in saved.layers)
    assert layers + saved.outside + saved.loss == pytest.approx(counter.nbytes, rel=0.03)


def test_the_peak_is_at_the_loss_or_in_a_layer():
    saved = footprint.Saved(layers=((10, 100, 30), (10, 200, 40)), outside=1, loss=50, logits=20)
    plain = {"checkpointing": False}
    assert footprint.activation_bytes(saved, **plain) == 1 + 300 + 50 + 120
    assert footprint.activation_bytes(saved, **plain, loss_share=0.1) == 1 + 300 + 3 * 40
    assert footprint.activation_bytes(saved, checkpointing=True) == 1 + 20 + 200 + 120
    assert footprint.activation_bytes(saved, checkpointing=True, loss_share=2.0) == 1 + 20 + 340


def test_shards_are_what_one_of_several_ranks_holds(tmp_path):
    save(MODELS["llama"](num_hidden_layers=4), tmp_path)
    model = on_meta(tmp_path)
    optimizer = qn.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    whole = footprint.estimate(model, optimizer, None)
    found = footprint.estimate(model, optimizer, None, shards=4)
    assert found.weights == whole.weights // 4 + 2 * whole.weights // 4
    assert found.optimizer == -(-whole.optimizer // 4)
    layer = model.model.layers[0]
    norms = footprint.held(layer).dense
    outside = whole.dense - 4 * norms
    assert found.dense == -(-whole.dense // 4) + outside + 2 * norms


def test_a_tensor_that_is_shared_counts_once():
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(4, 3), "b": torch.nn.Linear(4, 3)})
    model["b"].weight = model["a"].weight
    assert footprint.held(model).adapters == 4 * (12 + 3 + 3)


# ---- the command ----


def test_the_command_says_what_fits(tmp_path):
    save(MODELS["llama"](), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    arguments = ["estimate", tmp_path, "--seq", "16", "--batch", "2", "--lora-r", "5", "--json"]
    arguments += ["--optim", "adamw", "--skip-modules", "lm_head", "--gpus", "2"]
    found = run_cli(*arguments, "--gpu-memory", "1000")
    assert found.code == 0, found.err
    content = json.loads(found.out)
    ddp, fsdp = content["estimates"].values()
    meta = on_meta(tmp_path)
    expected = footprint.held(meta)
    assert ddp["weights"] == expected.weights
    assert ddp["adapters"] == ddp["gradients"] == expected.adapters
    assert ddp["activations"] > 0
    assert ddp["fits"] and fsdp["fits"]
    assert ddp["total"] == sum(ddp[part] for part in footprint.Footprint().parts())
    assert content["trainable_parameters"] * 4 == expected.adapters
    small = run_cli(*arguments, "--gpu-memory", "0.01")
    assert small.code == 1
    assert not json.loads(small.out)["estimates"]["each GPU, DDP"]["fits"]


@pytest.mark.parametrize(
    "own", [{}, {"quantize_embeddings": True}, {"modules_to_not_convert": ["down_proj"]}]
)
def test_a_model_in_4_bits_is_counted_as_it_is_stored(tmp_path, own):
    from transformers import AutoModelForCausalLM

    save(MODELS["llama"](), tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "dense",
        quantization_config=qn.QLoRANativeConfig(**own),
        dtype=BF16,
        device_map={"": "cpu"},
    )
    model.save_pretrained(tmp_path / "stored")
    expected = footprint.held(model.requires_grad_(False))
    found = run_cli("estimate", tmp_path / "stored", "--json", "--dtype", "bfloat16")
    assert found.code in (0, 1), found.err
    (estimate,) = json.loads(found.out)["estimates"].values()
    assert (estimate["weights"], estimate["dense"]) == (expected.weights, expected.dense)


def test_the_command_prints_a_table(tmp_path):
    save(MODELS["opt"](), tmp_path)
    found = run_cli("estimate", tmp_path, "--seq", "16", "--no-checkpointing")
    assert found.code == 0, found.err
    assert "activations" in found.out and "in host memory" in found.out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "--gpus 0: must be 1 or more"),
        (["--optim", "sgd"], "--optim sgd: unknown"),
        (["--dtype", "int8"], "--dtype int8: expected one of"),
        (["--gpu-memory", "0"], "--gpu-memory 0.0: must be more than 0"),
        (["--target-modules", "nothing"], "--target-modules nothing"),
        (["--block-size", "3"], "--block-size 3"),
    ],
)
def test_the_command_refuses_what_cannot_be(tmp_path, arguments, message):
    MODELS["llama"]().config.save_pretrained(tmp_path)
    found = run_cli("estimate", tmp_path, *arguments)
    assert found.code != 0
    assert message in found.err.replace("\n", " ")


def test_a_folder_without_a_configuration_is_said(tmp_path):
    found = run_cli("estimate", tmp_path)
    assert found.code != 0
    assert str(tmp_path) in found.err.replace("\n", "")
