"""QLoRA from end to end on real text, with nothing to download.

1. Trains a small Llama on the standard library's sources (kept in build/demo for next time).
2. Measures it on held-out topics of `pydoc_data`, text of another kind.
3. Runs `qlora-native finetune` on the other topics: NF4 with double quantization, and LoRA.
4. Loads the saved adapter in a fresh process and measures again: the loss must be the same number.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import subprocess
import sys
import time
from pathlib import Path

from base_model import BaseSettings, make_base_model
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

console = Console()
DEFAULT_FOLDER = Path(__file__).resolve().parents[2] / "build" / "demo"


@dataclasses.dataclass(frozen=True)
class DemoSettings:
    """What the demo runs; the tests shrink it."""

    base: BaseSettings = dataclasses.field(default_factory=BaseSettings)
    epochs: float = 2
    batch: int = 4
    learning_rate: float = 2e-3
    lora_r: int = 16
    max_topics: int | None = None
    prompt: str = "If a class defines"
    new_tokens: int = 60
    max_quantization_cost: float = 0.1
    min_gain: float = 0.2


def write_topics(folder: Path, max_topics: int | None = None) -> tuple[Path, Path]:
    """Writes the topics of pydoc's help as JSONL; every sixth, by name, is held out."""
    from pydoc_data.topics import topics

    # Several topics are one text under two names, which must not fall on both sides.
    texts = list(dict.fromkeys(topics[name] for name in sorted(topics)))[:max_topics]
    files = folder / "topics-train.jsonl", folder / "topics-eval.jsonl"
    for file, held_out in zip(files, (False, True), strict=True):
        rows = [text for i, text in enumerate(texts) if (i % 6 == 0) == held_out]
        file.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return files


def qlora_native(folder: Path, *arguments: object, capture: bool = True) -> str:
    """Runs the command in a process of its own and returns what it printed."""
    line = [sys.executable, "-m", "qlora_native", *map(str, arguments)]
    shown = " ".join("qlora-native" if i == 0 else word for i, word in enumerate(line[2:]))
    console.print(f"$ {shown}", style="dim", highlight=False, soft_wrap=True)
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "datasets")}
    result = subprocess.run(
        line, env=environment, text=True, stdout=subprocess.PIPE if capture else None
    )
    if result.returncode:
        sys.exit(f"the command above failed with exit code {result.returncode}")
    return result.stdout or ""


def run(settings: DemoSettings, folder: Path) -> dict:
    """Runs everything and returns the figures."""
    start = time.perf_counter()
    folder.mkdir(parents=True, exist_ok=True)
    base, training = make_base_model(folder, settings.base)
    train_file, eval_file = write_topics(folder, settings.max_topics)
    adapter = folder / "adapter"
    measure = (
        "evaluate", "--model", base, "--data", eval_file, "--json",
        "--max-seq-length", settings.base.sequence, "--per-device-eval-batch-size", 8,
    )  # fmt: skip
    sample = (
        "generate", "--model", base, "--prompt", settings.prompt, "--temperature", 0.4,
        "--repetition-penalty", 1.2, "--max-new-tokens", settings.new_tokens,
    )  # fmt: skip
    dense = json.loads(qlora_native(folder, *measure, "--no-quantize"))["eval_loss"]
    before = qlora_native(folder, *sample)
    qlora_native(
        folder, "finetune", "--model", base, "--data", train_file, "--eval-data", eval_file,
        "--output", adapter, "--overwrite", "--quant-type", "nf4", "--double-quant",
        "--max-seq-length", settings.base.sequence, "--lora-r", settings.lora_r,
        "--learning-rate", settings.learning_rate, "--num-train-epochs", settings.epochs,
        "--per-device-train-batch-size", settings.batch, "--per-device-eval-batch-size", 8,
        "--gradient-accumulation-steps", 1, "--no-gradient-checkpointing", "--max-grad-norm", 1,
        "--eval-steps", 40, "--save-steps", 100, "--logging-steps", 10,
        capture=False,
    )  # fmt: skip
    report = json.loads((adapter / "report.json").read_text())
    reloaded = json.loads(qlora_native(folder, *measure, "--adapter", adapter))["eval_loss"]
    after = qlora_native(folder, *sample, "--adapter", adapter)
    return {
        "losses": {
            "dense base": dense,
            "NF4 base, double quantization": report["eval_loss_before"],
            "after QLoRA": report["eval_loss_after"],
            "adapter reloaded in a fresh process": reloaded,
        },
        "samples": {"before": before, "after": after},
        "prompt": settings.prompt,
        "training": training,
        "report": report,
        "seconds": time.perf_counter() - start,
    }


def check(result: dict, settings: DemoSettings) -> list[str]:
    """What is not as it should be."""
    dense, quantized, tuned, reloaded = result["losses"].values()
    problems = []
    if reloaded != tuned:
        problems.append(f"the reloaded adapter gives {reloaded!r}, the trained one {tuned!r}")
    if not quantized - dense < settings.max_quantization_cost:
        problems.append(f"quantization cost {quantized - dense:.4f} nats per token")
    if not quantized - tuned > settings.min_gain:
        problems.append(f"QLoRA gained {quantized - tuned:.4f} nats per token only")
    return problems


def notes(result: dict) -> list[str]:
    """What was measured, in two sentences."""
    training, report = result["training"], result["report"]
    return [
        f"Base: {training['parameters'] / 1e6:.1f} M parameters, {training['tokens']:,} tokens in "
        f"{training['seconds']:.0f} s, training loss {training['first_loss']:.2f} to "
        f"{training['last_loss']:.2f}.",
        f"QLoRA: {report['steps']} steps in {report['train_seconds']:.0f} s, "
        f"{report['tokens_per_second']:,.0f} tokens/s, {report['trainable_parameters']:,} "
        f"trainable parameters, {report['bits_per_weight']:.3f} bits per quantized weight; "
        f"{report['device']}, {report['dtype']}, torch {report['versions']['torch']}, "
        f"Python {platform.python_version()}. The whole demo took {result['seconds']:.0f} s.",
    ]


def rows(result: dict) -> list[tuple[str, str, str]]:
    """The table's rows: what, loss, perplexity. The losses keep every digit that they have."""
    return [
        (name, f"{loss:.10f}", f"{math.exp(loss):.2f}") for name, loss in result["losses"].items()
    ]


HEADERS = ("model", "eval loss (nats per token)", "perplexity")


def show(result: dict) -> None:
    """Prints the table and the samples."""
    table = Table(title="Held-out topics of pydoc_data", title_style="bold")
    for header, justify in zip(HEADERS, ("left", "right", "right"), strict=True):
        table.add_column(header, justify=justify)
    for row in rows(result):
        table.add_row(*row)
    console.print(table)
    for when, text in result["samples"].items():
        body = f"[bold]{result['prompt']}[/]"
        console.print(
            Panel(console.render_str(body) + text.rstrip(), title=f"{when} QLoRA (NF4 base)")
        )
    for line in notes(result):
        console.print(line, highlight=False)


def write_markdown(path: Path, result: dict) -> None:
    """Writes the same as a Markdown file."""
    lines = ["# Demo results", "", "| " + " | ".join(HEADERS) + " |", "| --- | ---: | ---: |"]
    lines += [f"| {' | '.join(row)} |" for row in rows(result)]
    for line in notes(result):
        lines += ["", line]
    for when, text in result["samples"].items():
        lines += ["", f"A sample {when} QLoRA:", "", "```", result["prompt"] + text.rstrip(), "```"]
    path.write_text("\n".join(lines) + "\n")


def main() -> None:
    """The command line of the demo."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", type=Path, default=DEFAULT_FOLDER, help="cache and results")
    folder = parser.parse_args().folder
    settings = DemoSettings()
    result = run(settings, folder)
    show(result)
    write_markdown(folder / "demo-results.md", result)
    console.print(f"Written: {folder / 'demo-results.md'}, {folder / 'adapter' / 'loss.png'}")
    if problems := check(result, settings):
        sys.exit("the demo failed: " + "; ".join(problems))


if __name__ == "__main__":
    main()
