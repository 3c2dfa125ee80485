#include "dense.h"

#include <qlora_native/device.h>

#include <algorithm>
#include <bit>
#include <cstring>
#include <stdexcept>
#include <thread>

namespace llama {
namespace {

namespace qn = qlora_native;

float from_bfloat16(uint16_t bits) {
  return std::bit_cast<float>(static_cast<uint32_t>(bits) << 16);
}

float from_float16(uint16_t bits) {
  // Shifted into fp32's fields, the exponent is 112 too small; denormals come out right as well.
  const uint32_t shifted = static_cast<uint32_t>(bits & 0x7FFF) << 13;
  const float magnitude = std::bit_cast<float>(shifted) * 0x1p112f;
  const bool is_finite = (bits & 0x7C00) != 0x7C00;
  const uint32_t wide = is_finite ? std::bit_cast<uint32_t>(magnitude) : (shifted | 0x7F800000u);
  return std::bit_cast<float>(wide | static_cast<uint32_t>(bits & 0x8000) << 16);
}

template <class T>
T element(const std::byte* data, int64_t index) {
  T value;  // a tensor may lie at any address
  std::memcpy(&value, data + index * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

void to_floats(const std::byte* data, qn::DType dtype, int64_t count, float* out) {
  switch (dtype) {
    case qn::DType::kFloat32:
      std::memcpy(out, data, static_cast<size_t>(count) * sizeof(float));
      break;
    case qn::DType::kFloat16:
      for (int64_t i = 0; i < count; ++i) out[i] = from_float16(element<uint16_t>(data, i));
      break;
    case qn::DType::kBFloat16:
      for (int64_t i = 0; i < count; ++i) out[i] = from_bfloat16(element<uint16_t>(data, i));
      break;
  }
}

qn::DType require(const std::string& file, const qn::SafetensorsTensor& tensor,
                  const std::vector<int64_t>& shape) {
  const auto dtype = tensor.float_dtype();
  if (!dtype) {
    throw std::runtime_error(file + ": " + tensor.name + " is " + tensor.dtype +
                             ", expected F32, F16 or BF16");
  }
  if (tensor.shape != shape) {
    throw std::runtime_error(file + ": " + tensor.name + " has shape " +
                             qn::to_string(tensor.shape) + ", expected " + qn::to_string(shape));
  }
  return *dtype;
}

float dot(const float* a, const float* b, int64_t count) {
  // Independent sums, which the compiler puts side by side into vector registers.
  constexpr int64_t kSums = 16;
  float sums[kSums] = {};
  int64_t i = 0;
  for (; i + kSums <= count; i += kSums) {
    for (int64_t s = 0; s < kSums; ++s) sums[s] += a[i + s] * b[i + s];
  }
  float total = 0;
  for (; i < count; ++i) total += a[i] * b[i];
  for (const float sum : sums) total += sum;
  return total;
}

}  // namespace

std::vector<float> load_vector(const qn::SafetensorsCheckpoint& files, const std::string& name,
                               int64_t size) {
  const qn::SafetensorsTensor& tensor = files.at(name);
  std::vector<float> values(static_cast<size_t>(size));
  to_floats(tensor.data.data(), require(files.name(), tensor, {size}), size, values.data());
  return values;
}

DenseMatrix::DenseMatrix(const qn::SafetensorsCheckpoint& files, const std::string& name,
                         int64_t rows, int64_t cols)
    : tensor_(files.at(name)), dtype_(require(files.name(), tensor_, {rows, cols})) {}

void DenseMatrix::read_row(int64_t index, float* out) const {
  const int64_t cols = tensor_.shape[1];
  to_floats(tensor_.data.data() + index * cols * qn::size_bytes(dtype_), dtype_, cols, out);
}

void DenseMatrix::multiply(const Matrix& x, Matrix& y) const {
  const int64_t rows = tensor_.shape[0];
  // A thread costs about as much as a million multiplications.
  const int64_t worth = 1 + rows * tensor_.shape[1] * x.rows / (1 << 20);
  const int64_t threads = std::min<int64_t>(qn::cpu_threads(), worth);
  std::vector<std::jthread> others;
  for (int64_t t = 1; t < threads; ++t) {
    others.emplace_back(
        [&, t] { multiply_rows(x, y, rows * t / threads, rows * (t + 1) / threads); });
  }
  multiply_rows(x, y, 0, rows / threads);
}

void DenseMatrix::multiply_rows(const Matrix& x, Matrix& y, int64_t begin, int64_t end) const {
  std::vector<float> weights(static_cast<size_t>(x.cols));
  for (int64_t n = begin; n < end; ++n) {
    read_row(n, weights.data());
    for (int64_t m = 0; m < x.rows; ++m) y.row(m)[n] = dot(x.row(m), weights.data(), x.cols);
  }
}

}  // namespace llama
