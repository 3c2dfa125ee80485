"""The command `quantize`: a model in 4 bits, as files."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
import transformers

from qlora_native.cli import loading, models, output
from qlora_native.cli.errors import InputError, Interrupted, display_path, require
from qlora_native.cli.options import QuantizeOptions
from qlora_native.cli.packed_store import PackedStore, is_same_run
from qlora_native.cli.progress import stdout
from qlora_native.hf import QLoRANativeConfig
from qlora_native.hf.layer_kinds import stays_dense
from qlora_native.hf.model_card import write_model_card
from qlora_native.nn.expert_conversion import is_experts

_FORMATS = ("native", "bitsandbytes")


def quantize(options: QuantizeOptions) -> None:
    """Quantizes tensor by tensor, then writes the files.

    Raises:
        InputError: see the messages; the output folder is as it was.
        Interrupted: what was quantized is kept, and used when the command is given again.
    """
    config = _config(options)
    # In the dtype of the files.
    where = loading.Placement(loading.torch_device(options.device), "auto")
    loading.check_model_path(options.model)
    require(
        models.stored_quantization(options.model) is None,
        f"MODEL {options.model}: it is in 4 bits already",
    )
    _check_experts(options, config)
    run = _description(options, config)
    folder = options.output
    output.check_output(
        folder,
        inputs=[options.model],
        overwrite=options.overwrite,
        unfinished=is_same_run(folder, run),
    )
    if not is_same_run(folder, run):
        output.empty(folder)
    started = time.perf_counter()
    try:
        with PackedStore(folder, run) as store:
            model = models.load_model(options.model, where, config, store)
        layers = models.four_bit_layers(model)
        require(layers.count > 0, f"MODEL {options.model}: it has no linear layer to quantize")
        output.save_model(model, folder, options.format, options.max_shard_size)
    except KeyboardInterrupt:
        raise Interrupted(
            f"what was quantized is in {display_path(folder)}; the same command goes on from it"
        ) from None
    output.copy_companions(options.model, folder)
    config.checkpoint_format = options.format
    write_model_card(folder, config, base_model=_name(options.model))
    store.remove()
    again = f" ({store.reused} kept from before)" if store.reused else ""
    stdout.print(
        f"{layers.count} layers{again}: {store.dense_bytes / 1e9:.2f} GB in {store.seconds:.2f} s, "
        f"{store.dense_bytes / max(store.seconds, 1e-9) / 1e9:.2f} GB/s, at "
        f"{layers.bits_per_weight:.3f} bits per weight",
        highlight=False,
        soft_wrap=True,
    )
    stdout.print(
        f"Saved {output.folder_bytes(folder) / 1e9:.2f} GB to {folder} in "
        f"{time.perf_counter() - started:.1f} s",
        highlight=False,
        soft_wrap=True,
    )


def _config(options: QuantizeOptions) -> QLoRANativeConfig:
    loading.check_quantization(options)
    require(
        options.format in _FORMATS, f"--format {options.format}: expected one of {list(_FORMATS)}"
    )
    require(
        options.format == "native" or options.quant_type in ("nf4", "fp4"),
        f"--format bitsandbytes: it stores nf4 and fp4, not {options.quant_type}",
    )
    require(
        options.format == "native" or not options.quantize_embeddings,
        "--format bitsandbytes: it stores no 4-bit embeddings",
    )
    try:
        return models.quantization_config(
            options,
            compute_dtype=options.compute_dtype,
            quantize_embeddings=options.quantize_embeddings,
            **({} if options.skip_modules else {"modules_to_not_convert": None}),
        )
    except ValueError as error:
        raise InputError(f"--compute-dtype {options.compute_dtype}: {error}") from error


def _check_experts(options: QuantizeOptions, config: QLoRANativeConfig) -> None:
    """Refuses a format that has no place for experts before they are quantized for nothing."""
    if options.format == "native":
        return
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(loading.load_config(options.model))
    kept = config.modules_to_not_convert or ()
    experts = [
        name
        for name, module in model.named_modules()
        if is_experts(module) and not stays_dense(name, kept)
    ]
    require(
        not experts,
        f"--format {options.format}: it has no place for layers of experts, and MODEL "
        f"{options.model} has {len(experts)} ({', '.join(experts[:1])}); use --format native, or "
        "--skip-modules to leave them dense",
    )


def _description(options: QuantizeOptions, config: QLoRANativeConfig) -> dict[str, Any]:
    """What decides the packed bytes: kept ones of another description are not used."""
    folder = Path(options.model).expanduser()
    files = {
        path.name: [path.stat().st_size, path.stat().st_mtime_ns]
        for pattern in ("*.safetensors", "*.bin", "*.index.json")
        for path in sorted(folder.glob(pattern))
    }
    return {
        "model": str(folder.resolve() if files else folder),
        "files": files,
        # Of a model on the hub, whose branches move.
        "commit": getattr(loading.load_config(options.model), "_commit_hash", None),
        "config": config.to_dict(),
    }


def _name(model: str) -> str | None:
    # A path of this machine says nothing to the readers of a card.
    return None if Path(model).expanduser().exists() else model
