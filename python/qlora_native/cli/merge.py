"""The command `merge`: a base model with an adapter folded into it, as files."""

from __future__ import annotations

import time
from typing import Any

import torch

import qlora_native as qn
from qlora_native.cli import loading, models, output
from qlora_native.cli.errors import InputError, allocating, require
from qlora_native.cli.options import MergeOptions
from qlora_native.cli.progress import LayerProgress, stderr, stdout
from qlora_native.hf.model_card import remove_from_model_card, write_model_card
from qlora_native.nn.targets import lora_layers, replace_everywhere

_FORMATS = ("dense", "native", "bitsandbytes")
_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def merge(options: MergeOptions) -> None:
    """Loads the base and the adapter, adds them up, writes the files.

    Raises:
        InputError: see the messages; the output folder is as it was.
    """
    where = _check(options)
    if warning := models.adopt_quantization(options):
        stderr.print(warning, highlight=False, soft_wrap=True)
    loading.check_quantization(options)
    started = time.perf_counter()
    with LayerProgress() as progress:
        model = models.load_for_inference(options, where, progress)
    layers = sum(1 for _ in lora_layers(model))
    with allocating("merging the adapter", "use a machine with more memory, or --device cpu."):
        try:
            if options.format == "dense":
                _merge_dense(model, where.dtype)
            else:
                _merge_packed(model)
        except ValueError as error:
            raise InputError(f"--adapter {options.adapter}: {error}") from error
    output.empty(options.output)
    output.save_model(model, options.output, options.format, options.max_shard_size)
    output.copy_companions(options.model, options.output)
    if options.format == "dense":
        # The card of a base in 4 bits, copied, says how that is stored.
        remove_from_model_card(options.output)
    else:
        config = model.config.quantization_config
        config.checkpoint_format = options.format
        write_model_card(options.output, config)
    stdout.print(
        f"Merged {layers} layers; saved {output.folder_bytes(options.output) / 1e9:.2f} GB to "
        f"{options.output} in {time.perf_counter() - started:.1f} s",
        highlight=False,
        soft_wrap=True,
    )


def _check(options: MergeOptions) -> loading.Placement:
    require(
        options.format in _FORMATS, f"--format {options.format}: expected one of {list(_FORMATS)}"
    )
    require(
        options.quantize or options.format == "dense",
        f"--no-quantize gives a dense model; quantize it afterwards for --format {options.format}",
    )
    require(options.dtype in _DTYPES, f"--dtype {options.dtype}: expected one of {list(_DTYPES)}")
    device = loading.torch_device(options.device)
    loading.check_model_path(options.model)
    loading.check_adapter(options.adapter)
    output.check_output(
        options.output, inputs=[options.model, options.adapter], overwrite=options.overwrite
    )
    return loading.Placement(device, _DTYPES[options.dtype])


def _merge_dense(model: Any, dtype: torch.dtype) -> None:
    qn.merge_lora(model, dense=True, dtype=dtype)
    quantizer = getattr(model, "hf_quantizer", None)
    if quantizer is not None:
        quantizer.remove_quantization_config(model)


def _merge_packed(model: Any) -> None:
    """Requantizes, and leaves the plain 4-bit layers."""
    qn.merge_lora(model)
    for _, layer in list(lora_layers(model)):
        replace_everywhere(model, layer, layer.base_layer)
