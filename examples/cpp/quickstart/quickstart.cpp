// Quantizes a matrix to NF4 with double quantization, multiplies by it from the 4-bit codes, and
// compares the product with that of the fp32 matrix.
#include <qlora_native/qlora_native.h>

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <exception>
#include <memory>
#include <vector>

namespace qn = qlora_native;

namespace {

constexpr int64_t kM = 4, kN = 256, kK = 512, kBlockSize = 64;

/// Numbers in [-1, 1) that look random.
std::vector<float> numbers(int64_t count, uint32_t seed) {
  std::vector<float> values(count);
  for (float& value : values) {
    seed = seed * 1664525u + 1013904223u;
    value = static_cast<float>(seed >> 8) / 8388608.0f - 1.0f;
  }
  return values;
}

/// Scratch memory for one call, aligned as it has to be.
class Scratch {
 public:
  explicit Scratch(int64_t bytes)
      : data_(std::aligned_alloc(256, (static_cast<size_t>(bytes) / 256 + 1) * 256), std::free),
        bytes_(bytes) {
    if (!data_) throw std::bad_alloc();
  }
  qn::Workspace get() const { return {data_.get(), bytes_}; }

 private:
  std::unique_ptr<void, decltype(&std::free)> data_;
  int64_t bytes_;
};

/// An [kN, kK] matrix in 4 bits. The views say where it lies; the vectors own the memory.
struct Weight {
  std::vector<uint8_t> packed = std::vector<uint8_t>(qn::packed_bytes(kN * kK));
  std::vector<uint8_t> absmax = std::vector<uint8_t>(qn::num_blocks(kN * kK, kBlockSize));
  std::vector<float> absmax2 = std::vector<float>(qn::num_groups(std::ssize(absmax)));
  float offset = 0;

  qn::MutableQuantizedView mutable_view() {
    return {.packed = packed.data(),
            .absmax = {nullptr, absmax.data(), absmax2.data(), &offset},
            .rows = kN,
            .cols = kK,
            .block_size = kBlockSize,
            .codebook = qn::kNF4};
  }
  qn::QuantizedView view() const {
    return {.packed = packed.data(),
            .absmax = {nullptr, absmax.data(), absmax2.data(), &offset},
            .rows = kN,
            .cols = kK,
            .block_size = kBlockSize,
            .codebook = qn::kNF4};
  }
  size_t bytes() const { return packed.size() + absmax.size() + absmax2.size() * 4 + 4; }
};

void run() {
  const std::vector<float> w = numbers(kN * kK, 1), x = numbers(kM * kK, 2);
  std::vector<float> y(kM * kN);

  Weight weight;
  const qn::QuantizeArgs quantize{
      .input = {w.data(), kN * kK, qn::DType::kFloat32, qn::Device::cpu()},
      .output = weight.mutable_view()};
  qn::quantize_4bit(quantize, Scratch(qn::quantize_4bit_workspace_bytes(quantize)).get(),
                    qn::Stream::none());

  const qn::MatmulArgs matmul{.x = {x.data(), kM, kK, kK, qn::DType::kFloat32, qn::Device::cpu()},
                              .weight = weight.view(),
                              .y = {y.data(), kM, kN, kN, qn::DType::kFloat32, qn::Device::cpu()}};
  qn::matmul_4bit(matmul, Scratch(qn::matmul_4bit_workspace_bytes(matmul)).get(),
                  qn::Stream::none());

  double error = 0, norm = 0;
  for (int64_t m = 0; m < kM; ++m) {
    for (int64_t n = 0; n < kN; ++n) {
      double exact = 0;
      for (int64_t k = 0; k < kK; ++k) exact += double{x[m * kK + k]} * w[n * kK + k];
      error += (y[m * kN + n] - exact) * (y[m * kN + n] - exact);
      norm += exact * exact;
    }
  }
  std::printf("qlora_native %s: %zu bytes of fp32 in %zu of NF4\n", qn::build_info().version,
              w.size() * sizeof(float), weight.bytes());
  std::printf("relative error of the product: %.4f\n", std::sqrt(error / norm));
}

}  // namespace

int main() {
  try {
    run();
  } catch (const std::exception& error) {  // qn::InvalidArgument and its siblings
    std::fprintf(stderr, "error: %s\n", error.what());
    return 1;
  }
}
