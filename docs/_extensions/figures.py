"""Figures of the pages on concepts, drawn in every build from what the library computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib
import torch
from sphinx.application import Sphinx

import qlora_native as qn

matplotlib.use("Agg")
from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, GREY = "#2a6fbb", "#d9822b", "#3d9970", "#9aa5b1"
TYPES = {"nf4": BLUE, "fp4": ORANGE, "int4": GREEN}


def code_values(quant_type: str) -> torch.Tensor:
    """What the 16 codes of a type decode to, before the scale."""
    packed = torch.tensor([(2 * i) << 4 | (2 * i + 1) for i in range(8)], dtype=torch.uint8)
    one = torch.ones(1, dtype=torch.float32)
    q = qn.QuantizedTensor(packed, one, None, None, torch.Size((16,)), torch.float32, quant_type)
    return q.dequantize()


def normal_weights(*shape: int) -> torch.Tensor:
    """The same bell-shaped weights in every build."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)) * 0.02


def relative_error(w: torch.Tensor, q: qn.QuantizedTensor) -> float:
    """The norm of the quantization error over that of the weights."""
    return float((q.dequantize(torch.float32) - w).norm() / w.norm())


def draw_nf4() -> Figure:
    """Where the values of codes lie among scaled weights, and the errors that result."""
    w = normal_weights(1024, 1024)
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(2.2, 1))
    blocks = w.reshape(-1, 64)
    scaled = (blocks / blocks.abs().amax(dim=1, keepdim=True)).reshape(-1)
    left.hist(scaled.numpy(), bins=201, color=GREY, density=True)
    top = left.get_ylim()[1]
    for row, (name, color) in enumerate(TYPES.items()):
        height = -(0.12 + 0.14 * row) * top
        left.plot(code_values(name), [height] * 16, "|", color=color, markersize=11, mew=1.8)
        left.text(1.07, height, name, color=color, va="center")
    left.set(xlabel="weight / absmax of its block", ylabel="density", xlim=(-1.05, 1.25))
    left.set_yticks([])
    errors = {name: relative_error(w, qn.quantize_4bit(w, name)) for name in TYPES}
    bars = right.bar(list(errors), [100 * e for e in errors.values()], color=list(TYPES.values()))
    right.bar_label(bars, fmt="%.1f%%")
    right.set(ylabel="norm of the error / norm of the weights", ylim=(0, 14))
    right.yaxis.set_major_formatter("{x:.0f}%")
    return figure


def draw_double_quantization() -> Figure:
    """Bits and errors with and without the second quantization, by block size."""
    w = normal_weights(1024, 4096)
    sizes = [32, 64, 128, 256]
    figure = Figure(figsize=(8.5, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for double, color, label in ((False, GREY, "fp32 scales"), (True, BLUE, "double quantization")):
        quantized = [qn.quantize_4bit(w, block_size=size, double_quant=double) for size in sizes]
        bits = [8 * q.nbytes / w.numel() for q in quantized]
        errors = [100 * relative_error(w, q) for q in quantized]
        shift = 0.2 if double else -0.2
        places = [i + shift for i in range(len(sizes))]
        bars = left.bar(places, [b - 4 for b in bits], 0.38, 4, color=color, label=label)
        left.bar_label(bars, [f"{b:.3f}" for b in bits], fontsize=8)
        right.plot(range(len(sizes)), errors, "o-" if double else "s--", color=color, label=label)
    left.set(ylabel="bits per weight", ylim=(4, 5.15), xlabel="block size")
    right.set(ylabel="norm of the error / norm of the weights", xlabel="block size")
    right.yaxis.set_major_formatter("{x:.1f}%")
    for axes in (left, right):
        axes.set_xticks(range(len(sizes)), [str(size) for size in sizes])
        axes.legend(loc="upper right" if axes is left else "upper left")
    return figure


def _training_bytes(quantize: bool, make_optimizer: Any) -> tuple[float, float, float, float]:
    """Bytes per base parameter after one step: weights, gradients, state, state in paged memory."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(torch.nn.Linear(1024, 1024, bias=False) for _ in range(4)))
    model = model.bfloat16()
    count = sum(p.numel() for p in model.parameters())
    if quantize:
        qn.quantize_model(model)
        qn.add_lora(model, r=16)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = make_optimizer(trained)
    model(torch.randn(2, 1024, dtype=torch.bfloat16)).float().square().mean().backward()
    optimizer.step()
    tensors = [t for s in optimizer.state.values() for t in s.values()]
    state = sum(t.nbytes for t in tensors if isinstance(t, torch.Tensor))
    is_paged = "Paged" in type(optimizer).__name__
    return (
        sum(p.nbytes for p in model.parameters()) / count,
        sum(p.grad.nbytes for p in trained) / count,
        0.0 if is_paged else state / count,
        state / count if is_paged else 0.0,
    )


def draw_paging() -> Figure:
    """What training keeps per parameter of the base, and what of that paging lets leave the GPU."""
    optim = qn.optim
    rows = {
        "all weights, AdamW": _training_bytes(False, optim.AdamW),
        "all weights, AdamW8bit": _training_bytes(False, optim.AdamW8bit),
        "all weights, PagedAdamW": _training_bytes(False, optim.PagedAdamW),
        "QLoRA, AdamW": _training_bytes(True, optim.AdamW),
        "QLoRA, PagedAdamW": _training_bytes(True, optim.PagedAdamW),
    }
    parts = (
        ("weights and adapters", BLUE, ""),
        ("gradients", ORANGE, ""),
        ("optimizer state", GREEN, ""),
        ("optimizer state that can leave the GPU", "white", "///"),
    )
    figure = Figure(figsize=(8.5, 3.2), layout="constrained")
    axes = figure.subplots()
    names = list(rows)
    start = [0.0] * len(names)
    for part, (label, color, hatch) in enumerate(parts):
        values = [rows[name][part] for name in names]
        edge = GREEN if hatch else color
        axes.barh(names, values, left=start, color=color, hatch=hatch, edgecolor=edge, label=label)
        start = [a + b for a, b in zip(start, values, strict=True)]
    for place, total in enumerate(start):
        axes.text(total + 0.1, place, f"{total:.2f}", va="center")
    axes.invert_yaxis()
    axes.set(xlabel="bytes per parameter of the model", xlim=(0, 14.5))
    axes.legend(loc="lower right")
    return figure


FIGURES = {
    "nf4": draw_nf4,
    "double_quantization": draw_double_quantization,
    "paging": draw_paging,
}


def _draw(app: Sphinx) -> None:
    folder = Path(app.srcdir) / "_generated" / "figures"
    folder.mkdir(parents=True, exist_ok=True)
    # The same bytes in every build: identifiers by a fixed salt, no date.
    with matplotlib.rc_context({"svg.hashsalt": "qlora_native", "axes.spines.top": False,
                                "axes.spines.right": False}):  # fmt: skip
        for name, draw in FIGURES.items():
            draw().savefig(folder / f"{name}.svg", metadata={"Date": None})


def setup(app: Sphinx) -> dict[str, Any]:
    """Draw before anything is read."""
    app.connect("builder-inited", _draw, priority=100)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
