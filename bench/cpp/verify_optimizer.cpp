#include "verify_optimizer.h"

#include <algorithm>
#include <cmath>
#include <set>

#include "elements.h"
#include "qlora_native/codebook.h"

namespace bench {
namespace {

namespace qn = qlora_native;

constexpr int64_t kSampledElements = 16 * qn::kStateBlockSize;
/// fp32 arithmetic, a handful of roundings.
constexpr double kRoundings = 2e-6;

/// `count` elements of T from the machine's memory.
template <class T>
std::vector<T> fetch(Machine& machine, const void* data, int64_t begin, int64_t count) {
  std::vector<T> host(static_cast<size_t>(count));
  machine.copy_to_host(host.data(), static_cast<const T*>(data) + begin,
                       count * static_cast<int64_t>(sizeof(T)));
  return host;
}

std::vector<double> fetch_floats(Machine& machine, const void* data, qn::DType dtype, int64_t begin,
                                 int64_t count) {
  const int64_t size = qn::size_bytes(dtype);
  const HostArray array(
      fetch<uint8_t>(machine, static_cast<const uint8_t*>(data) + begin * size, 0, count * size),
      dtype);
  std::vector<double> values;
  for (int64_t i = 0; i < count; ++i) values.push_back(array[i]);
  return values;
}

double widest_gap(const qn::DynamicMap& map) {
  double widest = 0;
  for (int i = 0; i < 255; ++i) {
    widest = std::max(widest, static_cast<double>(map.values[i + 1]) - map.values[i]);
  }
  return widest;
}

/// What a step makes of one element.
struct Element {
  double param, moment1, moment2;
};

Element stepped(const Element& old, double grad, double t, qn::OptimizerAlgorithm algorithm,
                const qn::OptimizerGroup& group) {
  Element made = old;
  made.param *= 1 - group.lr * group.weight_decay;
  if (algorithm == qn::OptimizerAlgorithm::kLion) {
    const double direction = group.beta1 * old.moment1 + (1 - group.beta1) * grad;
    made.param -= group.lr * (direction > 0 ? 1 : direction < 0 ? -1 : 0);
    made.moment1 = group.beta2 * old.moment1 + (1 - group.beta2) * grad;
    return made;
  }
  made.moment1 += (1 - group.beta1) * (grad - old.moment1);
  made.moment2 = group.beta2 * old.moment2 + (1 - group.beta2) * grad * grad;
  const double size = std::sqrt(made.moment2) / std::sqrt(1 - std::pow(group.beta2, t)) + group.eps;
  made.param -= group.lr / (1 - std::pow(group.beta1, t)) * made.moment1 / size;
  return made;
}

std::string wrong(const std::string& what, size_t index, double got, double expected) {
  return what + " " + std::to_string(index) + " is " + std::to_string(got) + ", expected " +
         std::to_string(expected);
}

}  // namespace

StepCheck::StepCheck(const OptimizerProblem& problem) : problem_(problem) {
  const auto& tensors = problem.tensors();
  for (const size_t tensor : std::set<size_t>{0, tensors.size() / 2, tensors.size() - 1}) {
    const int64_t blocks = qn::num_blocks(tensors[tensor].numel, qn::kStateBlockSize);
    const int64_t last = std::max<int64_t>(0, blocks - kSampledElements / qn::kStateBlockSize);
    for (const int64_t block : std::set<int64_t>{0, last}) {
      before_.push_back(sample(tensor, block * qn::kStateBlockSize));
    }
  }
}

StepCheck::Sample StepCheck::sample(size_t tensor, int64_t begin) const {
  Machine& machine = problem_.machine();
  const qn::OptimizerTensor& from = problem_.tensors()[tensor];
  const int64_t count = std::min(kSampledElements, from.numel - begin);
  Sample made{.tensor = tensor,
              .begin = begin,
              .steps = fetch<float>(machine, from.step, 0, 1).front(),
              .param = fetch_floats(machine, from.param, problem_.dtype(), begin, count),
              .grad = fetch_floats(machine, from.grad, problem_.dtype(), begin, count)};
  const auto moment = [&](const void* state, const float* absmax, const qn::DynamicMap& map,
                          std::vector<double>& values, std::vector<double>& scales) {
    if (!problem_.kind().is_8bit()) {
      values = fetch_floats(machine, state, qn::DType::kFloat32, begin, count);
      return;
    }
    scales = fetch_floats(machine, absmax, qn::DType::kFloat32, begin / qn::kStateBlockSize,
                          qn::num_blocks(count, qn::kStateBlockSize));
    for (const uint8_t code : fetch<uint8_t>(machine, state, begin, count)) {
      values.push_back(map.values[code] * scales[values.size() / qn::kStateBlockSize]);
    }
  };
  moment(from.state1, from.absmax1, qn::kSignedDynamicMap, made.moment1, made.absmax1);
  if (problem_.kind().moments() == 2) {
    moment(from.state2, from.absmax2, qn::kUnsignedDynamicMap, made.moment2, made.absmax2);
  }
  return made;
}

std::string StepCheck::compare() const {
  for (const Sample& before : before_) {
    const std::string problem = compare(before, sample(before.tensor, before.begin));
    if (!problem.empty()) return "tensor " + std::to_string(before.tensor) + ": " + problem;
  }
  return "";
}

std::string StepCheck::compare(const Sample& before, const Sample& after) const {
  const double t = before.steps + 1;
  if (after.steps != t) return wrong("step", 0, after.steps, t);
  const qn::OptimizerGroup& group = problem_.group();
  const bool has_second = problem_.kind().moments() == 2;
  std::vector<double> moment1;
  std::vector<double> moment2;
  for (size_t i = 0; i < before.param.size(); ++i) {
    const Element old{before.param[i], before.moment1[i], has_second ? before.moment2[i] : 0};
    const Element expected = stepped(old, before.grad[i], t, problem_.kind().algorithm, group);
    const double allowed = half_ulp(expected.param, problem_.dtype()) +
                           kRoundings * std::abs(expected.param) + 1e-4 * group.lr;
    if (!(std::abs(after.param[i] - expected.param) <= allowed)) {
      return wrong("parameter", i, after.param[i], expected.param);
    }
    moment1.push_back(expected.moment1);
    if (has_second) moment2.push_back(expected.moment2);
  }
  const std::string first = compare_moment("moment 1", moment1, after.moment1, after.absmax1,
                                           widest_gap(qn::kSignedDynamicMap));
  if (!first.empty() || !has_second) return first;
  return compare_moment("moment 2", moment2, after.moment2, after.absmax2,
                        widest_gap(qn::kUnsignedDynamicMap));
}

std::string StepCheck::compare_moment(const char* name, const std::vector<double>& expected,
                                      const std::vector<double>& got,
                                      const std::vector<double>& absmax, double widest) const {
  for (size_t i = 0; i < expected.size(); ++i) {
    // A code is the nearest, so at most half a gap away.
    const double gap = absmax.empty() ? 0 : 0.5 * widest * absmax[i / qn::kStateBlockSize];
    const double allowed = (gap + std::abs(expected[i])) * kRoundings + gap + 1e-30;
    if (!(std::abs(got[i] - expected[i]) <= allowed)) return wrong(name, i, got[i], expected[i]);
  }
  for (size_t block = 0; block < absmax.size(); ++block) {
    double largest = 0;
    const size_t end = std::min(expected.size(), (block + 1) * qn::kStateBlockSize);
    for (size_t i = block * qn::kStateBlockSize; i < end; ++i) {
      largest = std::max(largest, std::abs(expected[i]));
    }
    if (!(std::abs(absmax[block] - largest) <= kRoundings * largest)) {
      return wrong(std::string("absmax of ") + name, block, absmax[block], largest);
    }
  }
  return "";
}

}  // namespace bench
