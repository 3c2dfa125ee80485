# The CUDA backend, paths relative to the root of the repository. Sources of the second list are
# compiled for sm_90a alone.
set(QLORA_NATIVE_CUDA_SOURCES
  cuda/backend.cpp
  cuda/dequantize.cu
  cuda/double_quantize.cu
  cuda/gemm/gemm_simt.cu
  cuda/gemm/heuristics.cpp
  cuda/gemv/gemv_simt.cu
  cuda/gemv/heuristics.cpp
  cuda/host/device_info.cpp
  cuda/host/error.cpp
  cuda/quantize.cu)
set(QLORA_NATIVE_CUDA_SM90A_SOURCES)
