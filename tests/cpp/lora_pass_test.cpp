// lora_forward and lora_backward against fp64 products of the decoded weight.
#include <gtest/gtest.h>

#include <cmath>

#include "support/kernel_runs.h"
#include "support/lora_model.h"
#include "support/problem.h"

namespace qlora_native::testing {
namespace {

/// A row-major matrix of doubles.
struct Matrix {
  int64_t rows = 0;
  int64_t cols = 0;
  std::vector<double> values;

  double at(int64_t row, int64_t col) const {
    return values[static_cast<size_t>(row * cols + col)];
  }
  double& at(int64_t row, int64_t col) { return values[static_cast<size_t>(row * cols + col)]; }
};

Matrix zeros(int64_t rows, int64_t cols) {
  return {rows, cols, std::vector<double>(static_cast<size_t>(rows * cols))};
}

Matrix random_matrix(int64_t rows, int64_t cols, DType dtype, uint32_t seed) {
  return {rows, cols, gaussian(rows * cols, dtype, seed)};
}

Matrix transposed(const Matrix& a) {
  Matrix out = zeros(a.cols, a.rows);
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t j = 0; j < a.cols; ++j) out.at(j, i) = a.at(i, j);
  }
  return out;
}

/// scale * a * b.
Matrix product(const Matrix& a, const Matrix& b, double scale = 1.0) {
  Matrix out = zeros(a.rows, b.cols);
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t j = 0; j < b.cols; ++j) {
      for (int64_t d = 0; d < a.cols; ++d) out.at(i, j) += scale * a.at(i, d) * b.at(d, j);
    }
  }
  return out;
}

Matrix sum(Matrix a, const Matrix& b) {
  for (size_t i = 0; i < a.values.size(); ++i) a.values[i] += b.values[i];
  return a;
}

Matrix dropped(const Dropout& dropout, Matrix a) {
  for (int64_t i = 0; i < a.rows; ++i) {
    for (int64_t j = 0; j < a.cols; ++j) {
      a.at(i, j) *= is_kept(dropout, a.cols, i, j) ? dropout_scale(dropout) : 0.0;
    }
  }
  return a;
}

struct Pass {
  int64_t m = 9;
  int64_t r = 8;
  DType dtype = DType::kFloat32;
  DType parameter_dtype = DType::kFloat32;
  bool has_bias = true;
  float scaling = 0.75f;
  Dropout dropout = {};
  WeightSpec weight{48, 192, 64, kNF4, true};
};

struct PassInputs {
  HostWeight packed;
  Matrix w, x, dy, a, b, bias;
};

PassInputs make_inputs(const Pass& p, uint32_t seed) {
  PassInputs in;
  in.packed = random_weight(p.weight, seed);
  in.w = {p.weight.rows, p.weight.cols, reference_decode(p.weight, in.packed)};
  in.x = random_matrix(p.m, p.weight.cols, p.dtype, seed + 1);
  in.dy = random_matrix(p.m, p.weight.rows, p.dtype, seed + 2);
  in.a = random_matrix(p.r, p.weight.cols, p.dtype, seed + 3);
  in.b = random_matrix(p.weight.rows, p.r, p.dtype, seed + 4);
  in.bias = random_matrix(1, p.weight.rows, p.dtype, seed + 5);
  return in;
}

/// What the passes give; a matrix that was not asked for is empty.
struct Results {
  Matrix t, y, dx, da, db;
};

Results reference(const Pass& p, const PassInputs& in) {
  Results out;
  out.t = product(dropped(p.dropout, in.x), transposed(in.a));
  out.y = sum(product(in.x, transposed(in.w)), product(out.t, transposed(in.b), p.scaling));
  if (p.has_bias) {
    for (int64_t i = 0; i < p.m; ++i) {
      for (int64_t j = 0; j < p.weight.rows; ++j) out.y.at(i, j) += in.bias.at(0, j);
    }
  }
  const Matrix u = product(in.dy, in.b, p.scaling);
  out.dx = sum(product(in.dy, in.w), dropped(p.dropout, product(u, in.a)));
  out.da = product(transposed(u), dropped(p.dropout, in.x));
  out.db = product(transposed(in.dy), out.t, p.scaling);
  return out;
}

/// The largest difference, over the root mean square of what is expected.
double relative_error(const Matrix& actual, const Matrix& expected) {
  EXPECT_EQ(actual.values.size(), expected.values.size());
  double largest = 0;
  double squares = 0;
  for (size_t i = 0; i < expected.values.size(); ++i) {
    const double difference = std::fabs(actual.values[i] - expected.values[i]);
    if (!(difference <= largest)) largest = difference;  // a NaN too
    squares += expected.values[i] * expected.values[i];
  }
  return expected.values.empty()
             ? 0
             : largest / std::sqrt(squares / static_cast<double>(expected.values.size()));
}

/// A matrix on the device.
class DeviceMatrix {
 public:
  DeviceMatrix(Device device, DType dtype, const Matrix& values)
      : device_(device),
        dtype_(dtype),
        rows_(values.rows),
        cols_(values.cols),
        bytes_(device, std::span<const uint8_t>(to_bytes(dtype, values.values))) {}
  /// Poisoned.
  DeviceMatrix(Device device, DType dtype, int64_t rows, int64_t cols)
      : device_(device),
        dtype_(dtype),
        rows_(rows),
        cols_(cols),
        bytes_(device, rows * cols * size_bytes(dtype)) {}

  MutableMatrixView view() { return {bytes_.data(), rows_, cols_, cols_, dtype_, device_}; }
  MatrixView const_view() { return {bytes_.data(), rows_, cols_, cols_, dtype_, device_}; }
  Matrix to_host() const {
    bytes_.expect_guards_intact();
    return {rows_, cols_, from_bytes(dtype_, bytes_.to_host())};
  }

 private:
  Device device_;
  DType dtype_;
  int64_t rows_, cols_;
  DeviceArray<uint8_t> bytes_;
};

/// Runs `operation` with just the workspace that it asks for.
template <class Args>
void run(Device device, const Args& args, int64_t (*workspace_bytes)(const Args&),
         void (*operation)(const Args&, Workspace, Stream)) {
  const TestStream stream(device);
  DeviceArray<uint8_t> workspace(device, workspace_bytes(args));
  operation(args, {workspace.data(), workspace.size()}, stream.get());
  stream.synchronize();
  workspace.expect_guards_intact();
}

struct Wanted {
  bool dx = true;
  bool da = true;
  bool db = true;
  bool t = true;
};

Results run_on(Device device, const Pass& p, const PassInputs& in, Wanted wanted = {}) {
  const int64_t n = p.weight.rows;
  const int64_t k = p.weight.cols;
  DeviceWeight weight(device, p.weight, in.packed);
  DeviceMatrix x(device, p.dtype, in.x);
  DeviceMatrix dy(device, p.dtype, in.dy);
  DeviceMatrix a(device, p.parameter_dtype, in.a);
  DeviceMatrix b(device, p.parameter_dtype, in.b);
  DeviceMatrix bias(device, p.dtype, in.bias);
  DeviceMatrix t(device, p.dtype, p.m, p.r);
  DeviceMatrix y(device, p.dtype, p.m, n);
  DeviceMatrix dx(device, p.dtype, p.m, k);
  DeviceMatrix da(device, p.parameter_dtype, p.r, k);
  DeviceMatrix db(device, p.parameter_dtype, n, p.r);

  LoraForwardArgs forward{.x = x.const_view(),
                          .weight = weight.view(),
                          .bias = {},
                          .a = a.const_view(),
                          .b = b.const_view(),
                          .scaling = p.scaling,
                          .dropout = p.dropout,
                          .t = {},
                          .y = y.view()};
  if (p.has_bias) forward.bias = {bias.const_view().data, n, p.dtype, device};
  if (wanted.t) forward.t = t.view();
  run(device, forward, lora_forward_workspace_bytes, lora_forward);
  Results results;
  results.y = y.to_host();
  if (!wanted.t) return results;
  results.t = t.to_host();

  // What an output that is not wanted needs is left out altogether.
  LoraBackwardArgs backward{};
  backward.dy = dy.const_view();
  backward.scaling = p.scaling;
  backward.dropout = p.dropout;
  if (wanted.dx) {
    backward.dx = dx.view();
    backward.weight = weight.view();
    backward.a = a.const_view();
  }
  if (wanted.dx || wanted.da) backward.b = b.const_view();
  if (wanted.da) {
    backward.da = da.view();
    backward.x = x.const_view();
  }
  if (wanted.db) {
    backward.db = db.view();
    backward.t = t.const_view();
  }
  run(device, backward, lora_backward_workspace_bytes, lora_backward);
  if (wanted.dx) results.dx = dx.to_host();
  if (wanted.da) results.da = da.to_host();
  if (wanted.db) results.db = db.to_host();
  return results;
}

void expect_accurate(const Pass& p, uint32_t seed) {
  const PassInputs in = make_inputs(p, seed);
  const Results expected = reference(p, in);
  // Up to three roundings to the dtype, of values of several times the root mean square, and sums.
  const double bound = 20 * unit_roundoff(p.dtype) + 60 * unit_roundoff(DType::kFloat32);
  for (const Device device : test_devices()) {
    SCOPED_TRACE(::testing::Message() << to_string(device) << " " << name(p.dtype) << " M " << p.m
                                      << " r " << p.r << " p " << p.dropout.p);
    const Results actual = run_on(device, p, in);
    EXPECT_LE(relative_error(actual.t, expected.t), bound) << "t";
    EXPECT_LE(relative_error(actual.y, expected.y), bound) << "y";
    EXPECT_LE(relative_error(actual.dx, expected.dx), bound) << "dx";
    EXPECT_LE(relative_error(actual.da, expected.da), bound) << "da";
    EXPECT_LE(relative_error(actual.db, expected.db), bound) << "db";
  }
}

TEST(LoraPass, IsAccurate) {
  uint32_t seed = 1;
  for (const DType dtype : kAllDTypes) {
    for (const int64_t m : {1, 5, 40}) {
      for (const float probability : {0.0f, 0.2f}) {
        Pass p;
        p.m = m;
        p.dtype = dtype;
        p.parameter_dtype = m == 5 ? dtype : DType::kFloat32;
        p.dropout = {probability, 17, 19};
        p.has_bias = m != 40;
        expect_accurate(p, ++seed);
      }
    }
  }
}

TEST(LoraPass, OddShapes) {
  Pass p;
  p.weight = {33, 99, 64, kFP4, false};
  p.dtype = DType::kBFloat16;
  p.dropout = {0.1f, 1, 2};
  for (const int64_t r : {1, 3, 70}) {
    p.r = r;
    p.m = 12 + r;
    expect_accurate(p, static_cast<uint32_t>(100 + r));
  }
}

TEST(LoraPass, WithoutRowsGradientsAreZero) {
  Pass p;
  p.m = 0;
  for (const Device device : test_devices()) {
    const Results results = run_on(device, p, make_inputs(p, 200));
    EXPECT_EQ(results.da.values, zeros(p.r, p.weight.cols).values);
    EXPECT_EQ(results.db.values, zeros(p.weight.rows, p.r).values);
  }
}

TEST(LoraPass, WithoutARankItIsTheProduct) {
  Pass p;
  p.r = 0;
  expect_accurate(p, 210);
}

TEST(LoraPass, GivesTheSameBitsWhateverElseIsWanted) {
  Pass p;
  p.dtype = DType::kBFloat16;
  p.dropout = {0.3f, 5, 6};
  const PassInputs in = make_inputs(p, 300);
  for (const Device device : test_devices()) {
    const Results all = run_on(device, p, in);
    EXPECT_EQ(run_on(device, p, in, {.t = false}).y.values, all.y.values);
    for (int wanted = 0; wanted < 8; ++wanted) {
      const bool dx = (wanted & 1) != 0;
      const bool da = (wanted & 2) != 0;
      const bool db = (wanted & 4) != 0;
      const Results some = run_on(device, p, in, {.dx = dx, .da = da, .db = db});
      if (dx) {
        EXPECT_EQ(some.dx.values, all.dx.values) << wanted;
      }
      if (da) {
        EXPECT_EQ(some.da.values, all.da.values) << wanted;
      }
      if (db) {
        EXPECT_EQ(some.db.values, all.db.values) << wanted;
      }
    }
  }
}

}  // namespace
}  // namespace qlora_native::testing
