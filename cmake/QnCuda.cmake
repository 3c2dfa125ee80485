# Decides whether the CUDA backend is built, and turns QLORA_NATIVE_CUDA into QLORA_NATIVE_WITH_CUDA.
string(TOUPPER "${QLORA_NATIVE_CUDA}" QLORA_NATIVE_CUDA)
set(QLORA_NATIVE_WITH_CUDA OFF)
if(NOT QLORA_NATIVE_CUDA STREQUAL "OFF")
  if(NOT CMAKE_CUDA_ARCHITECTURES)
    set(CMAKE_CUDA_ARCHITECTURES ${QLORA_NATIVE_CUDA_ARCHITECTURES})
  endif()
  if(NOT CMAKE_CUDA_COMPILER AND NOT DEFINED ENV{CUDACXX} AND EXISTS /usr/local/cuda/bin/nvcc)
    set(CMAKE_CUDA_COMPILER /usr/local/cuda/bin/nvcc)
  endif()
  if("${CMAKE_CUDA_COMPILER}" MATCHES "NOTFOUND$")
    # Looked for in vain last time: there may be one now.
    unset(CMAKE_CUDA_COMPILER CACHE)
  endif()
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    enable_language(CUDA)
    if(CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.5)
      message(FATAL_ERROR "qlora_native needs nvcc 12.5 or newer; ${CMAKE_CUDA_COMPILER} is "
                          "${CMAKE_CUDA_COMPILER_VERSION}. Configure with -DQLORA_NATIVE_CUDA=OFF "
                          "for a CPU-only build.")
    endif()
    if(NOT CMAKE_CUDA20_STANDARD_COMPILE_OPTION)
      # CMake 3.25 does not know that nvcc 12 and newer have C++20.
      set(CMAKE_CUDA20_STANDARD_COMPILE_OPTION "-std=c++20")
      set(CMAKE_CUDA20_EXTENSION_COMPILE_OPTION "-std=c++20")
      list(APPEND CMAKE_CUDA_COMPILE_FEATURES cuda_std_20)
    endif()
    find_package(CUDAToolkit REQUIRED)
    set(QLORA_NATIVE_WITH_CUDA ON)
  elseif(QLORA_NATIVE_CUDA STREQUAL "ON")
    message(FATAL_ERROR "QLORA_NATIVE_CUDA=ON, but no CUDA compiler was found. Install the CUDA "
                        "toolkit (nvcc), put it on PATH or name it in CUDACXX, or configure with "
                        "-DQLORA_NATIVE_CUDA=OFF for a CPU-only build.")
  endif()
endif()
message(STATUS "qlora_native ${PROJECT_VERSION}: CUDA backend ${QLORA_NATIVE_WITH_CUDA}")
