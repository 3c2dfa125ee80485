"""Adapter files: exact round trips, whole files, and every way they can be wrong."""

from __future__ import annotations

import json
import stat

import pytest
import safetensors.torch
import torch

from _adapted import SUFFIXES, quantized_net, same, state, trained_net
from _models import tiny_net, token_ids
from qlora_native._files import atomic_write
from qlora_native.checkpoint import load_adapter, save_adapter
from qlora_native.nn import add_lora, lora_parameters, merge_lora, set_adapter

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def edit_config(folder, **changes):
    path = folder / CONFIG
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_weights(folder, edit):
    tensors = safetensors.torch.load_file(folder / WEIGHTS)
    edit(tensors)
    safetensors.torch.save_file(tensors, folder / WEIGHTS)


@pytest.fixture
def saved(tmp_path):
    save_adapter(trained_net(), tmp_path / "adapter")
    return tmp_path / "adapter"


# ---- round trips ----


@pytest.mark.parametrize("bias", ["none", "all"])
def test_reload_on_the_quantized_model_is_exact(tmp_path, bias):
    model = trained_net(quantized_net().eval(), bias=bias)
    save_adapter(model, tmp_path)
    other = quantized_net().eval()
    report = load_adapter(other, tmp_path)
    assert same(state(model), state(other))
    assert torch.equal(model(token_ids()), other(token_ids()))
    assert report.trainable == 0
    assert not any(p.requires_grad for p in other.parameters())


def test_trainable_and_dtype(tmp_path):
    save_adapter(trained_net(quantized_net().eval(), adapter_dtype=torch.bfloat16), tmp_path)
    other = quantized_net().eval()
    report = load_adapter(other, tmp_path, trainable=True)
    assert {p.dtype for p in lora_parameters(other)} == {torch.bfloat16}
    assert report.trainable == sum(p.numel() for p in lora_parameters(other))
    assert all(p.requires_grad for p in lora_parameters(other))
    wide = quantized_net().eval()
    load_adapter(wide, tmp_path, adapter_dtype=torch.float32)
    assert {p.dtype for p in lora_parameters(wide)} == {torch.float32}


def test_several_adapters_by_name(tmp_path):
    model = trained_net(quantized_net().eval())
    ids = token_ids()
    first = model(ids)
    save_adapter(model, tmp_path / "first")
    add_lora(model, r=2, target_modules=["up_proj"], adapter_name="second")
    with torch.no_grad():
        for parameter in lora_parameters(model, "second"):
            parameter.fill_(0.1)
    second = model(ids)
    save_adapter(model, tmp_path / "second", adapter_name="second")
    keys = safetensors.torch.load_file(tmp_path / "second" / WEIGHTS).keys()
    assert keys == {
        f"base_model.model.layers.{i}.up_proj.lora_{x}.weight" for i in range(2) for x in "AB"
    }
    other = quantized_net().eval()
    load_adapter(other, tmp_path / "first", adapter_name="a")
    load_adapter(other, tmp_path / "second", adapter_name="b")
    assert torch.equal(other(ids), second)
    set_adapter(other, "a")
    assert torch.equal(other(ids), first)
    with pytest.raises(KeyError, match="third"):
        save_adapter(model, tmp_path / "third", adapter_name="third")


def test_loading_into_an_existing_adapter_keeps_its_parameters(saved):
    model = trained_net()
    want = state(model)
    parameters = list(lora_parameters(model))
    with torch.no_grad():
        for parameter in parameters:
            parameter.zero_()
    load_adapter(model, saved, trainable=True)
    assert all(a is b for a, b in zip(parameters, lora_parameters(model), strict=True))
    assert same(want, state(model))
    for arguments, error in (
        ({"r": 4}, "r=4"),
        ({"target_modules": ["q_proj"]}, "file only"),
        ({"target_modules": [*SUFFIXES, "up_proj"]}, "model only|missing"),
        ({"adapter_dtype": torch.bfloat16}, "bfloat16"),
    ):
        other = trained_net(**arguments)
        before = state(other)
        with pytest.raises(ValueError, match=error):
            load_adapter(other, saved, adapter_dtype=torch.float32)
        assert same(before, state(other))


def test_saving_while_merged_and_refusing_to_load(saved, tmp_path):
    model = trained_net()
    merge_lora(model)
    save_adapter(model, tmp_path / "merged")
    assert same(
        safetensors.torch.load_file(saved / WEIGHTS),
        safetensors.torch.load_file(tmp_path / "merged" / WEIGHTS),
    )
    with pytest.raises(RuntimeError, match="merged"):
        load_adapter(model, saved, adapter_name="other")


def test_a_compiled_model_saves_the_same_keys(saved, tmp_path):
    model = trained_net()
    model.layers[0] = torch.compile(model.layers[0], backend="eager")
    save_adapter(torch.compile(model, backend="eager"), tmp_path / "compiled")
    a = safetensors.torch.load_file(saved / WEIGHTS)
    assert same(a, safetensors.torch.load_file(tmp_path / "compiled" / WEIGHTS))


# ---- files ----


def test_refuses_to_overwrite(saved):
    before = (saved / WEIGHTS).read_bytes()
    model = trained_net()
    next(lora_parameters(model)).data.zero_()
    with pytest.raises(FileExistsError, match="overwrite"):
        save_adapter(model, saved)
    assert (saved / WEIGHTS).read_bytes() == before
    save_adapter(model, saved, overwrite=True)
    assert (saved / WEIGHTS).read_bytes() != before
    assert sorted(p.name for p in saved.iterdir()) == [CONFIG, WEIGHTS]
    file = saved.parent / "file"
    file.write_text("")
    with pytest.raises(NotADirectoryError, match="file"):
        save_adapter(model, file)


def test_a_failed_save_leaves_the_old_adapter(saved, monkeypatch):
    before = {p.name: p.read_bytes() for p in saved.iterdir()}

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(safetensors.torch, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_adapter(trained_net(), saved, overwrite=True)
    assert {p.name: p.read_bytes() for p in saved.iterdir()} == before


def test_atomic_write_makes_an_ordinary_file(tmp_path):
    with atomic_write(tmp_path / "new") as temporary:
        temporary.write_text("text")
        assert temporary.parent == tmp_path
        assert not (tmp_path / "new").exists()
    assert [p.name for p in tmp_path.iterdir()] == ["new"]
    (tmp_path / "plain").write_text("")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


# ---- mistakes ----


def rename(tensors, old, new):
    for key in list(tensors):
        if old in key:
            tensors[key.replace(old, new)] = tensors.pop(key)


DOWN_A = "base_model.model.layers.0.down_proj.lora_A.weight"
DOWN_B = "base_model.model.layers.0.down_proj.lora_B.weight"


@pytest.mark.parametrize(
    ("edit", "error"),
    [
        (lambda t: t.update({DOWN_A: torch.zeros(3, 36)}), rf"{DOWN_A} .*\(3, 36\).*\(3, 37\)"),
        (lambda t: t.update({DOWN_B: torch.zeros(24, 4)}), rf"{DOWN_B} .*\(24, 4\).*\(24, 3\)"),
        (lambda t: t.update({DOWN_A: torch.zeros(3, 37, dtype=torch.int8)}), "int8"),
        (lambda t: t.pop(DOWN_B), rf"{DOWN_B} is missing"),
        (lambda t: (t.pop(DOWN_A), t.pop(DOWN_B)), rf"{DOWN_A} is missing.*target_modules"),
        (lambda t: t.update(extra=torch.zeros(2)), r"1 of 9 tensors.*'extra' \(2,\)"),
        (lambda t: rename(t, "base_model.model.", ""), "8 of 8 tensors have no place"),
        (lambda t: rename(t, "down_proj", "other"), r"layers\.0\.other"),
        (lambda t: t.clear(), "no LoRA weights"),
        (
            lambda t: t.update(
                {"base_model.model.layers.0.q_proj.base_layer.bias": torch.zeros(24)}
            ),
            "bias='none'",
        ),
    ],
)
def test_weights_that_do_not_fit(saved, edit, error):
    edit_weights(saved, edit)
    for model in (quantized_net().eval(), tiny_net()):
        before = state(model)
        with pytest.raises(ValueError, match=error):
            load_adapter(model, saved)
        assert same(before, state(model))


@pytest.mark.parametrize(
    ("dtype", "bad"),
    [
        (torch.float32, ("nan", "-inf")),
        (torch.bfloat16, ("nan", "inf")),
        (torch.float8_e4m3fn, ("nan", "nan")),  # which has no infinity
    ],
)
def test_non_finite_weights_are_refused(saved, dtype, bad):
    values = torch.zeros(24, 3)
    values.view(-1)[[3, 71]] = torch.tensor([float(value) for value in bad])
    edit_weights(saved, lambda t: t.update({DOWN_B: values.to(dtype)}))
    # A new adapter, and one that is there already.
    for model in (quantized_net().eval(), trained_net(), tiny_net()):
        before = state(model)
        flags = [p.requires_grad for p in model.parameters()]
        with pytest.raises(ValueError, match=rf"{DOWN_B} has 2 NaN or infinite values of 72"):
            load_adapter(model, saved, trainable=True)
        assert same(before, state(model))
        assert [p.requires_grad for p in model.parameters()] == flags


def test_non_finite_biases_are_refused(tmp_path):
    save_adapter(trained_net(bias="lora_only"), tmp_path)
    key = "base_model.model.layers.0.q_proj.base_layer.bias"
    edit_weights(tmp_path, lambda t: t[key].fill_(float("inf")))
    model = tiny_net()
    before = state(model)
    with pytest.raises(ValueError, match=rf"{key} has 24 NaN or infinite values of 24"):
        load_adapter(model, tmp_path)
    assert same(before, state(model))


def test_another_model(saved):
    model = tiny_net(dim=16)
    with pytest.raises(ValueError, match=r"\(24, 3\).*\(16, 3\)"):
        load_adapter(model, saved)


@pytest.mark.parametrize("size", [0, 4, 100, -10])
def test_truncated_weights(saved, size):
    data = (saved / WEIGHTS).read_bytes()
    (saved / WEIGHTS).write_bytes(data[:size])
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors is not a complete"):
        load_adapter(quantized_net().eval(), saved)


def test_foreign_files(saved):
    (saved / WEIGHTS).write_bytes(b"PK\x03\x04" * 100)
    with pytest.raises(ValueError, match="not a complete safetensors"):
        load_adapter(quantized_net().eval(), saved)
    for text in ("{", "[]", "\x00"):
        (saved / CONFIG).write_text(text)
        with pytest.raises(ValueError, match=CONFIG):
            load_adapter(quantized_net().eval(), saved)


@pytest.mark.parametrize("name", [CONFIG, WEIGHTS])
def test_missing_files(saved, name):
    (saved / name).unlink()
    with pytest.raises(FileNotFoundError, match=name):
        load_adapter(quantized_net().eval(), saved)


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"r": 5}, r"\(3, 37\).*\(5, 37\)"),
        ({"r": "3"}, "r must be"),
        ({"lora_alpha": None}, CONFIG),
        ({"bias": "some"}, "some"),
        ({"lora_dropout": 2}, "dropout"),
    ],
)
def test_configs_that_do_not_fit(saved, changes, error):
    edit_config(saved, **changes)
    with pytest.raises(ValueError, match=error):
        load_adapter(quantized_net().eval(), saved)


def test_an_unknown_option_that_is_set_is_refused(saved):
    edit_config(saved, some_future_option=None)
    load_adapter(quantized_net().eval(), saved)
    edit_config(saved, some_future_option=1)
    with pytest.raises(NotImplementedError, match="some_future_option=1"):
        load_adapter(quantized_net().eval(), saved)
