"""The demo from end to end, with a model of a few thousand parameters."""

import dataclasses
import sys
from pathlib import Path

import pytest

from _cli import run_cli

EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "demo"


@pytest.fixture(scope="module")
def demo():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import demo
    finally:
        sys.path.remove(str(EXAMPLES))
    return demo


@pytest.fixture(scope="module")
def settings(demo):
    base = demo.BaseSettings(
        vocab_size=512, hidden_size=64, intermediate_size=128, layers=1, heads=2, kv_heads=1,
        sequence=64, batch=4, steps=60, max_files=20,
    )  # fmt: skip
    return demo.DemoSettings(
        base=base, epochs=1, max_topics=7, new_tokens=4, min_gain=0.01, learning_rate=1e-2
    )


@pytest.fixture(scope="module")
def result(demo, settings, tmp_path_factory):
    """The run. Only the reloading has a process of its own: starting one takes seconds."""
    folder = tmp_path_factory.mktemp("demo")
    start_process = demo.qlora_native

    def here(folder, *arguments, capture=True):
        if arguments[0] == "evaluate" and "--adapter" in arguments:
            return start_process(folder, *arguments, capture=capture)
        outcome = run_cli(*arguments)
        assert outcome.code == 0, outcome.err
        return outcome.out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "qlora_native", here)
        return demo.run(settings, folder), folder


def test_passes_its_own_check(demo, settings, result):
    figures, _ = result
    assert demo.check(figures, settings) == []
    assert figures["training"]["last_loss"] < figures["training"]["first_loss"] - 0.3


def test_writes_every_loss(demo, result, capsys):
    figures, folder = result
    demo.write_markdown(folder / "demo-results.md", figures)
    demo.show(figures)
    text = (folder / "demo-results.md").read_text()
    for name, loss in figures["losses"].items():
        assert f"| {name} | {loss:.10f} |" in text
    assert figures["prompt"] in capsys.readouterr().out


def test_the_base_model_is_trained_once(demo, settings, result):
    figures, folder = result
    path, training = demo.make_base_model(folder, settings.base)
    assert training == figures["training"]
    assert [p.name for p in folder.glob("base-*")] == [path.name]
    other = dataclasses.replace(settings.base, seed=1)
    assert other.key() != settings.base.key()


def test_check_finds_what_is_wrong(demo, settings):
    def with_losses(*losses):
        return {"losses": dict(zip("abcd", losses, strict=True))}

    assert demo.check(with_losses(5.0, 5.01, 4.0, 4.0), settings) == []
    assert "reloaded" in demo.check(with_losses(5.0, 5.01, 4.0, 4.0000001), settings)[0]
    assert "quantization cost" in demo.check(with_losses(5.0, 5.5, 4.0, 4.0), settings)[0]
    assert "gained" in demo.check(with_losses(5.0, 5.01, 5.01, 5.01), settings)[0]
    nan = float("nan")
    assert len(demo.check(with_losses(nan, nan, nan, nan), settings)) == 3


def test_held_out_topics_are_not_in_the_training_text(demo, tmp_path):
    train, held_out = (file.read_text().splitlines() for file in demo.write_topics(tmp_path))
    assert not set(train) & set(held_out)
    assert 0.1 < len(held_out) / len(train) < 0.3
