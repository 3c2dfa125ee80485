"""liger-kernel's Triton kernels for what lies between the products, where it is installed."""

from __future__ import annotations

import importlib.util

from torch import nn

from qlora_native.training.causal_lm import UnsupportedModelError


def use_liger_kernels(model: nn.Module, *, loss: bool = False) -> None:
    """Gives a model liger-kernel's RMSNorm, rotary embedding and gated MLP, and its loss, in place.

    liger-kernel also changes the classes of that kind of model, for the whole process. Call it
    before `qlora_native.training.use_chunked_loss`, which is the loss otherwise.

    Args:
        model: of transformers, on a GPU.
        loss: its linear cross-entropy as well, which takes a dense head for what it is.

    Raises:
        UnsupportedModelError: liger-kernel is not installed or does not know this kind of model,
            the model is not on a GPU, or `loss` and the head is not a dense layer.
    """
    if importlib.util.find_spec("liger_kernel") is None:
        raise UnsupportedModelError(
            'liger-kernel is not installed: pip install "qlora-native[liger]"'
        )
    if hasattr(model, "get_base_model"):
        model = model.get_base_model()
    device = model.get_input_embeddings().weight.device
    if device.type != "cuda":
        raise UnsupportedModelError(f"liger-kernel needs a GPU, and the model is on {device}")
    if loss and type(model.get_output_embeddings()) is not nn.Linear:
        head = type(model.get_output_embeddings()).__name__
        raise UnsupportedModelError(f"liger-kernel's loss takes a dense head, which is a {head}")
    from liger_kernel.transformers import _apply_liger_kernel_to_instance
    from liger_kernel.transformers.monkey_patch import MODEL_TYPE_TO_APPLY_LIGER_FN

    if model.config.model_type not in MODEL_TYPE_TO_APPLY_LIGER_FN:
        raise UnsupportedModelError(f"liger-kernel has nothing for {model.config.model_type}")
    _apply_liger_kernel_to_instance(
        model=model, cross_entropy=False, fused_linear_cross_entropy=loss
    )
