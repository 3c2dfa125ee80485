"""The manual's code works: blocks each by themselves, the commands of a page in order."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from _examples import Example, examples, run_compiled, run_python
from _sources import ROOT, all_files

PAGES = [name for name in all_files() if name.startswith("docs/") and name.endswith(".md")]
BLOCKS = {
    page: [e for e in examples((ROOT / page).read_text(encoding="utf-8")) if e.is_run]
    for page in PAGES
}
# Languages of blocks that only show something.
SHOWN = {"cmake", "console", "text", "eval"}


def _selected(*languages: str) -> list:
    return [
        pytest.param(block, id=f"{page.removeprefix('docs/')}:{block.line}")
        for page, blocks in BLOCKS.items()
        for block in blocks
        if block.language in languages
    ]


@pytest.mark.parametrize("example", _selected("python"))
def test_python_example_runs(example, tmp_path):
    for package in ("bitsandbytes", "peft", "transformers"):
        if package in example.code:
            pytest.importorskip(package)
    result = run_python(example, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("example", _selected("c", "cpp"))
def test_compiled_example_runs(example, tmp_path):
    result = run_compiled(example, tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def run_commands(blocks: list[Example], folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a page's blocks of shell commands, one after the other, up to the first that fails."""
    scripts = Path(sys.executable).parent
    return subprocess.run(
        ["bash", "-e", "-c", "\n".join(block.code for block in blocks)],
        cwd=folder,
        env={
            **os.environ,
            "HF_HUB_OFFLINE": "1",
            "PATH": os.pathsep.join((str(scripts), os.environ.get("PATH", ""))),
        },
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.timeout(1200)
@pytest.mark.parametrize(
    "page", [p for p, blocks in BLOCKS.items() if any(b.language == "sh" for b in blocks)]
)
def test_commands_run(page, tmp_path):
    _cli = pytest.importorskip("_cli")
    _cli.make_model(tmp_path / "llama")
    for name, seed in (("train.jsonl", 0), ("held_out.jsonl", 1)):
        rows = [{"text": sentence} for sentence in _cli.sentences(40, seed)]
        _cli.write_jsonl(tmp_path / name, rows)
    result = run_commands([b for b in BLOCKS[page] if b.language == "sh"], tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_block_is_run_or_only_shown():
    languages = {block.language for blocks in BLOCKS.values() for block in blocks}
    assert languages - SHOWN <= {"python", "c", "cpp", "sh"}
    assert {"python", "c", "cpp", "sh"} <= languages


def test_a_command_that_fails_is_found(tmp_path):
    blocks = [Example("sh", 1, "false\n", True), Example("sh", 5, "true\n", True)]
    assert run_commands(blocks, tmp_path).returncode != 0
