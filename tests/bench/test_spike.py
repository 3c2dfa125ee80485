"""bench/python/spike.py: its arithmetic and its verdict; on a GPU, a small spike."""

from __future__ import annotations

import json

import pytest

import spike


def records(**changes):
    found = {
        run: {"run": run, "losses": ["0x1p+0", "0x1.8p+0"], "failure": None}
        for run in ("spare", "paged", "unpaged")
    }
    found["unpaged"] |= {"losses": ["0x1p+0"], "failure": "out of memory"}
    for run, change in changes.items():
        found[run] |= change
    return found


def test_the_cap_has_no_room_for_the_state():
    options = spike.parse_options([])
    state = 2 * spike.parameter_bytes(options)
    rest = spike.cap_bytes(options) - 2 * spike.parameter_bytes(options)
    activations = 2 * options.layers * max(options.tokens) * options.width * 4
    assert rest > activations
    assert rest < activations + state


def test_the_verdict_is_good_only_when_all_three_are_as_they_should_be():
    assert spike.verdict(records()) is None
    assert "losses differ" in spike.verdict(records(paged={"losses": ["0x1p+0", "0x1.9p+0"]}))
    assert "paged failed" in spike.verdict(records(paged={"failure": "out of memory"}))
    assert "did not run out" in spike.verdict(records(unpaged={"failure": None}))


@pytest.mark.gpu
def test_a_small_spike(capsys):
    arguments = ["--width", "1024", "--layers", "24", "--tokens", "64,4096,64", "--json"]
    spike.main([*arguments, "--staging-mb", "32"])
    found = json.loads(capsys.readouterr().out)
    assert found["paged"]["to_device_gb"] > 0.5
    assert found["paged"]["losses"] == found["spare"]["losses"]
