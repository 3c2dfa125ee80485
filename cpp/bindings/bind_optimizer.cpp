// Optimizer steps over the parameters of a torch optimizer.
#include <nanobind/nanobind.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <map>
#include <tuple>
#include <utility>
#include <vector>

#include "bindings.h"
#include "optimizer_arguments.h"
#include "qlora_native/codebook.h"
#include "qlora_native/error.h"
#include "qlora_native/optimizer.h"
#include "qlora_native/paged_optimizer.h"

namespace nb = nanobind;
namespace qn = qlora_native;
using namespace nb::literals;

namespace {

/// lr, lr on the device or None, beta1, beta2, eps, weight_decay, maximize.
using Group = std::tuple<double, nb::object, double, double, double, double, bool>;

int code_of(qn::Device device) { return device.is_cpu() ? -1 : device.index; }

class OptimizerStepper {
 public:
  OptimizerStepper(nb::handle exchange_api, nb::sequence dtypes, nb::object current_stream,
                   nb::object empty_bytes)
      : arguments_(TensorReader(exchange_api, std::move(dtypes), std::move(current_stream))),
        empty_bytes_(std::move(empty_bytes)) {}

  std::vector<std::pair<int, int>> read(nb::list groups, nb::dict state, bool allows_host_state) {
    std::vector<std::pair<int, int>> places;
    for (const ParameterPlace& place :
         arguments_.read(std::move(groups), std::move(state), allows_host_state)) {
      places.emplace_back(place.group, place.index);
    }
    return places;
  }

  std::vector<int> devices() const {
    std::vector<int> codes;
    for (const DeviceTensors& known : arguments_.devices()) {
      if (!known.tensors.empty()) codes.push_back(code_of(known.device));
    }
    return codes;
  }

  nb::list params() const { return arguments_.params(); }
  void release() { arguments_.release(); }

  void gradient_norm(int device, nb::handle norm) {
    const DeviceTensors& tensors = find(device);
    std::vector<qn::VectorView> grads;
    grads.reserve(tensors.tensors.size());
    for (const qn::OptimizerTensor& tensor : tensors.tensors) {
      grads.push_back({tensor.grad, tensor.numel, tensor.grad_dtype, tensors.device});
    }
    const qn::GradientNormArgs args{grads, scalar(norm, tensors.device), tensors.device};
    run(tensors.device, qn::gradient_norm_workspace_bytes(args),
        [&](qn::Workspace workspace, qn::Stream stream) {
          qn::gradient_norm(args, workspace, stream);
        });
  }

  void step(int device, const std::string& algorithm, const std::vector<Group>& groups,
            nb::handle grad_scale, nb::handle found_inf, nb::handle grad_norm, double max_norm,
            bool skip_nonfinite, bool stochastic_rounding, uint64_t seed, const qn::PagedPool* pool,
            const std::vector<std::pair<uintptr_t, int64_t>>& allocations, int64_t part_bytes) {
    const DeviceTensors& tensors = find(device);
    std::vector<qn::OptimizerGroup> values;
    for (const auto& [lr, lr_tensor, beta1, beta2, eps, weight_decay, maximize] : groups) {
      values.push_back(
          {lr, scalar(lr_tensor, tensors.device), beta1, beta2, eps, weight_decay, maximize});
    }
    const qn::OptimizerStepArgs args{.algorithm = algorithm_of(algorithm),
                                     .tensors = tensors.tensors,
                                     .groups = values,
                                     .device = tensors.device,
                                     .grad_scale = scalar(grad_scale, tensors.device),
                                     .found_inf = scalar(found_inf, tensors.device),
                                     .grad_norm = scalar(grad_norm, tensors.device),
                                     .max_norm = max_norm,
                                     .skip_nonfinite = skip_nonfinite,
                                     .stochastic_rounding = stochastic_rounding,
                                     .seed = seed};
    std::vector<qn::PagedRange> ranges;
    for (const auto& [address, size_bytes] : allocations) {
      ranges.push_back({reinterpret_cast<void*>(address), size_bytes});
    }
    run(tensors.device, qn::optimizer_step_workspace_bytes(args),
        [&](qn::Workspace workspace, qn::Stream stream) {
          if (pool == nullptr) return qn::optimizer_step(args, workspace, stream);
          qn::paged_optimizer_step(args, *pool, ranges, part_bytes, workspace, stream);
        });
  }

 private:
  static qn::OptimizerAlgorithm algorithm_of(const std::string& wanted) {
    for (const auto known : {qn::OptimizerAlgorithm::kAdamW, qn::OptimizerAlgorithm::kLion}) {
      if (wanted == qn::name(known)) return known;
    }
    throw qn::InvalidArgument("no optimizer named '" + wanted + "'; there are: adamw, lion");
  }

  const DeviceTensors& find(int device) const {
    for (const DeviceTensors& known : arguments_.devices()) {
      if (code_of(known.device) == device) return known;
    }
    throw qn::InvalidArgument("no parameter was read on device " + std::to_string(device));
  }

  /// The address of one fp32 on `device`; null for None.
  float* scalar(nb::handle tensor, qn::Device device) const {
    if (tensor.is_none()) return nullptr;
    TensorFacts facts;
    if (!arguments_.reader().read(tensor, &facts) || facts.numel != 1 || !facts.is_float ||
        facts.dtype != qn::DType::kFloat32 || facts.device != device) {
      throw qn::InvalidArgument("optimizer_step: expected a tensor of one float32 on " +
                                qn::to_string(device));
    }
    return static_cast<float*>(facts.data);
  }

  template <class Operation>
  void run(qn::Device device, int64_t workspace_bytes, const Operation& operation) {
    const qn::Stream stream = arguments_.reader().current_stream(device);
    const qn::Workspace workspace = workspace_for(device, stream, workspace_bytes);
    // A launch waits too: for room in the queue, or for the first load of the kernel.
    const nb::gil_scoped_release no_gil;
    operation(workspace, stream);
  }

  /// Kept for the next step, one for each stream: a stream's work is in order.
  qn::Workspace workspace_for(qn::Device device, qn::Stream stream, int64_t size_bytes) {
    if (size_bytes == 0) return {};
    nb::object& kept = workspaces_[{code_of(device), stream.handle()}];
    TensorFacts facts;
    if (!kept.is_valid() || !arguments_.reader().read(kept, &facts) || facts.numel < size_bytes) {
      kept = empty_bytes_(size_bytes, code_of(device));
      arguments_.reader().read(kept, &facts);
    }
    return {facts.data, facts.numel};
  }

  OptimizerArguments arguments_;
  nb::object empty_bytes_;
  std::map<std::pair<int, void*>, nb::object> workspaces_;
};

}  // namespace

void bind_optimizer(nb::module_& m) {
  m.attr("STATE_BLOCK_SIZE") = qn::kStateBlockSize;
  m.attr("SIGNED_DYNAMIC_ZERO_CODE") = qn::kSignedDynamicZeroCode;
  nb::class_<OptimizerStepper>(m, "OptimizerStepper",
                               "Reads a torch optimizer's tensors and runs its steps.")
      .def(
          "__init__",
          [](OptimizerStepper* self, nb::object exchange_api, nb::sequence dtypes,
             nb::object current_stream, nb::object empty_bytes) {
            new (self) OptimizerStepper(exchange_api, dtypes, current_stream, empty_bytes);
          },
          nb::kw_only(), "exchange_api"_a.none(), "dtypes"_a, "current_stream"_a, "empty_bytes"_a)
      .def("read", &OptimizerStepper::read, "groups"_a, "state"_a, nb::kw_only(),
           "allows_host_state"_a,
           "Reads what the next step takes; returns (group, index) of parameters without state.")
      .def("devices", &OptimizerStepper::devices,
           "The devices of what was read: -1 is the CPU, i >= 0 is CUDA device i.")
      .def("params", &OptimizerStepper::params, "The parameters that were read.")
      .def("release", &OptimizerStepper::release, "Forgets what was read.")
      .def("gradient_norm", &OptimizerStepper::gradient_norm, "device"_a, "norm"_a)
      .def("step", &OptimizerStepper::step, "device"_a, nb::kw_only(), "algorithm"_a, "groups"_a,
           "grad_scale"_a.none(), "found_inf"_a.none(), "grad_norm"_a.none(), "max_norm"_a,
           "skip_nonfinite"_a, "stochastic_rounding"_a, "seed"_a, "pool"_a.none(), "allocations"_a,
           "part_bytes"_a, "With a pool, state lies in its `allocations` (address, bytes).");
}
