"""bitsandbytes' 4-bit checkpoints: read without it, written for it, the same bits both ways."""

import copy
import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import _hf_models
import qlora_native as qn
from qlora_native import _C
from qlora_native.hf import (
    QLoRANativeConfig,
    bitsandbytes_config,
    save_for_bitsandbytes,
    use_in_place_of_bitsandbytes,
)
from qlora_native.hf.bitsandbytes_format import read_quantized, write_quantized
from qlora_native.nn import Linear4bit

bnb = pytest.importorskip("bitsandbytes")

KINDS = [("nf4", True), ("nf4", False), ("fp4", True), ("fp4", False)]
NAME = "model.layers.0.mlp.up_proj.weight"


def bnb_model(folder, quant_type="nf4", double_quant=True, **settings):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=torch.bfloat16,
        **settings,
    )
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16, device_map={"": "cpu"}
    )


def bnb_decode(packed, state):
    """As a vector: bitsandbytes' CPU code mistakes the blocks of rows that are no whole blocks."""
    flat = copy.copy(state)
    flat.shape = torch.Size([state.shape.numel()])
    return bnb.functional.dequantize_4bit(packed, flat).view(state.shape)


def bnb_weights(model):
    return {
        name: bnb_decode(module.weight.data, module.weight.quant_state)
        for name, module in model.named_modules()
        if isinstance(module, bnb.nn.Linear4bit)
    }


def our_weights(model):
    return {n: m.dequantize() for n, m in model.named_modules() if isinstance(m, Linear4bit)}


def assert_same_weights(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        assert weight.dtype == theirs[name].dtype
        assert torch.equal(weight, theirs[name]), name


@pytest.fixture(scope="module", params=["llama", "opt", "gpt2"])
def dense(request, tmp_path_factory):
    torch.manual_seed(0)
    return _hf_models.save(
        _hf_models.MODELS[request.param](), tmp_path_factory.mktemp(request.param)
    )


@pytest.fixture(scope="module")
def theirs(tmp_path_factory):
    """A llama that bitsandbytes quantized, its folder, its decoded weights."""
    torch.manual_seed(0)
    dense = _hf_models.save(_hf_models.llama(), tmp_path_factory.mktemp("dense"))
    folder = tmp_path_factory.mktemp("bnb")
    model = bnb_model(dense)
    model.save_pretrained(folder)
    return folder, bnb_weights(model)


@pytest.fixture
def copied(theirs, tmp_path):
    """A copy of that folder to damage."""
    shutil.copytree(theirs[0], tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def in_place():
    use_in_place_of_bitsandbytes()
    yield
    use_in_place_of_bitsandbytes(False)


def load(folder, **arguments):
    return AutoModelForCausalLM.from_pretrained(
        folder, config=bitsandbytes_config(folder), **arguments
    )


def edit(folder, change):
    """Applies `change(tensors)` to the tensors in a folder with one file."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
def test_what_bitsandbytes_wrote_decodes_to_the_same_bits(
    dense, tmp_path, quant_type, double_quant
):
    model = bnb_model(dense, quant_type, double_quant)
    model.save_pretrained(tmp_path / "bnb", max_shard_size="30KB")
    ours = load(tmp_path / "bnb")
    assert_same_weights(our_weights(ours), bnb_weights(model))
    config = ours.config.quantization_config
    assert isinstance(config, QLoRANativeConfig)
    assert (config.quant_type, config.double_quant) == (quant_type, double_quant)
    assert config.compute_dtype == torch.bfloat16
    assert not config.overrides

    ours.save_pretrained(tmp_path / "native")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    for name, value in ours.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    saved = json.loads((tmp_path / "native" / "config.json").read_text())
    assert saved["quantization_config"]["quant_method"] == "qlora_native"

    save_for_bitsandbytes(ours, tmp_path / "written", max_shard_size="30KB")
    assert_same_files(tmp_path / "written", tmp_path / "bnb")
    assert config.checkpoint_format == "native"


def assert_same_files(ours, theirs):
    """Equal tensors under equal names, and configurations that say the same."""
    a, b = (
        {k: v for file in folder.glob("*.safetensors") for k, v in load_file(file).items()}
        for folder in (ours, theirs)
    )
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype, name
        if "quant_state" in name:
            first, second = (json.loads(bytes(t.tolist())) for t in (a[name], b[name]))
            assert first == second
        else:
            assert torch.equal(a[name], b[name]), name
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]


@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
def test_what_we_write_in_its_format_loads_in_bitsandbytes(tmp_path, quant_type, double_quant):
    # Rows of whole blocks: over others bitsandbytes' CPU code computes something else.
    dense = _hf_models.save(_hf_models.llama(intermediate_size=128), tmp_path / "dense")
    model = AutoModelForCausalLM.from_pretrained(
        dense,
        quantization_config=QLoRANativeConfig(quant_type, double_quant, compute_dtype="bfloat16"),
        dtype=torch.bfloat16,
        device_map={"": "cpu"},
    )
    save_for_bitsandbytes(model, tmp_path / "out")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", device_map={"": "cpu"})
    assert_same_weights(our_weights(model), bnb_weights(theirs))
    assert isinstance(theirs.config.quantization_config, BitsAndBytesConfig)
    ids = _hf_models.ids()
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=0.1, atol=0.1)


def test_bitsandbytes_need_not_be_installed(theirs, tmp_path):
    """In a process that cannot import it, by both doors, and saved again."""
    code = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "bitsandbytes":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Refuse())
import importlib.metadata
version = importlib.metadata.version
def no_version(name):
    if name == "bitsandbytes":
        raise importlib.metadata.PackageNotFoundError(name)
    return version(name)
importlib.metadata.version = no_version
import torch
import transformers
import qlora_native as qn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
folder, out = sys.argv[1:]
a = AutoModelForCausalLM.from_pretrained(folder, config=qn.hf.bitsandbytes_config(folder))
qn.hf.use_in_place_of_bitsandbytes()
b = AutoModelForCausalLM.from_pretrained(folder)
assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
assert type(b.model.layers[0].mlp.up_proj).__name__ == "Linear4bit"
qn.hf.save_for_bitsandbytes(b, out)
"""
    subprocess.run([sys.executable, "-c", code, theirs[0], tmp_path / "out"], check=True)
    assert_same_files(tmp_path / "out", theirs[0])


def test_the_process_wide_door_takes_checkpoints_and_configs(theirs, dense, in_place):
    model = AutoModelForCausalLM.from_pretrained(theirs[0], device_map={"": "cpu"})
    assert_same_weights(our_weights(model), theirs[1])
    quantized = bnb_model(dense)
    assert our_weights(quantized)
    assert not bnb_weights(quantized)
    assert quantized.config.quantization_config.quant_type == "nf4"


def test_the_process_wide_door_closes(theirs):
    use_in_place_of_bitsandbytes()
    use_in_place_of_bitsandbytes(False)
    model = AutoModelForCausalLM.from_pretrained(theirs[0], device_map={"": "cpu"})
    assert not our_weights(model)


def test_bytes_that_are_declared_as_another_dtype_are_the_same_bytes(dense, tmp_path):
    model = bnb_model(dense, bnb_4bit_quant_storage=torch.bfloat16)
    model.save_pretrained(tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys()
    assert_same_weights(our_weights(load(tmp_path)), bnb_weights(model))


def test_other_tensors_are_loaded_in_the_requested_dtype(theirs):
    model = load(theirs[0], dtype=torch.float32)
    assert model.model.norm.weight.dtype == torch.float32
    assert model.model.embed_tokens.weight.dtype == torch.float32
    assert_same_weights(our_weights(model), theirs[1])


def test_another_map_of_absmax_codes_is_decoded_by_itself(copied, theirs, tmp_path):
    """A map from a processor that rounds otherwise: the decoded bits are still the file's."""

    def nudge(tensors):
        key = f"{NAME}.nested_quant_map"
        tensors[key] = torch.nextafter(tensors[key], torch.tensor(2.0))

    edit(copied, nudge)
    tensors = load_file(copied / "model.safetensors")
    parts = {k.removeprefix(f"{NAME}."): v for k, v in tensors.items() if k.startswith(f"{NAME}.")}
    state = bnb.functional.QuantState.from_dict(dict(parts), torch.device("cpu"))
    expected = bnb_decode(tensors[NAME], state)
    model = load(copied)
    layer = model.model.layers[0].mlp.up_proj
    assert not layer.double_quant
    assert torch.equal(layer.dequantize(), expected)
    assert model.config.quantization_config.double_quant
    model.save_pretrained(tmp_path / "native")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "native")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_block_sizes_are_the_files_own(tmp_path):
    """BitsAndBytesConfig does not say them."""
    w = torch.randn(96, 128).bfloat16()
    packed, state = bnb.functional.quantize_4bit(
        w, blocksize=128, quant_type="nf4", compress_statistics=True
    )
    q = read_quantized(packed, state.as_dict(packed=True))
    assert q.block_size == 128
    assert torch.equal(q.dequantize(), bnb_decode(packed, state))


@pytest.mark.parametrize("shape", [(33, 77), (1, 1), (5, 129), (300, 100)])
@pytest.mark.parametrize(("quant_type", "double_quant"), KINDS)
def test_one_weight_makes_the_round_trip(shape, quant_type, double_quant):
    q = qn.quantize_4bit(torch.randn(shape), quant_type, double_quant=double_quant)
    packed, companions = write_quantized(q)
    state = bnb.functional.QuantState.from_dict(dict(companions), torch.device("cpu"))
    assert torch.equal(bnb_decode(packed, state), q.dequantize())
    again = read_quantized(packed, companions)
    assert torch.equal(again.packed, q.packed.view(-1))
    assert torch.equal(again.absmax, q.absmax)
    assert torch.equal(again.dequantize(), q.dequantize())


def damaged(change):
    packed, companions = write_quantized(qn.quantize_4bit(torch.randn(96, 64)))
    parts = {"weight": packed, **companions}
    change(parts)
    packed = parts.pop("weight")
    return packed, parts


def restate(**changes):
    def change(parts):
        key = "quant_state.bitsandbytes__nf4"
        info = json.loads(bytes(parts[key].tolist())) | changes
        parts[key] = torch.tensor(list(json.dumps(info).encode()), dtype=torch.uint8)

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda p: p.pop("absmax"), "absmax"),
        (lambda p: p.pop("quant_map"), "quant_map"),
        (lambda p: p.pop("nested_absmax"), "uint8"),
        (lambda p: p.pop("nested_quant_map"), "nested_quant_map"),
        (lambda p: p.pop("quant_state.bitsandbytes__nf4"), "expected"),
        (lambda p: p["quant_state.bitsandbytes__nf4"].fill_(65), "not a JSON object"),
        (lambda p: p.update(weight=p["weight"][:-1]), "3071 elements"),
        (lambda p: p.update(absmax=p["absmax"][:-1]), "95 elements"),
        (lambda p: p["quant_map"].add_(0.1), "quant_map is not that of nf4"),
        (restate(quant_type="int8"), "int8"),
        (restate(blocksize=48), "48"),
        (restate(shape=None), "lacks"),
        (restate(dtype="bfloat17"), "bfloat17"),
        (restate(shape=[96, 96]), "4608"),
    ],
)
def test_damaged_parts_are_named(change, message):
    with pytest.raises(ValueError, match=message):
        read_quantized(*damaged(change))


def test_a_damaged_checkpoint_names_the_weight(copied):
    edit(copied, lambda tensors: tensors.pop(f"{NAME}.absmax"))
    with pytest.raises(ValueError, match=rf"{NAME}: .*absmax"):
        load(copied)


def test_a_dense_weight_that_should_be_in_4_bits_is_named(copied):
    def make_dense(tensors):
        for key in [key for key in tensors if key.startswith(NAME)]:
            tensors.pop(key)
        tensors[NAME] = torch.zeros(96, 64, dtype=torch.bfloat16)

    edit(copied, make_dense)
    with pytest.raises(ValueError, match=rf"{NAME}: config.json says that it is in 4 bits"):
        load(copied)


def test_what_bitsandbytes_cannot_store_is_refused(dense, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(
        dense, quantization_config=QLoRANativeConfig("int4"), device_map={"": "cpu"}
    )
    with pytest.raises(ValueError, match="int4"):
        save_for_bitsandbytes(model, tmp_path)
    with pytest.raises(ValueError, match="QLoRANativeConfig"):
        save_for_bitsandbytes(AutoModelForCausalLM.from_pretrained(dense), tmp_path)


def test_another_kind_of_checkpoint_is_refused(dense):
    with pytest.raises(ValueError, match="bitsandbytes quantized it nowhere"):
        bitsandbytes_config(dense)


def test_the_maps_are_bitsandbytes_own():
    _, state = bnb.functional.quantize_4bit(
        torch.randn(4, 64), quant_type="nf4", compress_statistics=True
    )
    assert torch.equal(torch.tensor(_C.signed_dynamic_map()), state.state2.code)
