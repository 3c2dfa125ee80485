"""Every message that the troubleshooting page quotes is one that the library still has."""

from __future__ import annotations

import pytest

import _messages
from _sources import ROOT, read_texts

PAGE = ROOT / "docs" / "troubleshooting.md"


def _known():
    return _messages.templates(
        read_texts(
            (".py", ".cpp", ".h", ".cu", ".cmake"),
            ("python/qlora_native/", "cpp/src/", "cpp/include/", "cuda/", "cmake/"),
        )
    )


def test_every_quoted_message_exists():
    quoted = _messages.quoted(PAGE.read_text(encoding="utf-8"))
    assert len(quoted) > 30
    assert _messages.unknown(quoted, _known()) == []


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (
            "a.py",
            'raise E(f"x is {x}, expected "\n  f"{y!r} or less")',
            "x is …, expected … or less",
        ),
        ("a.py", 'raise E("there are: " + ", ".join(names))', "there are: …"),
        (
            "a.cpp",
            'fail(op, ": ", what, " has ", n, " rows, "\n "not two");',
            "…: … has … rows, not two",
        ),
        ("a.cpp", 'throw E("is " + std::to_string(n) + " bytes");', "is … bytes"),
        ("a.cmake", 'message(FATAL_ERROR "needs ${X} or "\n "newer.")', "needs … or newer."),
    ],
)
def test_messages_are_read_from_sources(name, text, message):
    known = _messages.templates({name: text})
    assert _messages.unknown([message], known) == []
    assert _messages.unknown([message.upper()], known) != []


def test_a_message_that_is_gone_is_found():
    page = "### `block_size … is odd`\n\ntext\n\n### `there is no CPU …`\n"
    assert _messages.unknown(_messages.quoted(page), _known()) == ["block_size … is odd"]
