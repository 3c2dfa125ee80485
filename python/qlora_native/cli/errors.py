"""From exceptions to one line on stderr and an exit code."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator

import torch

EXIT_FAILURE = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


class InputError(Exception):
    """Something the user gave cannot be used; the message names it and says what would do."""


class Interrupted(Exception):  # noqa: N818 - it is no error
    """The user stopped the run; the message says what is kept and how to go on."""


class RankLostError(Exception):
    """Another process of the run ended or did not answer; the message says which one noticed."""


class OutOfMemoryError(Exception):
    """An allocation failed; the message says during what, and what would need less memory."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on a GPU or on the CPU."""
    # torch's CPU allocator has no exception type of its own.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        isinstance(error, RuntimeError) and "DefaultCPUAllocator: " in str(error)
    )


@contextlib.contextmanager
def allocating(what: str, remedy: str) -> Iterator[None]:
    """Names what is being allocated, so that running out of memory says more than a byte count.

    Raises:
        OutOfMemoryError: in place of what torch or Python raises in the body.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        first_line = str(error).strip().split("\n")[0].rstrip(".") + "."
        raise OutOfMemoryError(
            f"out of memory while {what}: {first_line} To go on: {remedy}"
        ) from error


@contextlib.contextmanager
def reporting(debug: bool) -> Iterator[None]:
    """Ends the process with a message and an exit code when the body raises.

    With `debug`, the traceback follows. Anything that is not one of this file's exceptions is a
    defect or a circumstance that no check foresaw, and says so.
    """
    try:
        yield
    except Exception as error:
        if debug:
            raise
        if isinstance(error, (InputError, OutOfMemoryError)):
            message, code = f"error: {error}", EXIT_BAD_INPUT
        elif isinstance(error, RankLostError):
            message, code = f"error: {error}", EXIT_FAILURE
        elif isinstance(error, Interrupted):
            message, code = f"interrupted: {error}", EXIT_INTERRUPTED
        else:
            message = f"error: unexpected {type(error).__name__}: {error} (--debug shows where)"
            code = EXIT_FAILURE
    except KeyboardInterrupt:
        message, code = "interrupted", EXIT_INTERRUPTED
    else:
        return
    print(" ".join(message.split()), file=sys.stderr)
    sys.stderr.flush()
    sys.exit(code)


def require(condition: bool, message: str) -> None:
    """Raises InputError with `message` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def display_path(path: str | os.PathLike[str]) -> str:
    """The path as the user would type it in a shell."""
    import shlex

    return shlex.quote(os.fspath(path))
