"""Llamas of random weights, made layer by layer on the device in the format of each contestant.

No dense model is ever held: each matrix is drawn, taken over, and dropped. The numbers depend on
the name of the matrix alone, so that every contestant has the same weights and adapters.

Attention is torch's causal one without a mask. transformers' own "sdpa" looks at the positions for
packed sequences: it waits for the device in every step, and where it cannot look (compiled, or in a
CUDA graph) it makes a dense mask, which rules out the fast kernels.
"""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_ATTENTION = "causal_without_mask"
_WEIGHT_STD = 0.02
_ADAPTER_STD = 0.01


@dataclasses.dataclass(frozen=True)
class Shape:
    """A Llama's dimensions."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int

    def config(self, positions: int = 4096) -> Any:
        """Return transformers' configuration of it."""
        from transformers import LlamaConfig

        config = LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            max_position_embeddings=positions,
            use_cache=False,
        )
        config._attn_implementation = _registered_attention()
        return config


def _registered_attention() -> str:
    """Return the name of the attention, which has no function for masks and so gets none."""
    from transformers import AttentionInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    return _ATTENTION


SHAPES = {
    "tiny": Shape(64, 192, 2, 4, 2, 256),
    "llama-7b": Shape(4096, 11008, 32, 32, 32, 32000),
    "llama-13b": Shape(5120, 13824, 40, 40, 40, 32000),
    "llama-33b": Shape(6656, 17920, 60, 52, 52, 32000),
    "llama-65b": Shape(8192, 22016, 80, 64, 64, 32000),
    "llama-3-8b": Shape(4096, 14336, 32, 32, 8, 128256),
    "llama-3-70b": Shape(8192, 28672, 80, 64, 8, 128256),
}

MakeLinear = Callable[[torch.Tensor], nn.Module]
"""A linear layer without a bias from its dense weight [out, in], which it may keep."""


def drawn(
    name: str, shape: torch.Size | tuple[int, ...], std: float, device: torch.device, dtype: Any
) -> torch.Tensor:
    """Return normal numbers that depend on the name, the shape and the kind of device."""
    generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
    return torch.empty(shape, dtype=dtype, device=device).normal_(0, std, generator=generator)


def build(config: Any, make_linear: MakeLinear, device: torch.device) -> nn.Module:
    """Return a frozen LlamaForCausalLM in bf16 whose linear layers but the head `make_linear` made.

    Embeddings, norms and the head are dense bf16.
    """
    model = _without_weights(config)
    model.model.rotary_emb = _rotary_embedding(config, device)
    for name, module in _packed_linears(model):
        weight = drawn(name, module.weight.shape, _WEIGHT_STD, device, torch.bfloat16)
        model.set_submodule(name, make_linear(weight))
    for name, parameter in list(model.named_parameters()):
        if parameter.is_meta:
            owner, _, leaf = name.rpartition(".")
            value = _dense_value(name, parameter, device)
            setattr(model.get_submodule(owner), leaf, nn.Parameter(value))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def build_sharded(
    config: Any,
    r: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    packs_vocabulary: bool = False,
) -> nn.Module:
    """Return what `build` makes of `ours`, with native adapters, split over all ranks by FSDP2.

    Every rank calls it. Each draws all numbers and keeps its part: nothing is sent, and none ever
    holds more than its parts and one matrix.

    Args:
        packs_vocabulary: embeddings and head are in 4 bits too; their numbers are other ones then.
    """
    import torch.distributed as dist

    import qlora_native as qn
    from qlora_native.nn import Embedding4bit, Linear4bit
    from qlora_native.nn.sharding import copy_whole_, shard_model

    model = _without_weights(config)
    empty = {"device": "meta", "dtype": torch.bfloat16}
    linears = dict(_packed_linears(model))
    if packs_vocabulary:
        linears["lm_head"] = model.lm_head
        embedding = Embedding4bit(config.vocab_size, config.hidden_size, **empty)
        model.set_submodule("model.embed_tokens", embedding)
    for name, module in linears.items():
        size = module.in_features, module.out_features
        model.set_submodule(name, Linear4bit(*size, bias=False, **empty))
    model.requires_grad_(False)
    qn.add_lora(model, r=r, alpha=2 * r, adapter_dtype=dtype)
    shard_model(model, dist.init_device_mesh(device.type, (dist.get_world_size(),)))
    model.to_empty(device=device)
    model.model.rotary_emb = _rotary_embedding(config, device)
    for name, module in model.named_modules():
        if isinstance(module, Linear4bit):
            shape = module.out_features, module.in_features
        elif isinstance(module, Embedding4bit):
            shape = module.num_embeddings, module.embedding_dim
        else:
            continue
        name = name.removesuffix(".base_layer")
        whole = ours(drawn(name, shape, _WEIGHT_STD, device, torch.bfloat16))
        for leaf, value in whole.named_parameters():
            copy_whole_(module.get_parameter(leaf), value)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            copy_whole_(parameter, _adapter_value(name, parameter, device))
        elif parameter.dtype != torch.uint8:
            copy_whole_(parameter, _dense_value(name, parameter, device))
    return model


def _without_weights(config: Any) -> nn.Module:
    from transformers import LlamaForCausalLM

    with torch.device("meta"):
        return LlamaForCausalLM(config).to(torch.bfloat16)


def _rotary_embedding(config: Any, device: torch.device) -> nn.Module:
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    return LlamaRotaryEmbedding(config).to(device)


def _packed_linears(model: nn.Module) -> list[tuple[str, nn.Linear]]:
    """The layers whose weights get another format."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear)]
    return [(name, module) for name, module in found if name != "lm_head"]


def _dense_value(name: str, parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
    if parameter.dim() == 1:  # of a norm
        return torch.ones(parameter.shape, dtype=parameter.dtype, device=device)
    return drawn(name, parameter.shape, _WEIGHT_STD, device, parameter.dtype)


def _adapter_value(name: str, parameter: torch.Tensor, device: torch.device) -> torch.Tensor:
    # Not the usual zeros: a B of zero would hide A, and most of what can be wrong, from the loss.
    return drawn(name, parameter.shape, _ADAPTER_STD, device, torch.float32)


def ours(weight: torch.Tensor) -> nn.Module:
    """Return a Linear4bit: NF4, blocks of 64, double quantization."""
    from qlora_native import quantize_4bit
    from qlora_native.nn import Linear4bit

    return Linear4bit.from_quantized(quantize_4bit(weight))


def bitsandbytes(weight: torch.Tensor) -> nn.Module:
    """Return bitsandbytes' Linear4bit of the same format."""
    import bitsandbytes as bnb

    layer = bnb.nn.Linear4bit(
        weight.shape[1],
        weight.shape[0],
        bias=False,
        compute_dtype=torch.bfloat16,
        compress_statistics=True,
        quant_type="nf4",
        device="meta",
    )
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, compress_statistics=True, quant_type="nf4", module=layer
    )
    return layer.to(weight.device)


def dense(weight: torch.Tensor) -> nn.Module:
    """Return a dense bf16 layer with the weight that 4 bits would stand for."""
    from qlora_native import dequantize_4bit, quantize_4bit

    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(dequantize_4bit(quantize_4bit(weight)), requires_grad=False)
    return layer


def add_native_adapters(model: nn.Module, r: int, dtype: torch.dtype) -> None:
    """Add this library's LoRA to every linear layer but the head."""
    import qlora_native as qn

    qn.add_lora(model, r=r, alpha=2 * r, adapter_dtype=dtype)
    _draw_adapters(model)


def add_peft_adapters(model: nn.Module, r: int, dtype: torch.dtype) -> None:
    """Add PEFT's LoRA, in place; fp32 adapters are what PEFT makes by itself."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=r, lora_alpha=2 * r, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    get_peft_model(model, config, autocast_adapter_dtype=dtype == torch.float32)
    _draw_adapters(model)


def _draw_adapters(model: nn.Module) -> None:
    found = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for name, parameter in found:
        parameter.data.copy_(_adapter_value(name, parameter, parameter.device))
    if not found:
        raise RuntimeError("no adapter was added")


def batch(vocab: int, size: int, length: int, device: torch.device) -> torch.Tensor:
    """Return token ids [size, length], the same on every device."""
    generator = torch.Generator().manual_seed(0)
    return torch.randint(vocab, (size, length), generator=generator).to(device)
