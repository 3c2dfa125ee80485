"""Tiny random transformers models, their dense twins, and runs of them, for the tests of hf."""

from __future__ import annotations

import copy

import torch
from torch import nn

import qlora_native as qn
from qlora_native.nn import Experts4bit, Linear4bit, dequantize_experts
from qlora_native.nn.lora import dense_linear
from qlora_native.nn.targets import replace_module

IDS = torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(0))
SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "tie_word_embeddings": False,
}


MIXTURES = ["mixtral", "qwen3_moe", "gpt_oss"]


def tiny(kind: str, seed: int = 0, **overrides: object) -> nn.Module:
    """A random causal language model in fp32: "llama", "opt", "qwen" or of `MIXTURES`."""
    import transformers as t

    torch.manual_seed(seed)
    few = {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 48}
    if kind in MIXTURES:
        count = {"num_experts_per_tok": 2}
        classes, sizes = {
            "mixtral": ((t.MixtralConfig, t.MixtralForCausalLM), {"num_local_experts": 4}),
            "qwen3_moe": (
                (t.Qwen3MoeConfig, t.Qwen3MoeForCausalLM),
                {"num_experts": 5, "moe_intermediate_size": 24},
            ),
            # Transposed stacks with biases, gate and up interleaved.
            "gpt_oss": ((t.GptOssConfig, t.GptOssForCausalLM), {"num_local_experts": 4}),
        }[kind]
        model = classes[1](classes[0](**(SIZES | few | count | sizes | overrides)))
        return with_biases(model)
    if kind == "opt":
        sizes = {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 32}
        model = t.OPTForCausalLM(t.OPTConfig(**(SIZES | {"dropout": 0.0} | sizes | overrides)))
    else:
        sizes = {"intermediate_size": 48, "num_key_value_heads": 2}
        config, model = {
            "llama": (t.LlamaConfig, t.LlamaForCausalLM),
            "qwen": (t.Qwen2Config, t.Qwen2ForCausalLM),
        }[kind]
        model = model(config(**(SIZES | sizes | overrides)))
    return with_biases(model)


def with_adapters(model: nn.Module) -> nn.Module:
    """The model in 4 bits with adapters of rank 4, none of its parts too small to be seen."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 0.3)
    qn.quantize_model(model)
    qn.add_lora(model, r=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, 0, 0.1)
    return model.train()


def with_biases(model: nn.Module) -> nn.Module:
    """In evaluation, with biases that are not zero, which would hide a lost one."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
    return model.eval()


def quantized(kind: str, dtype: torch.dtype = torch.float32, **settings: object) -> nn.Module:
    model = tiny(kind).to(dtype)
    qn.quantize_model(model, **settings)
    return model


def dense_twin(model: nn.Module) -> nn.Module:
    """A copy whose 4-bit layers are dense ones of the decoded weights."""
    twin = copy.deepcopy(model)
    for name, module in list(twin.named_modules()):
        if isinstance(module, Linear4bit):
            replace_module(twin, name, dense_linear(module.dequantize(), module))
        elif isinstance(module, Experts4bit):
            dequantize_experts(module)
    return twin


def fill(model: nn.Module, scale: float = 0.05, seed: int = 1) -> nn.Module:
    """Moves everything trainable by the same noise in models with the same parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(noise.to(parameter.dtype), alpha=scale)
    return model


def loss_and_gradients(model: nn.Module, seed: int = 2, **inputs: object):
    """(logits, {name: gradient}) of one step; the model's gradients are cleared."""
    torch.manual_seed(seed)
    output = model(input_ids=IDS, labels=IDS, **inputs)
    output.loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    model.zero_grad()
    return output.logits.detach(), gradients


def logits(model: nn.Module, **inputs: object) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


def four_bit_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the state of the base: everything that no adapter holds."""
    return {n: t.clone() for n, t in model.state_dict().items() if "lora_" not in n}
