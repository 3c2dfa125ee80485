"""Models whose layers lie on several devices, by a device_map, train as models on one do."""

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("peft")

from peft import IA3Config, LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

import qlora_native as qn
import qlora_native.hf
from _hf import tiny
from qlora_native import QLoRANativeConfig

STEPS = 5

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two GPUs")


def places(rest, *layers):
    names = ("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head")
    layers = {f"model.layers.{i}": place for i, place in enumerate(layers)}
    return dict.fromkeys(names, rest) | layers


SPLITS = {
    "disk": places("cpu", "cpu", "disk", "cpu"),
    "host": pytest.param(places(0, 0, "cpu", 0), marks=pytest.mark.gpu),
    "two": pytest.param(places(0, 0, 1, 1), marks=[pytest.mark.gpu, two_gpus]),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama of three layers in 4 bits."""
    path = tmp_path_factory.mktemp("split")
    tiny("llama", num_hidden_layers=3).save_pretrained(path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        path / "dense", quantization_config=QLoRANativeConfig(), device_map={"": "cpu"}
    )
    model.save_pretrained(path / "nf4")
    return path / "nf4"


def add_ours(model):
    qn.add_lora(model, r=4, alpha=8)
    return model


def add_peft(model):
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
    return get_peft_model(model, config)


def train(model, add_adapters, checkpointing=False):
    """Return the losses of some steps, the first gradients by name, and the model."""
    torch.manual_seed(1)
    model = add_adapters(model)
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, parameter in model.named_parameters():
        if "lora_" in name:  # B too, else the first gradient of A is 0
            generator = torch.Generator().manual_seed(len(name))
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) / 10)
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2)
    ids = torch.arange(48).reshape(2, 24) * 7 % 64
    if torch.cuda.is_available():
        ids = ids.to(next(iter(trained.values())).device)
    losses, first = [], None
    for _ in range(STEPS):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        first = first or {n: p.grad.detach().cpu().clone() for n, p in trained.items()}
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses, first, model


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("add_adapters", [add_ours, add_peft])
@pytest.mark.parametrize("device_map", SPLITS.values(), ids=SPLITS.keys())
def test_a_split_model_trains_as_a_whole_one(
    folder, tmp_path, device_map, add_adapters, checkpointing
):
    whole = AutoModelForCausalLM.from_pretrained(
        folder, device_map={"": device_map["model.embed_tokens"]}
    )
    split = AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path
    )
    expected, gradients, _ = train(whole, add_adapters, checkpointing)
    losses, found, model = train(split, add_adapters, checkpointing)
    assert losses == pytest.approx(expected, rel=1e-5)
    assert expected[-1] < expected[0]
    assert found.keys() == gradients.keys() and len(found) == 3 * 7 * 2
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, gradients[name])
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            layer = name[name.index("model.layers.") :].split(".")[2]
            place = device_map[f"model.layers.{layer}"]
            if not isinstance(place, int):  # it is brought to where the first one is
                place = device_map["model.embed_tokens"]
            assert parameter.device == torch.device(place)


@pytest.mark.parametrize(
    "config",
    [
        IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
        LoraConfig(target_modules=["q_proj"], init_lora_weights="pissa"),
    ],
    ids=["ia3", "pissa"],
)
def test_what_reads_an_offloaded_weight_is_refused(folder, tmp_path, config):
    split = AutoModelForCausalLM.from_pretrained(
        folder, device_map=SPLITS["disk"], offload_folder=tmp_path
    )
    with pytest.raises(NotImplementedError, match="32 to 32 features, which is offloaded"):
        get_peft_model(split, config)


def test_adapters_merge_into_offloaded_layers_and_back(folder, tmp_path):
    maps = ({"": "cpu"}, SPLITS["disk"])
    whole, split = (
        AutoModelForCausalLM.from_pretrained(folder, device_map=m, offload_folder=tmp_path)
        for m in maps
    )
    ids = torch.arange(24)[None]
    logits = []
    for model in (whole, split):
        _, _, model = train(model, add_peft)
        model.eval()
        with torch.no_grad():
            found = [model(input_ids=ids).logits]
            for change in (model.merge_adapter, model.unmerge_adapter):
                change()
                found.append(model(input_ids=ids).logits)
        assert not torch.equal(found[1], found[0]) and torch.equal(found[2], found[0])
        logits.append(found)
    for of_split, of_whole in zip(*logits, strict=True):
        torch.testing.assert_close(of_split, of_whole)


def test_an_adapter_without_data_is_refused():
    layer = qn.nn.LoraLinear(qn.nn.Linear4bit.from_linear(torch.nn.Linear(64, 8)))
    layer.add_adapter("default", qn.nn.LoraSettings(r=4))
    layer.set_adapter("default")
    layer.lora_A.to("meta")
    for _ in range(2):
        with pytest.raises(ValueError, match="A is on meta, the activations on cpu"):
            layer(torch.randn(2, 64))
        layer.base_layer.register_forward_hook(lambda *_: None)  # what torch composes


@pytest.mark.gpu
@two_gpus
def test_auto_splits_over_two_gpus_and_trains(folder):
    whole = AutoModelForCausalLM.from_pretrained(folder, device_map={"": 0})
    # accelerate leaves a part of each free, and room for the largest layer on the first.
    room = {0: 40_000, 1: 200_000}
    split = AutoModelForCausalLM.from_pretrained(folder, device_map="auto", max_memory=room)
    assert {p.device.index for p in split.parameters()} == {0, 1}
    expected, _, _ = train(whole, add_ours)
    losses, _, _ = train(split, add_ours)
    assert losses == pytest.approx(expected, rel=1e-5)
