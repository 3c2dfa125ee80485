# The core: compiled once, as position-independent objects, and made into a shared and a static library.
find_package(Threads REQUIRED)
include(${PROJECT_SOURCE_DIR}/cpp/src/cpu/sources.cmake)

add_library(qlora_native_objects OBJECT EXCLUDE_FROM_ALL
  cpp/src/device.cpp cpp/src/registry.cpp cpp/src/validate.cpp cpp/src/version.cpp
  cpp/src/quantize.cpp cpp/src/dequantize.cpp cpp/src/matmul.cpp cpp/src/grouped_matmul.cpp
  cpp/src/lora.cpp cpp/src/validate_lora.cpp
  cpp/src/managed_mover.cpp cpp/src/memory.cpp cpp/src/paged_mover.cpp cpp/src/paged_pool_state.cpp
  cpp/src/region_allocator.cpp cpp/src/staging_cache.cpp
  cpp/src/optimizer.cpp cpp/src/paged_optimizer.cpp cpp/src/validate_optimizer.cpp
  cpp/src/json.cpp cpp/src/mapped_file.cpp cpp/src/quantization_config.cpp
  cpp/src/quantized_matrix.cpp cpp/src/safetensors.cpp cpp/src/safetensors_checkpoint.cpp
  cpp/src/c_api_guard.cpp cpp/src/c_api_arguments.cpp cpp/src/c_api_operations.cpp
  cpp/src/c_api_lora.cpp cpp/src/c_api_memory.cpp cpp/src/c_api_optimizer.cpp cpp/src/c_api_queries.cpp
  cpp/src/c_api_optimizer_arguments.cpp cpp/src/c_api_paged_optimizer.cpp
  ${QLORA_NATIVE_CPU_SOURCES})
qn_configure_target(qlora_native_objects)
set(core_objects $<TARGET_OBJECTS:qlora_native_objects>)

set(build_cuda_toolkit "")
set(build_cuda_architectures "")
if(QLORA_NATIVE_WITH_CUDA)
  include(${PROJECT_SOURCE_DIR}/cuda/sources.cmake)
  target_sources(qlora_native_objects PRIVATE ${QLORA_NATIVE_CUDA_SOURCES})
  target_include_directories(qlora_native_objects PRIVATE ${PROJECT_SOURCE_DIR}/cuda)
  set_target_properties(qlora_native_objects PROPERTIES
    CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON CUDA_VISIBILITY_PRESET hidden)
  target_link_libraries(qlora_native_objects PRIVATE CUDA::cudart_static)
  set(cuda_options --expt-relaxed-constexpr -Xcompiler=-Wall,-Wextra)
  target_compile_options(qlora_native_objects PRIVATE "$<$<COMPILE_LANGUAGE:CUDA>:${cuda_options}>")
  if(QLORA_NATIVE_CUDA_SM90A_SOURCES)
    # CUDA_ARCHITECTURES is a property of a target, hence a library of its own.
    add_library(qlora_native_sm90a OBJECT EXCLUDE_FROM_ALL ${QLORA_NATIVE_CUDA_SM90A_SOURCES})
    qn_configure_target(qlora_native_sm90a)
    set_target_properties(qlora_native_sm90a PROPERTIES
      CUDA_ARCHITECTURES 90a-real CUDA_STANDARD 20 CUDA_STANDARD_REQUIRED ON
      CUDA_VISIBILITY_PRESET hidden POSITION_INDEPENDENT_CODE ON)
    target_include_directories(qlora_native_sm90a PRIVATE
      cpp/include cpp/src ${PROJECT_SOURCE_DIR}/cuda)
    target_compile_options(qlora_native_sm90a PRIVATE ${cuda_options})
    list(APPEND core_objects $<TARGET_OBJECTS:qlora_native_sm90a>)
  endif()
  set(build_cuda_toolkit "${CMAKE_CUDA_COMPILER_VERSION}")
  set(build_cuda_architectures "${QLORA_NATIVE_CUDA_ARCHITECTURES}")
else()
  target_sources(qlora_native_objects PRIVATE cpp/src/no_cuda/backend.cpp)
endif()

set_source_files_properties(cpp/src/version.cpp PROPERTIES COMPILE_DEFINITIONS
  "QN_BUILD_COMPILER=\"${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}\";QN_BUILD_CUDA_TOOLKIT=\"${build_cuda_toolkit}\";QN_BUILD_CUDA_ARCHITECTURES=\"$<JOIN:${build_cuda_architectures},$<COMMA>>\"")

target_include_directories(qlora_native_objects PRIVATE cpp/include cpp/src)
target_compile_features(qlora_native_objects PRIVATE cxx_std_20)
target_link_libraries(qlora_native_objects PRIVATE Threads::Threads)
# The codecs round every multiplication and addition: nothing may be contracted to an FMA.
target_compile_options(qlora_native_objects PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-ffp-contract=off>)
if(NOT QLORA_NATIVE_SANITIZE)
  # In builds of every type. Under a sanitizer it triples the compile time and removes accesses
  # before they are checked.
  target_compile_options(qlora_native_objects PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-O3>)
endif()
set_target_properties(qlora_native_objects PROPERTIES
  CXX_VISIBILITY_PRESET hidden VISIBILITY_INLINES_HIDDEN ON POSITION_INDEPENDENT_CODE ON)

if(QLORA_NATIVE_CORE_OBJECTS)
  include(${QLORA_NATIVE_CORE_OBJECTS})
else()
  file(GENERATE OUTPUT ${PROJECT_BINARY_DIR}/core_objects.cmake
       CONTENT "set(core_objects \"${core_objects}\")\n")
endif()

# What both libraries have in common.
function(qn_configure_library target kind)
  add_library(qlora_native::${kind} ALIAS ${target})
  qn_configure_target(${target})
  target_include_directories(${target} PUBLIC
    $<BUILD_INTERFACE:${PROJECT_SOURCE_DIR}/cpp/include>
    $<INSTALL_INTERFACE:${CMAKE_INSTALL_INCLUDEDIR}>)
  target_compile_features(${target} INTERFACE cxx_std_20)
  set_target_properties(${target} PROPERTIES
    OUTPUT_NAME qlora_native EXPORT_NAME ${kind} LINKER_LANGUAGE CXX)
  target_link_libraries(${target} PRIVATE Threads::Threads)
  if(QLORA_NATIVE_WITH_CUDA)
    # The runtime is linked statically, so that the library loads where there is no CUDA at all.
    set_target_properties(${target} PROPERTIES CUDA_RUNTIME_LIBRARY Static)
    target_link_libraries(${target} PRIVATE CUDA::cudart_static)
  endif()
endfunction()

if(QLORA_NATIVE_BUILD_STATIC)
  add_library(qlora_native_static STATIC ${core_objects})
  qn_configure_library(qlora_native_static static)
  set(core_library qlora_native_static)
endif()
if(QLORA_NATIVE_BUILD_SHARED)
  add_library(qlora_native_shared SHARED ${core_objects})
  qn_configure_library(qlora_native_shared shared)
  set(core_library qlora_native_shared)
  if(NOT SKBUILD)
    # A wheel cannot hold the symbolic links that a versioned name needs.
    set_target_properties(qlora_native_shared PROPERTIES
      VERSION ${PROJECT_VERSION} SOVERSION ${PROJECT_VERSION_MAJOR})
  endif()
  if(CMAKE_SYSTEM_NAME STREQUAL "Linux")
    # Hides what a static archive or an instantiated standard template would otherwise export.
    set(symbol_map ${PROJECT_SOURCE_DIR}/cpp/src/exported_symbols.map)
    target_link_options(qlora_native_shared PRIVATE
      -Wl,--version-script=${symbol_map} -Wl,--exclude-libs,ALL)
    set_target_properties(qlora_native_shared PROPERTIES LINK_DEPENDS ${symbol_map})
  endif()
endif()
if(NOT core_library)
  message(FATAL_ERROR "QLORA_NATIVE_BUILD_SHARED and QLORA_NATIVE_BUILD_STATIC are both OFF: there "
                      "would be no library. Turn one of them on.")
endif()
add_library(qlora_native::qlora_native ALIAS ${core_library})
