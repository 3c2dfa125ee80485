// torch as the extension sees it, without linking it: what tensors are, whether anything watches
// the operations on them, memory for results, the current stream. torch's side is Python callables
// and DLPack's table of C functions, all lent by qlora_native._eager.
#pragma once

#include <nanobind/nanobind.h>

#include <array>
#include <cstdint>
#include <initializer_list>
#include <span>
#include <vector>

#include "dlpack.h"
#include "qlora_native/codebook.h"
#include "qlora_native/device.h"
#include "qlora_native/dtype.h"
#include "qlora_native/stream.h"

/// A callable without arguments, called by its C function where it has one: half the cost.
class Query {
 public:
  explicit Query(nanobind::object callable);
  /// The result. Throws the callable's exception.
  nanobind::object operator()() const;
  /// Whether the result is anything but None, False or 0.
  bool is_true() const;

 private:
  nanobind::object callable_;
  PyCFunction function_ = nullptr;
  PyObject* self_ = nullptr;
};

/// What torch lends. Every name is a name in Python too.
struct TorchFunctions {
  nanobind::object exchange_api;    ///< the capsule, or None where torch has none
  nanobind::sequence tensor_types;  ///< the types that hide nothing: Tensor and Parameter
  nanobind::sequence observers;     ///< callables; true: something must see the operators
  nanobind::object forward_ad;      ///< a module whose `_current_level` is -1 outside forward AD
  nanobind::object is_autocast_enabled;
  nanobind::object is_grad_enabled;
  nanobind::object is_neg;  ///< of a tensor
  nanobind::object num_threads;
  nanobind::object empty_strided;
  nanobind::object device;          ///< (type, index) -> torch.device
  nanobind::sequence float_dtypes;  ///< in the order of qlora_native::DType
  nanobind::object uint8;
  nanobind::object codebook;        ///< (quant_type, values) -> _C.Codebook
  nanobind::object linear;          ///< (x, weight, bias)
  nanobind::object matmul;          ///< (a, b)
  nanobind::object linear_of_rows;  ///< (x, weight)
  nanobind::object mm;              ///< (a, b)
  nanobind::object mm_to_float32;   ///< (a, b)
  nanobind::object addmm;           ///< (input, a, b, beta=, alpha=, out=)
  nanobind::object add;             ///< of a tensor, in place
  nanobind::object mul;             ///< of a tensor, in place
  nanobind::object cat;             ///< (tensors)
  nanobind::object sum;             ///< (tensor, dimension)
  nanobind::object narrow;          ///< of a tensor: (dimension, start, length)
  nanobind::object to;              ///< of a tensor: (dtype)
  nanobind::object transpose;       ///< of a matrix
  nanobind::object view;            ///< of a tensor: (rows, cols)
};

/// The functions that an object has as attributes of these names.
TorchFunctions torch_functions(nanobind::handle lent);

/// Nothing here raises for an argument of the wrong kind: it answers "no", and the caller leaves
/// the call to the code that words errors.
class Torch {
 public:
  explicit Torch(const TorchFunctions& functions);

  bool has_exchange_api() const { return api_ != nullptr; }

  /// Whether a mode, a transform, a tracer or a profiler wants to see operators.
  bool is_observed() const;
  bool is_autocast_enabled() const { return is_autocast_enabled_.is_true(); }
  /// Whether autograd has to see an operation on these tensors. None counts as no tensor.
  bool needs_grad(std::initializer_list<nanobind::handle> tensors) const;

  /// Whether it is a tensor of exactly one of the lent types.
  bool is_exact_tensor(nanobind::handle object) const;
  /// Describes a plain tensor on a CPU or a CUDA device.
  bool describe(nanobind::handle tensor, dlpack::Tensor* out) const;
  /// Whether the tensor's elements are the negatives of what its memory holds.
  bool is_negated(nanobind::handle tensor) const;

  /// Names of nn.Linear4bit's parameters.
  enum class Name { kWeight, kWeightAbsmax, kWeightAbsmax2, kBias };
  PyObject* name(Name name) const { return names_[static_cast<size_t>(name)].ptr(); }

  /// The codebook of a quant_type and, for "custom", its values; null for bad ones. `*owner` keeps
  /// it alive.
  const qlora_native::Codebook* codebook(nanobind::handle quant_type, nanobind::handle values,
                                         nanobind::object* owner) const;
  bool float_dtype(nanobind::handle dtype, qlora_native::DType* out) const;

  bool current_stream(qlora_native::Device device, qlora_native::Stream* out) const;
  void share_num_threads() const;

  /// A new contiguous tensor. Throws torch's exception, out of memory for instance.
  nanobind::object empty(std::span<const int64_t> shape, qlora_native::DType dtype,
                         qlora_native::Device device);
  nanobind::object empty_bytes(int64_t size_bytes, qlora_native::Device device);

  /// torch's products of tensors. They throw torch's exceptions.
  nanobind::object linear(nanobind::handle x, nanobind::handle weight, nanobind::handle bias) const;
  nanobind::object matmul(nanobind::handle a, nanobind::handle b) const;
  /// x W^T, and a b; matrices.
  nanobind::object linear_of_rows(nanobind::handle x, nanobind::handle weight) const;
  nanobind::object mm(nanobind::handle a, nanobind::handle b) const;
  /// scaling a b of 16 bits in fp32, on CUDA devices; not one of what autocast casts.
  nanobind::object mm_to_float32(nanobind::handle a, nanobind::handle b, float scaling) const;
  /// alpha * a b, plus `input` if it `adds`; to `out`, which may be `input`, or None. Matrices.
  /// Without `out` it is one of what autocast casts, as the above are; with it, it is not.
  nanobind::object addmm(nanobind::handle input, nanobind::handle a, nanobind::handle b,
                         float alpha, bool adds, nanobind::handle out) const;
  void add(nanobind::handle to, nanobind::handle tensor) const;
  nanobind::object sum_of_rows(nanobind::handle matrix) const;

  /// torch's views and copies. They throw torch's exceptions.
  nanobind::object as_matrix(nanobind::handle tensor, int64_t rows, int64_t cols) const;
  nanobind::object transposed(nanobind::handle matrix) const;
  nanobind::object narrowed(nanobind::handle matrix, int dimension, int64_t start,
                            int64_t length) const;
  nanobind::object cast(nanobind::handle tensor, qlora_native::DType dtype) const;
  nanobind::object stacked(const nanobind::list& matrices) const;

  /// Where a tensor of ours is; null when that cannot be told.
  void* address(nanobind::handle tensor) const;

 private:
  nanobind::object empty_of(std::span<const int64_t> shape, nanobind::handle dtype,
                            qlora_native::Device device);
  nanobind::handle device_object(qlora_native::Device device);

  const dlpack::ExchangeApi* api_;
  TorchFunctions functions_;
  std::array<PyObject*, 2> tensor_types_;
  std::vector<Query> observers_;
  nanobind::dict forward_ad_;
  Query is_autocast_enabled_;
  Query is_grad_enabled_;
  Query num_threads_;
  std::array<nanobind::object, 3> float_dtypes_;
  nanobind::object cpu_device_;
  std::vector<nanobind::object> cuda_devices_;
  nanobind::object empty_keywords_;
  nanobind::object addmm_keywords_;
  std::array<nanobind::object, 2> beta_;
  nanobind::object level_name_;
  nanobind::object requires_grad_name_;
  std::array<nanobind::object, 4> names_;
};

/// The table of our major version of DLPack in a capsule, or null.
const dlpack::ExchangeApi* find_exchange_api(nanobind::handle capsule);
/// The library's dtype of a DLPack one; false when it is none of ours.
bool float_dtype_of(dlpack::DataType dtype, qlora_native::DType* out);
qlora_native::Device device_of(dlpack::Device device);
int64_t numel(const dlpack::Tensor& tensor);
bool is_contiguous(const dlpack::Tensor& tensor);
