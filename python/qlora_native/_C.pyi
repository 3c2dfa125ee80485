"""
Kernels of qlora_native. Takes addresses; qlora_native.functional takes tensors.
"""

from collections.abc import Sequence


class CudaError(RuntimeError):
    pass

build_info: dict = ...

class DeviceInfo:
    """A device that this build can use."""

    @property
    def device(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def features(self) -> str: ...

    @property
    def memory_bytes(self) -> int: ...

    def __repr__(self) -> str: ...

def list_devices() -> list[DeviceInfo]: ...

def cuda_unavailable_reason() -> str: ...

def cpu_threads() -> int: ...

def set_cpu_threads(threads: int) -> None: ...

def use_openmp(library: str) -> bool:
    """
    Run on the threads of an OpenMP runtime that is loaded; False when it is not, or is none.
    """

def use_own_threads() -> None: ...

class KernelInfo:
    """A kernel of this build."""

    @property
    def op(self) -> str: ...

    @property
    def device(self) -> str: ...

    @property
    def name(self) -> str: ...

    @property
    def usable(self) -> bool: ...

    @property
    def why_not(self) -> str: ...

    def __repr__(self) -> str: ...

def list_kernels() -> list[KernelInfo]: ...

def force_kernel(op: str, device: str, kernel: str) -> None: ...

def forced_kernel(op: str, device: str) -> str: ...

def selected_kernel(op: str, *, m: int, rows: int, cols: int, dtype: int, block_size: int, double_quant: bool, codebook: Codebook, device: int) -> tuple[str, bool]:
    """
    The kernel for a problem of this shape, and whether a dense GEMM would be preferred to it.
    """

def last_kernel(op: str) -> str: ...

class Codebook:
    """One 4-bit code: its values and decision points."""

    @property
    def quant_type(self) -> str: ...

    @property
    def values(self) -> list[float]: ...

    @property
    def decision_points(self) -> list[float]: ...

def named_codebook(quant_type: str) -> Codebook: ...

def custom_codebook(values: Sequence[float]) -> Codebook: ...

def signed_dynamic_map() -> list[float]: ...

def is_valid_block_size(block_size: int) -> bool: ...

GROUP_SIZE: int = 256

class WeightView:
    """Addresses of a 4-bit weight's parts, for one call."""

    @staticmethod
    def make(*, packed: int, absmax: int, absmax2: int, offset: int, double_quant: bool, rows: int, cols: int, block_size: int, codebook: Codebook, device: int) -> WeightView: ...

def quantize_4bit_workspace_bytes(weight: WeightView, *, input: int, dtype: int, pinned_offset: int) -> int: ...

def quantize_4bit(weight: WeightView, *, input: int, dtype: int, pinned_offset: int, workspace: int, workspace_bytes: int, stream: int) -> None: ...

def dequantize_4bit(weight: WeightView, *, output: int, dtype: int, stream: int) -> None: ...

PREFER_DENSE: int = -1

def matmul_4bit_plan(weight: WeightView, *, x: int, m: int, row_stride: int, dtype: int, bias: int, y: int) -> int: ...

def matmul_4bit(weight: WeightView, *, x: int, m: int, row_stride: int, dtype: int, bias: int, y: int, workspace: int, workspace_bytes: int, stream: int) -> None: ...

def matmul_4bit_transposed_plan(weight: WeightView, *, dy: int, m: int, row_stride: int, dtype: int, dx: int) -> int: ...

def matmul_4bit_transposed(weight: WeightView, *, dy: int, m: int, row_stride: int, dtype: int, dx: int, workspace: int, workspace_bytes: int, stream: int) -> None: ...
