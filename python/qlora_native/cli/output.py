"""Folders that commands write models to: checking them, and what goes beside the weights."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import transformers

from qlora_native.cli.errors import require
from qlora_native.cli.loading import hub_arguments
from qlora_native.hf.bitsandbytes_models import save_for_bitsandbytes

_COPIED_SUFFIXES = (".json", ".jinja", ".md", ".model", ".tiktoken", ".txt")
_NOT_COPIED = ("config.json", "generation_config.json")


def check_output(
    folder: Path,
    *,
    inputs: Sequence[str | Path],
    overwrite: bool,
    unfinished: bool = False,
) -> None:
    """Raises InputError unless a model can be written to the folder.

    Args:
        inputs: folders that are read, and ids of the hub; none may be in the folder.
        unfinished: what is in it is from the same run, interrupted.
    """
    require(not folder.exists() or folder.is_dir(), f"{folder}: exists and is not a folder")
    for given in inputs:
        require(
            not _would_delete(folder, Path(given).expanduser()),
            f"{folder}: {given} is in it or is the same folder, and would be deleted; choose "
            "another output folder",
        )
    require(
        overwrite or unfinished or not folder.exists() or not any(folder.iterdir()),
        f"{folder}: exists and is not empty; --overwrite replaces what is in it",
    )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    require(os.access(existing, os.W_OK), f"{folder}: {existing} is not writable")


def _would_delete(folder: Path, read: Path) -> bool:
    """Whether emptying `folder` takes away `read`, one of its files, or a link on the way there."""
    if not read.exists():
        return False  # an id of the hub
    used = [read, *(read.iterdir() if read.is_dir() else ())]
    return any(
        path.is_relative_to(emptied)
        for emptied in (folder.absolute(), folder.resolve())
        for each in used
        for path in (each.absolute(), each.resolve())
    )


def empty(folder: Path) -> None:
    """Makes the folder, and deletes what is in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def save_model(model: Any, folder: Path, model_format: str, max_shard_size: str) -> None:
    """Writes the weights and config.json, as "dense", "native" or "bitsandbytes"."""
    save = model.save_pretrained
    if model_format == "bitsandbytes":
        save_for_bitsandbytes(model, folder, max_shard_size=max_shard_size)
    else:
        save(folder, max_shard_size=max_shard_size)


def copy_companions(model: str, folder: Path) -> None:
    """Puts the tokenizer, templates and the like of the model beside its new weights."""
    source = Path(model).expanduser()
    if source.is_dir():
        for path in sorted(source.iterdir()):
            copied = path.suffix in _COPIED_SUFFIXES and path.name not in _NOT_COPIED
            if path.is_file() and copied and not path.name.endswith(".index.json"):
                shutil.copyfile(path, folder / path.name)
        return
    tokenizer = transformers.AutoTokenizer.from_pretrained(model, **hub_arguments(model))
    tokenizer.save_pretrained(folder)


def folder_bytes(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))
