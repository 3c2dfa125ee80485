"""Parameters whose state has other bits than their optimizer's, found by name or by module."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

Place = tuple[int, int]
"""Group, and index in it: unlike an id(), the same in a copy and after unpickling."""


class Overrides:
    """The bits of some parameters' states, by their places."""

    def __init__(self) -> None:
        self.bits: dict[Place, int] = {}

    @staticmethod
    def find(
        groups: Sequence[Mapping[str, Any]],
        wanted: torch.nn.Module | torch.nn.Parameter | str,
    ) -> list[Place]:
        """Return the places of a module's parameters, of a parameter, or of what a name means.

        Raises:
            ValueError: there are none.
        """
        if isinstance(wanted, str):
            return _places_of_name(groups, wanted)
        if isinstance(wanted, torch.nn.Module):
            ids = {id(param) for param in wanted.parameters()}
        else:
            ids = {id(wanted)}
        places = [place for place, param, _ in _walk(groups) if id(param) in ids]
        if not places:
            raise ValueError(f"the optimizer holds no parameter of {type(wanted).__name__}")
        return places


def _walk(groups: Sequence[Mapping[str, Any]]) -> Iterator[tuple[Place, torch.Tensor, str | None]]:
    for g, group in enumerate(groups):
        names = group.get("param_names") or [None] * len(group["params"])
        for i, (param, name) in enumerate(zip(group["params"], names, strict=True)):
            yield (g, i), param, name


def _places_of_name(groups: Sequence[Mapping[str, Any]], wanted: str) -> list[Place]:
    entries = list(_walk(groups))
    if all(name is None for _, _, name in entries):
        raise ValueError(
            f"no parameter is called {wanted!r}: the optimizer knows no names; make it from "
            "model.named_parameters()"
        )
    places = [
        place
        for place, _, name in entries
        if name is not None and (name == wanted or name.startswith(wanted + "."))
    ]
    if not places:
        known = [name for _, _, name in entries if name is not None]
        raise ValueError(
            f"no parameter is called {wanted!r}, nor is any in a module of that name; there are "
            + ", ".join(known[:5])
            + (", ..." if len(known) > 5 else "")
        )
    return places
