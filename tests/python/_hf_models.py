"""Tiny random transformers models in folders, for the tests of the integrations."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

VOCABULARY = 96


_LLAMA_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}


def llama(**overrides: object) -> torch.nn.Module:
    settings = _LLAMA_SHAPE | {"tie_word_embeddings": False} | overrides
    return LlamaForCausalLM(LlamaConfig(**settings))


def opt(**overrides: object) -> torch.nn.Module:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "ffn_dim": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 128,
        "word_embed_proj_dim": 64,
    }
    return OPTForCausalLM(OPTConfig(**(settings | overrides)))


def qwen2(**overrides: object) -> torch.nn.Module:
    settings = _LLAMA_SHAPE | {"tie_word_embeddings": True} | overrides
    return Qwen2ForCausalLM(Qwen2Config(**settings))


def gpt2(**overrides: object) -> torch.nn.Module:
    settings = {
        "vocab_size": VOCABULARY,
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": 128,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return GPT2LMHeadModel(GPT2Config(**(settings | overrides)))


MODELS = {"llama": llama, "opt": opt, "qwen2": qwen2, "gpt2": gpt2}


def save(model: torch.nn.Module, folder: Path, dtype: torch.dtype = torch.bfloat16) -> Path:
    """Saves the model in `dtype`; its weights are larger than an initialization's."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.1)
    model.to(dtype).save_pretrained(folder)
    return folder


def ids(shape: tuple[int, int] = (2, 9), seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, shape, generator=generator)
