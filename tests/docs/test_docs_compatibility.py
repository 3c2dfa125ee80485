"""The page on bitsandbytes maps every name that the library maps, and to the same name."""

from __future__ import annotations

import re

import pytest

from _sources import ROOT

PAGE = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")


def rows(page: str) -> list[list[set[str]]]:
    """Return the code words of every cell of every row of the page's tables."""
    return [
        [set(re.findall(r"`([^`]+)`", cell)) for cell in line.strip("|").split("|")]
        for line in page.splitlines()
        if line.startswith("|")
    ]


def test_options_are_mapped():
    pytest.importorskip("transformers")
    from qlora_native.hf import config

    pairs = {(alias, name) for alias, name in config._ALIASES.items()}
    found = {
        (alias, name)
        for cells in rows(PAGE)
        if len(cells) == 2
        for name in cells[0]
        for alias in cells[1]
    }
    assert pairs <= found


def test_optimizers_are_mapped():
    from qlora_native.hf import optimizers

    expected = {
        (f"optim.{optimizers.OPTIMIZERS[ours].__name__}", theirs, ours)
        for theirs, ours in optimizers._IN_PLACE_OF_BITSANDBYTES.items()
    }
    found = {
        (cls, theirs, ours)
        for cells in rows(PAGE)
        if len(cells) == 4
        for cls in cells[0]
        for theirs in cells[2]
        for ours in cells[3]
    }
    assert expected <= found
    assert {ours for _, _, ours in found} | {"adamw"} >= set(optimizers.OPTIMIZERS)


def test_theirs_exist():
    bitsandbytes = pytest.importorskip("bitsandbytes")
    for cells in rows(PAGE):
        if len(cells) == 4 and any(name.startswith("optim.") for name in cells[0]):
            assert [name for name in cells[1] if not hasattr(bitsandbytes.optim, name)] == []


def test_tables_are_read():
    assert rows("text\n| `a` b | `c`, `d` |\n") == [[{"a"}, {"c", "d"}]]
