// The part of DLPack 1.x that the extension uses: a tensor's description, and the table of functions
// by which a framework fills one in for C callers (the capsule `__dlpack_c_exchange_api__` of its
// tensor type). The layouts are the standard's, fixed for major version 1; the names are ours.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dlpack {

inline constexpr uint32_t kMajorVersion = 1;
inline constexpr const char* kExchangeApiCapsule = "dlpack_exchange_api";

inline constexpr int32_t kCpu = 1;
inline constexpr int32_t kCuda = 2;

inline constexpr uint8_t kUint = 1;
inline constexpr uint8_t kFloat = 2;
inline constexpr uint8_t kBfloat = 4;

struct Device {
  int32_t type;
  int32_t index;
  friend bool operator==(const Device&, const Device&) = default;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
  friend bool operator==(const DataType&, const DataType&) = default;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  ///< in elements
  uint64_t byte_offset;
};
static_assert(sizeof(Tensor) == 48 && offsetof(Tensor, dtype) == 20 &&
              offsetof(Tensor, byte_offset) == 40);

/// A tensor with who owns its memory: what a capsule holds whose consumer takes it over.
struct ManagedTensor {
  Tensor tensor;
  void* context;
  void (*deleter)(ManagedTensor* self);
};
static_assert(sizeof(ManagedTensor) == 64);

/// The name of its capsule, until it is taken over.
inline constexpr const char* kTensorCapsule = "dltensor";

struct ExchangeApiHeader {
  uint32_t major_version;
  uint32_t minor_version;
  const ExchangeApiHeader* older;  ///< the table of an older version, or null
};

struct ExchangeApi {
  ExchangeApiHeader header;
  void (*allocate)();        // Not used: its tensors are none of the framework's allocator, which
  void (*export_managed)();  // then ignores record_stream on them.
  void (*import_managed)();
  /// Describes a Python tensor, whose memory it lends until the caller returns. 0, or -1 with a
  /// Python exception.
  int (*describe)(void* tensor_object, Tensor* out);
  /// The framework's current stream of a device. 0, or -1 with a Python exception.
  int (*current_stream)(int32_t device_type, int32_t device_index, void** out);
};
static_assert(offsetof(ExchangeApi, describe) == 40);

}  // namespace dlpack
