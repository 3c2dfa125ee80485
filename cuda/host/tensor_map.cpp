#include "host/tensor_map.h"

#include <cuda_runtime_api.h>

#include <string>

#include "host/error.h"
#include "qlora_native/error.h"

namespace qlora_native::cuda {
namespace {

using EncodeTiled = decltype(&cuTensorMapEncodeTiled);

/// The driver's function, which the library does not link: it loads where there is no driver.
EncodeTiled encode_tiled() {
  static const EncodeTiled function = [] {
    constexpr unsigned kVersion = 12000;  // where it appeared
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result{};
    QN_CUDA_TRY(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, kVersion,
                                                 cudaEnableDefault, &result));
    if (result != cudaDriverEntryPointSuccess || found == nullptr) {
      throw CudaError(cudaErrorSymbolNotFound, "the CUDA driver has no cuTensorMapEncodeTiled");
    }
    return reinterpret_cast<EncodeTiled>(found);
  }();
  return function;
}

}  // namespace

void make_context_current(int device) { QN_CUDA_TRY(cudaSetDevice(device)); }

CUtensorMap make_tensor_map(const TensorBox& box) {
  const cuuint64_t extents[] = {static_cast<cuuint64_t>(box.cols),
                                static_cast<cuuint64_t>(box.rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(box.stride_bytes)};
  const cuuint32_t box_extents[] = {static_cast<cuuint32_t>(box.box_cols),
                                    static_cast<cuuint32_t>(box.box_rows)};
  const cuuint32_t elem_strides[] = {1, 1};
  CUtensorMap map{};
  const CUresult status = encode_tiled()(
      &map, box.elem_bytes == 1 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_UINT16, 2,
      const_cast<void*>(box.data), extents, strides, box_extents, elem_strides,
      CU_TENSOR_MAP_INTERLEAVE_NONE,
      box.box_cols * box.elem_bytes == 64 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_128B,
      CU_TENSOR_MAP_L2_PROMOTION_L2_128B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (status != CUDA_SUCCESS) {
    throw CudaError(cudaErrorInvalidValue, "cuTensorMapEncodeTiled failed with code " +
                                               std::to_string(status) + " for a matrix of " +
                                               std::to_string(box.rows) + " x " +
                                               std::to_string(box.cols) + " elements of " +
                                               std::to_string(box.elem_bytes) + " bytes, rows " +
                                               std::to_string(box.stride_bytes) + " bytes apart");
  }
  return map;
}

}  // namespace qlora_native::cuda
