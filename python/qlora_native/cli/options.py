"""The options of the commands, each defined once."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

_MODEL = "Model"
_QUANTIZATION = "Quantization"
_DATA = "Data"
_LORA = "LoRA"
_TRAINING = "Training"
_OUTPUT = "Output, logging and checkpoints"
_SAMPLING = "Sampling"
_HARDWARE = "Hardware and precision"
PANELS = (_MODEL, _DATA, _LORA, _QUANTIZATION, _SAMPLING, _TRAINING, _OUTPUT, _HARDWARE)


def option(
    help_text: str, panel: str, *declarations: str, **settings: Any
) -> typer.models.OptionInfo:
    """A typer option in a panel of `--help`."""
    return typer.Option(*declarations, help=help_text, rich_help_panel=panel, **settings)


def argument(help_text: str, panel: str, **settings: Any) -> typer.models.ArgumentInfo:
    """A word without a name, listed in a panel of `--help`."""
    return typer.Argument(help=help_text, rich_help_panel=panel, **settings)


@dataclasses.dataclass(kw_only=True)
class QuantizationOptions:
    """How weights are quantized."""

    quant_type: Annotated[str, option("nf4, fp4 or int4.", _QUANTIZATION)] = "nf4"
    block_size: Annotated[
        int, option("Values that share an absmax: a power of two, 32 to 4096.", _QUANTIZATION)
    ] = 64
    double_quant: Annotated[
        bool,
        option("Quantize the absmax as well.", _QUANTIZATION, "--double-quant/--no-double-quant"),
    ] = True
    skip_modules: Annotated[
        str, option("Names of modules that stay as they are, comma-separated.", _QUANTIZATION)
    ] = "lm_head"


@dataclasses.dataclass(kw_only=True)
class ModelOptions(QuantizationOptions):
    """What every command that runs a model takes."""

    model: Annotated[
        str, option("A local folder with a transformers model, or a model id of the hub.", _MODEL)
    ]
    device: Annotated[
        str, option("auto, cpu or cuda. auto takes the GPU when there is one.", _HARDWARE)
    ] = "auto"
    bf16: Annotated[
        bool | None,
        option(
            "Compute in bfloat16 (the default where it is fast).", _HARDWARE, "--bf16/--no-bf16"
        ),
    ] = None
    fp16: Annotated[
        bool, option("Compute in float16 (GPUs older than Ampere).", _HARDWARE, "--fp16")
    ] = False
    debug: Annotated[
        bool,
        option("Show the traceback and the libraries' logs on an error.", _HARDWARE, "--debug"),
    ] = False


@dataclasses.dataclass(kw_only=True)
class FinetuneOptions(ModelOptions):
    """`qlora-native finetune`."""

    data: Annotated[
        list[Path],
        option(
            "Training files: .txt, .jsonl (fields `text` or `messages`) or .parquet.",
            _DATA,
            metavar="FILE...",
        ),
    ]
    output: Annotated[Path, option("Folder for the adapter, the report and checkpoints.", _OUTPUT)]
    eval_data: Annotated[
        list[Path] | None, option("Held-out files, same formats.", _DATA, metavar="FILE...")
    ] = None
    eval_fraction: Annotated[
        float,
        option("Share of the data held out when there is no --eval-data; 0: no evaluation.", _DATA),
    ] = 0.05
    max_seq_length: Annotated[int, option("Tokens per training sequence.", _DATA)] = 1024
    lora_r: Annotated[int, option("Rank.", _LORA)] = 16
    lora_alpha: Annotated[
        float, option("The update is scaled by alpha/r (alpha/sqrt(r) with rsLoRA).", _LORA)
    ] = 32.0
    lora_dropout: Annotated[float, option("Dropout on the adapter's input.", _LORA)] = 0.0
    target_modules: Annotated[
        str, option("all-linear, or module names, comma-separated.", _LORA)
    ] = "all-linear"
    use_rslora: Annotated[bool, option("Rank-stabilized scaling.", _LORA, "--use-rslora")] = False
    learning_rate: Annotated[float, option("Peak learning rate.", _TRAINING)] = 2e-4
    lr_scheduler_type: Annotated[
        str, option("cosine, linear, constant, constant_with_warmup, ...", _TRAINING)
    ] = "cosine"
    warmup_steps: Annotated[
        float, option("Steps of linear warm-up; below 1: share of all steps.", _TRAINING)
    ] = 0.03
    weight_decay: Annotated[float, option("Of the adapter's matrices.", _TRAINING)] = 0.0
    max_grad_norm: Annotated[float, option("Gradient clipping; 0: none.", _TRAINING)] = 0.3
    num_train_epochs: Annotated[float, option("Passes over the data.", _TRAINING)] = 1.0
    max_steps: Annotated[
        int, option("Optimizer steps; above 0 it overrides the epochs.", _TRAINING)
    ] = -1
    per_device_train_batch_size: Annotated[int, option("Sequences per forward.", _TRAINING)] = 4
    per_device_eval_batch_size: Annotated[int, option("The same in evaluation.", _TRAINING)] = 4
    gradient_accumulation_steps: Annotated[
        int, option("Batches per optimizer step.", _TRAINING)
    ] = 4
    gradient_checkpointing: Annotated[
        bool,
        option(
            "Recompute activations in the backward pass: less memory, more time.",
            _TRAINING,
            "--gradient-checkpointing/--no-gradient-checkpointing",
        ),
    ] = True
    checkpointing: Annotated[
        str,
        option(
            "none, full, selective (keep attention and narrow products), N (every N-th layer), or "
            "auto: full, unless --no-gradient-checkpointing.",
            _TRAINING,
        ),
    ] = "auto"
    offload_activations: Annotated[
        bool,
        option(
            "Keep the inputs of layers that run again in pinned host memory: for long sequences.",
            _HARDWARE,
            "--offload-activations",
        ),
    ] = False
    loss: Annotated[
        str,
        option(
            "chunked (logits of some tokens at a time), plain (transformers'), liger, or auto: "
            "chunked where it applies.",
            _TRAINING,
        ),
    ] = "auto"
    packing: Annotated[
        str,
        option(
            "none (padding), flat (a batch is one row), rows (sequences fill rows of "
            "--max-seq-length; a batch has more of them), or auto: none or flat. No sequence sees "
            "another.",
            _DATA,
        ),
    ] = "auto"
    cuda_graph: Annotated[
        bool,
        option(
            "Record forward and backward pass once and replay them: for small steps, which wait "
            "for the host. Every batch gets one shape.",
            _HARDWARE,
            "--cuda-graph",
        ),
    ] = False
    liger: Annotated[
        bool,
        option("Norms, rotary embedding and gates of liger-kernel (GPU).", _HARDWARE, "--liger"),
    ] = False
    optim: Annotated[
        str,
        option(
            "adamw, lion, either with 8bit behind or paged_ before it, or an optimizer of "
            "transformers' Trainer.",
            _TRAINING,
        ),
    ] = "paged_adamw"
    seed: Annotated[int, option("Of initialization, data order and dropout.", _TRAINING)] = 42
    logging_steps: Annotated[int, option("Steps between log lines.", _OUTPUT)] = 10
    eval_steps: Annotated[
        int, option("Steps between evaluations; 0: at the ends only.", _OUTPUT)
    ] = 0
    save_steps: Annotated[int, option("Steps between checkpoints; 0: none.", _OUTPUT)] = 200
    save_total_limit: Annotated[int, option("Newest checkpoints to keep.", _OUTPUT)] = 2
    overwrite: Annotated[
        bool, option("Replace a previous run in the output folder.", _OUTPUT, "--overwrite")
    ] = False
    fsdp: Annotated[
        bool,
        option(
            "Split weights, adapter and optimizer over the GPUs (FSDP2), where torchrun or "
            "accelerate launch started several processes; without it each has all of them.",
            _HARDWARE,
            "--fsdp",
        ),
    ] = False
    rank_timeout: Annotated[
        int, option("Seconds that one process waits for the others.", _HARDWARE)
    ] = 1800
    resume: Annotated[
        bool, option("Continue from the last checkpoint in the output folder.", _OUTPUT, "--resume")
    ] = False
    given: frozenset[str] = frozenset()
    """Names of the options that the user gave; the others have their defaults. Not an option."""


@dataclasses.dataclass(kw_only=True)
class AdapterOptions(ModelOptions):
    """A model and, when there is one, an adapter over it."""

    adapter: Annotated[Path | None, option("Folder of a saved adapter.", _MODEL)] = None
    quantize: Annotated[
        bool,
        option(
            "Quantize the model, or take it as it is.", _QUANTIZATION, "--quantize/--no-quantize"
        ),
    ] = True
    given: frozenset[str] = frozenset()
    """Names of the options that the user gave; the others have their defaults. Not an option."""


@dataclasses.dataclass(kw_only=True)
class GenerateOptions(AdapterOptions):
    """`qlora-native generate`."""

    prompt: Annotated[str, option("Text to continue.", _SAMPLING)]
    chat: Annotated[
        bool, option("Put the prompt into the tokenizer's chat template.", _SAMPLING, "--chat")
    ] = False
    max_new_tokens: Annotated[int, option("Upper limit.", _SAMPLING)] = 128
    temperature: Annotated[float, option("0: always the likeliest token.", _SAMPLING)] = 0.0
    top_p: Annotated[float, option("Sample from this share of the probability.", _SAMPLING)] = 1.0
    repetition_penalty: Annotated[float, option("1: none.", _SAMPLING)] = 1.0
    seed: Annotated[int, option("Of the sampling.", _SAMPLING)] = 42


@dataclasses.dataclass(kw_only=True)
class EvaluateOptions(AdapterOptions):
    """`qlora-native evaluate`."""

    data: Annotated[
        list[Path],
        option("Files: .txt, .jsonl (`text` or `messages`) or .parquet.", _DATA, metavar="FILE..."),
    ]
    max_seq_length: Annotated[int, option("Tokens per sequence.", _DATA)] = 1024
    per_device_eval_batch_size: Annotated[int, option("Sequences per forward.", _DATA)] = 4
    json: Annotated[bool, option("Print one JSON object.", _OUTPUT, "--json")] = False


@dataclasses.dataclass(kw_only=True)
class QuantizeOptions(QuantizationOptions):
    """`qlora-native quantize`."""

    model: Annotated[
        str, argument("A local folder with a transformers model, or a model id of the hub.", _MODEL)
    ]
    output: Annotated[Path, argument("Folder for the quantized model.", _OUTPUT)]
    skip_modules: Annotated[
        str,
        option(
            "Names of modules that stay as they are, comma-separated; when not given: the output "
            "head and tied weights.",
            _QUANTIZATION,
        ),
    ] = ""
    quantize_embeddings: Annotated[
        bool,
        option(
            "Quantize the token embeddings too, and the head that is tied to them.",
            _QUANTIZATION,
            "--quantize-embeddings",
        ),
    ] = False
    compute_dtype: Annotated[
        str, option("Dtype of products that config.json asks for.", _QUANTIZATION)
    ] = "bfloat16"
    format: Annotated[
        str, option("native, or bitsandbytes for a model that it can load.", _OUTPUT)
    ] = "native"
    max_shard_size: Annotated[str, option("Largest file, such as 5GB.", _OUTPUT)] = "5GB"
    overwrite: Annotated[
        bool, option("Replace what is in the output folder.", _OUTPUT, "--overwrite")
    ] = False
    device: Annotated[str, option("cpu, cuda or auto: where to quantize.", _HARDWARE)] = "cpu"
    debug: Annotated[
        bool,
        option("Show the traceback and the libraries' logs on an error.", _HARDWARE, "--debug"),
    ] = False


@dataclasses.dataclass(kw_only=True)
class MergeOptions(QuantizationOptions):
    """`qlora-native merge`."""

    model: Annotated[str, argument("The base: a local folder, or a model id of the hub.", _MODEL)]
    adapter: Annotated[Path, argument("Folder of a saved adapter.", _MODEL)]
    output: Annotated[Path, argument("Folder for the merged model.", _OUTPUT)]
    quantize: Annotated[
        bool,
        option(
            "Merge into the quantized base, over which the adapter was trained, or into the dense "
            "one.",
            _QUANTIZATION,
            "--quantize/--no-quantize",
        ),
    ] = True
    format: Annotated[
        str,
        option(
            "dense: the exact sum in 16 bits; native or bitsandbytes: quantized again.", _OUTPUT
        ),
    ] = "dense"
    max_shard_size: Annotated[str, option("Largest file, such as 5GB.", _OUTPUT)] = "5GB"
    overwrite: Annotated[
        bool, option("Replace what is in the output folder.", _OUTPUT, "--overwrite")
    ] = False
    dtype: Annotated[
        str, option("Of the dense weights: bfloat16, float16 or float32.", _HARDWARE)
    ] = "bfloat16"
    device: Annotated[str, option("cpu, cuda or auto: where to merge.", _HARDWARE)] = "cpu"
    debug: Annotated[
        bool,
        option("Show the traceback and the libraries' logs on an error.", _HARDWARE, "--debug"),
    ] = False
    given: frozenset[str] = frozenset()
    """Names of the options that the user gave; the others have their defaults. Not an option."""


@dataclasses.dataclass(kw_only=True)
class EstimateOptions(QuantizationOptions):
    """`qlora-native estimate`."""

    model: Annotated[
        str, argument("A local folder with a config.json, or a model id of the hub.", _MODEL)
    ]
    gpus: Annotated[int, option("GPUs that train together.", _HARDWARE)] = 1
    gpu_memory: Annotated[
        float | None,
        option("GB (10^9 bytes) of one GPU; when not given: that of the GPU here.", _HARDWARE),
    ] = None
    max_seq_length: Annotated[
        int, option("Tokens per training sequence.", _DATA, "--max-seq-length", "--seq")
    ] = 1024
    per_device_train_batch_size: Annotated[
        int,
        option("Sequences per forward.", _TRAINING, "--per-device-train-batch-size", "--batch"),
    ] = 4
    lora_r: Annotated[int, option("Rank.", _LORA)] = 16
    target_modules: Annotated[
        str, option("all-linear, or module names, comma-separated.", _LORA)
    ] = "all-linear"
    adapter_dtype: Annotated[str, option("Of the adapter's matrices.", _LORA)] = "float32"
    gradient_checkpointing: Annotated[
        bool,
        option(
            "Recompute activations in the backward pass.",
            _TRAINING,
            "--gradient-checkpointing/--no-gradient-checkpointing",
            "--checkpointing/--no-checkpointing",
        ),
    ] = True
    optim: Annotated[
        str, option("adamw or lion, either with 8bit behind or paged_ before it.", _TRAINING)
    ] = "paged_adamw"
    dtype: Annotated[str, option("Of what is not in 4 bits.", _HARDWARE)] = "bfloat16"
    json: Annotated[bool, option("Print one JSON object.", _OUTPUT, "--json")] = False
    debug: Annotated[
        bool,
        option("Show the traceback and the libraries' logs on an error.", _HARDWARE, "--debug"),
    ] = False
    given: frozenset[str] = frozenset()
    """Names of the options that the user gave; the others have their defaults. Not an option."""
