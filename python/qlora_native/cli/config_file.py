"""Options in YAML: `--config`, and what a run writes down of itself."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

import yaml

from qlora_native.cli.errors import InputError, require

RUN_FILE = "run.yaml"
"""Name of the options that `finetune` leaves in its output folder."""


def read_yaml(path: Path, option_name: str) -> dict[Any, Any]:
    """The mapping in a YAML file that `option_name` led to.

    Raises:
        InputError: the file is missing, is not YAML, or is no mapping.
    """
    require(path.is_file(), f"{option_name} {path}: no such file")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{option_name} {path}: not valid YAML: {error}") from error
    require(
        isinstance(content, dict),
        f"{option_name} {path}: expected lines of the form `option: value`",
    )
    return content


def read_config(path: Path, names: dict[str, bool]) -> dict[str, Any]:
    """Option values from a YAML file; `names` maps each option to whether it takes a list.

    Raises:
        InputError: the file is missing, is no mapping, or has a key that is no option.
    """
    values: dict[str, Any] = {}
    for key, value in read_yaml(path, "--config").items():
        name = str(key).lstrip("-").replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            raise InputError(f"--config {path}: unknown option `{key}`; the nearest is `{near[0]}`")
        if value is None:
            continue
        if names[name]:
            value = value if isinstance(value, list) else [value]
        elif isinstance(value, list):
            value = ",".join(map(str, value))
        values[name] = value
    return values
