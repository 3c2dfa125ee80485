// The adapters' passes, over addresses; as bind_ops.cpp.
#include <nanobind/nanobind.h>

#include <cstdint>

#include "bindings.h"
#include "core_arguments.h"
#include "qlora_native/lora.h"

namespace nb = nanobind;
namespace qn = qlora_native;
using namespace nb::literals;

namespace {

using Matrix = qn::MutableMatrixView;

Matrix matrix(uintptr_t data, int64_t rows, int64_t cols, int64_t row_stride, int dtype,
              int device) {
  return {pointer(data), rows, cols, row_stride, static_cast<qn::DType>(dtype), device_of(device)};
}

qn::MatrixView read_only(const Matrix& m) {
  return {m.data, m.rows, m.cols, m.row_stride, m.dtype, m.device};
}

qn::LoraProjectArgs project_args(const Matrix& x, const Matrix& factor, bool factor_transposed,
                                 float scaling, const qn::Dropout& dropout, const Matrix& t) {
  return {read_only(x), read_only(factor), factor_transposed, scaling, dropout, t};
}

qn::LoraUpdateArgs update_args(const Matrix& t, const Matrix& factor, bool factor_transposed,
                               float scaling, const qn::Dropout& dropout, const Matrix& y) {
  return {read_only(t), read_only(factor), factor_transposed, scaling, dropout, y};
}

qn::LoraGradientArgs gradient_args(const Matrix& s, const Matrix& v, bool transposed, float scaling,
                                   const qn::Dropout& dropout, const Matrix& grad) {
  return {read_only(s), read_only(v), scaling, dropout, transposed, grad};
}

/// Binds `<name>_plan` and `<name>`: two inputs, a flag, a factor, the dropout, the output.
template <class Args>
void bind_pass(nb::module_& m, const char* name, const char* plan_name, const char* first,
               const char* second, const char* flag, const char* output,
               Args (*make)(const Matrix&, const Matrix&, bool, float, const qn::Dropout&,
                            const Matrix&),
               qn::MatmulPlan (*plan)(const Args&),
               void (*run)(const Args&, qn::Workspace, qn::Stream)) {
  m.def(
      plan_name,
      [make, plan](const Matrix& a, const Matrix& b, bool is_transposed, float scaling,
                   const qn::Dropout& dropout, const Matrix& out) {
        return plan_code(plan(make(a, b, is_transposed, scaling, dropout, out)));
      },
      nb::kw_only(), nb::arg(first), nb::arg(second), nb::arg(flag), "scaling"_a, "dropout"_a,
      nb::arg(output));
  m.def(
      name,
      [make, run](const Matrix& a, const Matrix& b, bool is_transposed, float scaling,
                  const qn::Dropout& dropout, const Matrix& out, uintptr_t workspace,
                  int64_t workspace_bytes, uintptr_t stream) {
        run(make(a, b, is_transposed, scaling, dropout, out),
            workspace_of(workspace, workspace_bytes), stream_of(stream));
      },
      nb::kw_only(), nb::arg(first), nb::arg(second), nb::arg(flag), "scaling"_a, "dropout"_a,
      nb::arg(output), "workspace"_a, "workspace_bytes"_a, "stream"_a,
      nb::call_guard<nb::gil_scoped_release>());
}

}  // namespace

void bind_lora(nb::module_& m) {
  nb::class_<Matrix>(m, "MatrixView", "Where a matrix lies, for one call.")
      .def_static("make", &matrix, nb::kw_only(), "data"_a, "rows"_a, "cols"_a, "row_stride"_a,
                  "dtype"_a, "device"_a);
  nb::class_<qn::Dropout>(m, "Dropout", "Which elements of a matrix are dropped.")
      .def_static(
          "make",
          [](float p, uint64_t seed, uint64_t offset) {
            return qn::Dropout{.p = p, .seed = seed, .offset = offset};
          },
          nb::kw_only(), "p"_a, "seed"_a, "offset"_a);
  bind_pass(m, "lora_project", "lora_project_plan", "x", "factor", "factor_transposed", "t",
            &project_args, &qn::lora_project_plan, &qn::lora_project);
  bind_pass(m, "lora_update", "lora_update_plan", "t", "factor", "factor_transposed", "y",
            &update_args, &qn::lora_update_plan, &qn::lora_update);
  bind_pass(m, "lora_gradient", "lora_gradient_plan", "s", "v", "transposed", "grad",
            &gradient_args, &qn::lora_gradient_plan, &qn::lora_gradient);
}
