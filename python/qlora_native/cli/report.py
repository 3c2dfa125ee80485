"""What a fine-tuning run leaves behind for its reader: a table, report.json and loss.png."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import resource
import sys
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

import qlora_native as qn
from qlora_native._files import atomic_write
from qlora_native.cli.loss import perplexity


def versions() -> dict[str, str | None]:
    """Versions of what a result depends on; None for what is not installed."""
    found: dict[str, str | None] = {
        "qlora_native": qn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
    }
    for name in ("transformers", "datasets", "accelerate", "safetensors", "peft"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def peak_memory(device: torch.device) -> tuple[int, str]:
    """Bytes, and of what: allocated on the GPU, or the process's largest resident size."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), "allocated on the GPU"
    # Linux counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, "resident in the process"


def device_name(device: torch.device) -> str:
    """What the device calls itself."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return next(d.name for d in qn.list_devices() if d.device == "cpu")


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Writes the report; a non-finite number becomes null, which JSON can hold."""
    with atomic_write(path) as temporary:
        temporary.write_text(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not abs(value) < float("inf"):
        return None
    return value


def table(report: dict[str, Any]) -> Table:
    """The report's main figures."""
    result = Table(title="QLoRA fine-tuning", show_header=False, title_style="bold")
    result.add_column(style="cyan")
    result.add_column(justify="right")
    before, after = report["eval_loss_before"], report["eval_loss_after"]
    if before is not None:
        result.add_row("eval loss before", f"{before:.4f}  (perplexity {perplexity(before):.2f})")
        result.add_row("eval loss after", f"{after:.4f}  (perplexity {perplexity(after):.2f})")
    else:
        result.add_row("eval loss", "no held-out data")
    if report["train_loss"]:
        first, last = report["train_loss"][0][1], report["train_loss"][-1][1]
        result.add_row("train loss, first and last log", f"{first:.4f} to {last:.4f}")
    result.add_row("steps", f"{report['steps']:,}")
    if report["tokens_per_second"] is not None:
        result.add_row("tokens per second", f"{report['tokens_per_second']:,.0f}")
        result.add_row("training time", f"{report['train_seconds']:,.1f} s")
    result.add_row(
        "peak memory", f"{report['peak_memory_bytes'] / 2**20:,.0f} MiB {report['peak_memory_of']}"
    )
    trainable, total = report["trainable_parameters"], report["total_parameters"]
    result.add_row("trainable parameters", f"{trainable:,} of {total:,} ({trainable / total:.2%})")
    result.add_row("bits per quantized weight", f"{report['bits_per_weight']:.3f}")
    result.add_row("loss on", report["loss_on"])
    return result


def plot(path: Path, report: dict[str, Any]) -> None:
    """Draws the train and eval loss over the steps."""
    import matplotlib

    # No window system is needed to write a file.
    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=150, layout="constrained")
    for key, label, style in (
        ("train_loss", "train", {"color": "#8aa9c9", "linewidth": 1.4}),
        ("eval_loss", "eval (held out)", {"color": "#c0392b", "linewidth": 2, "marker": "o"}),
    ):
        points = [(step, loss) for step, loss in report[key] if abs(loss) < float("inf")]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, **style)
    for step, loss in [
        p for p in report["eval_loss"] if p in (report["eval_loss"][0], report["eval_loss"][-1])
    ]:
        axes.annotate(
            f"{loss:.3f}",
            (step, loss),
            textcoords="offset points",
            xytext=(0, 9),
            ha="center",
            color="#c0392b",
        )
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.set_title(report["title"], loc="left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.margins(y=0.15)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.lines:
        axes.legend(frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png")
    pyplot.close(figure)
