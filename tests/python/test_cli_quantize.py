"""`quantize` and `merge` write models that load everywhere; the other commands take them."""

import json
import shutil
import types

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import qlora_native as qn
from _cli import finetune_arguments, make_model, run_cli, sentences, write_jsonl
from _hf import tiny
from qlora_native.cli import packed_store
from qlora_native.cli import quantize as cli_quantize
from qlora_native.cli.options import QuantizeOptions
from qlora_native.hf import QLoRANativeConfig, layer_kinds
from qlora_native.nn import Linear4bit

PROMPT = ("--prompt", "the quick", "--device", "cpu", "--no-bf16", "--max-new-tokens", 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("quantize")
    make_model(path / "model")
    (path / "model" / "README.md").write_text("---\nlicense: mit\ntags:\n- tiny\n---\n# Tiny\n")
    write_jsonl(path / "data.jsonl", [{"text": text} for text in sentences(40)])
    for form in ("native", "bitsandbytes"):
        result = run_cli("quantize", path / "model", path / form, "--format", form,
                         "--compute-dtype", "float32", "--max-shard-size", "40KB")  # fmt: skip
        assert result.code == 0, result.err
        assert "14 layers" in result.out and "GB/s" in result.out
        assert "4.1" in result.out and str(path / form) in result.out.replace("\n", "")
    return path


@pytest.fixture(scope="module")
def adapter(folder):
    result = run_cli(
        *finetune_arguments(
            folder / "native", folder / "data.jsonl", folder / "adapter", learning_rate=2e-2
        )
    )
    assert result.code == 0, result.err
    return folder / "adapter"


def load(folder):
    config = None
    if "bitsandbytes" in (folder / "config.json").read_text():
        config = qn.hf.bitsandbytes_config(folder)
    return AutoModelForCausalLM.from_pretrained(folder, config=config, device_map={"": "cpu"})


def assert_same(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("form", ["native", "bitsandbytes"])
def test_the_folder_is_what_from_pretrained_makes(folder, form):
    expected = AutoModelForCausalLM.from_pretrained(
        folder / "model", quantization_config=QLoRANativeConfig(), device_map={"": "cpu"}
    )
    model = load(folder / form)
    assert_same(model, expected)
    assert len(list((folder / form).glob("*.safetensors"))) > 1
    assert (folder / form / "tokenizer.json").is_file()
    assert not (folder / form / ".quantizing").exists()
    assert {m.compute_dtype for m in model.modules() if isinstance(m, Linear4bit)} == {
        torch.float32
    }


@pytest.mark.parametrize("form", ["native", "bitsandbytes"])
def test_the_card_keeps_what_it_said_and_says_how_to_load(folder, form):
    text = (folder / form / "README.md").read_text()
    head, _, body = text.removeprefix("---\n").partition("\n---\n")
    assert "license: mit" in head
    for tag in ("tiny", "qlora_native", "nf4"):
        assert f"- {tag}\n" in f"{head}\n"
    assert "# Tiny" in body and "## Quantization" in body and "import qlora_native" in body
    assert ("bitsandbytes_config" in body) == (form == "bitsandbytes")
    assert str(folder) not in text


def test_writing_the_card_again_changes_nothing(folder):
    from qlora_native.hf.model_card import write_model_card

    path = folder / "native" / "README.md"
    before = path.read_text()
    model = load(folder / "native")
    write_model_card(folder / "native", model.config.quantization_config)
    assert path.read_text() == before


def test_generate_takes_models_that_are_in_4_bits(folder):
    outputs = {
        form: run_cli("generate", "--model", folder / form, *PROMPT)
        for form in ("model", "native", "bitsandbytes")
    }
    assert all(result.code == 0 for result in outputs.values()), outputs
    assert len({result.out for result in outputs.values()}) == 1
    dense = run_cli("generate", "--model", folder / "native", "--no-quantize", *PROMPT)
    assert dense.code == 0, dense.err


def test_a_stored_quantization_is_kept_and_told(folder, tmp_path):
    result = run_cli("generate", "--model", folder / "native", "--quant-type", "fp4", *PROMPT)
    assert result.code == 0
    assert "stored with quant_type nf4, not fp4: they stay" in result.err
    command = finetune_arguments(
        folder / "native", folder / "data.jsonl", tmp_path / "out", max_steps=1, quant_type="fp4"
    )
    result = run_cli(*command)
    assert result.code == 0, result.err
    assert "stored with quant_type nf4, not fp4: they stay" in result.err
    assert "quant_type: nf4\n" in (tmp_path / "out" / "run.yaml").read_text()


def test_finetune_reports_the_stored_quantization(adapter):
    report = json.loads((adapter / "report.json").read_text())
    assert report["quantized_layers"] == 14
    assert report["eval_loss_after"] < report["eval_loss_before"]


def test_a_model_that_others_quantized_is_refused(folder, tmp_path):
    model = make_model(tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (model / "config.json").write_text(json.dumps(config))
    for command in (("generate", "--model", model, *PROMPT), ("quantize", model, tmp_path / "out")):
        result = run_cli(*command)
        assert result.code == 2 and "quantized by gptq" in result.err


def test_an_interrupted_run_goes_on_from_what_it_has(folder, tmp_path, monkeypatch):
    """Killed after some tensors, and started again: the rest is quantized, the result the same."""
    monkeypatch.setattr(packed_store.PackedStore.__init__, "__kwdefaults__", {"part_bytes": 4000})
    quantize, calls = layer_kinds.quantize_4bit, []

    def interrupted(*arguments, **settings):
        calls.append(1)
        if len(calls) == 10:
            raise KeyboardInterrupt
        return quantize(*arguments, **settings)

    out = tmp_path / "out"
    command = ("quantize", folder / "model", out, "--compute-dtype", "float32")
    monkeypatch.setattr(layer_kinds, "quantize_4bit", interrupted)
    result = run_cli(*command)
    assert result.code == 130 and "the same command goes on from it" in result.err
    kept = sum(
        len(json.loads(file.metadata()["parts"]))
        for file in (
            packed_store.safe_open(path, "pt") for path in (out / ".quantizing").glob("*.safe*")
        )
    )
    assert 0 < kept < 10

    other = run_cli(*command, "--quant-type", "fp4")
    assert other.code == 2 and "--overwrite" in other.err

    calls.clear()
    monkeypatch.setattr(
        layer_kinds, "quantize_4bit", lambda *a, **k: calls.append(1) or quantize(*a, **k)
    )
    result = run_cli(*command)
    assert result.code == 0, result.err
    assert f"14 layers ({kept} kept from before)" in result.out
    assert len(calls) == 14 - kept
    assert_same(load(out), load(folder / "native"))
    assert not (out / ".quantizing").exists()


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--format", "gguf"), "native"),
        (("--quant-type", "nf5"), "nf4, fp4, int4"),
        (("--quant-type", "int4", "--format", "bitsandbytes"), "nf4 and fp4"),
        (("--quantize-embeddings", "--format", "bitsandbytes"), "embeddings"),
        (("--block-size", "100"), "power of two"),
        (("--compute-dtype", "float64"), "float64"),
        (("--device", "tpu"), "auto, cpu or cuda"),
    ],
)
def test_what_quantize_refuses(folder, tmp_path, extra, message):
    result = run_cli("quantize", folder / "model", tmp_path / "out", *extra)
    assert result.code == 2 and message in result.err
    assert not (tmp_path / "out").exists()


def test_a_mixture_is_no_model_for_bitsandbytes(tmp_path):
    """Said before anything is quantized."""
    model = tmp_path / "mixture"
    tiny("mixtral").save_pretrained(model)
    command = ("quantize", model, tmp_path / "out", "--format", "bitsandbytes")
    result = run_cli(*command)
    assert result.code == 2 and "no place for layers of experts" in result.err
    assert "model.layers.0.mlp.experts" in result.err
    assert not (tmp_path / "out").exists()


def test_what_is_kept_of_an_interrupted_run_is_of_these_weights(tmp_path, monkeypatch):
    model = make_model(tmp_path / "model")
    options = QuantizeOptions(model=str(model), output=tmp_path / "out")
    before = cli_quantize._description(options, QLoRANativeConfig())
    assert cli_quantize._description(options, QLoRANativeConfig()) == before
    (weights,) = model.glob("*.safetensors")
    torch.save(load_file(weights), model / "pytorch_model.bin")
    weights.unlink()
    binary = cli_quantize._description(options, QLoRANativeConfig())
    assert binary != before
    state = torch.load(model / "pytorch_model.bin")
    torch.save({name: tensor + 1 for name, tensor in state.items()}, model / "pytorch_model.bin")
    assert cli_quantize._description(options, QLoRANativeConfig()) != binary

    commits = []
    for commit in ("1" * 40, "2" * 40):
        config = types.SimpleNamespace(_commit_hash=commit)
        monkeypatch.setattr(cli_quantize.loading, "load_config", lambda model, c=config: c)
        hub = QuantizeOptions(model="someone/model", output=tmp_path / "out")
        commits.append(cli_quantize._description(hub, QLoRANativeConfig()))
    assert commits[0] != commits[1]


def test_a_folder_that_is_in_use_is_not_overwritten(folder, tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    result = run_cli("quantize", folder / "model", tmp_path)
    assert result.code == 2 and "--overwrite" in result.err
    assert (tmp_path / "thesis.txt").is_file()
    result = run_cli("quantize", folder / "native", tmp_path / "out")
    assert result.code == 2 and "in 4 bits already" in result.err
    assert run_cli("quantize", folder / "model", tmp_path, "--overwrite").code == 0
    assert not (tmp_path / "thesis.txt").exists()


@pytest.mark.parametrize("where", ["same", "parent", "link", "linked file", "link inside"])
@pytest.mark.parametrize("command", ["quantize", "merge model", "merge adapter"])
def test_overwriting_never_deletes_what_is_read(folder, adapter, tmp_path, command, where):
    precious = tmp_path / "parent" / "precious"
    shutil.copytree(adapter if command == "merge adapter" else folder / "model", precious)
    read, out = precious, {"same": precious, "parent": precious.parent}.get(where)
    if where == "link":
        out = tmp_path / "link"
        out.symlink_to(precious)
    elif where == "linked file":
        out, read = precious, tmp_path / "read"
        read.mkdir()
        for path in precious.iterdir():
            (read / path.name).symlink_to(path)
    elif where == "link inside":
        out, read = tmp_path / "out", tmp_path / "out" / "link"
        out.mkdir()
        read.symlink_to(precious)
    arguments = {
        "quantize": ("quantize", read, out),
        "merge model": ("merge", read, adapter, out),
        "merge adapter": ("merge", folder / "model", read, out),
    }[command]
    before = sorted(path.name for path in precious.iterdir())
    result = run_cli(*arguments, "--overwrite")
    assert result.code == 2 and "would be deleted" in result.err
    assert str(read) in result.err and str(out) in result.err
    assert sorted(path.name for path in read.iterdir()) == before


def test_a_weight_that_is_not_finite_is_named(folder, tmp_path):
    from safetensors.torch import save_file

    model = make_model(tmp_path / "model")
    tensors = load_file(model / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("inf")
    save_file(tensors, model / "model.safetensors", metadata={"format": "pt"})
    result = run_cli("quantize", model, tmp_path / "out")
    assert result.code == 2
    assert "model.layers.1.mlp.up_proj.weight (128, 64) holds 1 values" in result.err


# ---- merge ----


def adapted(folder, adapter):
    """The base as the adapter was trained over it, with the adapter."""
    model = load(folder / "native")
    qn.load_adapter(model, adapter)
    return model


def test_merged_dense_it_is_the_exact_sum(folder, adapter, tmp_path):
    out = tmp_path / "merged"
    result = run_cli("merge", folder / "native", adapter, out, "--dtype", "float32")
    assert result.code == 0, result.err
    assert "Merged 14 layers" in result.out
    model = AutoModelForCausalLM.from_pretrained(out)
    assert not [m for m in model.modules() if isinstance(m, Linear4bit)]
    assert "quantization_config" not in (out / "config.json").read_text()
    ids = torch.arange(3, 20)[None]
    expected = adapted(folder, adapter)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (out / "tokenizer.json").is_file()
    # The card as it was before the base was quantized.
    card = (out / "README.md").read_text()
    assert card == (folder / "model" / "README.md").read_text()


def test_a_card_that_only_says_how_it_was_quantized_loses_that(tmp_path):
    from qlora_native.hf.model_card import remove_from_model_card, write_model_card

    path = tmp_path / "README.md"
    for original in ("# Tiny\n", "---\ntags:\n- 4-bit\n---\n# Other\n"):
        path.write_text(original)
        remove_from_model_card(tmp_path)
        assert path.read_text() == original
    path.write_text("# Tiny\n\nSmall.\n")
    write_model_card(tmp_path, QLoRANativeConfig())
    assert "4 bits" in path.read_text()
    remove_from_model_card(tmp_path)
    assert path.read_text() == "# Tiny\n\nSmall.\n"


def test_merging_quantizes_the_dense_base_as_the_adapter_had_it(folder, adapter, tmp_path):
    """From the dense model and from the quantized one: the same."""
    for base in ("model", "native"):
        result = run_cli("merge", folder / base, adapter, tmp_path / base, "--dtype", "float32")
        assert result.code == 0, result.err
    a, b = (AutoModelForCausalLM.from_pretrained(tmp_path / base) for base in ("model", "native"))
    assert_same(a, b)


def test_merging_into_the_dense_base(folder, adapter, tmp_path):
    out = tmp_path / "merged"
    result = run_cli("merge", folder / "model", adapter, out, "--no-quantize", "--dtype", "float32")
    assert result.code == 0, result.err
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    qn.load_adapter(model, adapter)
    ids = torch.arange(3, 20)[None]
    merged = AutoModelForCausalLM.from_pretrained(out)
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("form", ["native", "bitsandbytes"])
def test_merged_in_4_bits_it_is_the_requantized_sum(folder, adapter, tmp_path, form):
    out = tmp_path / "merged"
    result = run_cli("merge", folder / "native", adapter, out, "--format", form)
    assert result.code == 0, result.err
    model = load(out)
    expected = adapted(folder, adapter)
    layers = [name for name, m in model.named_modules() if isinstance(m, Linear4bit)]
    assert len(layers) == 14
    for name in layers:
        weight = expected.get_submodule(name).merged_weight(dtype=torch.float32)
        assert torch.equal(
            model.get_submodule(name).weight.view(-1), qn.quantize_4bit(weight).packed
        )
    assert "## Quantization" in (out / "README.md").read_text()


def test_what_merge_refuses(folder, adapter, tmp_path):
    out = tmp_path / "out"

    def fails(*command):
        result = run_cli("merge", *command)
        assert result.code == 2, result.err
        assert not out.exists()
        return result.err

    assert "no such folder" in fails(folder / "model", tmp_path / "absent", out)
    assert "dense" in fails(folder / "model", adapter, out, "--format", "gguf")
    message = fails(folder / "model", adapter, out, "--no-quantize", "--format", "native")
    assert "quantize it afterwards" in message
    assert "float8" in fails(folder / "model", adapter, out, "--dtype", "float8")
