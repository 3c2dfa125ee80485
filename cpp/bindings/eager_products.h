// 4-bit products of torch's tensors in one call: read, planned, allocated and run, by the core's
// kernel or, where that is faster, by torch over the decoded weight. A result is None for arguments
// that are not of the ordinary kind.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>

#include "eager_arguments.h"
#include "qlora_native/stream.h"
#include "qlora_native/views.h"
#include "torch_eager.h"

/// An adapter as Python has it.
struct AdapterObjects {
  nanobind::handle a, b;
  float scaling;
};

/// Stands for memory not yet allocated in questions about a call.
void* eager_nowhere();

class EagerProducts {
 public:
  explicit EagerProducts(Torch& torch) : torch_(torch) {}

  /// How many operations ran.
  int64_t calls() const { return calls_; }

  /// x W^T + bias, [..., rows of W].
  nanobind::object linear(nanobind::handle x, nanobind::handle bias, const EagerWeight& weight);
  /// dy W, [..., columns of W].
  nanobind::object linear_dx(nanobind::handle dy, const EagerWeight& weight);
  /// dx += dy W, of matrices. False where `linear_dx` would be None.
  bool add_linear_dx(nanobind::handle dy, const EagerWeight& weight, nanobind::handle dx);
  nanobind::object dequantize(const EagerWeight& weight, qlora_native::DType dtype);
  /// Whether `decode` gives a matrix. On a CPU only a small one: fresh memory costs more in page
  /// faults than the decoding, and the operator has scratch memory and panels.
  static bool can_decode(const EagerWeight& weight, qlora_native::DType dtype);
  /// The matrix for a dense product by torch, or None.
  nanobind::object decode(const EagerWeight& weight, qlora_native::DType dtype);
  /// `linear` with the adapter's product, without dropout. None where a dense product is faster:
  /// there are many rows then.
  nanobind::object lora(nanobind::handle x, nanobind::handle bias, const AdapterObjects& adapter,
                        const EagerWeight& weight);

  /// To be called before a kernel is planned: the workspace depends on the number of threads.
  void share_threads(qlora_native::Device device) const {
    if (device.is_cpu()) torch_.share_num_threads();
  }

  /// Runs `kernel(Workspace, Stream)` without the interpreter's lock; false when there is no memory.
  template <class Kernel>
  bool run(qlora_native::Device device, int64_t workspace_bytes, const Kernel& kernel) {
    qlora_native::Stream stream = qlora_native::Stream::none();
    // On a GPU it is freed before the kernel has run: until then, the allocator gives it to work on
    // this stream alone.
    nanobind::object owner;
    qlora_native::Workspace workspace{nullptr, workspace_bytes};
    if (!torch_.current_stream(device, &stream) || !allocate(device, &workspace, &owner)) {
      return false;
    }
    // A launch waits too: for room in the queue, or for the first load of the kernel.
    const nanobind::gil_scoped_release no_gil;
    kernel(workspace, stream);
    return true;
  }

 private:
  struct Output;

  nanobind::object linear_dx(nanobind::handle dy, const EagerWeight& weight, nanobind::handle onto);

  bool allocate(qlora_native::Device device, qlora_native::Workspace* workspace,
                nanobind::object* owner);
  template <class Kernel>
  nanobind::object run_into_new(const Output& output, const Kernel& kernel);

  Torch& torch_;
  int64_t calls_ = 0;
};
