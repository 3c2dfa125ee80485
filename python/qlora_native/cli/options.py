"""The options of the commands, each defined once, and the machinery that makes commands of them."""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from typer.core import TyperCommand

from qlora_native.cli.errors import InputError, reporting, require

RUN_FILE = "run.yaml"

_MODEL = "Model"
_QUANTIZATION = "Quantization"
_DATA = "Data"
_LORA = "LoRA"
_TRAINING = "Training"
_OUTPUT = "Output, logging and checkpoints"
_SAMPLING = "Sampling"
_HARDWARE = "Hardware and precision"
_PANELS = (_MODEL, _DATA, _LORA, _QUANTIZATION, _SAMPLING, _TRAINING, _OUTPUT, _HARDWARE)


def option(
    help_text: str, panel: str, *declarations: str, **settings: Any
) -> typer.models.OptionInfo:
    """A typer option in a panel of `--help`."""
    return typer.Option(*declarations, help=help_text, rich_help_panel=panel, **settings)


@dataclasses.dataclass(kw_only=True)
class ModelOptions:
    """What every command that loads a model takes."""

    model: Annotated[
        str, option("A local folder with a transformers model, or a model id of the hub.", _MODEL)
    ]
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
    optim: Annotated[str, option("An optimizer of transformers' Trainer.", _TRAINING)] = (
        "adamw_torch"
    )
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
    resume: Annotated[
        bool, option("Continue from the last checkpoint in the output folder.", _OUTPUT, "--resume")
    ] = False


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


class VariadicCommand(TyperCommand):
    """A command whose list options take every following word: `--data a.txt b.txt`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Repeats the option in front of each of its words, which is what click understands."""
        several = {
            name
            for param in self.params
            if getattr(param, "multiple", False)
            for name in param.opts
        }
        expanded: list[str] = []
        current, words = None, 0
        for word in args:
            if word.startswith("-") and word != "-":
                # `--data=a.txt b.txt` has the first word in the option.
                name, equals, _ = word.partition("=")
                current, words = (name if name in several else None), len(equals)
            elif current is not None:
                if words:
                    expanded.append(current)
                words += 1
            expanded.append(word)
        return super().parse_args(ctx, expanded)


def read_yaml(path: Path, option_name: str) -> dict[Any, Any]:
    """The mapping in a YAML file that `option_name` led to.

    Raises:
        InputError: the file is missing, is not YAML, or is no mapping.
    """
    require(path.is_file(), f"{option_name} {path}: no such file")
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{option_name} {path}: not valid YAML: {error}") from error
    require(
        isinstance(content, dict),
        f"{option_name} {path}: expected lines of the form `option: value`",
    )
    return content


def read_config(path: Path, names: dict[str, bool]) -> dict[str, Any]:
    """Option values from a YAML file; `names` maps each option to whether it takes a list.

    Raises:
        InputError: the file is missing, is no mapping, or has a key that is no option.
    """
    values: dict[str, Any] = {}
    for key, value in read_yaml(path, "--config").items():
        name = str(key).lstrip("-").replace("-", "_")
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1, cutoff=0.0)
            raise InputError(f"--config {path}: unknown option `{key}`; the nearest is `{near[0]}`")
        if value is None:
            continue
        if names[name]:
            value = value if isinstance(value, list) else [value]
        elif isinstance(value, list):
            value = ",".join(map(str, value))
        values[name] = value
    return values


def _expand_home(name: str, value: Any) -> Any:
    # A shell leaves the `~` of `--output=~/run` and of a YAML file as it is.
    if isinstance(value, list):
        return [_expand_home(name, item) for item in value]
    if not str(value).startswith("~") or not (isinstance(value, Path) or name == "model"):
        return value
    try:
        return type(value)(Path(value).expanduser())
    except RuntimeError as error:
        raise InputError(f"--{name.replace('_', '-')} {value}: {error}") from error


def _apply_config(ctx: typer.Context, path: Path | None) -> Path | None:
    if path is None or ctx.resilient_parsing:
        return path
    names = {
        param.name: bool(getattr(param, "multiple", False))
        for param in ctx.command.params
        if param.name not in ("config", "help")
    }
    with reporting(debug=False):
        path = _expand_home("config", path)
        # The command line wins: click asks the default map only for what it did not find there.
        ctx.default_map = read_config(path, names)
    return path


_CONFIG = Annotated[
    Path | None,
    typer.Option(
        "--config",
        help="YAML file of options (`lora-r: 16`); the command line wins.",
        is_eager=True,
        callback=_apply_config,
    ),
]


def _panel_index(annotation: Any) -> int:
    return _PANELS.index(annotation.__metadata__[0].rich_help_panel)


def command(
    app: typer.Typer, options_class: type, **settings: Any
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Registers `function(options)` as a command with the fields of `options_class` as options."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        def run(ctx: typer.Context, **values: Any) -> None:
            values.pop("config")
            with reporting(values["debug"]):
                values = {name: _expand_home(name, value) for name, value in values.items()}
                if issubclass(options_class, AdapterOptions):
                    sources = {name: ctx.get_parameter_source(name) for name in values}
                    values["given"] = frozenset(
                        name for name, source in sources.items() if source.name != "DEFAULT"
                    )
                function(options_class(**values))

        hints = typing.get_type_hints(options_class, include_extras=True)
        hints.pop("given", None)
        parameters = [
            inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY),
            inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None),
        ]
        fields = sorted(
            (f for f in dataclasses.fields(options_class) if f.name in hints),
            key=lambda f: _panel_index(hints[f.name]),
        )
        parameters += [
            inspect.Parameter(
                field.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty
                if field.default is dataclasses.MISSING
                else field.default,
            )
            for field in fields
        ]
        run.__annotations__ = {"ctx": typer.Context, "config": _CONFIG, **hints}
        run.__signature__ = inspect.Signature(
            [p.replace(annotation=run.__annotations__[p.name]) for p in parameters]
        )
        app.command(
            name=function.__name__, help=inspect.getdoc(function), cls=VariadicCommand, **settings
        )(run)
        return function

    return register
