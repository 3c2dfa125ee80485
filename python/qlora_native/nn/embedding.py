"""Embedding4bit: an `nn.Embedding` whose table is stored in 4 bits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from qlora_native import _C
from qlora_native.functional import QuantizedTensor, dequantize_4bit, quantize_4bit
from qlora_native.nn.linear import Linear4bit, as_fp32, state_of
from qlora_native.nn.settings import write_settings

_MAP = tuple(_C.signed_dynamic_map())
_maps: dict[torch.device, Tensor] = {}


class Embedding4bit(nn.Embedding):
    """Rows [embedding_dim] of a frozen 4-bit table [num_embeddings, embedding_dim], by index.

    The state and its names are those of a Linear4bit with the same table as its weight, so that an
    output head can share it: weight, weight_absmax and, with double quantization, weight_absmax2.
    Only the rows that are asked for are decoded. Outputs have `weight_dtype`, which `.to(dtype)`
    and its like change; the packed state stays as it is.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = True,
        compute_dtype: torch.dtype | None = None,
    ) -> None:
        """Makes a table whose state is uninitialized: load a state dict into it before use.

        Args:
            padding_idx: kept for what asks for it; its row is one like any other.
            dtype: of the outputs; torch's default dtype when None.
            quant_type, block_size, double_quant: as in `quantize_4bit`.
            compute_dtype: taken and ignored, so that settings of a Linear4bit serve here too.

        Raises:
            ValueError: a bad setting, or rows that are no whole number of blocks: they could not be
                decoded one by one.
        """
        nn.Module.__init__(self)
        if embedding_dim % block_size:
            raise ValueError(
                f"embedding_dim={embedding_dim} is no multiple of block_size={block_size}: "
                "a row of a 4-bit table has to be whole blocks"
            )
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        self.max_norm, self.norm_type = None, 2.0
        self.scale_grad_by_freq = self.sparse = False
        self.quant_type, self.block_size, self.double_quant = quant_type, block_size, double_quant
        self.codebook = None
        self.weight_dtype = dtype or torch.get_default_dtype()
        like = Linear4bit(
            embedding_dim, num_embeddings, False, device, dtype,
            quant_type=quant_type, block_size=block_size, double_quant=double_quant,
        )  # fmt: skip
        for name, parameter in like._parameters.items():
            if name != "bias":
                self.register_parameter(name, parameter)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, **settings: Any) -> Embedding4bit:
        """Quantizes the table of `embedding`, which is left as it was.

        Args:
            settings: quant_type, block_size, double_quant.

        Raises:
            TypeError: not a dense nn.Embedding.
            ValueError: a bad setting, `max_norm` (which changes the table), NaN or infinity.
        """
        if not isinstance(embedding, nn.Embedding) or isinstance(embedding, Embedding4bit):
            raise TypeError(f"expected a dense nn.Embedding, got {type(embedding).__name__}")
        if embedding.max_norm is not None:
            raise ValueError(f"max_norm={embedding.max_norm} changes the table, which is frozen")
        weight = embedding.weight.detach()
        layer = cls(*weight.shape, embedding.padding_idx, "meta", weight.dtype, **settings)
        q = quantize_4bit(
            weight, layer.quant_type, layer.block_size, layer.double_quant, check_finite=True
        )
        for name, value in state_of(q).items():
            setattr(layer, name, nn.Parameter(value, requires_grad=False))
        return layer.train(embedding.training)

    @property
    def in_features(self) -> int:
        """Columns of the table, as of the Linear4bit that may share it."""
        return self.embedding_dim

    @property
    def out_features(self) -> int:
        """Rows of the table."""
        return self.num_embeddings

    # The same state as a Linear4bit's, read and written the same way.
    quantized_weight = Linear4bit.quantized_weight
    dequantize = Linear4bit.dequantize
    requantize_ = Linear4bit.requantize_
    _metadata = Linear4bit._metadata
    _state_dict_problems = Linear4bit._state_dict_problems

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        write_settings(destination, prefix, self._metadata())

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: dict[str, Any], *others: Any
    ) -> None:
        problems = self._state_dict_problems(state_dict, prefix, local_metadata)
        if problems:
            others[-1].extend(problems)
            return
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *others)

    def forward(self, input: Tensor) -> Tensor:
        """Rows [..., embedding_dim] of `weight_dtype` for integer indices [...].

        Raises:
            IndexError: an index is not in [0, num_embeddings), on a CPU; undefined on a GPU, as
                for nn.Embedding.
        """
        rows = input.reshape(-1)
        count = rows.numel()
        codes = self.weight.view(self.num_embeddings, -1)[rows]
        q = QuantizedTensor(
            packed=codes.reshape(-1),
            absmax=self._absmax_of(rows).reshape(-1),
            absmax2=None,
            offset=None,
            shape=torch.Size((count, self.embedding_dim)),
            dtype=self.weight_dtype,
            quant_type=self.quant_type,
            block_size=self.block_size,
        )
        return dequantize_4bit(q).view(*input.shape, self.embedding_dim)

    def _absmax_of(self, rows: Tensor) -> Tensor:
        """fp32 absmax [rows, blocks of a row]."""
        blocks = self.embedding_dim // self.block_size
        if not self.double_quant:
            return as_fp32(self.weight_absmax).view(self.num_embeddings, blocks)[rows]
        codes = self.weight_absmax.view(self.num_embeddings, blocks)[rows]
        constants = as_fp32(self.weight_absmax2)
        block = rows[:, None] * blocks + torch.arange(blocks, device=rows.device)
        groups = constants[:-1][block // _C.GROUP_SIZE]
        return _absmax_map(codes.device)[codes.int()] * groups + constants[-1]

    def reset_parameters(self) -> None:
        """Refused: a 4-bit table is loaded or quantized, never initialized."""
        raise NotImplementedError(
            "Embedding4bit has no initialization: use from_embedding, requantize_ or "
            "load_state_dict"
        )

    def extra_repr(self) -> str:
        """The settings, as `print(model)` shows them."""
        return (
            f"{self.num_embeddings}, {self.embedding_dim}, quant_type={self.quant_type}, "
            f"block_size={self.block_size}, double_quant={self.double_quant}"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Embedding4bit:
        # There is no floating parameter that a cast could reach.
        self.weight_dtype = fn(torch.empty(0, dtype=self.weight_dtype)).dtype
        return super()._apply(fn, recurse)


def dense_embedding(embedding: Embedding4bit, dtype: torch.dtype | None) -> nn.Embedding:
    """An nn.Embedding with the decoded table, frozen; its own dtype when None."""
    dense = nn.Embedding.from_pretrained(
        embedding.dequantize(dtype), padding_idx=embedding.padding_idx
    )
    return dense.train(embedding.training)


def _absmax_map(device: torch.device) -> Tensor:
    """The values of the 8-bit absmax codes."""
    kept = _maps.get(device)
    if kept is None:
        kept = torch.tensor(_MAP, dtype=torch.float32, device=device)
        # A compiler's tensor belongs to the graph that it is tracing.
        if not torch.compiler.is_compiling():
            _maps[device] = kept
    return kept
