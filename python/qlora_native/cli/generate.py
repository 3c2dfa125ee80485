"""The command `generate`: text from a quantized model with or without an adapter."""

from __future__ import annotations

from typing import Any

import torch
import transformers

from qlora_native.cli import data, loading, models
from qlora_native.cli.errors import allocating, require
from qlora_native.cli.loss import autocast
from qlora_native.cli.options import GenerateOptions
from qlora_native.cli.progress import LayerProgress, stderr


class _PlainStreamer(transformers.TextStreamer):
    """Prints text as it comes, exactly as the tokenizer decodes it."""

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints one piece."""
        print(text, end="\n" if stream_end else "", flush=True)


def generate(options: GenerateOptions) -> None:
    """Prints the continuation of the prompt to stdout, piece by piece.

    Raises:
        InputError: see the messages.
    """
    require(
        options.max_new_tokens >= 1, f"--max-new-tokens {options.max_new_tokens}: must be 1 or more"
    )
    require(options.temperature >= 0, f"--temperature {options.temperature}: must not be negative")
    require(0 < options.top_p <= 1, f"--top-p {options.top_p}: must be in (0, 1]")
    where = loading.placement(options)
    loading.check_model_path(options.model)
    if warning := models.adopt_quantization(options):
        stderr.print(warning, highlight=False, soft_wrap=True)
    loading.check_quantization(options)
    tokenizer = loading.load_tokenizer(options.model)
    ids = _prompt_ids(options, tokenizer)
    require(ids.numel() > 0, "--prompt: it has no token; give at least one character")
    with LayerProgress() as progress:
        model = models.load_for_inference(options, where, progress)
    transformers.set_seed(options.seed)
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature > 0:
        sampling = {
            "do_sample": True,
            "temperature": options.temperature,
            "top_p": options.top_p,
            "top_k": 0,
        }
    with (
        allocating(f"generating {options.max_new_tokens} tokens:", "reduce --max-new-tokens."),
        torch.inference_mode(),
        autocast(where.device, where.dtype),
    ):
        model.generate(
            ids.to(where.device),
            attention_mask=torch.ones_like(ids, device=where.device),
            max_new_tokens=options.max_new_tokens,
            repetition_penalty=options.repetition_penalty,
            pad_token_id=tokenizer.pad_token_id
            if tokenizer.pad_token_id is not None
            else tokenizer.eos_token_id,
            streamer=_PlainStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True),
            **sampling,
        )


def _prompt_ids(options: GenerateOptions, tokenizer: Any) -> torch.Tensor:
    if not options.chat:
        return tokenizer(options.prompt, return_tensors="pt")["input_ids"]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": options.prompt}],
        chat_template=tokenizer.chat_template or data.PLAIN_CHAT_TEMPLATE,
        tokenize=False,
        add_generation_prompt=True,
    )
    return tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
