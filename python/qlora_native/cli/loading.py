"""What the options say of paths, precision and quantization, checked.

Whatever the user gave wrong is found here before anything large is read, and nothing is written.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from safetensors import SafetensorError, safe_open

import qlora_native as qn
from qlora_native import _checks
from qlora_native.cli.errors import InputError, require
from qlora_native.cli.options import ModelOptions, QuantizationOptions


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a run computes, and in which dtype."""

    device: torch.device
    dtype: torch.dtype | str
    """Or "auto": what the model's files have."""


def check_quantization(options: QuantizationOptions) -> None:
    """Raises InputError for a quant_type or a block size that does not exist."""
    # A custom codebook is a matter of code, not of the command line.
    known = [name for name in qn.QUANT_TYPES if name != "custom"]
    require(
        options.quant_type in known,
        f"--quant-type {options.quant_type}: unknown; there are {', '.join(known)}",
    )
    try:
        _checks.check_block_size(options.block_size)
    except ValueError as error:
        raise InputError(f"--block-size {options.block_size}: {error}") from error


def placement(options: ModelOptions) -> Placement:
    """The device and the dtype to compute in.

    Raises:
        InputError: the device is unknown or cannot be used (the message says why), or the dtype
            does not exist on it.
    """
    require(not (options.bf16 and options.fp16), "--bf16 and --fp16 exclude each other")
    device = torch_device(options.device)
    if device.type == "cpu":
        require(not options.fp16, "--fp16 needs a GPU; on the CPU use --bf16 or neither")
        bf16 = _cpu_is_fast_in_bf16() if options.bf16 is None else options.bf16
        return Placement(device, torch.bfloat16 if bf16 else torch.float32)
    if options.fp16:
        return Placement(device, torch.float16)
    if options.bf16 is None:
        return Placement(
            device, torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
        )
    return Placement(device, torch.bfloat16 if options.bf16 else torch.float32)


def torch_device(name: str) -> torch.device:
    """The device that --device means, where auto takes the GPU when it can be used.

    Raises:
        InputError: the device is unknown or cannot be used (the message says why).
    """
    require(name in ("auto", "cpu", "cuda"), f"--device {name}: expected auto, cpu or cuda")
    obstacle = cuda_obstacle()
    require(name != "cuda" or obstacle is None, f"--device cuda: {obstacle}")
    if name == "cpu" or obstacle is not None:
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def cuda_obstacle() -> str | None:
    """Why a GPU cannot be used, or None when it can: both this library and torch must see it."""
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            return f"this torch ({torch.__version__}) is built without CUDA"
        return "torch sees no GPU: " + (qn.cuda_unavailable_reason() or "no device is visible")
    reason = qn.cuda_unavailable_reason()
    return f"qlora_native cannot use it: {reason}" if reason else None


def unused_gpu(options: ModelOptions, where: Placement) -> str | None:
    """What to tell a user whose GPU --device auto passed over."""
    if options.device == "auto" and where.device.type == "cpu" and torch.cuda.is_available():
        return f"There is a GPU, but {cuda_obstacle()}; running on the CPU."
    return None


def _cpu_is_fast_in_bf16() -> bool:
    # Without the matrix or vector instructions torch converts every operand, slower than fp32.
    return any(
        "avx512_bf16" in device.features for device in qn.list_devices() if device.device == "cpu"
    )


def check_model_path(model: str) -> Path | None:
    """The folder when `model` is a local one, None when it is an id of the hub.

    Raises:
        InputError: it looks like a path and is none, or the folder has no complete model.
    """
    folder = Path(model).expanduser()
    if not folder.exists():
        looks_local = model.startswith((".", "/", "~")) or model.count("/") > 1
        require(not looks_local, f"--model {model}: no such folder")
        return None
    require(folder.is_dir(), f"--model {model}: not a folder")
    require((folder / "config.json").is_file(), f"--model {model}: there is no config.json in it")
    weights = sorted(folder.glob("*.safetensors"))
    require(
        bool(weights or list(folder.glob("pytorch_model*.bin"))),
        f"--model {model}: there are no weights (*.safetensors) in it",
    )
    for file in weights:
        check_safetensors(file)
    return folder


def check_safetensors(file: Path) -> None:
    """Raises InputError when the file is truncated or is something else."""
    try:
        with safe_open(file, framework="pt"):
            pass
    except (SafetensorError, OSError) as error:
        raise InputError(
            f"{file} ({file.stat().st_size:,} bytes) is truncated or no safetensors file: {error}"
        ) from error


def load_tokenizer(model: str) -> Any:
    """The model's tokenizer.

    Raises:
        InputError: there is none.
    """
    try:
        return transformers.AutoTokenizer.from_pretrained(model, **hub_arguments(model))
    except (OSError, ValueError) as error:
        raise InputError(f"--model {model}: no tokenizer: {first_line(error)}") from error


def load_config(model: str) -> Any:
    """The model's configuration.

    Raises:
        InputError: there is none, or its architecture is unknown to transformers.
    """
    try:
        return transformers.AutoConfig.from_pretrained(model, **hub_arguments(model))
    except (OSError, ValueError) as error:
        raise InputError(f"--model {model}: {first_line(error)}") from error


def check_context(model: str, max_seq_length: int) -> None:
    """Raises InputError when the model has fewer positions than that."""
    limit = getattr(load_config(model), "max_position_embeddings", None)
    require(
        limit is None or max_seq_length <= limit,
        f"--max-seq-length {max_seq_length}: the model takes at most {limit} tokens",
    )


def check_adapter(folder: Path) -> None:
    """Raises InputError unless the folder holds an adapter's two files."""
    require(folder.is_dir(), f"--adapter {folder}: no such folder")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        require((folder / name).is_file(), f"--adapter {folder}: there is no {name} in it")
    check_safetensors(folder / "adapter_model.safetensors")


def hub_arguments(model: str) -> dict[str, bool]:
    """Arguments of every `from_pretrained` of that model."""
    # For a folder, transformers would otherwise ask the hub for files that are not in it.
    return {"local_files_only": Path(model).expanduser().exists()}


def first_line(error: Exception) -> str:
    """The first line of a message that may have many."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def quiet_libraries() -> None:
    """Turns off the libraries' logs and bars; the commands say themselves what matters."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
