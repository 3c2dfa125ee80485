// The extension module: exceptions, build facts, devices. Operations and kernels are in their own
// files.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bindings.h"
#include "qlora_native/device.h"
#include "qlora_native/error.h"
#include "qlora_native/version.h"

namespace nb = nanobind;
namespace qn = qlora_native;

namespace {

template <class Exception>
void translate_to(PyObject* python_type) {
  nb::register_exception_translator(
      [](const std::exception_ptr& pointer, void* type) {
        try {
          std::rethrow_exception(pointer);
        } catch (const Exception& error) {
          PyErr_SetString(static_cast<PyObject*>(type), error.what());
        }
      },
      python_type);
}

}  // namespace

NB_MODULE(_C, m) {
  // At the interpreter's exit objects of the caller's may still be alive; a library does not print that.
  nb::set_leak_warnings(false);
  m.doc() = "Kernels of qlora_native. Takes addresses; qlora_native.functional takes tensors.";

  // The last registered is tried first: the base class comes first.
  translate_to<qn::Error>(PyExc_RuntimeError);
  translate_to<qn::InvalidArgument>(PyExc_ValueError);
  translate_to<qn::OutOfMemory>(PyExc_MemoryError);
  translate_to<qn::Unsupported>(PyExc_NotImplementedError);
  nb::exception<qn::CudaError>(m, "CudaError", PyExc_RuntimeError).doc() =
      "The CUDA runtime or driver failed; the message says in which call.";

  const qn::BuildInfo build = qn::build_info();
  m.attr("__version__") = build.version;
  nb::dict build_info;
  build_info["version"] = build.version;
  build_info["compiler"] = build.compiler;
  build_info["cuda_toolkit"] = build.cuda_toolkit;
  build_info["cuda_architectures"] = build.cuda_architectures;
  m.attr("build_info") = build_info;

  nb::class_<qn::DeviceInfo>(m, "DeviceInfo", "A device that this build can use.")
      .def_prop_ro(
          "device", [](const qn::DeviceInfo& info) { return qn::to_string(info.device); },
          "\"cpu\" or \"cuda:0\".")
      .def_ro("name", &qn::DeviceInfo::name, "What the manufacturer calls it.")
      .def_ro("features", &qn::DeviceInfo::features,
              "Instruction sets of a CPU; \"sm_90, 132 SMs\" of a GPU.")
      .def_ro("memory_bytes", &qn::DeviceInfo::memory_bytes, "Of the whole device.")
      .def("__repr__", [](const qn::DeviceInfo& info) {
        return "DeviceInfo(" + qn::to_string(info.device) + ", " + info.name + ", " +
               info.features + ")";
      });
  m.def("list_devices", &qn::list_devices,
        "Return the devices that this build can use: the CPU, then the GPUs.");
  m.def("cuda_unavailable_reason", &qn::cuda_unavailable_reason,
        "Return why there is no GPU to use, or an empty text when there is one.");

  bind_cpu_threads(m);
  bind_kernels(m);
  bind_ops(m);
  bind_lora(m);
  bind_eager(m);
  bind_memory(m);
  bind_optimizer(m);
}
