"""The commands of `qlora-native` and their help. What they do is imported when they run."""

from __future__ import annotations

import logging
from typing import Annotated

import typer

from qlora_native.cli.errors import EXIT_FAILURE, reporting
from qlora_native.cli.options import (
    EstimateOptions,
    EvaluateOptions,
    FinetuneOptions,
    GenerateOptions,
    MergeOptions,
    QuantizeOptions,
)
from qlora_native.cli.registration import command

app = typer.Typer(
    name="qlora-native",
    help="Fine-tune language models in 4 bits, on a GPU or a CPU.",
    epilog="For C and C++: --include-dir, --cmake-dir or --pkgconfig-dir prints where the package "
    "has the core's headers, CMake's files and pkg-config's.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="markdown",
    # A traceback is for --debug, and then Python's own; typer's shows every local tensor.
    pretty_exceptions_enable=False,
)


def _quiet() -> None:
    # PEFT imports it where it is installed, and it then warns of kernels that nothing here uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    from qlora_native.cli.loading import quiet_libraries

    quiet_libraries()


@command(app, FinetuneOptions, no_args_is_help=True)
def finetune(options: FinetuneOptions) -> None:
    """Quantize a model to 4 bits and train a LoRA adapter over it.

    Examples:

    - `qlora-native finetune --model ./llama --data notes.txt --output out`

    - `qlora-native finetune --model ./llama --data a.jsonl b.jsonl --eval-data c.jsonl --output out
      --lora-r 8 --learning-rate 1e-4 --max-steps 500`

    - `qlora-native finetune --config run.yaml --learning-rate 5e-5`

    - `qlora-native finetune --config out/run.yaml --resume`

    - `torchrun --nproc-per-node 8 -m qlora_native finetune --config run.yaml --fsdp`

    The output folder gets the adapter in PEFT's format, the tokenizer, report.json, loss.png,
    run.yaml (these options) and checkpoints. Ctrl-C stops after the step, with a checkpoint.
    """
    if not options.debug:
        _quiet()
    from qlora_native.cli.finetune import finetune as run

    run(options)


@command(app, GenerateOptions, no_args_is_help=True)
def generate(options: GenerateOptions) -> None:
    """Continue a prompt with a quantized model and, if given, an adapter.

    Examples:

    - `qlora-native generate --model ./llama --adapter out --prompt "Once upon"`

    - `qlora-native generate --model ./llama --no-quantize --prompt Hello --temperature 0.8`
    """
    if not options.debug:
        _quiet()
    from qlora_native.cli.generate import generate as run

    run(options)


@command(app, EvaluateOptions, no_args_is_help=True)
def evaluate(options: EvaluateOptions) -> None:
    """Measure the loss and the perplexity of a model on files.

    Examples:

    - `qlora-native evaluate --model ./llama --data held-out.txt`

    - `qlora-native evaluate --model ./llama --adapter out --data held-out.txt --json`
    """
    if not options.debug:
        _quiet()
    from qlora_native.cli.evaluate import evaluate as run

    run(options)


@command(app, QuantizeOptions, no_args_is_help=True)
def quantize(options: QuantizeOptions) -> None:
    """Quantize a model to 4 bits and save it.

    Examples:

    - `qlora-native quantize ./llama ./llama-nf4`

    - `qlora-native quantize ./llama ./llama-bnb --format bitsandbytes`

    The folder loads with `import qlora_native` and transformers' from_pretrained, and in the other
    commands. An interrupted run goes on where it was when it is started again.
    """
    if not options.debug:
        _quiet()
    from qlora_native.cli.quantize import quantize as run

    run(options)


@command(app, MergeOptions, no_args_is_help=True)
def merge(options: MergeOptions) -> None:
    """Fold an adapter into its base model and save that.

    Examples:

    - `qlora-native merge ./llama ./out ./llama-merged`

    - `qlora-native merge ./llama-nf4 ./out ./llama-merged-nf4 --format native`
    """
    if not options.debug:
        _quiet()
    from qlora_native.cli.merge import merge as run

    run(options)


@command(app, EstimateOptions, no_args_is_help=True)
def estimate(options: EstimateOptions) -> None:
    """Show what fine-tuning would hold in GPU memory, by part, and whether that fits.

    Examples:

    - `qlora-native estimate ./llama --seq 2048 --batch 1 --gpu-memory 24`

    - `qlora-native estimate ./llama --gpus 8 --lora-r 64 --optim adamw8bit --no-checkpointing`

    Of the model only config.json is read. The exit code is 1 when it does not fit.
    """
    if not options.debug:
        _quiet()
    from qlora_native.cli.estimate import estimate as run

    if run(options) is False:
        raise typer.Exit(EXIT_FAILURE)


@app.command()
def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks.")] = False,
) -> None:
    """Show the build, the devices, and each kernel with why it is or is not usable.

    The exit code is 0 when the library can be used here.
    """
    from qlora_native.cli.doctor import doctor as run

    with reporting(debug):
        usable = run(json)
    if not usable:
        raise typer.Exit(EXIT_FAILURE)
