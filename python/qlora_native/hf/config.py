"""QLoRANativeConfig: what `from_pretrained(quantization_config=...)` is told."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

from qlora_native import _checks
from qlora_native.hf.import_hook import require

QUANT_METHOD = "qlora_native"
CHECKPOINT_FORMATS = ("native", "bitsandbytes")

_ALIASES = {
    "bnb_4bit_quant_type": "quant_type",
    "bnb_4bit_use_double_quant": "double_quant",
    "bnb_4bit_compute_dtype": "compute_dtype",
    "bnb_4bit_blocksize": "block_size",
    "llm_int8_skip_modules": "modules_to_not_convert",
}
# Options of BitsAndBytesConfig that say nothing about a 4-bit model here: those of 8-bit models,
# and the permission to keep modules on the CPU (which here stay in 4 bits).
_WITHOUT_MEANING = {
    "llm_int8_enable_fp32_cpu_offload",
    "llm_int8_has_fp16_weight",
    "llm_int8_threshold",
    "_load_in_4bit",
    "_load_in_8bit",
}


class QLoRANativeConfig(QuantizationConfigMixin):
    """How linear layers are stored in 4 bits. The names of BitsAndBytesConfig are taken as well.

    Args:
        quant_type: "nf4", "fp4" or "int4".
        double_quant: quantize the absmax values too.
        block_size: elements that share an absmax: a power of two from 32 to 4096.
        compute_dtype: dtype (or its name) that inputs are cast to for the product and outputs back;
            None computes in the input's dtype.
        modules_to_not_convert: names or patterns of modules that stay as they are, as in
            transformers; None leaves the output head and tied weights alone. A list takes the place
            of that, so `[]` quantizes the head too, unless it is tied.
        quantize_embeddings: store token embeddings in 4 bits, and an output head that is tied to
            them in the same bytes.
        checkpoint_format: "native", or "bitsandbytes" for checkpoints that it wrote and can read.
        overrides: settings of single modules that differ: {path: {"double_quant": False}}; set by
            the reader of bitsandbytes checkpoints where they need it.

    Raises:
        TypeError: an unknown option, or one given twice with different values.
        ValueError: a value that is out of range.
        IntegrationError: the installed transformers could not be extended.
    """

    def __init__(
        self,
        quant_type: str = "nf4",
        double_quant: bool = True,
        block_size: int = 64,
        compute_dtype: torch.dtype | str | None = None,
        modules_to_not_convert: Sequence[str] | None = None,
        quantize_embeddings: bool = False,
        checkpoint_format: str = "native",
        overrides: Mapping[str, Mapping[str, Any]] | None = None,
        **aliases: Any,
    ) -> None:
        require("transformers.quantizers")
        # What packed bytes are declared as in a bitsandbytes checkpoint; here they are uint8.
        self.quant_storage = _storage(aliases.pop("bnb_4bit_quant_storage", None))
        given = {
            "quant_type": (quant_type, "nf4"),
            "double_quant": (double_quant, True),
            "block_size": (block_size, 64),
            "compute_dtype": (compute_dtype, None),
            "modules_to_not_convert": (modules_to_not_convert, None),
        }
        values = _resolve(aliases, given)
        self.quant_method = QUANT_METHOD
        self.quant_type = values["quant_type"]
        self.double_quant = values["double_quant"]
        self.block_size = values["block_size"]
        self.compute_dtype = _dtype(values["compute_dtype"])
        skip = values["modules_to_not_convert"]
        if isinstance(skip, str):
            raise TypeError(f"modules_to_not_convert is a list of names, got the string {skip!r}")
        self.modules_to_not_convert = None if skip is None else list(skip)
        self.quantize_embeddings = quantize_embeddings
        self.checkpoint_format = checkpoint_format
        self.overrides = {name: dict(settings) for name, settings in (overrides or {}).items()}
        self.post_init()

    def post_init(self) -> None:
        """Checks the values.

        Raises:
            ValueError, TypeError: one is out of range; the message says which are not.
        """
        known = [name for name in _checks.QUANT_TYPES if name != "custom"]
        if self.quant_type not in known:
            raise ValueError(f"quant_type is one of {known}, got {self.quant_type!r}")
        _checks.check_block_size(self.block_size)
        for name in ("double_quant", "quantize_embeddings"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} is a bool, got {getattr(self, name)!r}")
        if self.checkpoint_format not in CHECKPOINT_FORMATS:
            raise ValueError(
                f"checkpoint_format is one of {list(CHECKPOINT_FORMATS)}, "
                f"got {self.checkpoint_format!r}"
            )

    @classmethod
    def from_bnb(cls, config: Any, **changes: Any) -> QLoRANativeConfig:
        """The same quantization as a BitsAndBytesConfig (or its dict) describes.

        Its `bnb_4bit_compute_dtype` is taken as it is: transformers' default for it is float32.

        Args:
            changes: arguments of this class that take precedence.

        Raises:
            ValueError: the config is for 8 bits.
        """
        values = dict(config if isinstance(config, Mapping) else config.to_dict())
        values.pop("quant_method", None)
        for name in (*_ALIASES, "quant_type"):
            if _ALIASES.get(name, name) in changes:
                values.pop(name, None)
        # What a dict leaves out has bitsandbytes' defaults, not ours.
        if "bnb_4bit_quant_type" not in values and "quant_type" not in changes:
            values["bnb_4bit_quant_type"] = "fp4"
        if "bnb_4bit_use_double_quant" not in values and "double_quant" not in changes:
            values["bnb_4bit_use_double_quant"] = False
        return cls(**values, **changes)

    def layer_settings(self, name: str) -> dict[str, Any]:
        """Settings of the module at the path `name`, as Linear4bit takes them."""
        settings = {
            "quant_type": self.quant_type,
            "block_size": self.block_size,
            "double_quant": self.double_quant,
            "compute_dtype": self.compute_dtype,
        }
        return settings | self.overrides.get(name, {})

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: plain values; in bitsandbytes' words for its format."""
        if self.checkpoint_format == "bitsandbytes":
            return self._bitsandbytes_dict()
        values = {
            "quant_method": QUANT_METHOD,
            "quant_type": self.quant_type,
            "double_quant": self.double_quant,
            "block_size": self.block_size,
            "compute_dtype": _dtype_name(self.compute_dtype),
            "modules_to_not_convert": self.modules_to_not_convert,
            "quantize_embeddings": self.quantize_embeddings,
        }
        if self.overrides:
            values["overrides"] = self.overrides
        return values

    def _bitsandbytes_dict(self) -> dict[str, Any]:
        return {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "load_in_8bit": False,
            "_load_in_4bit": True,
            "_load_in_8bit": False,
            "bnb_4bit_quant_type": self.quant_type,
            "bnb_4bit_use_double_quant": self.double_quant,
            "bnb_4bit_compute_dtype": _dtype_name(self.compute_dtype) or "float32",
            "bnb_4bit_quant_storage": "uint8",
            "llm_int8_enable_fp32_cpu_offload": False,
            "llm_int8_has_fp16_weight": False,
            "llm_int8_skip_modules": self.modules_to_not_convert,
            "llm_int8_threshold": 6.0,
        }

    def __iter__(self) -> Any:
        yield from self.to_dict().items()

    def __repr__(self) -> str:
        return f"{type(self).__name__} {json.dumps(self.to_dict(), indent=2)}"


def _resolve(aliases: Mapping[str, Any], given: Mapping[str, tuple[Any, Any]]) -> dict[str, Any]:
    """Values by our names, from (value, default) pairs and options by other names."""
    values = {name: value for name, (value, _) in given.items()}
    for alias, value in aliases.items():
        if alias == "quant_method":
            if value != QUANT_METHOD:
                raise ValueError(f"quant_method is {QUANT_METHOD!r}, got {value!r}")
        elif alias in ("load_in_4bit", "load_in_8bit"):
            if bool(value) is not (alias == "load_in_4bit"):
                raise ValueError(f"{alias}={value!r}: this quantization is in 4 bits")
        elif alias in _ALIASES:
            name = _ALIASES[alias]
            ours, default = given[name]
            if ours != default and ours != value:
                raise TypeError(f"{name}={ours!r} and {alias}={value!r} contradict each other")
            values[name] = value
        elif alias not in _WITHOUT_MEANING:
            raise TypeError(
                f"unknown option {alias!r}; there are {[*given, 'quantize_embeddings']} and, as "
                f"aliases, {sorted(_ALIASES)}"
            )
    return values


def _storage(value: torch.dtype | str | None) -> torch.dtype:
    if value is None:
        return torch.uint8
    dtype = getattr(torch, value, None) if isinstance(value, str) else value
    if not isinstance(dtype, torch.dtype):
        raise ValueError(f"bnb_4bit_quant_storage is a dtype of torch or its name, got {value!r}")
    return dtype


def _dtype(value: torch.dtype | str | None) -> torch.dtype | None:
    if isinstance(value, str):
        value = getattr(torch, value.removeprefix("torch."), value)
    if value is None:
        return None
    if value not in _checks.FLOAT_DTYPES:
        raise ValueError(
            f"compute_dtype is float32, float16 or bfloat16 (torch's or by name), got {value!r}"
        )
    return value


def _dtype_name(dtype: torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")
