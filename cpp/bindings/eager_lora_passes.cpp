#include "eager_lora_passes.h"

#include <utility>

namespace nb = nanobind;
namespace qn = qlora_native;

EagerMatrix EagerMatrix::without_memory(const qn::MatrixView& rows, int64_t cols) {
  return {{}, {eager_nowhere(), rows.rows, cols, cols, rows.dtype, rows.device}};
}

qn::MutableMatrixView EagerMatrix::writable() const {
  return {
      const_cast<void*>(view.data), view.rows, view.cols, view.row_stride, view.dtype, view.device};
}

EagerMatrix EagerLoraPasses::new_matrix(int64_t rows, int64_t cols, const qn::MatrixView& like) {
  const int64_t shape[] = {rows, cols};
  nb::object tensor = torch_.empty(shape, like.dtype, like.device);
  const void* const data = torch_.address(tensor);
  return {std::move(tensor), {data, rows, cols, cols, like.dtype, like.device}};
}

nb::object EagerLoraPasses::factor_for_torch(const EagerMatrix& factor, qn::DType dtype,
                                             bool transposed) const {
  const nb::object cast =
      factor.view.dtype == dtype ? factor.tensor : torch_.cast(factor.tensor, dtype);
  return transposed ? torch_.transposed(cast) : cast;
}

EagerMatrix EagerLoraPasses::project(const EagerMatrix& x, const EagerMatrix& factor,
                                     bool transposed, float scaling, const qn::Dropout& dropout,
                                     nb::handle like) {
  const int64_t ranks = transposed ? factor.view.cols : factor.view.rows;
  auto place = EagerMatrix::without_memory(x.view, ranks);
  qn::MatrixView& view = place.view;
  const bool is_scaled = scaling != 1.0f;
  const qn::LoraProjectArgs question{x.view,  factor.view, transposed,
                                     scaling, dropout,     place.writable()};
  if (qn::lora_project_plan(question).prefers_dense && !torch_.is_autocast_enabled() &&
      !(is_scaled && like.is_none())) {
    const nb::object other = factor_for_torch(factor, view.dtype, is_scaled && !transposed);
    nb::object t = is_scaled    ? torch_.addmm(like, x.tensor, other, scaling, false, nb::none())
                   : transposed ? torch_.mm(x.tensor, other)
                                : torch_.linear_of_rows(x.tensor, other);
    view.data = torch_.address(t);
    return {std::move(t), view};
  }
  EagerMatrix t = new_matrix(view.rows, view.cols, view);
  return project_into(x, factor, transposed, scaling, dropout, t) ? t : EagerMatrix{};
}

bool EagerLoraPasses::project_into(const EagerMatrix& x, const EagerMatrix& factor, bool transposed,
                                   float scaling, const qn::Dropout& dropout,
                                   const EagerMatrix& t) {
  const qn::LoraProjectArgs args{x.view, factor.view, transposed, scaling, dropout, t.writable()};
  const qn::MatmulPlan plan = qn::lora_project_plan(args);
  if (plan.prefers_dense) {
    const nb::object other = factor_for_torch(factor, x.view.dtype, !transposed);
    torch_.addmm(t.tensor, x.tensor, other, scaling, false, t.tensor);
    return true;
  }
  return products_.run(x.view.device, plan.workspace_bytes,
                       [&](qn::Workspace workspace, qn::Stream stream) {
                         qn::lora_project(args, workspace, stream);
                       });
}

bool EagerLoraPasses::update_is_dense(const EagerMatrix& t, const EagerMatrix& factor,
                                      bool transposed, float scaling, const qn::Dropout& dropout,
                                      const EagerMatrix& y) {
  return qn::lora_update_plan({t.view, factor.view, transposed, scaling, dropout, y.writable()})
      .prefers_dense;
}

bool EagerLoraPasses::update(const EagerMatrix& t, const EagerMatrix& factor, bool transposed,
                             float scaling, const qn::Dropout& dropout, const EagerMatrix& y) {
  const qn::LoraUpdateArgs args{t.view, factor.view, transposed, scaling, dropout, y.writable()};
  const qn::MatmulPlan plan = qn::lora_update_plan(args);
  if (plan.prefers_dense) {
    add_low_rank(y.tensor, t, factor, transposed, scaling, y);
    return true;
  }
  return products_.run(y.view.device, plan.workspace_bytes,
                       [&](qn::Workspace workspace, qn::Stream stream) {
                         qn::lora_update(args, workspace, stream);
                       });
}

void EagerLoraPasses::add_low_rank(nb::handle start, const EagerMatrix& t,
                                   const EagerMatrix& factor, bool transposed, float scaling,
                                   const EagerMatrix& y) const {
  const nb::object other = factor_for_torch(factor, y.view.dtype, !transposed);
  const bool adds = !start.is_none();
  torch_.addmm(adds ? start : nb::handle(y.tensor), t.tensor, other, scaling, adds, y.tensor);
}

nb::object EagerLoraPasses::gradient(const EagerMatrix& s, const EagerMatrix& v, bool transposed,
                                     float scaling, const qn::Dropout& dropout, qn::DType dtype,
                                     nb::handle looks) {
  const int64_t rows = transposed ? v.view.cols : s.view.cols;
  const int64_t cols = transposed ? s.view.cols : v.view.cols;
  qn::MatrixView like = v.view;
  // For the question a place that is not there yet; the rule does not look at it.
  qn::LoraGradientArgs args{s.view, v.view, scaling, dropout, transposed, {}};
  args.grad = {eager_nowhere(), rows, cols, cols, dtype, like.device};
  const qn::MatmulPlan plan = qn::lora_gradient_plan(args);
  if (plan.prefers_dense) {
    const nb::object left = torch_.transposed((transposed ? v : s).tensor);
    const nb::object& right = (transposed ? s : v).tensor;
    if (dtype == qn::DType::kFloat32 && like.dtype != dtype && !like.device.is_cpu()) {
      return torch_.mm_to_float32(left, right, scaling);
    }
    nb::object grad;
    if (torch_.is_autocast_enabled() || (scaling != 1.0f && looks.is_none())) {
      grad = new_matrix(rows, cols, like).tensor;
      torch_.addmm(grad, left, right, scaling, false, grad);
    } else if (scaling != 1.0f) {
      grad = torch_.addmm(looks, left, right, scaling, false, nb::none());
    } else {
      grad = torch_.mm(left, right);
    }
    return dtype == like.dtype ? grad : torch_.cast(grad, dtype);
  }
  like.dtype = dtype;
  const EagerMatrix grad = new_matrix(rows, cols, like);
  args.grad = grad.writable();
  const bool ran = products_.run(like.device, plan.workspace_bytes,
                                 [&](qn::Workspace workspace, qn::Stream stream) {
                                   qn::lora_gradient(args, workspace, stream);
                                 });
  return ran ? grad.tensor : nb::none();
}
