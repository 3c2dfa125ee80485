"""What a run shows while it works: a bar where there is a terminal, and a line per log entry."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor
from transformers.trainer_callback import TrainerCallback

from qlora_native.hf.packing import PackObserver

# Results go to stdout; what is only news goes to stderr.
stdout = Console()
stderr = Console(stderr=True)


def bar() -> Progress:
    """A progress bar on stderr that leaves nothing behind, and is not there without a terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=stderr,
        transient=True,
        disable=not stderr.is_terminal,
    )


class LayerProgress(PackObserver):
    """Shows what is quantized while a model is loaded: how many layers, which, how fast."""

    def __init__(self) -> None:
        self._bar = bar()
        self._task = self._bar.add_task("Quantizing", total=None)
        self._started = 0.0
        self.dense_bytes = 0
        self.seconds = 0.0

    def __enter__(self) -> LayerProgress:
        self._bar.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._bar.stop()

    def begin(self, tensors: int) -> None:
        """Starts the clock."""
        self._bar.update(self._task, total=tensors)
        self._started = time.perf_counter()

    def pack(
        self, name: str, value: Tensor, make: Callable[[], dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        """Moves the bar by one."""
        state = super().pack(name, value, make)
        self.dense_bytes += value.nbytes
        self.seconds = time.perf_counter() - self._started
        rate = self.dense_bytes / self.seconds / 1e9
        layer = name.removesuffix(".weight")
        self._bar.update(self._task, advance=1, description=f"Quantizing {rate:.2f} GB/s {layer}")
        return state


class TrainingProgress(TrainerCallback):
    """Shows the steps of a Trainer, and its log entries as lines."""

    def __init__(self) -> None:
        self._bar: Progress | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Starts the bar, at the step from which training goes on."""
        self._bar = bar()
        self._task = self._bar.add_task(
            "Training", total=state.max_steps, completed=state.global_step
        )
        self._bar.start()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Moves the bar."""
        self._bar.update(self._task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Prints the losses."""
        parts = [f"step {state.global_step}/{state.max_steps}" if state.max_steps else "start"]
        for key, label, form in (
            ("loss", "loss", ".4f"),
            ("eval_loss", "eval loss", ".4f"),
            ("grad_norm", "grad norm", ".3f"),
            ("learning_rate", "learning rate", ".2e"),
        ):
            if key in logs:
                parts.append(f"{label} {logs[key]:{form}}")
        if len(parts) > 1:
            stderr.print("  ".join(parts), highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Takes the bar away."""
        self.close()

    def close(self) -> None:
        """Gives the terminal back, also after an error."""
        if self._bar is not None:
            self._bar.stop()
