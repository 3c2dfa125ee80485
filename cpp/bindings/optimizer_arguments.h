// The parameters of a torch optimizer as the core's arguments, read anew in every step: gradients
// come and go, and parameters may be given other memory.
#pragma once

#include <nanobind/nanobind.h>

#include <cstdint>
#include <string>
#include <vector>

#include "qlora_native/optimizer.h"
#include "tensor_reader.h"

/// The tensors of one device that a step takes.
struct DeviceTensors {
  qlora_native::Device device;
  std::vector<qlora_native::OptimizerTensor> tensors;
};

/// Where a parameter is in an optimizer.
struct ParameterPlace {
  int32_t group;
  int32_t index;
};

class OptimizerArguments {
 public:
  explicit OptimizerArguments(TensorReader reader);

  /// Reads all parameters that have a gradient, with their state. Returns the places of those that
  /// have no state yet, which are left out. Throws nb::value_error or nb::type_error that names the
  /// parameter. `allows_host_state`: moments and masters may be in a pool's pinned host memory.
  std::vector<ParameterPlace> read(nanobind::list groups, nanobind::dict state,
                                   bool allows_host_state);

  const std::vector<DeviceTensors>& devices() const { return devices_; }
  /// The parameters that were read, as Python's objects.
  const nanobind::list& params() const { return params_; }
  const TensorReader& reader() const { return reader_; }
  /// Lets go of what keeps the tensors alive.
  void release();

 private:
  struct Parameter {
    nanobind::dict group;
    ParameterPlace place;
    nanobind::handle object;
    TensorFacts facts;
  };

  [[noreturn]] void refuse(const Parameter& parameter, const std::string& problem) const;
  bool is_wrapper(nanobind::handle tensor);
  nanobind::object local_part(nanobind::handle tensor);
  TensorFacts read_grad(const Parameter& parameter, nanobind::handle grad);
  TensorFacts read_state(const Parameter& parameter, nanobind::handle state, nanobind::handle key,
                         int64_t numel);
  qlora_native::OptimizerTensor make_tensor(const Parameter& parameter, const TensorFacts& grad,
                                            nanobind::handle state);
  void add(qlora_native::Device device, const qlora_native::OptimizerTensor& tensor);

  struct Kind {
    nanobind::object type;
    bool is_wrapper;
  };

  TensorReader reader_;
  std::vector<Kind> kinds_;
  bool allows_host_state_ = false;
  std::vector<DeviceTensors> devices_;
  nanobind::list params_;
  std::vector<nanobind::object> owned_;
  nanobind::object grad_name_, params_name_, local_name_;
  nanobind::object step_key_, moment_key_, square_key_, moment_absmax_key_, square_absmax_key_,
      master_key_;
};
