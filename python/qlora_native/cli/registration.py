"""Makes commands of classes of options."""

from __future__ import annotations

import dataclasses
import inspect
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from qlora_native.cli.config_file import read_config
from qlora_native.cli.errors import InputError, reporting
from qlora_native.cli.options import PANELS


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
    return PANELS.index(annotation.__metadata__[0].rich_help_panel)


def command(
    app: typer.Typer, options_class: type, **settings: Any
) -> Callable[[Callable[[Any], None]], Callable[[Any], None]]:
    """Registers `function(options)` as a command with the fields of `options_class` as options."""

    def register(function: Callable[[Any], None]) -> Callable[[Any], None]:
        def run(ctx: typer.Context, **values: Any) -> None:
            values.pop("config")
            with reporting(values["debug"]):
                values = {name: _expand_home(name, value) for name, value in values.items()}
                if "given" in options_class.__dataclass_fields__:
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
