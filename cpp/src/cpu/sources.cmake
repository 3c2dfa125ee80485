# The CPU backend's sources, relative to the root of the project, and the flags of the vector kernels.
set(QLORA_NATIVE_CPU_SOURCES
  cpp/src/cpu/backend.cpp
  cpp/src/cpu/cpu_features.cpp
  cpp/src/cpu/dequantize.cpp
  cpp/src/cpu/double_quantize.cpp
  cpp/src/cpu/matmul_scalar.cpp
  cpp/src/cpu/parallel.cpp
  cpp/src/cpu/quantize.cpp)
