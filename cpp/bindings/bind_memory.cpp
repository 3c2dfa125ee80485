// Paged memory: pools, and tensors over their memory, as DLPack capsules for torch.from_dlpack.
// Ranges are addresses and sizes; qlora_native.memory takes tensors.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstdint>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings.h"
#include "dlpack.h"
#include "qlora_native/error.h"
#include "qlora_native/memory.h"

namespace nb = nanobind;
namespace qn = qlora_native;
using namespace nb::literals;

namespace {

using Addresses = std::vector<uintptr_t>;
using Sizes = std::vector<int64_t>;

/// Python's device code: -1 is the CPU, i >= 0 is CUDA device i.
qn::Device device_of(int device) {
  return device < 0 ? qn::Device::cpu() : qn::Device::cuda(device);
}

qn::Stream stream_of(uintptr_t handle) {
  return qn::Stream::from_handle(reinterpret_cast<void*>(handle));
}

std::vector<qn::PagedRange> ranges_of(const Addresses& addresses, const Sizes& sizes) {
  if (addresses.size() != sizes.size()) {
    throw qn::InvalidArgument(std::to_string(addresses.size()) + " addresses, but " +
                              std::to_string(sizes.size()) + " sizes");
  }
  std::vector<qn::PagedRange> ranges(addresses.size());
  for (size_t i = 0; i < ranges.size(); ++i) {
    ranges[i] = {reinterpret_cast<void*>(addresses[i]), sizes[i]};
  }
  return ranges;
}

qn::Backing backing_of(const std::string& backing_name) {
  for (const qn::Backing backing :
       {qn::Backing::kAuto, qn::Backing::kManaged, qn::Backing::kPinned, qn::Backing::kHost}) {
    if (backing_name == qn::name(backing)) return backing;
  }
  throw qn::InvalidArgument("unknown backing '" + backing_name +
                            "'; known are auto, managed, pinned and host");
}

qn::Access access_of(const std::string& access_name) {
  if (access_name == "read") return qn::Access::kRead;
  if (access_name == "write") return qn::Access::kWrite;
  if (access_name == "readwrite") return qn::Access::kReadWrite;
  throw qn::InvalidArgument("unknown access '" + access_name +
                            "'; known are read, write and readwrite");
}

qn::PagedPool make_pool(int device, const std::string& backing, int64_t region_bytes,
                        int64_t device_budget_bytes) {
  return qn::PagedPool({.device = device_of(device),
                        .backing = backing_of(backing),
                        .region_bytes = region_bytes,
                        .device_budget_bytes = device_budget_bytes});
}

/// What lives as long as a tensor made here.
struct TensorContext {
  dlpack::ManagedTensor managed{};
  std::vector<int64_t> shape;
  std::vector<int64_t> strides;
  qn::PagedBuffer memory;  ///< empty for a view
};

/// torch calls it on whichever thread lets go of the memory last, with or without the GIL.
void delete_tensor(dlpack::ManagedTensor* tensor) {
  delete static_cast<TensorContext*>(tensor->context);
}

nb::object capsule_of(std::unique_ptr<TensorContext> context, void* data, dlpack::Device device,
                      dlpack::DataType dtype) {
  context->managed = {.tensor = {.data = data,
                                 .device = device,
                                 .ndim = static_cast<int32_t>(context->shape.size()),
                                 .dtype = dtype,
                                 .shape = context->shape.data(),
                                 .strides = context->strides.data(),
                                 .byte_offset = 0},
                      .context = context.get(),
                      .deleter = delete_tensor};
  // A capsule that nobody took over still owns the tensor.
  PyObject* const capsule =
      PyCapsule_New(&context->managed, dlpack::kTensorCapsule, [](PyObject* unused) {
        if (!PyCapsule_IsValid(unused, dlpack::kTensorCapsule)) return;
        delete_tensor(static_cast<dlpack::ManagedTensor*>(
            PyCapsule_GetPointer(unused, dlpack::kTensorCapsule)));
      });
  if (capsule == nullptr) nb::raise_python_error();
  static_cast<void>(context.release());
  return nb::steal(capsule);
}

std::vector<int64_t> contiguous_strides(const std::vector<int64_t>& shape) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i] > 1 ? shape[i] : 1;
  }
  return strides;
}

/// Managed memory passes for device memory, which kernels take; the rest is the host's.
dlpack::Device tensor_device(const qn::PagedPool& pool) {
  if (pool.backing() == qn::Backing::kManaged) return {dlpack::kCuda, pool.device().index};
  return {dlpack::kCpu, 0};
}

nb::object empty_tensor(const qn::PagedPool& pool, std::vector<int64_t> shape, uint8_t code,
                        uint8_t bits, int64_t size_bytes, uintptr_t stream) {
  auto context = std::make_unique<TensorContext>();
  {
    const nb::gil_scoped_release no_gil;
    context->memory = qn::PagedBuffer(pool, size_bytes, stream_of(stream));
  }
  context->strides = contiguous_strides(shape);
  context->shape = std::move(shape);
  void* const data = context->memory.data();
  return capsule_of(std::move(context), data, tensor_device(pool), {code, bits, 1});
}

nb::object staged_tensor(const qn::PagedPool& pool, uintptr_t address, std::vector<int64_t> shape,
                         std::vector<int64_t> strides, uint8_t code, uint8_t bits) {
  auto context = std::make_unique<TensorContext>();
  context->shape = std::move(shape);
  context->strides = std::move(strides);
  return capsule_of(std::move(context), reinterpret_cast<void*>(address),
                    {dlpack::kCuda, pool.device().index}, {code, bits, 1});
}

void bind_stats(nb::module_& m) {
  using Stats = qn::PagedPoolStats;
  nb::class_<Stats>(m, "PagedPoolStats", "What a pool holds and has moved.")
      .def_ro("reserved_bytes", &Stats::reserved_bytes, "Of all regions.")
      .def_ro("used_bytes", &Stats::used_bytes, "Of live tensors, each rounded up to 256 bytes.")
      .def_ro("peak_used_bytes", &Stats::peak_used_bytes, "The most that `used_bytes` has been.")
      .def_ro("allocations", &Stats::allocations, "How many tensors are alive.")
      .def_ro("device_resident_bytes", &Stats::device_resident_bytes,
              "Of tensors, on the device, as far as the pool has moved them.")
      .def_ro("device_reserved_bytes", &Stats::device_reserved_bytes,
              "Device memory of the staging cache.")
      .def_ro("prefetches", &Stats::prefetches,
              "Tensors brought to the device before they were acquired.")
      .def_ro("evictions", &Stats::evictions, "Tensors moved off the device.")
      .def_ro("bytes_to_device", &Stats::bytes_to_device, "Moved so far.")
      .def_ro("bytes_to_host", &Stats::bytes_to_host, "Moved so far.")
      .def("__repr__", [](const Stats& stats) {
        return "PagedPoolStats(used_bytes=" + std::to_string(stats.used_bytes) +
               ", reserved_bytes=" + std::to_string(stats.reserved_bytes) +
               ", peak_used_bytes=" + std::to_string(stats.peak_used_bytes) +
               ", allocations=" + std::to_string(stats.allocations) +
               ", device_resident_bytes=" + std::to_string(stats.device_resident_bytes) +
               ", device_reserved_bytes=" + std::to_string(stats.device_reserved_bytes) +
               ", prefetches=" + std::to_string(stats.prefetches) +
               ", evictions=" + std::to_string(stats.evictions) +
               ", bytes_to_device=" + std::to_string(stats.bytes_to_device) +
               ", bytes_to_host=" + std::to_string(stats.bytes_to_host) + ")";
      });
}

}  // namespace

void bind_memory(nb::module_& m) {
  bind_stats(m);
  const auto no_gil = nb::call_guard<nb::gil_scoped_release>();
  using Pool = qn::PagedPool;
  nb::class_<Pool>(m, "PagedPool", "A pool of paged memory; qlora_native.memory takes tensors.")
      .def_static("make", &make_pool, nb::kw_only(), "device"_a, "backing"_a, "region_bytes"_a,
                  "device_budget_bytes"_a)
      .def_prop_ro("backing", [](const Pool& pool) { return std::string(name(pool.backing())); })
      .def("empty_tensor", &empty_tensor, nb::kw_only(), "shape"_a, "code"_a, "bits"_a,
           "size_bytes"_a, "stream"_a,
           "A DLPack capsule; its memory goes back to the pool with the last tensor over it.")
      .def("staged_tensor", &staged_tensor, nb::kw_only(), "address"_a, "shape"_a, "strides"_a,
           "code"_a, "bits"_a, "A DLPack capsule of acquired memory, which it does not keep.")
      .def(
          "prefetch",
          [](Pool& pool, const Addresses& addresses, const Sizes& sizes, uintptr_t stream) {
            pool.prefetch(ranges_of(addresses, sizes), stream_of(stream));
          },
          "addresses"_a, "sizes"_a, nb::kw_only(), "stream"_a, no_gil)
      .def(
          "evict",
          [](Pool& pool, const Addresses& addresses, const Sizes& sizes, uintptr_t stream) {
            pool.evict(ranges_of(addresses, sizes), stream_of(stream));
          },
          "addresses"_a, "sizes"_a, nb::kw_only(), "stream"_a, no_gil)
      .def(
          "plan",
          [](Pool& pool, const Addresses& addresses, const Sizes& sizes) {
            pool.plan(ranges_of(addresses, sizes));
          },
          "addresses"_a, "sizes"_a, no_gil)
      .def(
          "acquire",
          [](Pool& pool, const Addresses& addresses, const Sizes& sizes, const std::string& access,
             uintptr_t stream) {
            std::vector<void*> found(addresses.size());
            pool.acquire(ranges_of(addresses, sizes), access_of(access), found, stream_of(stream));
            Addresses result;
            for (void* const address : found)
              result.push_back(reinterpret_cast<uintptr_t>(address));
            return result;
          },
          "addresses"_a, "sizes"_a, nb::kw_only(), "access"_a, "stream"_a, no_gil)
      .def(
          "release",
          [](Pool& pool, const Addresses& addresses, const Sizes& sizes, uintptr_t stream) {
            pool.release(ranges_of(addresses, sizes), stream_of(stream));
          },
          "addresses"_a, "sizes"_a, nb::kw_only(), "stream"_a, no_gil)
      .def(
          "synchronize_to_host",
          [](Pool& pool, const Addresses& addresses, const Sizes& sizes, uintptr_t stream) {
            for (const qn::PagedRange& range : ranges_of(addresses, sizes)) {
              pool.host_view(range, stream_of(stream));
            }
          },
          "addresses"_a, "sizes"_a, nb::kw_only(), "stream"_a, no_gil)
      .def("trim", &Pool::trim, no_gil)
      .def("stats", &Pool::stats, no_gil)
      .def(
          "resident_bytes",
          [](const Pool& pool, int device) { return pool.resident_bytes(device_of(device)); },
          "device"_a, no_gil);
  m.def(
      "automatic_backing",
      [](int device) {
        const qn::BackingChoice choice = qn::automatic_backing(device_of(device));
        return std::make_pair(std::string(name(choice.backing)), choice.reason);
      },
      "device"_a, "The backing that \"auto\" stands for on a device, and why.");
}
