"""The part of a model card that says how a model was quantized, and its tags."""

from __future__ import annotations

import functools
import os
import re
import types
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from qlora_native import _checks
from qlora_native.hf.config import QLoRANativeConfig

_BEGIN, _END = "<!-- qlora_native:begin -->", "<!-- qlora_native:end -->"


def model_tags(config: QLoRANativeConfig) -> list[str]:
    """Tags by which such models are found."""
    return ["qlora_native", "4-bit", config.quant_type]


def card_section(config: QLoRANativeConfig) -> str:
    """Markdown: the quantization, and how to load the model."""
    double = "with double quantization" if config.double_quant else "without double quantization"
    compute = "the input's dtype" if config.compute_dtype is None else str(config.compute_dtype)
    if config.checkpoint_format == "bitsandbytes":
        load = (
            "The files are in bitsandbytes' format: `from_pretrained` loads them with bitsandbytes."
            " Without it:\n\n```python\nimport qlora_native\n"
            "from transformers import AutoModelForCausalLM\n\n"
            "config = qlora_native.hf.bitsandbytes_config(PATH)\n"
            "model = AutoModelForCausalLM.from_pretrained(PATH, config=config)\n```"
        )
    else:
        load = (
            "```python\nimport qlora_native  # registers the format with transformers\n"
            "from transformers import AutoModelForCausalLM\n\n"
            "model = AutoModelForCausalLM.from_pretrained(PATH)\n```\n\n"
            'Without that import transformers says "Unknown quantization type, got qlora_native" '
            "and then fails on the shapes of the weights."
        )
    return (
        "## Quantization\n\n"
        f"Linear layers are stored in 4 bits ({config.quant_type}, blocks of {config.block_size} "
        f"elements, {double}) and multiply in {compute}; qlora_native made this model.\n\n{load}"
    )


def write_model_card(
    folder: str | os.PathLike[str], config: QLoRANativeConfig, *, base_model: str | None = None
) -> Path:
    """Writes README.md in `folder`, or adds the section and the tags to the one that is there.

    Called again, it replaces its own section and nothing else.

    Args:
        base_model: name of the model that was quantized, for the card's metadata.
    """
    path = Path(folder) / "README.md"
    if path.is_file():
        card = ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)
    else:
        title = Path(folder).resolve().name
        data = ModelCardData(library_name="transformers")
        card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n")
    metadata: Any = card.data
    tags = list(metadata.tags or [])
    metadata.tags = tags + [tag for tag in model_tags(config) if tag not in tags]
    if base_model and not getattr(metadata, "base_model", None):
        metadata.base_model = base_model
    section = f"{_BEGIN}\n{card_section(config)}\n{_END}"
    text = re.sub(
        f"{re.escape(_BEGIN)}.*?{re.escape(_END)}", lambda _: section, card.text, flags=re.DOTALL
    )
    if _BEGIN not in text:
        text = f"{text.rstrip()}\n\n{section}\n"
    card.text = text
    card.save(path)
    return path


def remove_from_model_card(folder: str | os.PathLike[str]) -> None:
    """Takes the section and the tags out of the README.md in `folder`, if it has the section.

    For a dense model that was made of one in 4 bits, of which the card would go on telling.
    """
    path = Path(folder) / "README.md"
    content = path.read_text(encoding="utf-8") if path.is_file() else ""
    if _BEGIN not in content:
        return
    card = ModelCard(content, ignore_metadata_errors=True)
    text = re.sub(rf"\s*{re.escape(_BEGIN)}.*?{re.escape(_END)}", "", card.text, flags=re.DOTALL)
    metadata: Any = card.data
    ours = {"qlora_native", "4-bit", *_checks.QUANT_TYPES} - {"custom"}
    metadata.tags = [tag for tag in metadata.tags or [] if tag not in ours] or None
    if metadata.to_dict():
        card.text = text
        card.save(path)
    else:
        # Without metadata the card would begin with an empty block of it.
        path.write_text(text.lstrip("\n"), encoding="utf-8")


def attach_card(model: Any) -> None:
    """Has the model write its card when it is saved, and its tags when it is uploaded."""
    model.add_model_tags(model_tags(model.config.quantization_config))

    @functools.wraps(type(model).save_pretrained)
    def save_pretrained(self: Any, save_directory: Any, *arguments: Any, **options: Any) -> Any:
        result = type(self).save_pretrained(self, save_directory, *arguments, **options)
        config = getattr(self.config, "quantization_config", None)
        whole = not getattr(self, "_hf_peft_config_loaded", False)
        on_this_rank = arguments[0] if arguments else options.get("is_main_process", True)
        if isinstance(config, QLoRANativeConfig) and whole and on_this_rank:
            write_model_card(save_directory, config)
        return result

    model.save_pretrained = types.MethodType(save_pretrained, model)
