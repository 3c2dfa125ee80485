// torch's tensors as addresses, for code that takes hundreds of them in a call: through DLPack's
// table of C functions where torch has one, else through attributes.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <cstdint>

#include "dlpack.h"
#include "qlora_native/device.h"
#include "qlora_native/dtype.h"
#include "qlora_native/stream.h"

/// What a strided tensor on a CPU or a CUDA device is.
struct TensorFacts {
  void* data = nullptr;
  int64_t numel = 0;
  qlora_native::Device device;
  bool is_contiguous = false;
  bool is_float = false;  ///< of `dtype`
  bool is_uint8 = false;
  qlora_native::DType dtype = qlora_native::DType::kFloat32;
};

class TensorReader {
 public:
  /// `dtypes`: torch.float32, torch.float16, torch.bfloat16 and torch.uint8. `current_stream`: from
  /// a device's index to the handle of torch's current stream there.
  TensorReader(nanobind::handle exchange_api, nanobind::sequence dtypes,
               nanobind::object current_stream);

  /// False for what is no tensor with memory on a CPU or a CUDA device. Nothing is raised.
  bool read(nanobind::handle tensor, TensorFacts* out) const;

  qlora_native::Stream current_stream(qlora_native::Device device) const;

 private:
  bool read_attributes(nanobind::handle tensor, TensorFacts* out) const;

  const dlpack::ExchangeApi* api_;
  std::array<nanobind::object, 4> dtypes_;
  nanobind::object current_stream_;
};
