// Wrong arguments of the adapters' operations: the message holds the values, no output is touched.
#include <gtest/gtest.h>

#include <functional>
#include <limits>

#include "support/kernel_runs.h"
#include "support/problem.h"

namespace qlora_native::testing {
namespace {

constexpr int64_t kM = 3;
constexpr int64_t kN = 6;
constexpr int64_t kK = 64;
constexpr int64_t kR = 4;
constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

/// The arrays of every operation, fp32 and dense.
struct Arrays {
  explicit Arrays(Device where)
      : device(where),
        weight(where, spec, random_weight(spec, 1)),
        x(where, kM * kK),
        dy(where, kM * kN),
        t(where, kM * kR),
        a(where, kR * kK),
        b(where, kN * kR),
        bias(where, kN),
        out(where, 4096),
        workspace(where, 1 << 16) {}

  MatrixView in(DeviceArray<float>& array, int64_t rows, int64_t cols) const {
    return {array.data(), rows, cols, cols, DType::kFloat32, device};
  }
  MutableMatrixView output(int64_t rows, int64_t cols) {
    return {out.data(), rows, cols, cols, DType::kFloat32, device};
  }

  LoraProjectArgs project() {
    return {in(x, kM, kK), in(a, kR, kK), false, 1.0f, {}, output(kM, kR)};
  }
  LoraUpdateArgs update() {
    return {in(t, kM, kR), in(b, kN, kR), false, 1.0f, {}, output(kM, kN)};
  }
  LoraGradientArgs gradient() {
    return {in(t, kM, kR), in(x, kM, kK), 1.0f, {}, false, output(kR, kK)};
  }
  LoraForwardArgs forward() {
    return {.x = in(x, kM, kK),
            .weight = weight.view(),
            .bias = {bias.data(), kN, DType::kFloat32, device},
            .a = in(a, kR, kK),
            .b = in(b, kN, kR),
            .scaling = 1.0f,
            .dropout = {},
            .t = {out.data() + 1024, kM, kR, kR, DType::kFloat32, device},
            .y = output(kM, kN)};
  }
  LoraBackwardArgs backward() {
    return {.dy = in(dy, kM, kN),
            .x = in(x, kM, kK),
            .t = in(t, kM, kR),
            .weight = weight.view(),
            .a = in(a, kR, kK),
            .b = in(b, kN, kR),
            .scaling = 1.0f,
            .dropout = {},
            .dx = output(kM, kK),
            .da = {out.data() + 1024, kR, kK, kK, DType::kFloat32, device},
            .db = {out.data() + 2048, kN, kR, kR, DType::kFloat32, device}};
  }

  const WeightSpec spec{kN, kK, 64, kNF4, false};
  Device device;
  DeviceWeight weight;
  DeviceArray<float> x, dy, t, a, b, bias, out;
  DeviceArray<uint8_t> workspace;
};

void expect_message(const std::function<void()>& call, const std::vector<std::string>& words) {
  try {
    call();
    ADD_FAILURE() << "accepted; expected a complaint about " << ::testing::PrintToString(words);
  } catch (const InvalidArgument& error) {
    const std::string message = error.what();
    for (const std::string& word : words) {
      EXPECT_NE(message.find(word), std::string::npos)
          << "'" << word << "' is missing from: " << message;
    }
  }
}

/// Changes good arguments, and expects both functions of the operation to refuse them.
template <class Args>
class Rejects {
 public:
  using Make = Args (Arrays::*)();
  using Run = void (*)(const Args&, Workspace, Stream);
  using Count = int64_t (*)(const Args&);

  Rejects(Make make, Run run, Count count) : make_(make), run_(run), count_(count) {}

  void operator()(const std::function<void(Args&)>& change,
                  const std::vector<std::string>& words) const {
    for (const Device device : test_devices()) {
      Arrays arrays(device);
      Args args = (arrays.*make_)();
      change(args);
      const Workspace workspace{arrays.workspace.data(), arrays.workspace.size()};
      expect_message([&] { run_(args, workspace, TestStream(device).get()); }, words);
      expect_message([&] { count_(args); }, words);
      EXPECT_TRUE(arrays.out.is_untouched());
    }
  }

  /// A workspace that is a byte too small, and one that is null.
  void short_workspaces() const {
    for (const Device device : test_devices()) {
      Arrays arrays(device);
      const Args args = (arrays.*make_)();
      const int64_t needed = count_(args);
      if (needed == 0) continue;
      for (const Workspace& workspace :
           {Workspace{arrays.workspace.data(), needed - 1}, Workspace{nullptr, needed}}) {
        expect_message([&] { run_(args, workspace, TestStream(device).get()); },
                       {"workspace", std::to_string(workspace.size_bytes), std::to_string(needed)});
      }
      EXPECT_TRUE(arrays.out.is_untouched());
    }
  }

 private:
  Make make_;
  Run run_;
  Count count_;
};

TEST(LoraValidation, Project) {
  const Rejects<LoraProjectArgs> rejects(&Arrays::project, lora_project,
                                         lora_project_workspace_bytes);
  rejects(
      [](auto& a) {
        a.factor.cols = 63;
        a.factor.row_stride = 63;
      },
      {"lora_project", "factor", "4 x 63", "4 x 64"});
  rejects([](auto& a) { a.factor_transposed = true; }, {"4 x 64", "64 x 4"});
  rejects([](auto& a) { a.t.rows = 2; }, {"t is 2 x 4", "3 x 4"});
  rejects([](auto& a) { a.t.dtype = DType::kBFloat16; }, {"float32", "t is bfloat16"});
  rejects([](auto& a) { a.factor.dtype = DType::kFloat16; }, {"factor is float16", "or float32"});
  rejects([](auto& a) { a.x.dtype = static_cast<DType>(5); }, {"dtype", "5"});
  rejects([](auto& a) { a.x.data = nullptr; }, {"x is null", "192"});
  rejects([](auto& a) { a.x.row_stride = 10; }, {"row stride 10"});
  rejects([](auto& a) { a.x.rows = -1; }, {"-1"});
  rejects([](auto& a) { a.x.row_stride = int64_t{1} << 62; }, {"x's 3 rows", "overflow"});
  rejects([](auto& a) { a.factor.device = Device::cuda(7); }, {"factor is on cuda:7"});
  rejects([](auto& a) { a.scaling = kNan; }, {"scaling", "nan"});
  rejects([](auto& a) { a.dropout.p = 1.5f; }, {"dropout", "1.5"});
  rejects([](auto& a) { a.dropout.p = kNan; }, {"dropout", "nan"});
  rejects.short_workspaces();
}

TEST(LoraValidation, Update) {
  const Rejects<LoraUpdateArgs> rejects(&Arrays::update, lora_update, lora_update_workspace_bytes);
  rejects([](auto& a) { a.factor.rows = 5; }, {"lora_update", "factor", "5 x 4", "6 x 4"});
  rejects([](auto& a) { a.factor_transposed = true; }, {"6 x 4", "4 x 6"});
  rejects([](auto& a) { a.t.rows = 2; }, {"t is 2 x 4", "3 x 4"});
  rejects([](auto& a) { a.t.dtype = DType::kFloat16; }, {"t is float16"});
  rejects([](auto& a) { a.y.data = nullptr; }, {"y is null"});
  rejects([](auto& a) { a.y.device = Device::cuda(7); }, {"cuda:7"});
  rejects([](auto& a) { a.dropout.p = -0.1f; }, {"dropout", "-0.1"});
  rejects([](auto& a) { a.scaling = std::numeric_limits<float>::infinity(); }, {"inf"});
  rejects.short_workspaces();
}

TEST(LoraValidation, Gradient) {
  const Rejects<LoraGradientArgs> rejects(&Arrays::gradient, lora_gradient,
                                          lora_gradient_workspace_bytes);
  rejects([](auto& a) { a.transposed = true; }, {"lora_gradient", "grad is 4 x 64", "64 x 4"});
  rejects([](auto& a) { a.s.rows = 2; }, {"s is 2 x 4", "3 x 4"});
  rejects([](auto& a) { a.s.dtype = DType::kFloat16; }, {"s is float16"});
  rejects([](auto& a) { a.grad.dtype = DType::kFloat16; }, {"grad is float16"});
  rejects([](auto& a) { a.grad.row_stride = 5; }, {"row stride 5"});
  rejects([](auto& a) { a.v.data = nullptr; }, {"v is null"});
  rejects([](auto& a) { a.dropout.p = 2.0f; }, {"dropout", "2"});
  rejects.short_workspaces();
}

TEST(LoraValidation, Forward) {
  const Rejects<LoraForwardArgs> rejects(&Arrays::forward, lora_forward,
                                         lora_forward_workspace_bytes);
  rejects([](auto& a) { a.weight.cols = 128; }, {"lora_forward", "6 x 128", "6 x 64"});
  rejects([](auto& a) { a.weight.block_size = 65; }, {"block_size 65"});
  rejects([](auto& a) { a.weight.device = Device::cuda(3); }, {"weight is on cuda:3"});
  rejects([](auto& a) { a.a.cols = 63; }, {"a is 4 x 63", "4 x 64"});
  rejects([](auto& a) { a.b.rows = 5; }, {"b is 5 x 4", "6 x 4"});
  rejects([](auto& a) { a.b.dtype = DType::kBFloat16; }, {"b is bfloat16"});
  rejects([](auto& a) { a.t.cols = 3; }, {"t is 3 x 3", "3 x 4"});
  rejects([](auto& a) { a.y.cols = 5; }, {"y is 3 x 5", "3 x 6"});
  rejects([](auto& a) { a.bias.size = 7; }, {"bias", "7", "6"});
  rejects([](auto& a) { a.bias.dtype = DType::kFloat16; }, {"bias is float16"});
  rejects([](auto& a) { a.scaling = kNan; }, {"scaling"});
  rejects.short_workspaces();
}

TEST(LoraValidation, Backward) {
  const Rejects<LoraBackwardArgs> rejects(&Arrays::backward, lora_backward,
                                          lora_backward_workspace_bytes);
  rejects([](auto& a) { a.dy.cols = 5; }, {"lora_backward", "b is 6 x 4", "5 x 4"});
  rejects([](auto& a) { a.weight.rows = 7; }, {"7 x 64", "6 x 64"});
  rejects([](auto& a) { a.a.rows = 3; }, {"a is 3 x 64", "4 x 64"});
  rejects([](auto& a) { a.x.rows = 2; }, {"x is 2 x 64", "3 x 64"});
  rejects([](auto& a) { a.t.rows = 2; }, {"t is 2 x 4", "3 x 4"});
  rejects([](auto& a) { a.dx.cols = 63; }, {"6 x 64", "6 x 63"});
  rejects([](auto& a) { a.da.rows = 3; }, {"da is 3 x 64", "4 x 64"});
  rejects([](auto& a) { a.db.dtype = DType::kFloat16; }, {"db is float16"});
  rejects([](auto& a) { a.dropout.p = kNan; }, {"dropout"});
  rejects.short_workspaces();
}

TEST(LoraValidation, AKernelThatDeclinesLeavesTheOthersUnrun) {
  for (const std::string& kernel : usable_kernels(Op::kMatmul4bit, Device::cpu())) {
    if (!kernel.starts_with("gemv")) continue;
    const WeightSpec odd{kN, 99, 64, kNF4, false};
    DeviceWeight weight(Device::cpu(), odd, random_weight(odd, 2));
    Arrays arrays(Device::cpu());
    DeviceArray<float> x(Device::cpu(), kM * 99);
    DeviceArray<float> a(Device::cpu(), kR * 99);
    LoraForwardArgs args = arrays.forward();
    args.weight = weight.view();
    args.x = arrays.in(x, kM, 99);
    args.a = arrays.in(a, kR, 99);
    const ForcedKernel forced(Op::kMatmul4bit, DeviceType::kCpu, kernel);
    const Workspace workspace{arrays.workspace.data(), arrays.workspace.size()};
    EXPECT_THROW(lora_forward(args, workspace, Stream::none()), Unsupported);
    EXPECT_TRUE(arrays.out.is_untouched()) << "t was written before the product was refused";
  }
}

}  // namespace
}  // namespace qlora_native::testing
