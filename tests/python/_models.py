"""Small models that the module tests share; built on the spot, since tests have no network."""

from __future__ import annotations

import torch
from torch import nn


class Block(nn.Module):
    """A residual block with the layer names that LoRA targets usually have."""

    def __init__(self, dim: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(dim)
        self.q_proj = nn.Linear(dim, dim, bias=bias)
        self.up_proj = nn.Linear(dim, hidden, bias=bias)
        self.down_proj = nn.Linear(hidden, dim, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.up_proj(self.q_proj(self.norm(x))))
        return x + self.down_proj(h)


class TinyNet(nn.Module):
    """Embedding, blocks and a head; `hidden` odd by default, so rows straddle blocks and bytes."""

    def __init__(self, dim: int = 24, hidden: int = 37, blocks: int = 2, bias: bool = True) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, dim)
        self.layers = nn.ModuleList(Block(dim, hidden, bias) for _ in range(blocks))
        self.lm_head = nn.Linear(dim, 11, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for layer in self.layers:
            x = layer(x)
        return self.lm_head(x)


def tiny_net(seed: int = 0, **arguments: object) -> TinyNet:
    torch.manual_seed(seed)
    return TinyNet(**arguments)


def token_ids(seed: int = 0, shape: tuple[int, ...] = (3, 5), vocabulary: int = 11) -> torch.Tensor:
    return torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))


def tiny_llama(seed: int = 0, **overrides: object) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    settings = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | overrides)))


def randomize_adapters(model: nn.Module, seed: int = 0, scale: float = 0.1) -> None:
    """Gives every adapter values that make a difference: B starts at zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise * scale)
