"""From options to a model on its device: paths, precision, quantization, adapters.

Whatever the user gave wrong is found here before anything large is read, and nothing is written.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import torch
import transformers
from safetensors import SafetensorError, safe_open

import qlora_native as qn
from qlora_native import _checks
from qlora_native.cli.errors import InputError, allocating, is_out_of_memory, require
from qlora_native.cli.options import RUN_FILE, AdapterOptions, ModelOptions, read_yaml
from qlora_native.convert import ConversionReport

Progress = Callable[[int, int, str], object]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a run computes, and in which dtype."""

    device: torch.device
    dtype: torch.dtype


def check_quantization(options: ModelOptions) -> None:
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


def adopt_quantization(options: AdapterOptions) -> str | None:
    """Sets the quantization that the adapter was trained over where the user gave none.

    It is known for the output folder of `finetune` and for the checkpoints in it.

    Returns:
        What to tell a user who gave another quantization than the adapter's; usually None.

    Raises:
        InputError: the folder's settings cannot be read.
    """
    if options.adapter is None or not options.quantize:
        return None
    folder = options.adapter
    file = (folder.parent if folder.name.startswith("checkpoint-") else folder) / RUN_FILE
    if not file.is_file():
        return None
    settings = read_yaml(file, "--adapter")
    others = []
    for name in ("quant_type", "block_size", "double_quant", "skip_modules"):
        asked = getattr(options, name)
        trained = settings.get(name, asked)
        if trained == asked:
            continue
        if name in options.given:
            others.append(f"{name} {trained}, not {asked}")
        else:
            setattr(options, name, trained)
    if others:
        return f"Warning: the adapter was trained over {'; '.join(others)}: results will differ."
    return None


def placement(options: ModelOptions) -> Placement:
    """The device and the dtype to compute in.

    Raises:
        InputError: the device is unknown or cannot be used (the message says why), or the dtype
            does not exist on it.
    """
    require(
        options.device in ("auto", "cpu", "cuda"),
        f"--device {options.device}: expected auto, cpu or cuda",
    )
    require(not (options.bf16 and options.fp16), "--bf16 and --fp16 exclude each other")
    obstacle = cuda_obstacle()
    require(options.device != "cuda" or obstacle is None, f"--device cuda: {obstacle}")
    if options.device == "cpu" or obstacle is not None:
        require(not options.fp16, "--fp16 needs a GPU; on the CPU use --bf16 or neither")
        bf16 = _cpu_is_fast_in_bf16() if options.bf16 is None else options.bf16
        return Placement(torch.device("cpu"), torch.bfloat16 if bf16 else torch.float32)
    device = torch.device("cuda", torch.cuda.current_device())
    if options.fp16:
        return Placement(device, torch.float16)
    if options.bf16 is None:
        return Placement(
            device, torch.bfloat16 if torch.cuda.is_bf16_supported(False) else torch.float16
        )
    return Placement(device, torch.bfloat16 if options.bf16 else torch.float32)


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
        return transformers.AutoTokenizer.from_pretrained(model, **_where(model))
    except (OSError, ValueError) as error:
        raise InputError(f"--model {model}: no tokenizer: {_first_line(error)}") from error


def load_config(model: str) -> Any:
    """The model's configuration.

    Raises:
        InputError: there is none, or its architecture is unknown to transformers.
    """
    try:
        return transformers.AutoConfig.from_pretrained(model, **_where(model))
    except (OSError, ValueError) as error:
        raise InputError(f"--model {model}: {_first_line(error)}") from error


def check_context(model: str, max_seq_length: int) -> None:
    """Raises InputError when the model has fewer positions than that."""
    limit = getattr(load_config(model), "max_position_embeddings", None)
    require(
        limit is None or max_seq_length <= limit,
        f"--max-seq-length {max_seq_length}: the model takes at most {limit} tokens",
    )


def load_dense(model: str, dtype: torch.dtype) -> torch.nn.Module:
    """The model on the CPU in `dtype`, weights mapped from the files where possible.

    Raises:
        InputError: weights are missing or their shapes disagree with the configuration.
        OutOfMemoryError: the model does not fit.
    """
    with allocating(f"loading {model}", "use a machine with more memory or a smaller model."):
        try:
            loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
                model,
                dtype=dtype,
                output_loading_info=True,
                # Its own exception does not name the tensors; the check below does.
                ignore_mismatched_sizes=True,
                **_where(model),
            )
        except (OSError, ValueError, SafetensorError, RuntimeError) as error:
            if is_out_of_memory(error):
                raise
            raise InputError(f"--model {model}: {_first_line(error)}") from error
    missing = sorted(info["missing_keys"])
    require(
        not missing,
        f"--model {model}: its files lack {len(missing)} tensors: {', '.join(missing[:3])}",
    )
    mismatched = [
        f"{name} is {tuple(in_file)} in the file and {tuple(in_model)} by config.json"
        for name, in_file, in_model in sorted(info["mismatched_keys"])
    ]
    require(
        not mismatched,
        f"--model {model}: {len(mismatched)} tensors have another shape than the model: "
        f"{'; '.join(mismatched[:3])}",
    )
    return loaded


def quantize(
    model: torch.nn.Module, options: ModelOptions, where: Placement, progress: Progress | None
) -> ConversionReport:
    """Quantizes the linear layers in place, each on the target device.

    Raises:
        InputError: nothing could be quantized, or a weight is not finite.
        OutOfMemoryError: the quantized model does not fit.
    """
    with allocating(
        f"quantizing the model on {where.device}",
        "use a GPU with more memory, --device cpu, or a smaller model.",
    ):
        try:
            report = qn.quantize_model(
                model,
                quant_type=options.quant_type,
                block_size=options.block_size,
                double_quant=options.double_quant,
                skip=tuple(
                    name.strip() for name in options.skip_modules.split(",") if name.strip()
                ),
                compute_dtype=where.dtype,
                device=where.device,
                progress=progress,
            )
        except ValueError as error:
            raise InputError(f"--model {options.model}: {error}") from error
    require(
        bool(report.converted),
        f"--model {options.model}: it has no linear layer to quantize: {report}",
    )
    return report


def load_for_inference(
    options: AdapterOptions, where: Placement, progress: Progress | None
) -> torch.nn.Module:
    """The model, quantized unless the options say otherwise, with the adapter when there is one.

    Raises:
        InputError: the adapter does not fit the model.
    """
    if options.adapter is not None:
        check_adapter(options.adapter)
    model = load_dense(options.model, where.dtype)
    if options.quantize:
        quantize(model, options, where, progress)
    else:
        with allocating(f"moving the model to {where.device}", "leave out --no-quantize."):
            model.to(where.device)
    if options.adapter is not None:
        try:
            qn.load_adapter(model, options.adapter)
        except (ValueError, KeyError, RuntimeError) as error:
            raise InputError(f"--adapter {options.adapter}: {error}") from error
    return model.eval()


def check_adapter(folder: Path) -> None:
    """Raises InputError unless the folder holds an adapter's two files."""
    require(folder.is_dir(), f"--adapter {folder}: no such folder")
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        require((folder / name).is_file(), f"--adapter {folder}: there is no {name} in it")
    check_safetensors(folder / "adapter_model.safetensors")


def _where(model: str) -> dict[str, bool]:
    # For a folder, transformers would otherwise ask the hub for files that are not in it.
    return {"local_files_only": Path(model).expanduser().exists()}


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def quiet_libraries() -> None:
    """Turns off the libraries' logs and bars; the commands say themselves what matters."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    datasets.logging.set_verbosity_error()
