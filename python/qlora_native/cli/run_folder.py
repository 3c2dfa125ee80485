"""The output folder of `finetune`: what may be in it, and what goes on from there."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import yaml

from qlora_native._files import atomic_write
from qlora_native.cli.config_file import RUN_FILE, read_yaml
from qlora_native.cli.errors import display_path, require
from qlora_native.cli.options import FinetuneOptions
from qlora_native.cli.trainer import checkpoints

_RESULTS = ("adapter_config.json", "adapter_model.safetensors", "report.json", "loss.png", RUN_FILE)
# What may differ between a run and its continuation: it changes no number but for the device,
# which changes them by rounding only, as the dtype that it came to is recorded and compared.
_FREE_ON_RESUME = {
    "output", "overwrite", "resume", "debug", "logging_steps", "eval_steps", "save_steps",
    "save_total_limit", "device", "fsdp", "rank_timeout", "gradient_checkpointing", "checkpointing",
    "offload_activations",
}  # fmt: skip


def check_output(options: FinetuneOptions) -> Path | None:
    """The checkpoint to go on from, if that was asked for."""
    folder = options.output
    require(
        not (options.resume and options.overwrite), "--resume and --overwrite exclude each other"
    )
    require(
        not folder.exists() or folder.is_dir(), f"--output {folder}: exists and is not a folder"
    )
    if options.resume:
        whole = checkpoints(folder) if folder.exists() else []
        require(bool(whole), f"--resume: there is no checkpoint in {folder}")
        _check_same_run(options)
        return whole[-1]
    require(
        options.overwrite or not folder.exists() or not any(folder.iterdir()),
        f"--output {folder}: exists and is not empty; --overwrite replaces the run in it, "
        "--resume continues it",
    )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    require(os.access(existing, os.W_OK), f"--output {folder}: {existing} is not writable")
    return None


def _check_same_run(options: FinetuneOptions) -> None:
    file = options.output / RUN_FILE
    require(file.is_file(), f"--resume: there is no {RUN_FILE} in {options.output}")
    then, now = read_yaml(file, "--resume"), settings(options)
    defaults = {field.name: field.default for field in dataclasses.fields(FinetuneOptions)}
    for name in now.keys() - _FREE_ON_RESUME:
        # What the file does not name did not exist yet.
        before = then.get(name, defaults[name])
        require(
            before == now[name],
            f"--resume: --{name.replace('_', '-')} was {before} and is now {now[name]}; "
            f"to continue the run as it was: {_resume_command(options)}",
        )


def _resume_command(options: FinetuneOptions) -> str:
    return f"qlora-native finetune --config {display_path(options.output / RUN_FILE)} --resume"


def start_output(options: FinetuneOptions) -> None:
    """Makes the folder, without the previous run when --overwrite was given."""
    options.output.mkdir(parents=True, exist_ok=True)
    for path in checkpoints(options.output):
        shutil.rmtree(path)
    for name in _RESULTS:
        (options.output / name).unlink(missing_ok=True)
    with atomic_write(options.output / RUN_FILE) as temporary:
        temporary.write_text(yaml.safe_dump(settings(options), sort_keys=False))


def settings(options: FinetuneOptions) -> dict[str, Any]:
    """The options as YAML and JSON take them, so that the file is a --config of the same run."""

    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(item) for item in value]
        return str(value) if isinstance(value, Path) else value

    passing = ("overwrite", "resume", "debug", "given")
    return {
        name: plain(value)
        for name, value in dataclasses.asdict(options).items()
        if name not in passing
    }


def how_to_resume(options: FinetuneOptions) -> str:
    """What to tell a user whose run was interrupted."""
    whole = checkpoints(options.output)
    if not whole:
        return "there is no checkpoint yet; start again with --overwrite"
    return f"{whole[-1]} is whole; go on with: {_resume_command(options)}"
