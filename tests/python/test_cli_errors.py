"""What the user got wrong is named in one line on stderr, with code 2, and nothing is written."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import qlora_native as qn
from _cli import finetune_arguments, make_model, run_cli, sentences, write_jsonl
from qlora_native.hf import layer_kinds


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("errors")
    make_model(path / "model")
    write_jsonl(path / "data.jsonl", [{"text": text} for text in sentences(40)])
    return path


def fails(folder, tmp_path, *extra, **changes):
    """Runs finetune with one thing wrong and returns the message."""
    output = changes.pop("output", tmp_path / "out")
    existed = output.exists()
    line = finetune_arguments(
        changes.pop("model", folder / "model"),
        changes.pop("data", folder / "data.jsonl"),
        output,
        **changes,
    )
    result = run_cli(*line, *extra)
    assert result.code == 2, (result.code, result.err)
    assert "Traceback" not in result.err
    [message] = [text for text in result.err.splitlines() if text.startswith("error: ")]
    assert output.exists() == existed
    return message


def test_output_that_exists(folder, tmp_path):
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "thesis.txt").write_text("years of work")
    message = fails(folder, tmp_path, output=kept)
    assert "not empty" in message and "--overwrite" in message
    assert [path.name for path in kept.iterdir()] == ["thesis.txt"]
    assert "is not a folder" in fails(folder, tmp_path, output=kept / "thesis.txt")
    assert "no checkpoint" in fails(folder, tmp_path, output=kept, resume=True)
    assert "exclude each other" in fails(folder, tmp_path, resume=True, overwrite=True)


def test_data_files(folder, tmp_path):
    def made(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    assert "no such file" in fails(folder, tmp_path, data=tmp_path / "absent.txt")
    assert "is empty" in fails(folder, tmp_path, data=made("empty.txt", b""))
    assert "no text" in fails(folder, tmp_path, data=made("blank.txt", b"  \n\n "))
    message = fails(folder, tmp_path, data=made("data.docx", b"x"))
    assert ".docx" in message and ".jsonl" in message
    columns = write_jsonl(tmp_path / "columns.jsonl", [{"question": "a", "answer": "b"}])
    message = fails(folder, tmp_path, data=columns)
    assert "`text` or `messages`" in message and "question, answer" in message
    numbers = write_jsonl(tmp_path / "numbers.jsonl", [{"text": 1}])
    assert "must be strings, is int64" in fails(folder, tmp_path, data=numbers)
    assert "cannot be read" in fails(folder, tmp_path, data=made("bad.jsonl", b'{"text": "a"\n{{'))
    assert "cannot be read" in fails(folder, tmp_path, data=made("bad.parquet", b"PAR0 nonsense"))
    assert "cannot be read" in fails(folder, tmp_path, data=made("latin.txt", b"\xff\xfe\xfa" * 9))
    assert "too little to hold out" in fails(folder, tmp_path, data=made("one.txt", b"the dog"))
    messages = write_jsonl(
        tmp_path / "messages.jsonl", [{"messages": [{"from": "x", "value": "y"}]}]
    )
    assert "role, content" in fails(folder, tmp_path, data=messages, eval_fraction=0)


def test_model_folder(folder, tmp_path):
    assert "no such folder" in fails(folder, tmp_path, model=tmp_path / "absent")
    assert "nobody/nothing" in fails(folder, tmp_path, model="nobody/nothing")
    assert "no config.json" in fails(folder, tmp_path, model=tmp_path)
    broken = tmp_path / "broken"
    shutil.copytree(folder / "model", broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    message = fails(folder, tmp_path, model=broken)
    assert "model.safetensors" in message and "truncated" in message
    weights.write_bytes(b"<html>404</html>")
    assert "truncated or no safetensors file" in fails(folder, tmp_path, model=broken)
    weights.unlink()
    assert "no weights" in fails(folder, tmp_path, model=broken)


def test_model_whose_weights_do_not_fit_its_config(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    odd = tmp_path / "odd"
    shutil.copytree(folder / "model", odd)
    tensors = load_file(odd / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    save_file({k: v for k, v in tensors.items() if k != name}, odd / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip
    assert name in fails(folder, tmp_path, model=odd)
    wider = tensors | {name: torch.zeros(130, 64)}
    save_file(wider, odd / "model.safetensors", metadata={"format": "pt"})
    message = fails(folder, tmp_path, model=odd)
    assert f"{name} is (130, 64) in the file and (128, 64) by config.json" in message
    tensors[name] = tensors[name].clone()
    tensors[name][3, 5] = float("nan")
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    message = fails(folder, tmp_path, model=odd)
    assert "model.layers.1.mlp.up_proj.weight" in message and "finite" in message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"quant_type": "nf5"}, "nf4, fp4, int4"),
        ({"block_size": 100}, "power of two"),
        ({"device": "tpu"}, "auto, cpu or cuda"),
        ({"target_modules": "q_porj"}, "q_porj"),
        ({"target_modules": "q_proj,nothing"}, "nothing"),
        ({"lora_r": 0}, "--lora-r 0"),
        ({"lora_dropout": 1.0}, "--lora-dropout"),
        ({"eval_fraction": 1.0}, "--eval-fraction"),
        ({"max_seq_length": 4096}, "at most 128"),
        ({"lr_scheduler_type": "sideways"}, "sideways"),
        ({"optim": "adamx"}, "adamx"),
        ({"max_steps": -1, "num_train_epochs": 0}, "--num-train-epochs"),
        ({"fp16": True}, "--fp16"),
    ],
)
def test_option_values(folder, tmp_path, change, expected):
    assert expected in fails(folder, tmp_path, **change)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_says_why(folder, tmp_path):
    message = fails(folder, tmp_path, device="cuda")
    assert "--device cuda: " in message
    assert ("without CUDA" in message) or (qn.cuda_unavailable_reason() in message)


def test_out_of_memory_names_the_work_and_the_remedy(folder, tmp_path, monkeypatch):
    """The allocator's exception is provoked: no test may fill the machine's memory."""

    def no_room(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nMore.")

    monkeypatch.setattr(layer_kinds, "quantize_4bit", no_room)
    message = fails(folder, tmp_path)
    assert "loading" in message and "in 4 bits on cpu" in message and "_proj.weight" in message
    assert "20.00 GiB" in message and "--device cpu" in message


@pytest.mark.parametrize("step", ["load", "quantize"])
def test_the_cpu_allocator_running_out_is_out_of_memory(folder, tmp_path, monkeypatch, step):
    import transformers

    def no_room(*_, **__):
        torch.empty(1 << 56, device="cpu")

    if step == "load":
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", no_room)
    else:
        monkeypatch.setattr(layer_kinds, "quantize_4bit", no_room)
    message = fails(folder, tmp_path)
    assert message.startswith("error: out of memory while ") and "To go on: " in message


def test_config_file(folder, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text("lora-rank: 3\n")
    message = fails(folder, tmp_path, "--config", config)
    assert "`lora-rank`" in message and "`lora_r" in message
    config.write_text("- a\n- b\n")
    assert "option: value" in fails(folder, tmp_path, "--config", config)
    config.write_text("a: [\n")
    assert "not valid YAML" in fails(folder, tmp_path, "--config", config)
    assert "no such file" in fails(folder, tmp_path, "--config", tmp_path / "absent.yaml")


def test_the_home_folder_in_paths(folder, tmp_path, monkeypatch):
    """On the command line and from YAML, for the model, files, the output and the YAML itself."""
    import qlora_native.cli.finetune as module

    seen = []
    monkeypatch.setattr(module, "finetune", seen.append)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("model: ~/m\ndata: [~/a.txt, b~.txt]\n")
    line = ("finetune", "--config=~/run.yaml", "--output=~/out")
    assert run_cli(*line).code == 0
    assert run_cli(*line, "--eval-data", "~/e.txt", "--model", "org/name").code == 0
    assert seen[0].model == f"{tmp_path}/m" and seen[1].model == "org/name"
    assert seen[0].data == [tmp_path / "a.txt", Path("b~.txt")]
    assert seen[0].output == tmp_path / "out"
    assert seen[0].eval_data is None and seen[1].eval_data == [tmp_path / "e.txt"]
    result = run_cli(*line, "--model", "~nobody-of-that-name/m")
    assert result.code == 2 and "--model ~nobody-of-that-name/m" in result.err


def test_an_option_that_is_missing_is_named(folder):
    result = run_cli("finetune", "--model", folder / "model")
    assert result.code == 2
    assert "--data" in result.err


def test_adapters_that_do_not_fit(folder, tmp_path):
    from safetensors.torch import load_file, save_file

    adapter = tmp_path / "adapter"
    made = run_cli(
        *finetune_arguments(folder / "model", folder / "data.jsonl", adapter, max_steps=1)
    )
    assert made.code == 0, made.err
    generate = ("generate", "--model", folder / "model", "--prompt", "a", "--adapter")
    result = run_cli(*generate, tmp_path / "absent")
    assert result.code == 2 and "no such folder" in result.err
    file = adapter / "adapter_model.safetensors"
    whole = file.read_bytes()
    tensors = load_file(file)
    name = next(name for name in tensors if "lora_A" in name)
    save_file(tensors | {name: torch.zeros(4, 60)}, file)
    result = run_cli(*generate, adapter)
    assert result.code == 2
    assert "(4, 60)" in result.err and "(4, 128)" in result.err and "Traceback" not in result.err
    file.write_bytes(whole[:-40])
    result = run_cli(*generate, adapter)
    assert result.code == 2 and "truncated" in result.err


def test_a_defect_shows_its_traceback_with_debug_only(folder, tmp_path, monkeypatch):
    from qlora_native.cli import loading

    def defect(*_):
        raise ZeroDivisionError("a defect")

    monkeypatch.setattr(loading, "check_quantization", defect)
    line = finetune_arguments(folder / "model", folder / "data.jsonl", tmp_path / "out")
    result = run_cli(*line)
    assert result.code == 1 and "unexpected ZeroDivisionError: a defect" in result.err
    with pytest.raises(ZeroDivisionError):
        run_cli(*line, "--debug")


def test_without_the_extra_one_line_installs_it():
    code = (
        "import importlib.util as u; find = u.find_spec;"
        "u.find_spec = lambda name, *a: None if name == 'typer' else find(name, *a);"
        "from qlora_native.__main__ import main; main()"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 2
    assert "pip install 'qlora-native[cli]'" in result.stderr and "typer" in result.stderr


def test_doctor_tells_what_can_be_used():
    result = run_cli("doctor", "--json")
    assert result.code == 0
    findings = json.loads(result.out)
    assert findings["usable"] and findings["problems"] == []
    assert findings["devices"][0]["device"] == "cpu"
    assert findings["versions"]["torch"] == torch.__version__
    assert findings["cuda"]["usable"] == (findings["cuda"]["why_not"] is None)
    listed = any(device["device"].startswith("cuda") for device in findings["devices"])
    assert findings["cuda"]["library_sees_gpu"] == listed
    assert {kernel["op"] for kernel in findings["kernels"]} >= {"quantize_4bit", "matmul_4bit"}
    assert all(kernel["usable"] or kernel["why_not"] for kernel in findings["kernels"])
    assert run_cli("doctor").code == 0


def test_doctor_says_how_memory_is_paged():
    findings = json.loads(run_cli("doctor", "--json").out)
    paged = {entry["device"]: entry for entry in findings["paged_memory"]}
    assert list(paged) == [device.device for device in qn.list_devices()]
    assert paged["cpu"]["backing"] == "host" and "operating system" in paged["cpu"]["reason"]


def test_doctor_reports_a_product_that_is_wrong(monkeypatch):
    monkeypatch.setattr(qn, "linear_4bit", lambda x, q: x.new_zeros(3, 64))
    result = run_cli("doctor", "--json")
    assert result.code == 1
    assert "is off by" in json.loads(result.out)["problems"][0]
