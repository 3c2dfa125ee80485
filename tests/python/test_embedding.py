"""Embedding4bit gives the rows of the decoded table, and shares it with an output head."""

import copy
import io
import re

import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import _hf_models
import qlora_native as qn
from qlora_native.hf import QLoRANativeConfig
from qlora_native.nn import Embedding4bit, Linear4bit


def table(rows=1001, dim=192, dtype=torch.float32, device="cpu"):
    return torch.nn.Embedding(rows, dim, padding_idx=3, device=device, dtype=dtype)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4", "int4"])
@pytest.mark.parametrize("block_size", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_those_of_the_decoded_table(device, quant_type, block_size, double_quant, dtype):
    dense = table(dtype=dtype, device=device)
    layer = Embedding4bit.from_embedding(
        dense, quant_type=quant_type, block_size=block_size, double_quant=double_quant
    )
    q = qn.quantize_4bit(dense.weight, quant_type, block_size, double_quant)
    assert torch.equal(layer.weight.view(-1), q.packed)
    ids = torch.randint(0, 1001, (3, 17), device=device)
    ids[0, 0], ids[2, 16] = 0, 1000
    rows = layer(ids)
    assert rows.dtype == dtype and rows.shape == (3, 17, 192)
    assert torch.equal(rows, q.dequantize()[ids])


@pytest.mark.parametrize("shape", [(0,), (), (1,), (2, 0, 3)])
def test_any_shape_of_indices(shape):
    layer = Embedding4bit.from_embedding(table())
    assert layer(torch.zeros(shape, dtype=torch.long)).shape == (*shape, 192)


def test_an_index_out_of_range_raises():
    layer = Embedding4bit.from_embedding(table(10, 64))
    with pytest.raises(IndexError):
        layer(torch.tensor([10]))


def test_casts_change_the_outputs_only():
    layer = Embedding4bit.from_embedding(table(10, 64))
    state = {n: t.clone() for n, t in layer.state_dict().items()}
    ids = torch.arange(10)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        assert layer.to(dtype)(ids).dtype == dtype
        assert all(torch.equal(layer.state_dict()[n], t) for n, t in state.items())
    assert layer.to("meta").weight_dtype == torch.float32


def test_it_is_saved_loaded_and_copied():
    layer = Embedding4bit.from_embedding(table(10, 64))
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = Embedding4bit(10, 64)
    other.load_state_dict(torch.load(file, weights_only=True))
    ids = torch.arange(10)
    assert torch.equal(other(ids), layer(ids))
    assert torch.equal(copy.deepcopy(layer)(ids), layer(ids))
    layer.requantize_(torch.ones(10, 64))
    assert torch.equal(layer(ids), torch.ones(10, 64))


def test_a_state_dict_of_another_quantization_is_refused():
    table = torch.nn.Embedding(8, 64)
    layer = Embedding4bit.from_embedding(table)
    before = copy.deepcopy(layer.state_dict())
    for settings in ({"quant_type": "fp4"}, {"block_size": 32}, {"double_quant": False}):
        ((name, value),) = settings.items()
        other = Embedding4bit.from_embedding(table, **settings).state_dict()
        with pytest.raises(RuntimeError, match=f"weight was quantized with {name}={value!r}"):
            layer.load_state_dict(other)
        # Without the settings beside them, the shapes tell what they can.
        if name != "quant_type":
            with pytest.raises(RuntimeError, match=r"weight_absmax2? "):
                layer.load_state_dict(dict(other))
    with pytest.raises(RuntimeError, match=r"weight is torch\.float32, expected packed"):
        layer.load_state_dict(table.state_dict(), strict=False)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    layer.load_state_dict(Embedding4bit.from_embedding(table).state_dict())


def test_it_compiles_without_a_graph_break():
    layer = Embedding4bit.from_embedding(table(10, 64))
    ids = torch.arange(10)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert torch.equal(compiled(ids), layer(ids))


def test_what_is_refused():
    with pytest.raises(ValueError, match="embedding_dim=96 is no multiple of block_size=64"):
        Embedding4bit(10, 96)
    with pytest.raises(ValueError, match="max_norm"):
        Embedding4bit.from_embedding(torch.nn.Embedding(10, 64, max_norm=1.0))
    with pytest.raises(TypeError, match="Embedding4bit"):
        Embedding4bit.from_embedding(Embedding4bit(10, 64))
    with pytest.raises(ValueError, match="NaN"):
        dense = table(10, 64)
        dense.weight.data[2, 2] = float("nan")
        Embedding4bit.from_embedding(dense)


# ---- in transformers models ----


@pytest.fixture(scope="module")
def tied(tmp_path_factory):
    torch.manual_seed(0)
    return _hf_models.save(_hf_models.qwen2(), tmp_path_factory.mktemp("tied"))


@pytest.fixture(scope="module")
def untied(tmp_path_factory):
    torch.manual_seed(0)
    return _hf_models.save(_hf_models.llama(), tmp_path_factory.mktemp("untied"))


def load(folder, device="cpu", **settings):
    return AutoModelForCausalLM.from_pretrained(
        folder,
        quantization_config=QLoRANativeConfig(quantize_embeddings=True, **settings),
        dtype=torch.float32,
        device_map={"": device},
    )


def assert_reloads(model, folder, device):
    model.save_pretrained(folder)
    again = AutoModelForCausalLM.from_pretrained(folder, device_map={"": device})
    a, b = model.state_dict(), again.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    ids = _hf_models.ids().to(device)
    assert torch.equal(again(ids).logits, model(ids).logits)
    return again


@pytest.mark.parametrize("double_quant", [True, False])
def test_a_tied_head_has_the_same_bytes(tied, device, tmp_path, double_quant):
    dense = AutoModelForCausalLM.from_pretrained(tied, dtype=torch.float32)
    loaded = load(tied, device, double_quant=double_quant)
    for model in (loaded, assert_reloads(loaded, tmp_path, device)):
        embedding, head = model.get_input_embeddings(), model.lm_head
        assert isinstance(embedding, Embedding4bit) and isinstance(head, Linear4bit)
        for name in ("weight", "weight_absmax", "weight_absmax2"):
            assert getattr(embedding, name) is getattr(head, name)
        q = qn.quantize_4bit(dense.lm_head.weight.to(device), double_quant=double_quant)
        assert torch.equal(head.dequantize(), q.dequantize())
        assert model.num_parameters() == dense.num_parameters()
        assert model.num_parameters(exclude_embeddings=True) == dense.num_parameters(
            exclude_embeddings=True
        )
    ids = _hf_models.ids().to(device)
    logits = model(ids).logits
    decoded = model.dequantize()
    assert type(decoded.lm_head) is torch.nn.Linear
    assert decoded.lm_head.weight is decoded.get_input_embeddings().weight
    torch.testing.assert_close(decoded(ids).logits, logits, rtol=1e-4, atol=1e-4)


def test_a_head_of_its_own_stays_dense(untied, tmp_path):
    model = load(untied)
    assert isinstance(model.get_input_embeddings(), Embedding4bit)
    assert type(model.lm_head) is torch.nn.Linear
    assert_reloads(model, tmp_path, "cpu")


def test_only_token_embeddings_are_quantized(tmp_path):
    folder = _hf_models.save(_hf_models.gpt2(), tmp_path / "gpt2")
    model = load(folder)
    assert isinstance(model.transformer.wte, Embedding4bit)
    assert type(model.transformer.wpe) is torch.nn.Embedding
    assert_reloads(model, tmp_path / "out", "cpu")


def test_generating_with_everything_in_4_bits(tied, device):
    model = load(tied, device)
    out = model.generate(
        _hf_models.ids((1, 5)).to(device), max_new_tokens=4, do_sample=False, pad_token_id=0
    )
    assert out.shape == (1, 9)


@pytest.mark.parametrize("entry", ["lm_head", "embed_tokens", "model", "model.embed.*", "head"])
def test_a_tied_head_that_is_to_stay_dense_is_a_contradiction(tied, entry):
    message = f"modules_to_not_convert has {[entry]}: "
    with pytest.raises(ValueError, match=re.escape(message)):
        load(tied, modules_to_not_convert=["q_proj", entry])


def test_embeddings_that_compute_more_are_refused(tmp_path):
    """Gemma 3's scales its rows, and takes the weight's dtype for that of the scale."""
    config = transformers.Gemma3TextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=32,
    )  # fmt: skip
    folder = _hf_models.save(transformers.Gemma3ForCausalLM(config), tmp_path)
    with pytest.raises(ValueError, match=r"Gemma3TextScaledWordEmbedding, which computes more"):
        load(folder)


def test_entries_that_match_other_modules_leave_the_embedding_alone(tied):
    model = load(tied, modules_to_not_convert=["q_proj", "model.embed", "model.layers.1"])
    assert isinstance(model.get_input_embeddings(), Embedding4bit)


@pytest.mark.parametrize("kind", ["tied", "untied"])
def test_merged_dense_it_is_an_ordinary_embedding(kind, request, tmp_path):
    model = load(request.getfixturevalue(kind))
    qn.add_lora(model, r=2)
    ids = _hf_models.ids()
    expected = model(ids).logits
    qn.merge_lora(model, dense=True)
    model.hf_quantizer.remove_quantization_config(model)
    model.save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    assert not [name for name, tensor in stored.items() if tensor.dtype == torch.uint8]
    assert ("lm_head.weight" in stored) == (kind == "untied")
    for merged in (model, AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)):
        embedding = merged.get_input_embeddings()
        assert type(embedding) is torch.nn.Embedding
        assert (merged.lm_head.weight is embedding.weight) == (kind == "tied")
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_the_dense_export_keeps_paddings_and_takes_the_dtype():
    model = torch.nn.ModuleDict({"embedding": Embedding4bit.from_embedding(table(8, 64))})
    assert qn.merge_lora(model, dense=True, dtype=torch.float16) == 1
    assert model["embedding"].weight.dtype == torch.float16
    assert model["embedding"].padding_idx == 3
