"""from_pretrained with QLoRANativeConfig: what is loaded, saved, reloaded, and refused."""

import copy
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.pytorch_utils import Conv1D

import _hf_models
import qlora_native as qn
from qlora_native.hf import QLoRANativeConfig, layer_kinds
from qlora_native.nn import Linear4bit


@pytest.fixture(scope="module", params=list(_hf_models.MODELS))
def checkpoint(request, tmp_path_factory):
    torch.manual_seed(0)
    return _hf_models.save(
        _hf_models.MODELS[request.param](), tmp_path_factory.mktemp(request.param)
    )


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(0)
    return _hf_models.save(_hf_models.llama(), tmp_path_factory.mktemp("llama"))


def load(folder, device="cpu", **settings):
    arguments = {"dtype": torch.bfloat16, "device_map": {"": device}}
    for name in ("dtype", "device_map", "offload_folder"):
        if name in settings:
            arguments[name] = settings.pop(name)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=QLoRANativeConfig(**settings), **arguments
    )


def layers(model):
    return {n: m for n, m in model.named_modules() if isinstance(m, Linear4bit)}


def assert_same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        assert torch.equal(a[name].cpu(), b[name].cpu()), name


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_every_linear_layer_but_the_head_has_the_bytes_of_its_weight(
    checkpoint, device, quant_type, double_quant
):
    dense = AutoModelForCausalLM.from_pretrained(checkpoint)
    model = load(checkpoint, device, quant_type=quant_type, double_quant=double_quant)
    expected = {
        name: module
        for name, module in dense.named_modules()
        if type(module) in (torch.nn.Linear, Conv1D) and name != "lm_head"
    }
    assert layers(model).keys() == expected.keys()
    assert type(model.lm_head) is torch.nn.Linear
    for name, layer in layers(model).items():
        weight = expected[name].weight.to(device)
        if isinstance(expected[name], Conv1D):
            weight = weight.t().contiguous()
        q = qn.quantize_4bit(weight, quant_type=quant_type, double_quant=double_quant)
        assert torch.equal(layer.dequantize(), q.dequantize()), name
        assert torch.equal(layer.weight.view(-1), q.packed), name
        if expected[name].bias is not None:
            assert torch.equal(layer.bias.cpu(), expected[name].bias)


@pytest.mark.parametrize("double_quant", [True, False])
def test_saved_and_reloaded_it_is_the_same_bit_for_bit(checkpoint, device, double_quant, tmp_path):
    model = load(checkpoint, device, double_quant=double_quant, compute_dtype="bfloat16")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    again = AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": device})
    assert_same_state(model, again)
    for name, layer in layers(again).items():
        assert layer.extra_repr() == layers(model)[name].extra_repr()
        assert layer.weight_dtype == torch.bfloat16
    ids = _hf_models.ids().to(device)
    assert torch.equal(model(ids).logits, again(ids).logits)
    third = tmp_path / "third"
    again.save_pretrained(third)
    assert_same_state(again, AutoModelForCausalLM.from_pretrained(third, device_map={"": device}))


def test_the_output_is_that_of_the_decoded_weights(checkpoint, device):
    model = load(checkpoint, device, dtype=torch.float32)
    ids = _hf_models.ids().to(device)
    expected = copy.deepcopy(model).dequantize()
    assert not layers(expected)
    assert not hasattr(expected.config, "quantization_config")
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-4)


def test_generation_is_the_same_with_a_dynamic_and_a_static_cache(llama, device):
    model = load(llama, device, dtype=torch.float32)
    arguments = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    ids = _hf_models.ids((2, 5)).to(device)
    dynamic = model.generate(ids, **arguments)
    static = model.generate(ids, cache_implementation="static", disable_compile=True, **arguments)
    assert torch.equal(dynamic, static)
    assert model.hf_quantizer.is_compileable


def test_it_compiles_without_a_graph_break(llama):
    model = load(llama, dtype=torch.float32)
    ids = _hf_models.ids()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(ids).logits, model(ids).logits)


def test_casting_leaves_the_packed_state_alone(llama):
    model = load(llama)
    state = {n: t.clone() for n, t in model.state_dict().items() if t.dtype == torch.uint8}
    for dtype in (torch.float16, torch.float32):
        model.to(dtype)
        assert all(torch.equal(model.state_dict()[n], t) for n, t in state.items())
    assert model.model.norm.weight.dtype == torch.float32


def test_sizes_are_those_of_the_model(llama):
    dense = AutoModelForCausalLM.from_pretrained(llama)
    model = load(llama)
    assert model.num_parameters() == dense.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(
        exclude_embeddings=True
    )
    assert model.get_memory_footprint() == sum(t.nbytes for t in model.state_dict().values()) + sum(
        b.nbytes for b in model.model.rotary_emb.buffers()
    )
    assert copy.deepcopy(model).num_parameters() == dense.num_parameters()


def test_the_planned_size_of_a_model_is_its_size(llama):
    """device_map="auto" plans with placeholders; they must count as what they will be."""
    from accelerate import init_empty_weights
    from transformers.integrations.accelerate import compute_module_sizes
    from transformers.quantizers.auto import AutoHfQuantizer

    model = load(llama)
    with init_empty_weights():
        planned = AutoModelForCausalLM.from_config(model.config, dtype=torch.bfloat16)
    quantizer = AutoHfQuantizer.from_config(QLoRANativeConfig(), pre_quantized=False)
    quantizer.preprocess_model(planned, dtype=torch.bfloat16, device_map=None)
    sizes, _ = compute_module_sizes(planned, quantizer)
    expected = sum(p.nbytes for p in model.parameters())
    buffers = sum(b.nbytes for b in model.buffers())
    assert expected <= sizes[""] <= expected + buffers


def test_one_dense_weight_at_a_time(llama, monkeypatch):
    alive = []
    pack = layer_kinds.LinearKind.pack

    def watched(self, module, tensor_name, value):
        assert not [ref for ref in alive if ref() is not None]
        alive.append(weakref.ref(value))
        return pack(self, module, tensor_name, value)

    monkeypatch.setattr(layer_kinds.LinearKind, "pack", watched)
    assert len(alive) == 0
    model = load(llama, dtype=torch.float32)
    assert len(alive) == len(layers(model))


def test_weights_are_quantized_in_the_requested_dtype(tmp_path):
    folder = _hf_models.save(_hf_models.llama(), tmp_path, torch.float32)
    dense = AutoModelForCausalLM.from_pretrained(folder)
    for dtype in (torch.float32, torch.bfloat16):
        layer = load(folder, dtype=dtype).model.layers[0].mlp.up_proj
        q = qn.quantize_4bit(dense.model.layers[0].mlp.up_proj.weight.to(dtype))
        assert torch.equal(layer.weight.view(-1), q.packed)
        assert layer.weight_dtype == dtype


def test_named_modules_are_left_alone(llama):
    model = load(llama, modules_to_not_convert=["lm_head", "q_proj", "model.layers.1"])
    assert {name.rpartition(".")[2] for name in layers(model)} == {
        "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"
    }  # fmt: skip
    assert all(name.startswith("model.layers.0.") for name in layers(model))


@pytest.mark.parametrize(
    ("entry", "dense"),
    [
        ("model.layers.1", ["model.layers.1", "model.layers.1.mlp.gate"]),
        ("mlp.gate", ["model.layers.1.mlp.gate", "model.layers.11.mlp.gate"]),
        ("layers.1", ["model.layers.1"]),
        ("model.layers.*.gate", ["model.layers.1.mlp.gate", "model.layers.11.mlp.gate"]),
        ("model.layers.1|lm_head", ["model.layers.1", "model.layers.1.mlp.gate", "lm_head"]),
        (r"model\.layers\.1\.", ["model.layers.1.mlp.gate"]),
        ("proj", ["model.layers.11.mlp.gate_proj"]),
        ("head", ["lm_head"]),
        ("lm", []),
    ],
)
def test_what_an_entry_names_is_the_same_in_every_version(entry, dense):
    names = [
        "lm_head", "model.layers.1", "model.layers.1.mlp.gate", "model.layers.11.mlp.gate",
        "model.layers.11.mlp.gate_proj",
    ]  # fmt: skip
    assert [name for name in names if layer_kinds.stays_dense(name, [entry])] == sorted(
        dense, key=names.index
    )
    assert not layer_kinds.stays_dense("lm_head", [])


def test_the_head_can_be_quantized(llama, tmp_path):
    model = load(llama, modules_to_not_convert=[])
    assert isinstance(model.lm_head, Linear4bit)
    model.save_pretrained(tmp_path)
    assert_same_state(model, AutoModelForCausalLM.from_pretrained(tmp_path))


def test_a_tied_head_is_never_quantized_alone(tmp_path):
    folder = _hf_models.save(_hf_models.qwen2(), tmp_path)
    model = load(folder, modules_to_not_convert=[])
    assert type(model.lm_head) is torch.nn.Linear
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_a_new_head_is_initialized_and_left_dense(llama):
    model = AutoModelForSequenceClassification.from_pretrained(
        llama, num_labels=3, quantization_config=QLoRANativeConfig(), dtype=torch.bfloat16
    )
    assert type(model.score) is torch.nn.Linear
    assert model.score.weight.isfinite().all()
    assert len(layers(model)) == 14


def test_a_new_layer_that_is_to_be_quantized_is(llama):
    """Weights that the checkpoint lacks are initialized first, then packed."""
    model = AutoModelForSequenceClassification.from_pretrained(
        llama,
        num_labels=3,
        quantization_config=QLoRANativeConfig(modules_to_not_convert=[]),
        dtype=torch.float32,
    )
    assert isinstance(model.score, Linear4bit)
    assert 0 < model.score.dequantize().std() < 0.1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("double_quant", [True, False])
def test_a_weight_that_is_not_finite_is_named(llama, tmp_path, bad, double_quant):
    tensors = load_file(llama / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name][3, 5] = bad
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    with pytest.raises(ValueError, match=f"{name}.*1 values that are NaN or infinite"):
        load(tmp_path, double_quant=double_quant)


def test_no_memory_is_told_by_the_tensor_and_ends_the_packing(llama, monkeypatch):
    calls = []

    def no_room(*_, **__):
        calls.append(1)
        raise torch.OutOfMemoryError("Tried to allocate 20 GiB.")

    monkeypatch.setattr(layer_kinds, "quantize_4bit", no_room)
    with pytest.raises(torch.OutOfMemoryError, match=r"down_proj.weight.*20 GiB"):
        load(llama)
    assert len(calls) == 1


def test_an_observer_sees_every_tensor_and_may_answer(llama):
    from qlora_native.hf.packing import PackObserver, observe_packing

    class Keep(PackObserver):
        def __init__(self):
            self.kept, self.announced = {}, None

        def begin(self, tensors):
            self.announced = tensors

        def pack(self, name, value, make):
            assert value.dtype == torch.bfloat16
            if name not in self.kept:
                self.kept[name] = make()
            return self.kept[name]

    keep = Keep()
    with observe_packing(keep):
        first, second = load(llama), load(llama)
    assert keep.announced == len(keep.kept) == len(layers(first)) == 14
    assert first.model.layers[0].mlp.up_proj.weight is second.model.layers[0].mlp.up_proj.weight


def test_a_weight_of_another_shape_is_named(llama, tmp_path):
    tensors = load_file(llama / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    tensors[name] = tensors[name][:5].clone()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((llama / "config.json").read_text())
    with pytest.raises(ValueError, match=rf"{name} is \(5, 64\) .* \(96, 64\)"):
        load(tmp_path)


@pytest.fixture
def saved(llama, tmp_path):
    model = load(llama)
    model.save_pretrained(tmp_path / "saved")
    return model, tmp_path / "saved"


@pytest.mark.parametrize("part", ["weight", "weight_absmax", "weight_absmax2"])
def test_a_checkpoint_that_lacks_a_part_is_refused(saved, part):
    _, folder = saved
    tensors = load_file(folder / "model.safetensors")
    tensors.pop(f"model.layers.0.mlp.up_proj.{part}")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=f"lacks 1 tensors.*layers.0.mlp.up_proj.{part}"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_a_config_that_does_not_describe_the_tensors_is_refused(saved):
    _, folder = saved
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["block_size"] = 128
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises((RuntimeError, ValueError), match=r"size|shape"):
        AutoModelForCausalLM.from_pretrained(folder)


def test_offloading_to_the_disk_while_quantizing_is_refused(llama, tmp_path):
    device_map = {
        "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
        "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    with pytest.raises(ValueError, match=r"model.layers.1.*qlora-native quantize"):
        load(llama, device_map=device_map, offload_folder=tmp_path)


def test_a_quantized_checkpoint_can_be_offloaded_to_the_disk(saved, tmp_path):
    model, folder = saved
    device_map = {
        "model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
        "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu",
    }  # fmt: skip
    offloaded = AutoModelForCausalLM.from_pretrained(
        folder, device_map=device_map, offload_folder=tmp_path / "offload"
    )
    assert offloaded.model.layers[1].mlp.up_proj.weight.is_meta
    ids = _hf_models.ids()
    assert torch.equal(offloaded(ids).logits, model(ids).logits)


@pytest.mark.gpu
def test_a_model_is_split_over_gpu_and_cpu(llama):
    device_map = {
        "model.embed_tokens": 0, "model.layers.0": 0, "model.layers.1": "cpu",
        "model.norm": 0, "model.rotary_emb": 0, "lm_head": 0,
    }  # fmt: skip
    split, whole = load(llama, device_map=device_map), load(llama, "cuda")
    ids = _hf_models.ids().cuda()
    torch.testing.assert_close(split(ids).logits, whole(ids).logits)


def test_the_default_device_is_the_best_there_is(llama):
    model = AutoModelForCausalLM.from_pretrained(llama, quantization_config=QLoRANativeConfig())
    expected = "cuda" if torch.cuda.is_available() else "cpu"
    assert {p.device.type for p in model.parameters()} == {expected}


def test_a_saved_model_has_a_card_and_tags(saved, tmp_path):
    model, folder = saved
    text = (folder / "README.md").read_text()
    assert "## Quantization" in text and "import qlora_native" in text
    assert all(f"- {tag}\n" in text for tag in ("qlora_native", "4-bit", "nf4"))
    assert {"qlora_native", "nf4"} <= set(model.model_tags)
    copied = copy.deepcopy(model)
    copied.save_pretrained(tmp_path / "copy")
    assert (tmp_path / "copy" / "README.md").is_file()
    copied.dequantize().save_pretrained(tmp_path / "dense")
    assert not (tmp_path / "dense" / "README.md").exists()


def test_a_model_survives_pickling(saved, tmp_path):
    model, _ = saved
    torch.save(model, tmp_path / "model.pt")
    again = torch.load(tmp_path / "model.pt", weights_only=False)
    assert_same_state(model, again)
