"""Runs a function once a module has been imported, by whomever, without importing it.

transformers and PEFT have no entry points: a library that extends them has to be there when they
look. Importing them for that would cost seconds and make them dependencies.
"""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType

Action = Callable[[], object]


class IntegrationError(ImportError):
    """A library of which we extend an internal has changed it; the message says what to do."""


_pending: dict[str, list[Action]] = {}
_failures: dict[str, IntegrationError] = {}


def after_import(module: str, action: Action | str) -> None:
    """Runs `action()` when `module` has been imported; at once if it already is.

    An action that raises does not break the import that it follows: a RuntimeWarning tells, and
    `require(module)` raises from then on.

    Args:
        module: the full name, such as "transformers.quantizers".
        action: a function, or "module:function", which is imported when it is to run.
    """
    if isinstance(action, str):
        action = _by_name(action)
    if module in sys.modules:
        # Another thread may be in the middle of it; this waits for its end.
        importlib.import_module(module)
        _run(module, action)
        return
    _pending.setdefault(module, []).append(action)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def require(module: str) -> None:
    """Raises IntegrationError when an action that was to run after `module` has failed."""
    if module in _failures:
        raise _failures[module]


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: has the loaders of awaited modules run the actions."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname not in _pending:
            return None
        spec = _spec_from_others(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_act(module: ModuleType) -> None:
            execute(module)
            for action in _pending.pop(fullname, ()):
                _run(fullname, action)

        # On the instance: a loader of another class would hide what tools ask of the real one.
        spec.loader.exec_module = execute_and_act  # type: ignore[method-assign]
        return spec


_finder = _Finder()


def _spec_from_others(
    name: str, path: Sequence[str] | None, target: ModuleType | None
) -> ModuleSpec | None:
    for finder in sys.meta_path:
        if finder is _finder or not hasattr(finder, "find_spec"):
            continue
        spec = finder.find_spec(name, path, target)
        if spec is not None:
            return spec
    return None


def _by_name(name: str) -> Action:
    module, _, function = name.partition(":")
    return lambda: getattr(importlib.import_module(module), function)()


def _run(module: str, action: Action) -> None:
    try:
        action()
    except Exception as error:
        library = module.partition(".")[0]
        version = getattr(sys.modules.get(library), "__version__", "of unknown version")
        failure = IntegrationError(
            f"qlora_native cannot extend {module} of {library} {version}: "
            f"{type(error).__name__}: {error}. Install a version of {library} that it supports "
            "(README, Platforms), or a newer qlora_native; everything outside of "
            "qlora_native.hf works as it is."
        )
        failure.__cause__ = error
        _failures[module] = failure
        warnings.warn(str(failure), RuntimeWarning, stacklevel=2)
