# The CPU backend's sources, relative to the root of the project, and the flags of the vector kernels.
set(QLORA_NATIVE_CPU_SOURCES
  cpp/src/cpu/backend.cpp
  cpp/src/cpu/cpu_features.cpp
  cpp/src/cpu/dequantize.cpp
  cpp/src/cpu/double_quantize.cpp
  cpp/src/cpu/gradient_norm.cpp
  cpp/src/cpu/lora.cpp
  cpp/src/cpu/grouped_matmul.cpp
  cpp/src/cpu/matmul.cpp
  cpp/src/cpu/matmul_scalar.cpp
  cpp/src/cpu/memory.cpp
  cpp/src/cpu/optimizer.cpp
  cpp/src/cpu/parallel.cpp
  cpp/src/cpu/quantize.cpp)

if(CMAKE_SYSTEM_PROCESSOR MATCHES "^(x86_64|AMD64|amd64)$")
  set(qn_cpu_avx2_sources
    cpp/src/cpu/dequantize_avx2.cpp
    cpp/src/cpu/gemm_avx2.cpp
    cpp/src/cpu/gemv_avx2.cpp
    cpp/src/cpu/optimizer_avx2.cpp
    cpp/src/cpu/quantize_avx2.cpp)
  set(qn_cpu_avx512_sources
    cpp/src/cpu/dequantize_avx512.cpp
    cpp/src/cpu/gemm_avx512.cpp
    cpp/src/cpu/gemv_avx512.cpp
    cpp/src/cpu/optimizer_avx512.cpp
    cpp/src/cpu/quantize_avx512.cpp)
  list(APPEND QLORA_NATIVE_CPU_SOURCES ${qn_cpu_avx2_sources} ${qn_cpu_avx512_sources})
  set(qn_cpu_avx512_flags "-mavx512f;-mavx512bw;-mavx512vl;-mavx512dq;-mavx2;-mfma;-mf16c")
  set(qn_cpu_definitions QN_CPU_X86)
  # Compilers older than these instructions leave their kernels out.
  include(CheckCXXCompilerFlag)
  check_cxx_compiler_flag("-mavx512bf16 -mamx-tile -mamx-bf16" QLORA_NATIVE_HAVE_AMX_FLAGS)
  if(QLORA_NATIVE_HAVE_AMX_FLAGS)
    set(qn_cpu_amx_sources cpp/src/cpu/gemm_amx.cpp)
    list(APPEND QLORA_NATIVE_CPU_SOURCES ${qn_cpu_amx_sources})
    list(APPEND qn_cpu_definitions QN_CPU_AMX)
  endif()
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC 12's own AVX-512 header leaves the operand of an unmasked intrinsic uninitialized.
    set(qn_cpu_quiet "-Wno-uninitialized;-Wno-maybe-uninitialized")
  endif()
  # The kernels' `usable` predicates in backend.cpp check all of these at run time.
  set_source_files_properties(${qn_cpu_avx2_sources} PROPERTIES
    COMPILE_OPTIONS "-mavx2;-mfma;-mf16c")
  set_source_files_properties(${qn_cpu_avx512_sources} PROPERTIES
    COMPILE_OPTIONS "${qn_cpu_avx512_flags};${qn_cpu_quiet}")
  set_source_files_properties(${qn_cpu_amx_sources} PROPERTIES
    COMPILE_OPTIONS "${qn_cpu_avx512_flags};-mavx512bf16;-mamx-tile;-mamx-bf16;${qn_cpu_quiet}")
  set_source_files_properties(cpp/src/cpu/backend.cpp PROPERTIES
    COMPILE_DEFINITIONS "${qn_cpu_definitions}")
endif()
