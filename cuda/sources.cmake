# The CUDA backend, paths relative to the root of the repository. Sources of the second list are
# compiled for sm_90a alone.
set(QLORA_NATIVE_CUDA_SOURCES
  cuda/backend.cpp
  cuda/dequantize.cu
  cuda/double_quantize.cu
  cuda/gemm/gemm_mma.cu
  cuda/gemm/gemm_simt.cu
  cuda/gemm/gemm_sm80.cu
  cuda/gemm/heuristics.cpp
  cuda/gemm/sm80/plan.cpp
  cuda/gemm/sm90a/plan.cpp
  cuda/gemv/gemv_mma.cu
  cuda/gemv/gemv_simt.cu
  cuda/gemv/heuristics.cpp
  cuda/gradient_norm.cu
  cuda/grouped/grouped_matmul_mma.cu
  cuda/grouped/grouped_matmul_simt.cu
  cuda/grouped/plan.cpp
  cuda/host/compiled_architecture.cu
  cuda/host/device_info.cpp
  cuda/host/error.cpp
  cuda/host/launch_number.cpp
  cuda/host/mma_args.cpp
  cuda/host/table_values.cpp
  cuda/host/tensor_map.cpp
  cuda/lora/gradient_mma.cu
  cuda/lora/lora_mma.cpp
  cuda/lora/lora_simt.cu
  cuda/lora/prepared_factor.cu
  cuda/lora/project_mma.cu
  cuda/lora/update_mma.cu
  cuda/memory.cpp
  cuda/optimizer.cu
  cuda/quantize.cu)
# Their device code is empty before sm_90, where what only it uses is unused.
set_source_files_properties(cuda/gemm/gemm_mma.cu cuda/gemv/gemv_mma.cu
  PROPERTIES COMPILE_OPTIONS --diag-suppress=177)
# What the optimizers compute is the CPU's, which has no contraction to FMA either.
set_source_files_properties(cuda/optimizer.cu PROPERTIES COMPILE_OPTIONS --fmad=false)
set(QLORA_NATIVE_CUDA_SM90A_SOURCES
  cuda/gemm/gemm_sm90a.cu
  cuda/gemm/gemm_transposed_sm90a.cu)
