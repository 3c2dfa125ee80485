"""How a module's state was quantized, in state dicts: written beside it, compared before a load.

torch would load the codes of another quantization, whose shapes may well agree.
"""

from __future__ import annotations

from typing import Any

_METADATA_KEY = "qlora_native"


def write_settings(destination: Any, prefix: str, settings: dict[str, Any]) -> None:
    """Puts the settings of the module at `prefix` into a state dict's metadata."""
    # A plain dict given by the caller has no place for metadata.
    if hasattr(destination, "_metadata"):
        destination._metadata[prefix[:-1]][_METADATA_KEY] = settings


def other_settings(
    what: str, local_metadata: dict[str, Any], settings: dict[str, Any]
) -> list[str]:
    """Sentences for every setting of `what` in a state dict that is not the module's own."""
    theirs = local_metadata.get(_METADATA_KEY, settings)
    return [
        f"{what} was quantized with {key}={theirs.get(key)!r}, this layer has {key}={value!r}"
        for key, value in settings.items()
        if theirs.get(key) != value
    ]
