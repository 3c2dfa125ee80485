"""How `finetune` runs its steps: what it chooses, what it refuses, and that numbers stay."""

import json
import shutil
import types
from typing import ClassVar

import pytest
import torch
import yaml

from _cli import finetune_arguments, make_model, run_cli, sentences, write_jsonl
from qlora_native.cli import packing, step, trainer
from qlora_native.training import UnsupportedModelError

# Words of a question and of an answer, so that sequences are of many lengths.
TURNS = [(2 + i % 5, 3 + 4 * (i % 6)) for i in range(40)]


def conversation(text, question, answer):
    words = text.split()
    return {
        "messages": [
            {"role": "user", "content": " ".join(words[:question])},
            {"role": "assistant", "content": " ".join(words[:answer])},
        ]
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("step")
    make_model(path / "model")
    write_jsonl(path / "text.jsonl", [{"text": text} for text in sentences(40)])
    rows = [conversation(t, *turns) for t, turns in zip(sentences(40), TURNS, strict=True)]
    write_jsonl(path / "chat.jsonl", rows)
    return path


def finetune(folder, output, *words, data="chat.jsonl", **changes):
    settings = {"max_steps": 3, "eval_fraction": 0, "max_seq_length": 128, "lora_dropout": 0.0}
    line = finetune_arguments(folder / "model", folder / data, output, **(settings | changes))
    return run_cli(*line, *words)


def report(folder, output, *words, **changes):
    result = finetune(folder, output, *words, **changes)
    assert result.code == 0, result.err
    return json.loads((output / "report.json").read_text())


def losses(found):
    return [loss for _, loss in found["train_loss"]]


@pytest.fixture(scope="module")
def padded(folder):
    return report(folder, folder / "padded", "--packing", "none", "--loss", "plain")


def test_by_default_padding_goes_and_every_number_stays(folder, padded, tmp_path):
    found = report(folder, tmp_path / "out", gradient_accumulation_steps=1)
    assert found["step"]["packing"].startswith("flat: a batch is one row; ")
    assert found["step"]["loss"].startswith("by chunks of tokens")
    assert padded["step"]["packing"].endswith("of the tokens are padding")
    assert losses(found) == pytest.approx(losses(padded), rel=1e-4)
    assert found["train_tokens"] == padded["train_tokens"]


def test_accumulated_flat_batches_weigh_every_token_alike(folder, tmp_path):
    changes = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 2, "max_steps": 2}
    flat = report(folder, tmp_path / "flat", "--packing", "flat", **changes)
    none = report(folder, tmp_path / "none", "--packing", "none", "--loss", "plain", **changes)
    assert losses(flat) == pytest.approx(losses(none), rel=1e-4)


def test_text_has_no_padding_to_save(folder, tmp_path):
    found = report(folder, tmp_path / "out", data="text.jsonl", max_steps=1, max_seq_length=16)
    assert found["step"]["packing"].startswith("none, ")


def test_rows_hold_every_sequence_once(folder, tmp_path):
    found = report(
        folder, tmp_path / "out", "--packing", "rows", max_steps=-1, per_device_train_batch_size=2
    )
    rows = int(found["step"]["packing"].split(" sequences in ")[1].split()[0])
    assert "rows: 40 sequences" in found["step"]["packing"] and rows < 40
    assert found["steps"] == -(-rows // 2)
    once = report(folder, tmp_path / "once", "--packing", "none", max_steps=-1)
    assert found["train_tokens"] == once["train_tokens"]


def test_a_model_that_mixes_sequences_is_padded(folder, padded, tmp_path, monkeypatch):
    def leak(model):
        raise packing.LeakError("in it a sequence sees the one before it")

    monkeypatch.setattr(packing, "check_isolation", leak)
    found = report(folder, tmp_path / "out", "--loss", "plain")
    assert found["step"]["packing"].endswith("(in it a sequence sees the one before it)")
    assert losses(found) == losses(padded)
    result = finetune(folder, tmp_path / "refused", "--packing", "rows")
    assert result.code == 2 and "--packing rows: in it a sequence sees" in result.err


def test_a_loss_that_is_not_ours_stays(folder, padded, tmp_path, monkeypatch):
    def refuse(model, **_):
        raise UnsupportedModelError("it has a loss of its own")

    monkeypatch.setattr(step, "use_chunked_loss", refuse)
    found = report(folder, tmp_path / "out", "--packing", "none")
    assert found["step"]["loss"] == (
        "transformers' own, over all logits (it has a loss of its own)"
    )
    assert losses(found) == losses(padded)
    result = finetune(folder, tmp_path / "refused", "--loss", "chunked")
    assert result.code == 2 and "--loss chunked: it has a loss of its own" in result.err


@pytest.mark.parametrize("mode", ["full", "2", "selective"])
def test_what_is_kept_changes_no_number(folder, padded, tmp_path, mode):
    words = ("--packing", "none", "--loss", "plain", "--checkpointing", mode)
    found = report(folder, tmp_path / "out", *words)
    assert losses(found) == losses(padded)
    assert padded["step"]["checkpointing"] == "none: activations are kept"
    assert found["step"]["checkpointing"] != padded["step"]["checkpointing"]


def test_offloading_changes_no_number(folder, padded, tmp_path):
    words = ("--packing", "none", "--loss", "plain", "--checkpointing", "full")
    found = report(folder, tmp_path / "out", *words, "--offload-activations")
    assert losses(found) == losses(padded)
    assert padded["step"]["offload"] == "off"
    assert found["step"]["offload"] == "off (on the CPU they are in host memory)"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--loss", "best"), "--loss best: expected one of auto, chunked, liger, plain"),
        (("--packing", "tight"), "--packing tight: expected one of auto, none, flat, rows"),
        (("--checkpointing", "0"), "--checkpointing 0: expected auto, none, full, selective"),
        (("--offload-activations",), "--offload-activations: with --checkpointing none no layer"),
        (("--cuda-graph",), "--cuda-graph: the run is on the cpu; a CUDA graph needs a GPU"),
        (("--liger",), "--liger: liger-kernel "),
        (("--loss", "liger"), "--loss liger: liger-kernel "),
    ],
)
def test_what_cannot_be_is_refused(folder, tmp_path, words, message):
    result = finetune(folder, tmp_path / "out", *words)
    assert result.code == 2 and message in " ".join(result.err.split())
    assert not (tmp_path / "out").exists()


def options(**changes):
    values = {"packing": "auto", "cuda_graph": True, "lora_dropout": 0.0, "checkpointing": "full",
              "gradient_checkpointing": True, "offload_activations": False,
              "loss": "auto"}  # fmt: skip
    return types.SimpleNamespace(**(values | changes))


def test_a_graph_is_refused_where_it_would_be_wrong():
    from _hf import tiny
    from qlora_native.cli.errors import InputError

    where = types.SimpleNamespace(device=torch.device("cuda"))
    step.check(options(), where, 1)
    with pytest.raises(InputError, match="for one process, and there are 2"):
        step.check(options(), where, 2)
    with pytest.raises(InputError, match="every flat batch has its own"):
        step.check(options(packing="flat"), where, 1)
    with pytest.raises(InputError, match="--offload-activations: what moves to the host cannot"):
        step.check(options(offload_activations=True), where, 1)
    model = tiny("llama")
    with pytest.raises(InputError, match=r"with --lora-dropout 0.1 a layer"):
        step.apply_checkpointing(model, options(lora_dropout=0.1))
    model.config.attention_dropout = 0.2
    with pytest.raises(InputError, match=r"with its attention_dropout 0.2 a layer"):
        step.apply_checkpointing(model, options())
    step.apply_checkpointing(model, options(checkpointing="none"))


class Recorded:
    """In place of a graph: sees the batches, and runs the step."""

    shapes: ClassVar[set] = set()

    def __init__(self, run, parameters):
        self.run, self.parameters = run, parameters

    def __call__(self, batch):
        assert "attention_mask" not in batch
        self.shapes.add(tuple((n, tuple(t.shape)) for n, t in sorted(batch.items())))
        return self.run(batch)


@pytest.mark.parametrize(
    ("data", "mode", "length"), [("chat.jsonl", "rows", 128), ("text.jsonl", "none", 64)]
)
def test_with_a_graph_all_batches_have_one_shape(folder, tmp_path, monkeypatch, data, mode, length):
    monkeypatch.setattr(step, "check", lambda *_: None)
    monkeypatch.setattr(Recorded, "shapes", set())
    monkeypatch.setattr(trainer, "GraphedStep", Recorded)
    changes = {"data": data, "max_seq_length": length, "max_steps": -1}
    # The steps that are left out would change a schedule.
    changes |= {"lr_scheduler_type": "constant", "warmup_steps": 0}
    found = report(folder, tmp_path / "out", "--cuda-graph", **changes)
    assert found["step"]["packing"].startswith(mode)
    assert found["step"]["CUDA graph"] == "forward and backward pass, recorded once"
    (shapes,) = Recorded.shapes
    assert dict(shapes)["input_ids"] == (4, length)
    monkeypatch.undo()
    without = report(folder, tmp_path / "without", "--packing", mode, **changes)
    # Without a graph a last batch may be smaller.
    assert without["steps"] - found["steps"] in (0, 1)
    assert losses(found) == pytest.approx(losses(without)[: found["steps"]], rel=1e-4)


def test_a_run_of_before_these_options_goes_on(folder, tmp_path):
    output = tmp_path / "out"
    report(folder, output, max_steps=2, save_steps=1)
    file = output / "run.yaml"
    settings = yaml.safe_load(file.read_text())
    for name in (
        "loss", "packing", "checkpointing", "offload_activations", "cuda_graph", "liger",
    ):  # fmt: skip
        del settings[name]
    file.write_text(yaml.safe_dump(settings))
    shutil.rmtree(output / "checkpoint-2")
    result = run_cli("finetune", "--config", file, "--resume", "--checkpointing", "full")
    assert result.code == 0, result.err
    assert json.loads((output / "report.json").read_text())["steps"] == 2
    result = run_cli("finetune", "--config", file, "--resume", "--packing", "rows")
    assert result.code == 2 and "--packing was auto and is now rows" in result.err


def test_dropout_is_found_under_every_name():
    config = types.SimpleNamespace(
        to_dict=lambda: {"hidden_dropout_prob": 0.1, "resid_pdrop": 0.2, "dropout": 0.0, "size": 8}
    )
    assert step._dropouts(config) == [("hidden_dropout_prob", 0.1), ("resid_pdrop", 0.2)]
