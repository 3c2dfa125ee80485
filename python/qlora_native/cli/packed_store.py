"""Tensors that an interrupted `quantize` has packed, kept in files to go on from."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from qlora_native._files import atomic_write
from qlora_native.cli.progress import LayerProgress

_FOLDER = ".quantizing"
_RUN = "run.json"
_PART_BYTES = 256 << 20


class PackedStore(LayerProgress):
    """A progress that keeps what is packed, and answers with what was kept.

    Files are whole or absent, whenever the process is killed; at most 256 MiB are packed again.
    """

    def __init__(self, output: Path, run: dict[str, Any], *, part_bytes: int = _PART_BYTES) -> None:
        """Opens what is kept in `output` for the same `run`; anything else there is deleted."""
        super().__init__()
        self._folder = output / _FOLDER
        self._part_bytes = part_bytes
        self._parts: dict[str, list[str]] = {}
        self._files: dict[str, Path] = {}
        self._pending: dict[str, dict[str, Tensor]] = {}
        self.reused = 0
        if not is_same_run(output, run):
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder.mkdir(parents=True)
            with atomic_write(self._folder / _RUN) as temporary:
                temporary.write_text(json.dumps(run))
        for path in sorted(self._folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                parts = json.loads(file.metadata()["parts"])
            self._parts |= parts
            self._files |= dict.fromkeys(parts, path)

    def pack(
        self, name: str, value: Tensor, make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """The kept parts of the tensor, or new ones, which are kept."""
        if name in self._files:
            state = super().pack(name, value, lambda: self._read(name, value))
            self.reused += 1
            return state
        state = super().pack(name, value, make)
        self._pending[name] = state
        if sum(t.nbytes for parts in self._pending.values() for t in parts.values()) > (
            self._part_bytes
        ):
            self._write()
        return state

    def remove(self) -> None:
        """Deletes what was kept, once the result is complete."""
        shutil.rmtree(self._folder)

    def _read(self, name: str, value: Tensor) -> dict[str, Tensor]:
        with safe_open(self._files[name], framework="pt") as file:
            tensors = {key: file.get_tensor(key).to(value.device) for key in self._parts[name]}
        return {key: nn.Parameter(t, requires_grad=False) for key, t in tensors.items()}

    def _write(self) -> None:
        parts = {name: list(state) for name, state in self._pending.items()}
        tensors = {
            key: tensor.detach().contiguous()
            for state in self._pending.values()
            for key, tensor in state.items()
        }
        path = self._folder / f"packed-{len(set(self._files.values())) + 1:05}.safetensors"
        with atomic_write(path) as temporary:
            save_file(tensors, temporary, metadata={"parts": json.dumps(parts)})
        self._parts |= parts
        self._files |= dict.fromkeys(parts, path)
        self._pending.clear()


def is_unfinished(output: Path) -> bool:
    """Whether the folder holds an interrupted run."""
    return (output / _FOLDER / _RUN).is_file()


def is_same_run(output: Path, run: dict[str, Any]) -> bool:
    """Whether the folder holds an interrupted run of exactly that description."""
    return is_unfinished(output) and json.loads((output / _FOLDER / _RUN).read_text()) == run
