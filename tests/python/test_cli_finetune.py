"""`finetune` learns, reports, stops and goes on; the reports say what happened."""

import json
import shutil
import signal
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import yaml
from safetensors.torch import load_file

from _cli import finetune_arguments, make_model, run_cli, sentences, write_jsonl


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("finetune")
    make_model(path / "model")
    write_jsonl(path / "data.jsonl", [{"text": text} for text in sentences(60)])
    return path


def arguments(folder, output, **changes):
    return finetune_arguments(folder / "model", folder / "data.jsonl", output, **changes)


@pytest.fixture(scope="module")
def finished(folder):
    """One uninterrupted run that the tests look at."""
    output = folder / "finished"
    result = run_cli(*arguments(folder, output, save_steps=2, eval_steps=3, save_total_limit=2))
    assert result.code == 0, result.err
    return output, result


def signal_after_step(line, step, number):
    """Sends a signal to a command when it has logged a step; returns its exit code and stderr."""
    process = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    lines = []
    try:
        for text in process.stderr:
            lines.append(text)
            if text.startswith(step):
                break
        process.send_signal(number)
        lines.append(process.communicate(timeout=100)[1])
    finally:
        process.kill()
        process.wait()
    return process.returncode, "".join(lines)


def leave_incomplete(output):
    """What a process leaves that is killed while it writes or deletes a checkpoint."""
    for name in (".checkpoint-incomplete/checkpoint-9", ".checkpoint-incomplete-checkpoint-2"):
        (output / name).mkdir(parents=True)
        (output / name / "optimizer.pt").write_bytes(b"half")


def log_of(output):
    report = json.loads((output / "report.json").read_text())
    return report["train_loss"], report["eval_loss"]


def test_learns_and_leaves_its_files(finished):
    output, result = finished
    report = json.loads((output / "report.json").read_text())
    assert report["eval_loss_after"] < report["eval_loss_before"] - 0.05
    assert report["eval_loss"][0] == [0, report["eval_loss_before"]]
    assert report["eval_loss"][-1] == [6, report["eval_loss_after"]]
    assert [step for step, _ in report["train_loss"]] == [1, 2, 3, 4, 5, 6]
    assert report["steps"] == 6
    assert report["tokens_per_second"] > 0
    # One of the sequences is the short end of the text.
    assert 6 * 4 * 32 - 32 < report["train_tokens"] < 6 * 4 * 32
    assert report["peak_memory_bytes"] > 2**20
    # r * (in + out) over q, k, v, o, gate, up, down of two layers.
    shapes = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 128), (64, 128), (128, 64)]
    assert report["trainable_parameters"] == 2 * sum(4 * (i + o) for i, o in shapes)
    assert 4 < report["bits_per_weight"] < 4.5
    assert report["settings"]["lora_r"] == 4
    assert report["versions"]["torch"] == torch.__version__
    assert (output / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert (output / "tokenizer.json").is_file()
    assert f"{report['eval_loss_after']:.4f}" in result.out
    config = json.loads((output / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA" and config["r"] == 4


def test_keeps_the_newest_checkpoints_with_the_adapter_only(finished):
    output, _ = finished
    assert sorted(path.name for path in output.glob("*checkpoint-*")) == [
        "checkpoint-4",
        "checkpoint-6",
    ]
    names = {path.name for path in (output / "checkpoint-6").iterdir()}
    assert "model.safetensors" not in names
    assert {"adapter_model.safetensors", "optimizer.pt", "rng_state.pth"} <= names


def test_report_agrees_with_evaluating_the_saved_adapter(folder):
    held_out = write_jsonl(folder / "held.jsonl", [{"text": t} for t in sentences(8, seed=5)])
    other = folder / "with-eval-data"
    result = run_cli(*arguments(folder, other, eval_data=held_out, max_steps=3))
    assert result.code == 0, result.err
    report = json.loads((other / "report.json").read_text())
    common = ("evaluate", "--model", folder / "model", "--data", held_out, "--json", "--no-bf16",
              "--device", "cpu", "--max-seq-length", 32)  # fmt: skip
    base, tuned = run_cli(*common), run_cli(*common, "--adapter", other)
    assert json.loads(base.out)["eval_loss"] == report["eval_loss_before"]
    assert json.loads(tuned.out)["eval_loss"] == report["eval_loss_after"]


def test_an_adapter_brings_its_quantization(folder, tmp_path):
    held_out = write_jsonl(tmp_path / "held.jsonl", [{"text": t} for t in sentences(8, seed=5)])
    tuned = tmp_path / "tuned"
    line = arguments(folder, tuned, eval_data=held_out, max_steps=1, save_steps=1,
                     quant_type="int4", block_size=128)  # fmt: skip
    result = run_cli(*line, "--no-double-quant")
    assert result.code == 0, result.err
    report = json.loads((tuned / "report.json").read_text())
    common = ("evaluate", "--model", folder / "model", "--data", held_out, "--json", "--no-bf16",
              "--device", "cpu", "--max-seq-length", 32, "--adapter")  # fmt: skip
    for adapter in (tuned, tuned / "checkpoint-1"):
        result = run_cli(*common, adapter)
        assert json.loads(result.out)["eval_loss"] == report["eval_loss_after"]
        assert "Warning" not in result.err
    result = run_cli(*common, tuned, "--quant-type", "nf4")
    assert json.loads(result.out)["eval_loss"] != report["eval_loss_after"]
    assert "quant_type int4, not nf4" in result.err and "block_size" not in result.err


def test_resume_keeps_the_dtype_that_the_first_machine_chose(folder, tmp_path, monkeypatch):
    from qlora_native.cli import loading

    output = tmp_path / "out"
    line = arguments(folder, output, max_steps=1, save_steps=1)
    line.remove("--no-bf16")
    monkeypatch.setattr(loading, "_cpu_is_fast_in_bf16", lambda: False)
    result = run_cli(*line)
    assert result.code == 0, result.err
    monkeypatch.setattr(loading, "_cpu_is_fast_in_bf16", lambda: True)
    result = run_cli(*line, "--resume")
    assert result.code == 2 and "--bf16 was False and is now True" in result.err
    result = run_cli("finetune", "--config", output / "run.yaml", "--resume")
    assert result.code == 0, result.err
    assert json.loads((output / "report.json").read_text())["dtype"] == "float32"


def test_resume_refuses_a_run_file_that_is_none(finished, tmp_path):
    output = shutil.copytree(finished[0], tmp_path / "copy")
    config = shutil.copy(output / "run.yaml", tmp_path / "options.yaml")
    for content, expected in (("", "option: value"), ("- a", "option: value"), ("a: [", "YAML")):
        (output / "run.yaml").write_text(content)
        result = run_cli("finetune", "--config", config, "--output", output, "--resume")
        assert result.code == 2 and expected in result.err


def test_local_paths_never_reach_for_the_network(folder, finished, tmp_path, monkeypatch):
    """With everything that keeps the tests offline taken away, nobody tries to connect."""
    import datasets
    import huggingface_hub

    attempts = []

    def refuse(self, address):
        attempts.append(address)
        raise OSError("no network in tests")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *a, **k: refuse(None, a))
    output, _ = finished
    generate = ("generate", "--model", folder / "model", "--adapter", output, "--prompt", "a")
    assert run_cli(*arguments(folder, tmp_path / "out", max_steps=1)).code == 0
    assert run_cli(*generate, "--max-new-tokens", 1).code == 0
    assert attempts == []
    # The check can fail: this is how an attempt would look.
    with pytest.raises(Exception, match="no network in tests"):
        huggingface_hub.HfApi().model_info("nobody/nothing")
    assert attempts


def test_resuming_a_finished_run_changes_nothing(finished, tmp_path):
    output = shutil.copytree(finished[0], tmp_path / "copy")
    log, adapter = log_of(output), load_file(output / "adapter_model.safetensors")
    result = run_cli("finetune", "--config", output / "run.yaml", "--output", output, "--resume")
    assert result.code == 0, result.err
    assert log_of(output) == log
    for name, tensor in load_file(output / "adapter_model.safetensors").items():
        assert torch.equal(tensor, adapter[name]), name


def test_resumed_after_a_kill_equals_an_uninterrupted_run(folder, finished):
    """SIGKILL leaves whole checkpoints; losses and adapter are the uninterrupted run's."""
    whole, _ = finished
    output = folder / "killed"
    line = [sys.executable, "-m", "qlora_native"]
    line += [str(a) for a in arguments(folder, output, save_steps=2, eval_steps=3)]
    code, err = signal_after_step(line, "step 3/", signal.SIGKILL)
    assert code == -signal.SIGKILL, err
    assert not (output / "adapter_model.safetensors").exists()
    assert (output / "checkpoint-2" / "trainer_state.json").is_file()
    leave_incomplete(output)
    result = run_cli("finetune", "--config", output / "run.yaml", "--resume")
    assert result.code == 0, result.err
    assert log_of(output) == log_of(whole)
    assert not list(output.glob(".checkpoint-*"))
    expected = load_file(whole / "adapter_model.safetensors")
    for name, tensor in load_file(output / "adapter_model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name


def test_ctrl_c_writes_a_checkpoint_and_says_how_to_go_on(folder):
    output = folder / "stopped"
    line = [sys.executable, "-m", "qlora_native"]
    line += [str(a) for a in arguments(folder, output, max_steps=100000)]
    code, err = signal_after_step(line, "step 2/", signal.SIGINT)
    assert code == 130, err
    [checkpoint] = output.glob("checkpoint-*")
    assert f"{checkpoint} is whole" in err
    assert f"qlora-native finetune --config {output}/run.yaml --resume" in err
    assert "Traceback" not in err


def test_a_checkpoint_that_was_being_written_is_no_checkpoint(folder, finished, tmp_path):
    """Kills the writer between the files and the rename."""
    from qlora_native.cli import trainer

    class KilledError(BaseException):
        pass

    def killed(_):
        raise KilledError

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(trainer, "_sync_tree", killed)
        with pytest.raises(KilledError):
            run_cli(*arguments(folder, tmp_path / "out", save_steps=2))
    assert trainer.checkpoints(tmp_path / "out") == []
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_an_old_checkpoint_goes_where_a_killed_deletion_left_files(tmp_path):
    from qlora_native.cli import trainer

    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    leave_incomplete(tmp_path)
    saver = trainer.AdapterTrainer.__new__(trainer.AdapterTrainer)
    saver.args = SimpleNamespace(save_total_limit=1)
    saver._delete_old(tmp_path)
    assert [path.name for path in trainer.checkpoints(tmp_path)] == ["checkpoint-4"]
    assert not (tmp_path / ".checkpoint-incomplete-checkpoint-2").exists()


def test_resume_refuses_other_settings(folder, finished):
    output, _ = finished
    before = sorted(output.iterdir())
    result = run_cli("finetune", "--config", output / "run.yaml", "--resume", "--lora-r", 8)
    assert result.code == 2
    assert "--lora-r was 4 and is now 8" in result.err
    assert sorted(output.iterdir()) == before


def test_overwrite_replaces_the_whole_run(folder):
    output = folder / "twice"
    for steps in (4, 2):
        result = run_cli(
            *arguments(
                folder, output, save_steps=2, max_steps=steps, overwrite=True, eval_fraction=0
            )
        )
        assert result.code == 0, result.err
        assert not list(output.glob(".checkpoint-*"))
        leave_incomplete(output)
    assert [path.name for path in output.glob("checkpoint-*")] == ["checkpoint-2"]
    report = json.loads((output / "report.json").read_text())
    assert report["steps"] == 2 and report["eval_loss_after"] is None


def test_config_file_and_the_command_line_over_it(folder, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "model": str(folder / "model"),
                "data": [str(folder / "data.jsonl")],
                "lora-r": 2,
                "max_steps": 1,
                "learning-rate": "1e-3",
                "double-quant": False,
                "max-seq-length": 32,
                "target_modules": ["q_proj", "v_proj"],
                "device": "cpu",
                "eval-fraction": 0,
            }
        )
    )
    output = tmp_path / "out"
    result = run_cli("finetune", "--config", config, "--output", output, "--lora-r", 3)
    assert result.code == 0, result.err
    settings = json.loads((output / "report.json").read_text())["settings"]
    assert settings["lora_r"] == 3
    assert settings["learning_rate"] == 1e-3
    assert settings["double_quant"] is False
    adapter = json.loads((output / "adapter_config.json").read_text())
    assert sorted(adapter["target_modules"]) == ["q_proj", "v_proj"]


def test_accumulation_and_checkpointing_train_too(folder, tmp_path):
    changes = {"gradient_accumulation_steps": 2, "max_steps": 2, "lora_dropout": 0.0}
    losses = []
    for name, flag in (
        ("plain", "--no-gradient-checkpointing"),
        ("again", "--gradient-checkpointing"),
    ):
        output = tmp_path / name
        result = run_cli(*arguments(folder, output, **changes), flag)
        assert result.code == 0, result.err
        losses.append(log_of(output))
    assert losses[0] == losses[1]


def test_generate_continues_the_prompt(folder, finished):
    output, _ = finished
    common = ("generate", "--model", folder / "model", "--device", "cpu", "--max-new-tokens", 8)
    tuned = run_cli(*common, "--prompt", "the quick", "--adapter", output)
    assert tuned.code == 0, tuned.err
    assert tuned.out.strip()
    sampling = ("--prompt", "the quick", "--temperature", 1.0, "--top-p", 0.9, "--seed")
    first, again, other = (run_cli(*common, *sampling, seed).out for seed in (1, 1, 2))
    assert first == again != other
    assert run_cli(*common, "--prompt", "the quick", "--no-quantize").code == 0


def test_time_in_evaluation_does_not_count_as_training(folder, finished):
    output, _ = finished
    report = json.loads((output / "report.json").read_text())
    assert 0 < report["train_seconds"] < report["wall_seconds"]
    assert report["tokens_per_second"] == pytest.approx(
        report["train_tokens"] / report["train_seconds"]
    )
