#include "qlora_native/paged_optimizer.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "qlora_native/codebook.h"
#include "validate.h"
#include "validation_failure.h"

namespace qlora_native {
namespace {

/// What is brought to the device, updated, and taken back as one.
struct Part {
  std::vector<PagedRange> ranges;
  std::vector<OptimizerTensor> tensors;
  int64_t bytes = 0;
};

bool contains(const PagedRange& range, const void* data) {
  const auto* const begin = static_cast<const char*>(range.data);
  return begin <= data && data < begin + range.size_bytes;
}

/// An array of a tensor's state, and the bytes that a block of 256 elements has in it.
struct StateArray {
  void** data;
  int64_t block_bytes;
};

/// The arrays of `tensor` that may be paged; null ones are left out.
std::vector<StateArray> state_arrays(OptimizerTensor* tensor) {
  const bool is_float = tensor->state_format == StateFormat::kFloat32;
  const int64_t moment_bytes = kStateBlockSize * (is_float ? int64_t{sizeof(float)} : 1);
  std::vector<StateArray> arrays;
  const auto add = [&](auto** data, int64_t block_bytes) {
    if (*data != nullptr) arrays.push_back({reinterpret_cast<void**>(data), block_bytes});
  };
  add(&tensor->state1, moment_bytes);
  add(&tensor->state2, moment_bytes);
  add(&tensor->absmax1, sizeof(float));
  add(&tensor->absmax2, sizeof(float));
  add(&tensor->master, kStateBlockSize * int64_t{sizeof(float)});
  return arrays;
}

/// The bytes of `numel` elements in an array; the last block may be short, but has an absmax.
int64_t array_bytes(const StateArray& array, int64_t numel) {
  if (array.block_bytes < kStateBlockSize) {
    return num_blocks(numel, kStateBlockSize) * array.block_bytes;
  }
  return numel * (array.block_bytes / kStateBlockSize);
}

class Cutter {
 public:
  Cutter(std::span<const PagedRange> allocations, int64_t part_bytes)
      : allocations_(allocations.begin(), allocations.end()), part_bytes_(part_bytes) {
    std::sort(allocations_.begin(), allocations_.end(),
              [](const PagedRange& a, const PagedRange& b) { return a.data < b.data; });
  }

  void add(OptimizerTensor tensor) {
    std::vector<PagedRange> needed;  // allocations that are not in the current part
    int64_t bytes = 0;
    for (const StateArray& array : state_arrays(&tensor)) {
      const PagedRange* const found = find(*array.data);
      if (found != nullptr) check_fits(*found, *array.data, array_bytes(array, tensor.numel));
      if (found == nullptr || holds(needed, *found) || holds(part_.ranges, *found)) continue;
      needed.push_back(*found);
      bytes += found->size_bytes;
    }
    if (bytes > part_bytes_) return add_runs(tensor);
    if (part_.bytes + bytes > part_bytes_) {
      close();
      return add(tensor);  // what was in the closed part has to be in the new one
    }
    part_.ranges.insert(part_.ranges.end(), needed.begin(), needed.end());
    part_.bytes += bytes;
    part_.tensors.push_back(tensor);
  }

  std::vector<Part> finish() {
    close();
    return std::move(parts_);
  }

 private:
  static bool holds(const std::vector<PagedRange>& ranges, const PagedRange& range) {
    return std::find(ranges.begin(), ranges.end(), range) != ranges.end();
  }

  static void check_fits(const PagedRange& range, const void* data, int64_t bytes) {
    const int64_t begin = static_cast<const char*>(data) - static_cast<const char*>(range.data);
    if (bytes > range.size_bytes - begin) {
      fail("paged_optimizer_step: state of ", bytes, " bytes starts at byte ", begin,
           " of an allocation of ", range.size_bytes);
    }
  }

  /// The allocation that holds an address, or null.
  const PagedRange* find(const void* data) const {
    const auto next = std::upper_bound(
        allocations_.begin(), allocations_.end(), data,
        [](const void* wanted, const PagedRange& range) { return wanted < range.data; });
    if (next == allocations_.begin() || !contains(*(next - 1), data)) return nullptr;
    return &*(next - 1);
  }

  /// A tensor that is too large for a part, in runs of whole blocks, each a part of its own.
  void add_runs(const OptimizerTensor& whole) {
    close();
    OptimizerTensor counted = whole;
    int64_t block_bytes = 0;
    for (const StateArray& array : state_arrays(&counted)) {
      if (find(*array.data) != nullptr) block_bytes += array.block_bytes;
    }
    const int64_t run_elems = std::max<int64_t>(1, part_bytes_ / block_bytes) * kStateBlockSize;
    for (int64_t begin = 0; begin < whole.numel; begin += run_elems) {
      OptimizerTensor run = whole;
      run.numel = std::min(run_elems, whole.numel - begin);
      run.first_element = whole.first_element + begin;
      run.advances_step = whole.advances_step && begin + run.numel == whole.numel;
      run.param = static_cast<char*>(whole.param) + begin * size_bytes(whole.param_dtype);
      run.grad = static_cast<const char*>(whole.grad) + begin * size_bytes(whole.grad_dtype);
      for (const StateArray& array : state_arrays(&run)) {
        const bool is_paged = find(*array.data) != nullptr;
        const int64_t offset = begin / kStateBlockSize * array.block_bytes;
        *array.data = static_cast<char*>(*array.data) + offset;
        if (!is_paged) continue;
        part_.ranges.push_back({*array.data, array_bytes(array, run.numel)});
      }
      part_.tensors.push_back(run);
      close();
    }
  }

  void close() {
    if (!part_.tensors.empty()) parts_.push_back(std::move(part_));
    part_ = {};
  }

  std::vector<PagedRange> allocations_;
  int64_t part_bytes_;
  Part part_;
  std::vector<Part> parts_;
};

/// Points the tensors of a part to where its ranges are on the device.
void relocate(Part* part, std::span<void* const> addresses) {
  for (OptimizerTensor& tensor : part->tensors) {
    for (const StateArray& array : state_arrays(&tensor)) {
      for (size_t i = 0; i < part->ranges.size(); ++i) {
        if (!contains(part->ranges[i], *array.data)) continue;
        const auto offset =
            static_cast<char*>(*array.data) - static_cast<char*>(part->ranges[i].data);
        *array.data = static_cast<char*>(addresses[i]) + offset;
        break;
      }
    }
  }
}

}  // namespace

void paged_optimizer_step(const OptimizerStepArgs& args, PagedPool pool,
                          std::span<const PagedRange> allocations, int64_t part_bytes,
                          Workspace workspace, Stream stream) {
  validate(args);
  if (pool.device() != args.device) {
    fail("paged_optimizer_step: the pool is of ", to_string(pool.device()), ", the call for ",
         to_string(args.device));
  }
  if (part_bytes < 1) fail("paged_optimizer_step: part_bytes is ", part_bytes);
  for (const PagedRange& range : allocations) {
    if (range.size_bytes < 0 || (range.data == nullptr && range.size_bytes > 0)) {
      fail("paged_optimizer_step: an allocation of ", range.size_bytes, " bytes at ", range.data);
    }
  }
  Cutter cutter(allocations, part_bytes);
  for (const OptimizerTensor& tensor : args.tensors) cutter.add(tensor);
  std::vector<Part> parts = cutter.finish();

  std::vector<PagedRange> order;
  for (const Part& part : parts) order.insert(order.end(), part.ranges.begin(), part.ranges.end());
  pool.plan(order);
  std::vector<void*> addresses;
  for (Part& part : parts) {
    addresses.assign(part.ranges.size(), nullptr);
    pool.acquire(part.ranges, Access::kReadWrite, addresses, stream);
    try {
      relocate(&part, addresses);
      OptimizerStepArgs step = args;
      step.tensors = part.tensors;
      optimizer_step(step, workspace, stream);
    } catch (...) {
      pool.release(part.ranges, stream);
      throw;
    }
    pool.release(part.ranges, stream);
  }
}

}  // namespace qlora_native
