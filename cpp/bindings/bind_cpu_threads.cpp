// Threads of operations on the CPU: how many, and whose.
#include <dlfcn.h>
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>

#include <atomic>
#include <string>

#include "bindings.h"
#include "qlora_native/device.h"

namespace nb = nanobind;
namespace qn = qlora_native;

namespace {

/// What a compiler emits for `#pragma omp parallel`; libgomp's, which LLVM's and Intel's runtimes
/// export too.
using GompParallel = void (*)(void (*body)(void*), void* context, unsigned threads, unsigned flags);
std::atomic<GompParallel> g_gomp_parallel{nullptr};

bool use_openmp(const std::string& library) {
  // NOLOAD: only a runtime that the process has loaded already is worth sharing. The handle is
  // kept.
  void* const handle = dlopen(library.c_str(), RTLD_LAZY | RTLD_NOLOAD);
  if (handle == nullptr) return false;
  const auto parallel = reinterpret_cast<GompParallel>(dlsym(handle, "GOMP_parallel"));
  if (parallel == nullptr) return false;
  g_gomp_parallel = parallel;
  qn::set_cpu_executor([](int threads, void (*body)(void*), void* context) {
    g_gomp_parallel.load()(body, context, static_cast<unsigned>(threads), 0);
  });
  return true;
}

}  // namespace

void bind_cpu_threads(nb::module_& m) {
  m.def("cpu_threads", &qn::cpu_threads);
  m.def("set_cpu_threads", &qn::set_cpu_threads, nb::arg("threads"));
  m.def(
      "use_openmp", &use_openmp, nb::arg("library"),
      "Run on the threads of an OpenMP runtime that is loaded; False when it is not, or is none.");
  m.def("use_own_threads", [] { qn::set_cpu_executor(nullptr); });
}
