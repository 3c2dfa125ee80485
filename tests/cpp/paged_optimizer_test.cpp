// Steps over paged state give the bits of steps over state on the device, however they are cut.
#include "qlora_native/paged_optimizer.h"

#include <gtest/gtest.h>

#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "support/kernel_runs.h"
#include "support/optimizer_model.h"

namespace qlora_native::testing {
namespace {

constexpr int64_t kBudget = 1 << 18;

const std::vector<Parameter::Spec>& specs() {
  static const std::vector<Parameter::Spec> specs = {
      {20000},
      {300},
      {1},
      {0},
      {5000, DType::kBFloat16, DType::kFloat32, StateFormat::kFloat32, true},
      {9000, DType::kFloat32, DType::kFloat32, StateFormat::kDynamic8bit},
      {777, DType::kFloat16, DType::kFloat16, StateFormat::kDynamic8bit, true}};
  return specs;
}

std::vector<PagedPool> pools(Device device) {
  std::vector<PagedPool> pools;
  for (const Backing backing : {Backing::kManaged, Backing::kPinned, Backing::kHost}) {
    if ((backing == Backing::kHost) != device.is_cpu()) continue;
    if (backing == Backing::kManaged && automatic_backing(device).backing != backing) continue;
    pools.emplace_back(
        PagedPoolOptions{.device = device, .backing = backing, .device_budget_bytes = kBudget});
  }
  return pools;
}

/// The states of a model's tensors in a pool: of each tensor its moments in one allocation, its
/// scales in another, and the master on the device.
class PagedState {
 public:
  PagedState(const PagedPool& pool, const std::vector<OptimizerTensor>& tensors, Stream stream)
      : tensors_(tensors), stream_(stream) {
    for (OptimizerTensor& tensor : tensors_) {
      const bool is_float = tensor.state_format == StateFormat::kFloat32;
      const int64_t bytes = tensor.numel * (is_float ? 4 : 1);
      const int64_t scales = is_float ? 0 : (tensor.numel + 255) / 256 * 4;
      uint8_t* const moments = allocate(pool, 2 * bytes, is_float ? 0 : 127);
      tensor.state1 = moments;
      tensor.state2 = moments + bytes;
      if (is_float) continue;
      std::memset(tensor.state2, 0, static_cast<size_t>(bytes));
      tensor.absmax1 = reinterpret_cast<float*>(allocate(pool, 2 * scales, 0));
      tensor.absmax2 = tensor.absmax1 + scales / 4;
    }
  }

  const std::vector<OptimizerTensor>& tensors() const { return tensors_; }
  std::vector<PagedRange> allocations() const {
    std::vector<PagedRange> ranges;
    for (const PagedBuffer& buffer : buffers_) {
      if (buffer.size_bytes() > 0) ranges.push_back(buffer.range());
    }
    return ranges;
  }
  std::vector<std::vector<uint8_t>> contents(PagedPool pool) const {
    std::vector<std::vector<uint8_t>> result;
    for (const PagedRange& range : allocations()) {
      const auto* const data = static_cast<const uint8_t*>(pool.host_view(range, stream_));
      result.emplace_back(data, data + range.size_bytes);
    }
    return result;
  }

 private:
  uint8_t* allocate(const PagedPool& pool, int64_t bytes, int value) {
    buffers_.emplace_back(pool, bytes, stream_);
    if (bytes > 0) std::memset(buffers_.back().data(), value, static_cast<size_t>(bytes));
    return static_cast<uint8_t*>(buffers_.back().data());
  }

  std::vector<OptimizerTensor> tensors_;
  std::vector<PagedBuffer> buffers_;
  Stream stream_;
};

/// Five steps; the bytes of everything afterwards.
std::vector<std::vector<uint8_t>> train(Device device, PagedPool pool, int64_t part_bytes) {
  Model model(device, specs(), OptimizerAlgorithm::kAdamW);
  const TestStream stream(device);
  const PagedState state(pool, model.tensors(), stream.get());
  const std::vector<PagedRange> allocations = state.allocations();
  const OptimizerGroup group{.lr = 0.01, .weight_decay = 0.1};
  OptimizerStepArgs args;
  args.tensors = state.tensors();
  args.groups = {&group, 1};
  args.device = device;
  args.stochastic_rounding = true;
  const int64_t bytes = optimizer_step_workspace_bytes(args);
  DeviceArray<uint8_t> workspace(device, bytes);
  for (int i = 0; i < 5; ++i) {
    paged_optimizer_step(args, pool, allocations, part_bytes, {workspace.data(), bytes},
                         stream.get());
  }
  stream.synchronize();
  std::vector<std::vector<uint8_t>> result = state.contents(pool);
  for (size_t i = 0; i < specs().size(); ++i) {
    std::vector<std::vector<uint8_t>> contents = model[i].contents();
    result.push_back(contents.front());
    EXPECT_EQ(model[i].step(), 5.0f);
  }
  model.expect_guards_intact();
  workspace.expect_guards_intact();
  return result;
}

TEST(PagedOptimizerStep, IsTheSameWhereverStateLiesAndHoweverItIsCut) {
  const auto expected = train(Device::cpu(), pools(Device::cpu()).front(), int64_t{1} << 30);
  for (const Device device : test_devices()) {
    for (const PagedPool& pool : pools(device)) {
      for (const int64_t part_bytes : {int64_t{1}, int64_t{5000}, kBudget / 8}) {
        EXPECT_EQ(train(device, pool, part_bytes), expected)
            << to_string(device) << ' ' << name(pool.backing()) << ' ' << part_bytes;
      }
      EXPECT_EQ(pool.stats().used_bytes, 0);
    }
  }
}

TEST(PagedOptimizerStep, StateOutsideOfThePoolStaysWhereItIs) {
  const PagedPool pool = pools(Device::cpu()).front();
  Model plain(Device::cpu(), specs(), OptimizerAlgorithm::kAdamW);
  Model model(Device::cpu(), specs(), OptimizerAlgorithm::kAdamW);
  plain.step();
  model.step([&](OptimizerStepArgs* args) {
    const int64_t bytes = optimizer_step_workspace_bytes(*args);
    DeviceArray<uint8_t> workspace(Device::cpu(), bytes);
    paged_optimizer_step(*args, pool, {}, 1, {workspace.data(), bytes}, Stream::none());
    args->tensors = {};  // nothing is left to do
  });
  EXPECT_EQ(model.contents(), plain.contents());
}

TEST(PagedOptimizerStep, WrongArgumentsAreRefused) {
  const PagedPool pool = pools(Device::cpu()).front();
  OptimizerStepArgs args;
  EXPECT_THROW(paged_optimizer_step(args, pool, {}, 0, {}, Stream::none()), InvalidArgument);
  args.device = Device::cuda(0);
  EXPECT_THROW(paged_optimizer_step(args, pool, {}, 1, {}, Stream::none()), InvalidArgument);
  Model model(Device::cpu(), {{300}}, OptimizerAlgorithm::kAdamW);
  const std::vector<OptimizerTensor> tensors = model.tensors();
  const PagedRange foreign{tensors[0].state1, 1200};
  const OptimizerGroup group;
  args = {.algorithm = OptimizerAlgorithm::kAdamW,
          .tensors = tensors,
          .groups = {&group, 1},
          .device = Device::cpu()};
  const auto before = model.contents();
  EXPECT_THROW(paged_optimizer_step(args, pool, {&foreign, 1}, 1 << 20, {}, Stream::none()),
               InvalidArgument);
  const PagedRange negative{tensors[0].state1, -1}, nowhere{nullptr, 1200};
  const PagedRange short_one{tensors[0].state1, 1199};
  for (const PagedRange& wrong : {negative, nowhere, short_one}) {
    EXPECT_THROW(paged_optimizer_step(args, pool, {&wrong, 1}, 1 << 20, {}, Stream::none()),
                 InvalidArgument);
  }
  EXPECT_EQ(model.contents(), before);
}

}  // namespace
}  // namespace qlora_native::testing
