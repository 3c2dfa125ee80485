#include "optimizer_arguments.h"

#include <nanobind/stl/string.h>

#include <utility>

#include "qlora_native/codebook.h"

namespace nb = nanobind;
namespace qn = qlora_native;

namespace {

nb::object interned(const char* text) { return nb::steal(PyUnicode_InternFromString(text)); }

/// A value of a dict, or an invalid handle. No default is made up for a missing one.
nb::handle look_up(nb::handle dict, nb::handle key) {
  PyObject* const value = PyDict_GetItemWithError(dict.ptr(), key.ptr());
  if (value == nullptr && PyErr_Occurred() != nullptr) nb::raise_python_error();
  return value;
}

std::string text_of(nb::handle object) { return nb::cast<std::string>(nb::str(object)); }

}  // namespace

OptimizerArguments::OptimizerArguments(TensorReader reader)
    : reader_(std::move(reader)),
      grad_name_(interned("grad")),
      params_name_(interned("params")),
      local_name_(interned("_local_tensor")),
      step_key_(interned("step")),
      moment_key_(interned("exp_avg")),
      square_key_(interned("exp_avg_sq")),
      moment_absmax_key_(interned("exp_avg_absmax")),
      square_absmax_key_(interned("exp_avg_sq_absmax")),
      master_key_(interned("master")) {}

void OptimizerArguments::refuse(const Parameter& parameter, const std::string& problem) const {
  std::string label = "parameter " + std::to_string(parameter.place.index) + " of group " +
                      std::to_string(parameter.place.group);
  if (parameter.group.contains("param_names")) {
    label += " (" + text_of(parameter.group["param_names"][parameter.place.index]) + ")";
  }
  throw nb::value_error((label + ": " + problem).c_str());
}

bool OptimizerArguments::is_wrapper(nb::handle tensor) {
  // Asked of the type, and once: an attribute that is not there costs an exception.
  const nb::handle type = tensor.type();
  for (const Kind& kind : kinds_) {
    if (kind.type.is(type)) return kind.is_wrapper;
  }
  kinds_.push_back({nb::borrow(type), nb::hasattr(type, local_name_)});
  return kinds_.back().is_wrapper;
}

nb::object OptimizerArguments::local_part(nb::handle tensor) {
  // A DTensor's shard is updated where it lies. What the DTensor says of its own memory is wrong: an
  // address of nothing, plus an offset.
  return is_wrapper(tensor) ? nb::object(tensor.attr(local_name_)) : nb::borrow(tensor);
}

TensorFacts OptimizerArguments::read_grad(const Parameter& parameter, nb::handle grad) {
  TensorFacts facts;
  nb::object owner = local_part(grad);
  if (!reader_.read(owner, &facts)) {
    refuse(parameter, "its gradient is " + text_of(grad.attr("layout")) + " on " +
                          text_of(grad.attr("device")) +
                          "; only strided ones on cpu and cuda devices are supported");
  }
  if (!facts.is_contiguous) {
    owner = owner.attr("contiguous")();
    reader_.read(owner, &facts);
  }
  if (facts.device != parameter.facts.device || facts.numel != parameter.facts.numel) {
    refuse(parameter, "it has " + std::to_string(parameter.facts.numel) + " elements on " +
                          qn::to_string(parameter.facts.device) + ", its gradient " +
                          std::to_string(facts.numel) + " on " + qn::to_string(facts.device));
  }
  if (!facts.is_float ||
      (facts.dtype != parameter.facts.dtype && facts.dtype != qn::DType::kFloat32)) {
    refuse(parameter, std::string("it is ") + qn::name(parameter.facts.dtype) + ", its gradient " +
                          text_of(grad.attr("dtype")));
  }
  owned_.push_back(std::move(owner));
  return facts;
}

TensorFacts OptimizerArguments::read_state(const Parameter& parameter, nb::handle state,
                                           nb::handle key, int64_t count) {
  const nb::handle value = look_up(state, key);
  TensorFacts facts;
  if (!value.is_valid() || !reader_.read(local_part(value), &facts)) {
    refuse(parameter, "its state has no tensor '" + text_of(key) + "'");
  }
  const bool is_in_place = facts.device == parameter.facts.device ||
                           (allows_host_state_ && facts.device.is_cpu() && !key.is(step_key_));
  if (facts.numel != count || !is_in_place || !facts.is_contiguous ||
      !(facts.is_uint8 || (facts.is_float && facts.dtype == qn::DType::kFloat32))) {
    refuse(parameter, "'" + text_of(key) + "' of its state is " + text_of(value.attr("dtype")) +
                          " with " + std::to_string(facts.numel) + " elements on " +
                          qn::to_string(facts.device) + ", expected " + std::to_string(count) +
                          " contiguous ones on " + qn::to_string(parameter.facts.device));
  }
  return facts;
}

qn::OptimizerTensor OptimizerArguments::make_tensor(const Parameter& parameter,
                                                    const TensorFacts& grad, nb::handle state) {
  const int64_t numel = parameter.facts.numel;
  const int64_t blocks = qn::num_blocks(numel, qn::kStateBlockSize);
  const auto floats = [&](nb::handle key, int64_t count) {
    const TensorFacts facts = read_state(parameter, state, key, count);
    if (!facts.is_float) refuse(parameter, "'" + text_of(key) + "' of its state is uint8");
    return static_cast<float*>(facts.data);
  };
  const TensorFacts moment = read_state(parameter, state, moment_key_, numel);
  qn::OptimizerTensor tensor{.param = parameter.facts.data,
                             .grad = grad.data,
                             .state1 = moment.data,
                             .step = floats(step_key_, 1),
                             .numel = numel,
                             .group = parameter.place.group,
                             .param_dtype = parameter.facts.dtype,
                             .grad_dtype = grad.dtype};
  if (moment.is_uint8) {
    tensor.state_format = qn::StateFormat::kDynamic8bit;
    tensor.absmax1 = floats(moment_absmax_key_, blocks);
  }
  if (look_up(state, square_key_).is_valid()) {
    const TensorFacts square = read_state(parameter, state, square_key_, numel);
    if (square.is_uint8 != moment.is_uint8) {
      refuse(parameter, "one moment of its state is 8-bit, the other is not");
    }
    tensor.state2 = square.data;
    if (square.is_uint8) tensor.absmax2 = floats(square_absmax_key_, blocks);
  }
  if (look_up(state, master_key_).is_valid()) tensor.master = floats(master_key_, numel);
  return tensor;
}

void OptimizerArguments::add(qn::Device device, const qn::OptimizerTensor& tensor) {
  for (DeviceTensors& known : devices_) {
    if (known.device == device) {
      known.tensors.push_back(tensor);
      return;
    }
  }
  devices_.push_back({device, {tensor}});
}

std::vector<ParameterPlace> OptimizerArguments::read(nb::list groups, nb::dict state,
                                                     bool allows_host_state) {
  release();
  allows_host_state_ = allows_host_state;
  std::vector<ParameterPlace> without_state;
  uint32_t number = 0;
  for (size_t g = 0; g < groups.size(); ++g) {
    const auto group = nb::cast<nb::dict>(groups[g]);
    const auto members = nb::cast<nb::list>(nb::borrow(look_up(group, params_name_)));
    for (size_t i = 0; i < members.size(); ++i, ++number) {
      nb::object object = members[i];
      const nb::object grad = nb::steal(PyObject_GetAttr(object.ptr(), grad_name_.ptr()));
      if (!grad.is_valid()) nb::raise_python_error();
      if (grad.is_none()) continue;
      Parameter parameter{group, {static_cast<int32_t>(g), static_cast<int32_t>(i)}, object, {}};
      if (is_wrapper(object)) owned_.push_back(local_part(object));
      if (!reader_.read(is_wrapper(object) ? owned_.back() : object, &parameter.facts)) {
        refuse(parameter, "it is " + text_of(object.attr("layout")) + " on " +
                              text_of(object.attr("device")) +
                              "; only strided ones on cpu and cuda devices are supported");
      }
      if (!parameter.facts.is_float) {
        refuse(parameter, "it is " + text_of(object.attr("dtype")) +
                              ", expected float32, float16 or bfloat16");
      }
      if (!parameter.facts.is_contiguous) {
        refuse(parameter,
               "it is not contiguous: replace it with its .contiguous() before the "
               "optimizer is made");
      }
      const TensorFacts grad_facts = read_grad(parameter, grad);
      const nb::handle own_state = look_up(state, object);
      if (!own_state.is_valid() || PyDict_Size(own_state.ptr()) == 0) {
        without_state.push_back(parameter.place);
        continue;
      }
      qn::OptimizerTensor tensor = make_tensor(parameter, grad_facts, own_state);
      tensor.random_stream = number;
      add(parameter.facts.device, tensor);
      params_.append(object);
    }
  }
  return without_state;
}

void OptimizerArguments::release() {
  // The vectors keep their memory for the next step.
  for (DeviceTensors& known : devices_) known.tensors.clear();
  owned_.clear();
  params_ = nb::list();
}
