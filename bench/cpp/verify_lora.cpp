#include <vector>

#include "elements.h"
#include "reference.h"
#include "verify.h"

namespace bench {
namespace {

constexpr int64_t kSampledOutputs = 16;
constexpr int64_t kSampledRows = 5;
constexpr int64_t kSampledRanks = 3;

/// The arrays on the host.
struct HostAdapter {
  HostAdapter(const Problem& problem, int64_t m, int64_t rank)
      : weight(problem),
        x(problem.activations(), m * problem.shape().k, problem.dtype()),
        a(problem.adapter().a, rank * problem.shape().k, problem.dtype()),
        b(problem.adapter().b, problem.shape().n * rank, problem.dtype()),
        t(problem.adapter().t, m * rank, problem.dtype()),
        dy(problem.adapter().dy, m * problem.shape().n, problem.dtype()) {}

  HostWeight weight;
  HostArray x, a, b, t, dy;
};

}  // namespace

std::string check_lora_forward(const Problem& problem, int64_t m, int64_t rank) {
  const auto [n, k] = problem.shape();
  const HostAdapter host(problem, m, rank);
  const HostArray y(problem.output(), m * n, problem.dtype());
  for (const int64_t row : spread(m, kSampledRows)) {
    for (int64_t j = 0; j < rank; ++j) {
      ExpectedSum t(problem.dtype());
      for (int64_t i = 0; i < k; ++i) t.add(double{host.x[row * k + i]} * host.a[j * k + i]);
      const int64_t index = row * rank + j;
      if (!t.allows(host.t[index])) return wrong("t", index, host.t[index], t.value());
    }
    for (const int64_t output : spread(n, kSampledOutputs)) {
      ExpectedSum sum(problem.dtype());
      for (int64_t i = 0; i < k; ++i) {
        sum.add(double{host.x[row * k + i]} * host.weight.value(output * k + i));
      }
      for (int64_t j = 0; j < rank; ++j) {
        sum.add(double{kLoraScaling} * host.t[row * rank + j] * host.b[output * rank + j]);
      }
      const int64_t index = row * n + output;
      if (!sum.allows(y[index])) return wrong("output", index, y[index], sum.value());
    }
  }
  return "";
}

std::string check_lora_backward(const Problem& problem, int64_t m, int64_t rank) {
  const auto [n, k] = problem.shape();
  const HostAdapter host(problem, m, rank);
  const auto u = [&, n = n](int64_t row, int64_t j) {
    double sum = 0;
    for (int64_t i = 0; i < n; ++i) sum += double{host.dy[row * n + i]} * host.b[i * rank + j];
    return kLoraScaling * sum;
  };
  const HostArray dx(problem.output(), m * k, problem.dtype());
  for (const int64_t row : spread(m, kSampledRows)) {
    std::vector<double> factors;
    for (int64_t j = 0; j < rank; ++j) factors.push_back(u(row, j));
    for (const int64_t output : spread(k, kSampledOutputs)) {
      ExpectedSum sum(problem.dtype());
      for (int64_t i = 0; i < n; ++i) {
        sum.add(double{host.dy[row * n + i]} * host.weight.value(i * k + output));
      }
      for (int64_t j = 0; j < rank; ++j) {
        sum.add(factors[static_cast<size_t>(j)] * host.a[j * k + output]);
      }
      const int64_t index = row * k + output;
      if (!sum.allows(dx[index])) return wrong("dX", index, dx[index], sum.value());
    }
  }
  const HostArray da(problem.adapter().da, rank * k, problem.dtype());
  const HostArray db(problem.adapter().db, n * rank, problem.dtype());
  for (const int64_t j : spread(rank, kSampledRanks)) {
    std::vector<double> factors;
    for (int64_t row = 0; row < m; ++row) factors.push_back(u(row, j));
    for (const int64_t column : spread(k, kSampledOutputs)) {
      ExpectedSum sum(problem.dtype());
      for (int64_t row = 0; row < m; ++row) {
        sum.add(factors[static_cast<size_t>(row)] * host.x[row * k + column]);
      }
      const int64_t index = j * k + column;
      if (!sum.allows(da[index])) return wrong("dA", index, da[index], sum.value());
    }
    for (const int64_t output : spread(n, kSampledOutputs)) {
      ExpectedSum sum(problem.dtype());
      for (int64_t row = 0; row < m; ++row) {
        sum.add(double{kLoraScaling} * host.dy[row * n + output] * host.t[row * rank + j]);
      }
      const int64_t index = output * rank + j;
      if (!sum.allows(db[index])) return wrong("dB", index, db[index], sum.value());
    }
  }
  return "";
}

}  // namespace bench
