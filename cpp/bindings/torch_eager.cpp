#include "torch_eager.h"

#include <utility>

namespace nb = nanobind;
namespace qn = qlora_native;

namespace {

nb::object interned(const char* text) { return nb::steal(PyUnicode_InternFromString(text)); }

/// A tuple of integers. Throws what Python raises.
nb::object tuple_of(std::span<const int64_t> values) {
  nb::object tuple = nb::steal(PyTuple_New(static_cast<Py_ssize_t>(values.size())));
  if (!tuple.is_valid()) nb::raise_python_error();
  for (size_t i = 0; i < values.size(); ++i) {
    PyObject* const value = PyLong_FromLongLong(values[i]);
    if (value == nullptr) nb::raise_python_error();
    PyTuple_SetItem(tuple.ptr(), static_cast<Py_ssize_t>(i), value);
  }
  return tuple;
}

/// Calls with at most four arguments. Throws what Python raises.
nb::object call(nb::handle function, std::initializer_list<nb::handle> arguments) {
  PyObject* objects[5] = {};
  size_t count = 0;
  for (const nb::handle argument : arguments) objects[++count] = argument.ptr();
  PyObject* const result = PyObject_Vectorcall(function.ptr(), objects + 1,
                                               count | PY_VECTORCALL_ARGUMENTS_OFFSET, nullptr);
  if (result == nullptr) nb::raise_python_error();
  return nb::steal(result);
}

bool is_false(PyObject* object) {
  return object == Py_None || object == Py_False || PyObject_Not(object) == 1;
}

}  // namespace

const dlpack::ExchangeApi* find_exchange_api(nb::handle capsule) {
  if (!PyCapsule_IsValid(capsule.ptr(), dlpack::kExchangeApiCapsule)) return nullptr;
  auto* header = static_cast<const dlpack::ExchangeApiHeader*>(
      PyCapsule_GetPointer(capsule.ptr(), dlpack::kExchangeApiCapsule));
  while (header != nullptr && header->major_version != dlpack::kMajorVersion) {
    header = header->older;
  }
  // The header is the table's first member.
  auto* const api = reinterpret_cast<const dlpack::ExchangeApi*>(header);
  return api != nullptr && api->describe != nullptr && api->current_stream != nullptr ? api
                                                                                      : nullptr;
}

Query::Query(nb::object callable) : callable_(std::move(callable)) {
  if (!PyCFunction_Check(callable_.ptr())) return;
  if ((PyCFunction_GetFlags(callable_.ptr()) & METH_NOARGS) == 0) return;
  function_ = PyCFunction_GetFunction(callable_.ptr());
  self_ = PyCFunction_GetSelf(callable_.ptr());
}

nb::object Query::operator()() const {
  PyObject* const result =
      function_ != nullptr ? function_(self_, nullptr) : PyObject_CallNoArgs(callable_.ptr());
  if (result == nullptr) nb::raise_python_error();
  return nb::steal(result);
}

bool Query::is_true() const { return !is_false((*this)().ptr()); }

TorchFunctions torch_functions(nb::handle lent) {
  return {
      .exchange_api = lent.attr("exchange_api"),
      .tensor_types = lent.attr("tensor_types"),
      .observers = lent.attr("observers"),
      .forward_ad = lent.attr("forward_ad"),
      .is_autocast_enabled = lent.attr("is_autocast_enabled"),
      .is_grad_enabled = lent.attr("is_grad_enabled"),
      .is_neg = lent.attr("is_neg"),
      .num_threads = lent.attr("num_threads"),
      .empty_strided = lent.attr("empty_strided"),
      .device = lent.attr("device"),
      .float_dtypes = lent.attr("float_dtypes"),
      .uint8 = lent.attr("uint8"),
      .codebook = lent.attr("codebook"),
      .linear = lent.attr("linear"),
      .matmul = lent.attr("matmul"),
      .linear_of_rows = lent.attr("linear_of_rows"),
      .mm = lent.attr("mm"),
      .mm_to_float32 = lent.attr("mm_to_float32"),
      .addmm = lent.attr("addmm"),
      .add = lent.attr("add"),
      .mul = lent.attr("mul"),
      .cat = lent.attr("cat"),
      .sum = lent.attr("sum"),
      .narrow = lent.attr("narrow"),
      .to = lent.attr("to"),
      .transpose = lent.attr("transpose"),
      .view = lent.attr("view"),
  };
}

Torch::Torch(const TorchFunctions& functions)
    : api_(find_exchange_api(functions.exchange_api)),
      functions_(functions),
      forward_ad_(nb::borrow<nb::dict>(functions.forward_ad.attr("__dict__"))),
      is_autocast_enabled_(functions.is_autocast_enabled),
      is_grad_enabled_(functions.is_grad_enabled),
      num_threads_(functions.num_threads),
      cpu_device_(functions.device("cpu")),
      empty_keywords_(nb::make_tuple("dtype", "device")),
      addmm_keywords_(nb::make_tuple("beta", "alpha", "out")),
      beta_{nb::int_(0), nb::int_(1)},
      level_name_(interned("_current_level")),
      requires_grad_name_(interned("requires_grad")),
      names_{interned("weight"), interned("weight_absmax"), interned("weight_absmax2"),
             interned("bias")} {
  for (size_t i = 0; i < tensor_types_.size(); ++i) {
    // `functions_` keeps the types alive.
    tensor_types_[i] = nb::object(functions_.tensor_types[i]).ptr();
  }
  for (nb::handle observer : functions_.observers) observers_.emplace_back(nb::borrow(observer));
  for (size_t i = 0; i < float_dtypes_.size(); ++i) float_dtypes_[i] = functions_.float_dtypes[i];
}

bool Torch::is_observed() const {
  for (const Query& observer : observers_) {
    if (observer.is_true()) return true;
  }
  PyObject* const level = PyDict_GetItemWithError(forward_ad_.ptr(), level_name_.ptr());
  return level == nullptr || PyLong_AsLong(level) >= 0;
}

bool Torch::needs_grad(std::initializer_list<nb::handle> tensors) const {
  if (!is_grad_enabled_.is_true()) return false;
  for (const nb::handle tensor : tensors) {
    if (tensor.is_none()) continue;
    const nb::object flag = nb::steal(PyObject_GetAttr(tensor.ptr(), requires_grad_name_.ptr()));
    if (!flag.is_valid()) nb::raise_python_error();
    if (flag.ptr() != Py_False) return true;
  }
  return false;
}

bool Torch::is_exact_tensor(nb::handle object) const {
  auto* const type = reinterpret_cast<PyObject*>(Py_TYPE(object.ptr()));
  return type == tensor_types_[0] || type == tensor_types_[1];
}

bool Torch::describe(nb::handle tensor, dlpack::Tensor* out) const {
  if (api_ == nullptr || !is_exact_tensor(tensor)) return false;
  if (api_->describe(tensor.ptr(), out) != 0) {
    // No strided memory (sparse, meta, a wrapper of a transform), or a dtype that DLPack lacks.
    PyErr_Clear();
    return false;
  }
  if (out->device.type != dlpack::kCpu && out->device.type != dlpack::kCuda) return false;
  if (out->data == nullptr) return numel(*out) == 0;
  out->data = static_cast<char*>(out->data) + out->byte_offset;
  return true;
}

bool Torch::is_negated(nb::handle tensor) const {
  const nb::object result = call(functions_.is_neg, {tensor});
  return result.ptr() != Py_False;
}

const qn::Codebook* Torch::codebook(nb::handle quant_type, nb::handle values,
                                    nb::object* owner) const {
  if (!PyUnicode_Check(quant_type.ptr())) return nullptr;
  if (values.is_none()) {
    for (const qn::Codebook* book : {&qn::kNF4, &qn::kFP4, &qn::kINT4}) {
      if (PyUnicode_CompareWithASCIIString(quant_type.ptr(), qn::name(book->type)) == 0) {
        return book;
      }
    }
    return nullptr;
  }
  try {
    *owner = functions_.codebook(quant_type, values);
    return nb::cast<const qn::Codebook*>(*owner);
  } catch (nb::python_error&) {
    return nullptr;
  }
}

bool Torch::float_dtype(nb::handle dtype, qn::DType* out) const {
  for (size_t i = 0; i < float_dtypes_.size(); ++i) {
    if (dtype.ptr() == float_dtypes_[i].ptr()) {
      *out = static_cast<qn::DType>(i);
      return true;
    }
  }
  return false;
}

bool Torch::current_stream(qn::Device device, qn::Stream* out) const {
  if (device.is_cpu()) {
    *out = qn::Stream::none();
    return true;
  }
  void* handle = nullptr;
  if (api_->current_stream(dlpack::kCuda, device.index, &handle) != 0) {
    PyErr_Clear();
    return false;
  }
  *out = qn::Stream::from_handle(handle);
  return true;
}

void Torch::share_num_threads() const {
  qn::set_cpu_threads(static_cast<int>(PyLong_AsLong(num_threads_().ptr())));
}

nb::object Torch::empty(std::span<const int64_t> shape, qn::DType dtype, qn::Device device) {
  return empty_of(shape, float_dtypes_[static_cast<size_t>(dtype)], device);
}

nb::object Torch::empty_bytes(int64_t size_bytes, qn::Device device) {
  return empty_of({&size_bytes, 1}, functions_.uint8, device);
}

nb::object Torch::linear(nb::handle x, nb::handle weight, nb::handle bias) const {
  return call(functions_.linear, {x, weight, bias});
}

nb::object Torch::matmul(nb::handle a, nb::handle b) const {
  return call(functions_.matmul, {a, b});
}

nb::object Torch::linear_of_rows(nb::handle x, nb::handle weight) const {
  return call(functions_.linear_of_rows, {x, weight});
}

nb::object Torch::mm(nb::handle a, nb::handle b) const { return call(functions_.mm, {a, b}); }

nb::object Torch::mm_to_float32(nb::handle a, nb::handle b, float scaling) const {
  nb::object product = call(functions_.mm_to_float32, {a, b});
  if (scaling != 1.0f) call(functions_.mul, {product, nb::float_(scaling)});
  return product;
}

nb::object Torch::addmm(nb::handle input, nb::handle a, nb::handle b, float alpha, bool adds,
                        nb::handle out) const {
  const nb::object factor = nb::float_(alpha);
  PyObject* const arguments[] = {
      nullptr, input.ptr(), a.ptr(), b.ptr(), beta_[adds ? 1 : 0].ptr(), factor.ptr(), out.ptr()};
  PyObject* const result =
      PyObject_Vectorcall(functions_.addmm.ptr(), arguments + 1, 3 | PY_VECTORCALL_ARGUMENTS_OFFSET,
                          addmm_keywords_.ptr());
  if (result == nullptr) nb::raise_python_error();
  return nb::steal(result);
}

void Torch::add(nb::handle to, nb::handle tensor) const { call(functions_.add, {to, tensor}); }

nb::object Torch::sum_of_rows(nb::handle matrix) const {
  return call(functions_.sum, {matrix, nb::int_(0)});
}

nb::object Torch::as_matrix(nb::handle tensor, int64_t rows, int64_t cols) const {
  return call(functions_.view, {tensor, nb::int_(rows), nb::int_(cols)});
}

nb::object Torch::transposed(nb::handle matrix) const {
  return call(functions_.transpose, {matrix});
}

nb::object Torch::narrowed(nb::handle matrix, int dimension, int64_t start, int64_t length) const {
  return call(functions_.narrow, {matrix, nb::int_(dimension), nb::int_(start), nb::int_(length)});
}

nb::object Torch::cast(nb::handle tensor, qn::DType dtype) const {
  return call(functions_.to, {tensor, float_dtypes_[static_cast<size_t>(dtype)]});
}

nb::object Torch::stacked(const nb::list& matrices) const {
  return call(functions_.cat, {matrices});
}

void* Torch::address(nb::handle tensor) const {
  dlpack::Tensor described;
  return describe(tensor, &described) ? described.data : nullptr;
}

nb::object Torch::empty_of(std::span<const int64_t> shape, nb::handle dtype, qn::Device device) {
  // torch's own allocation, not DLPack's: the result is a tensor like any other, whose memory
  // torch's allocator knows (record_stream, resize_). Of torch's ways this is the shortest.
  constexpr size_t kInline = 8;
  int64_t few[kInline];
  std::vector<int64_t> many;
  int64_t* strides = few;
  if (shape.size() > kInline) {
    many.resize(shape.size());
    strides = many.data();
  }
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i] > 1 ? shape[i] : 1;
  }
  const nb::object sizes = tuple_of(shape);
  const nb::object steps = tuple_of({strides, shape.size()});
  PyObject* const arguments[] = {nullptr, sizes.ptr(), steps.ptr(), dtype.ptr(),
                                 device_object(device).ptr()};
  PyObject* const result =
      PyObject_Vectorcall(functions_.empty_strided.ptr(), arguments + 1,
                          2 | PY_VECTORCALL_ARGUMENTS_OFFSET, empty_keywords_.ptr());
  if (result == nullptr) nb::raise_python_error();
  return nb::steal(result);
}

nb::handle Torch::device_object(qn::Device device) {
  if (device.is_cpu()) return cpu_device_;
  const auto index = static_cast<size_t>(device.index);
  while (cuda_devices_.size() <= index) {
    cuda_devices_.push_back(functions_.device("cuda", cuda_devices_.size()));
  }
  return cuda_devices_[index];
}

bool float_dtype_of(dlpack::DataType dtype, qn::DType* out) {
  if (dtype == dlpack::DataType{dlpack::kFloat, 32, 1}) {
    *out = qn::DType::kFloat32;
  } else if (dtype == dlpack::DataType{dlpack::kFloat, 16, 1}) {
    *out = qn::DType::kFloat16;
  } else if (dtype == dlpack::DataType{dlpack::kBfloat, 16, 1}) {
    *out = qn::DType::kBFloat16;
  } else {
    return false;
  }
  return true;
}

qn::Device device_of(dlpack::Device device) {
  return device.type == dlpack::kCuda ? qn::Device::cuda(device.index) : qn::Device::cpu();
}

int64_t numel(const dlpack::Tensor& tensor) {
  int64_t product = 1;
  for (int i = 0; i < tensor.ndim; ++i) product *= tensor.shape[i];
  return product;
}

bool is_contiguous(const dlpack::Tensor& tensor) {
  int64_t expected = 1;
  for (int i = tensor.ndim - 1; i >= 0; --i) {
    if (tensor.shape[i] == 1) continue;
    if (tensor.strides[i] != expected) return false;
    expected *= tensor.shape[i];
  }
  return true;
}
