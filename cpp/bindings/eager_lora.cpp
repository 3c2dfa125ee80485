#include "eager_lora.h"

#include <cmath>
#include <utility>

namespace nb = nanobind;
namespace qn = qlora_native;

namespace {

constexpr qn::Dropout kNoDropout{};
constexpr Py_ssize_t kFirstLayer = 3;  // among a Function's arguments

qn::MutableMatrixView writable(const qn::MatrixView& view) {
  // Of a tensor of ours.
  return {
      const_cast<void*>(view.data), view.rows, view.cols, view.row_stride, view.dtype, view.device};
}

nb::handle item(nb::handle tuple, Py_ssize_t i) { return PyTuple_GetItem(tuple.ptr(), i); }

bool is_true(nb::handle flags, Py_ssize_t i) { return item(flags, i).ptr() == Py_True; }

bool is_any_true(nb::handle flags, size_t layers, Py_ssize_t part) {
  for (size_t i = 0; i < layers; ++i) {
    const auto first = kFirstLayer + static_cast<Py_ssize_t>(i) * EagerLora::kPerLayer;
    if (is_true(flags, first + part)) return true;
  }
  return false;
}

nb::object tuple_of(const nb::list& list) { return nb::steal(PyList_AsTuple(list.ptr())); }

}  // namespace

nb::object EagerLora::forward(nb::handle x, const qn::Dropout& dropout, nb::handle objects) {
  std::vector<Layer> layers;
  dlpack::Tensor described;
  Matrix rows;
  if (!torch_.has_exchange_api() || torch_.is_observed() || !read_layers(objects, &layers) ||
      !read_activation(torch_, x, layers[0].weight, layers[0].weight.view.cols, &described,
                       &rows.view) ||
      !read_factors(rows.view.dtype, &layers)) {
    return nb::none();
  }
  nb::list results;
  for (const Layer& layer : layers) {
    const nb::object y = products_.linear(x, layer.bias, layer.weight);
    if (y.is_none()) return y;
    results.append(y);
  }
  rows.tensor =
      described.ndim == 2 ? nb::borrow(x) : torch_.as_matrix(x, rows.view.rows, rows.view.cols);
  const Matrix a = all_a(layers, rows.view.dtype);
  const Matrix t = project(rows, a, false, 1.0f, dropout, nb::none());
  if (!t.tensor.is_valid()) return nb::none();
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    qn::MatrixView view = rows.view;
    view.cols = view.row_stride = layer.weight.view.rows;
    view.data = torch_.address(results[i]);
    nb::object y = described.ndim == 2 ? nb::object(results[i])
                                       : torch_.as_matrix(results[i], view.rows, view.cols);
    const Matrix out{std::move(y), view};
    if (!update(columns(t, layer), layer.b, false, layer.scaling, kNoDropout, out)) {
      return nb::none();
    }
  }
  results.append(t.tensor);
  return tuple_of(results);
}

nb::object EagerLora::backward(nb::handle dy, nb::handle x, nb::handle t,
                               const qn::Dropout& dropout, nb::handle objects, nb::handle wanted) {
  std::vector<Layer> layers;
  if (!torch_.has_exchange_api() || torch_.is_observed() || !read_layers(objects, &layers)) {
    return nb::none();
  }
  std::vector<Matrix> gradients(layers.size());
  dlpack::Tensor described;
  for (size_t i = 0; i < layers.size(); ++i) {
    const nb::handle one = item(dy, static_cast<Py_ssize_t>(i));
    const EagerWeight& weight = layers[i].weight;
    qn::MatrixView& view = gradients[i].view;
    if (!torch_.is_exact_tensor(one) ||
        !read_activation(torch_, one, weight, weight.view.rows, &described, &view) ||
        view.dtype != gradients[0].view.dtype || view.rows != gradients[0].view.rows) {
      return nb::none();
    }
    gradients[i].tensor =
        described.ndim == 2 ? nb::borrow(one) : torch_.as_matrix(one, view.rows, view.cols);
  }
  const qn::MatrixView& like = gradients[0].view;
  const bool wants_dx = is_true(wanted, 0);
  const bool wants_da = is_any_true(wanted, layers.size(), 1);
  const bool wants_db = is_any_true(wanted, layers.size(), 2);
  if (!read_factors(like.dtype, &layers)) return nb::none();
  cast_b(like.dtype, &layers);
  const int64_t ranks = layers.back().first_rank + layers.back().a.view.rows;
  const int64_t in_features = layers[0].weight.view.cols;
  Matrix rows;
  Matrix t_matrix{nb::borrow(t), {}};
  if ((wants_da &&
       !(read_activation(torch_, x, layers[0].weight, in_features, &described, &rows.view) &&
         rows.view.dtype == like.dtype && rows.view.rows == like.rows)) ||
      (wants_db &&
       !read_matrix(torch_, t, layers[0].weight, like.dtype, like.rows, ranks, &t_matrix.view))) {
    return nb::none();
  }

  nb::list results;
  for (Py_ssize_t i = 0; i < PyTuple_Size(wanted.ptr()); ++i) results.append(nb::none());
  Matrix dx;
  if (wants_dx) {
    const nb::object result = products_.linear_dx(item(dy, 0), layers[0].weight);
    if (result.is_none()) return result;
    dx.tensor = torch_.as_matrix(result, like.rows, in_features);
    dx.view = {
        torch_.address(result), like.rows, in_features, in_features, like.dtype, like.device};
    for (size_t i = 1; i < layers.size(); ++i) {
      if (!products_.add_linear_dx(gradients[i].tensor, layers[i].weight, dx.tensor)) {
        return nb::none();
      }
    }
    results[0] = result;
  }
  if (wants_dx || wants_da) {
    const Matrix u = gradient_of_t(gradients, layers, t, ranks);
    if (!u.tensor.is_valid()) return nb::none();
    if (wants_dx && !update(u, all_a(layers, like.dtype), true, 1.0f, dropout, dx)) {
      return nb::none();
    }
    if (wants_da) {
      rows.tensor =
          described.ndim == 2 ? nb::borrow(x) : torch_.as_matrix(x, rows.view.rows, rows.view.cols);
      if (!set_da(u, rows, dropout, layers, wanted, &results)) return nb::none();
    }
  }
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto place = kFirstLayer + static_cast<Py_ssize_t>(i) * kPerLayer;
    const Layer& layer = layers[i];
    if (is_true(wanted, place)) results[place] = torch_.sum_of_rows(gradients[i].tensor);
    if (!is_true(wanted, place + 2)) continue;
    const nb::object db = gradient(columns(t_matrix, layer), gradients[i], true, layer.scaling,
                                   kNoDropout, layer.dtype_of_b, layer.b.tensor);
    if (db.is_none()) return db;
    results[place + 2] = db;
  }
  return tuple_of(results);
}

bool EagerLora::read_layers(nb::handle objects, std::vector<Layer>* out) const {
  const Py_ssize_t count = PyTuple_Size(objects.ptr()) / kPerLayer;
  for (Py_ssize_t i = 0; i < count; ++i) {
    const nb::handle setting = item(objects, i * kPerLayer + 3);
    Layer& layer = out->emplace_back();
    layer.bias = item(objects, i * kPerLayer);
    layer.a.tensor = nb::borrow(item(objects, i * kPerLayer + 1));
    layer.b.tensor = nb::borrow(item(objects, i * kPerLayer + 2));
    layer.scaling = static_cast<float>(PyFloat_AsDouble(item(setting, 0).ptr()));
    const EagerWeight& first = (*out)[0].weight;
    if (!std::isfinite(layer.scaling) ||
        !read_weight_tuple(torch_, item(setting, 1), &layer.weight) ||
        layer.weight.shape.ndim != 2 || layer.weight.view.rows == 0 ||
        layer.weight.view.cols != first.view.cols || layer.weight.device != first.device) {
      return false;
    }
  }
  return count > 0;
}

bool EagerLora::read_factors(qn::DType dtype, std::vector<Layer>* layers) const {
  int64_t ranks = 0;
  for (Layer& layer : *layers) {
    if (!read_adapter(torch_, layer.a.tensor, layer.b.tensor, layer.weight, dtype, &layer.a.view,
                      &layer.b.view)) {
      return false;
    }
    layer.dtype_of_b = layer.b.view.dtype;
    layer.first_rank = ranks;
    ranks += layer.a.view.rows;
  }
  return true;
}

/// Two products read it. What the core rounds, torch rounds here.
void EagerLora::cast_b(qn::DType dtype, std::vector<Layer>* layers) const {
  for (Layer& layer : *layers) {
    if (layer.b.view.dtype == dtype) continue;
    layer.b.tensor = torch_.cast(layer.b.tensor, dtype);
    layer.b.view.data = torch_.address(layer.b.tensor);
    layer.b.view.dtype = dtype;
    layer.b.view.row_stride = layer.b.view.cols;
  }
}

/// u = scaling dy B of every layer, side by side. `like` may be t, which looks the same.
EagerLora::Matrix EagerLora::gradient_of_t(const std::vector<Matrix>& gradients,
                                           const std::vector<Layer>& layers, nb::handle like,
                                           int64_t ranks) {
  if (layers.size() == 1) {
    return project(gradients[0], layers[0].b, true, layers[0].scaling, kNoDropout, like);
  }
  Matrix u = new_matrix(gradients[0].view.rows, ranks, gradients[0].view);
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    const Matrix part = columns(u, layer);
    if (!project_into(gradients[i], layer.b, true, layer.scaling, kNoDropout, part)) return {};
  }
  return u;
}

/// The A of all layers, one below the other, in their own dtype if they have one.
EagerLora::Matrix EagerLora::all_a(const std::vector<Layer>& layers, qn::DType dtype) const {
  if (layers.size() == 1) return layers[0].a;
  bool is_one_dtype = true;
  for (const Layer& layer : layers) {
    is_one_dtype = is_one_dtype && layer.a.view.dtype == layers[0].a.view.dtype;
  }
  nb::list parts;
  for (const Layer& layer : layers) {
    parts.append(is_one_dtype ? layer.a.tensor : factor_for_torch(layer.a, dtype, false));
  }
  qn::MatrixView view = layers[0].a.view;
  if (!is_one_dtype) view.dtype = dtype;
  view.rows = layers.back().first_rank + layers.back().a.view.rows;
  view.row_stride = view.cols;
  nb::object all = torch_.stacked(parts);
  view.data = torch_.address(all);
  return {std::move(all), view};
}

EagerLora::Matrix EagerLora::new_matrix(int64_t rows, int64_t cols, const qn::MatrixView& like) {
  const int64_t shape[] = {rows, cols};
  nb::object tensor = torch_.empty(shape, like.dtype, like.device);
  const void* const data = torch_.address(tensor);
  return {std::move(tensor), {data, rows, cols, cols, like.dtype, like.device}};
}

/// The columns of t, or of its gradient, that are of one layer.
EagerLora::Matrix EagerLora::columns(const Matrix& t, const Layer& layer) const {
  const int64_t ranks = layer.a.view.rows;
  if (ranks == t.view.cols) return t;
  qn::MatrixView view = t.view;
  view.cols = ranks;
  view.data = static_cast<const char*>(view.data) + layer.first_rank * qn::size_bytes(view.dtype);
  return {torch_.narrowed(t.tensor, 1, layer.first_rank, ranks), view};
}

nb::object EagerLora::factor_for_torch(const Matrix& factor, qn::DType dtype,
                                       bool transposed) const {
  const nb::object cast =
      factor.view.dtype == dtype ? factor.tensor : torch_.cast(factor.tensor, dtype);
  return transposed ? torch_.transposed(cast) : cast;
}

/// t as a new matrix. `like` looks as it will, or is None. Invalid when there is no memory.
EagerLora::Matrix EagerLora::project(const Matrix& x, const Matrix& factor, bool transposed,
                                     float scaling, const qn::Dropout& dropout, nb::handle like) {
  const int64_t ranks = transposed ? factor.view.cols : factor.view.rows;
  qn::MatrixView view{eager_nowhere(), x.view.rows, ranks, ranks, x.view.dtype, x.view.device};
  const bool is_scaled = scaling != 1.0f;
  const qn::LoraProjectArgs question{x.view,  factor.view, transposed,
                                     scaling, dropout,     writable(view)};
  if (qn::lora_project_plan(question).prefers_dense && !torch_.is_autocast_enabled() &&
      !(is_scaled && like.is_none())) {
    const nb::object other = factor_for_torch(factor, view.dtype, is_scaled && !transposed);
    nb::object t = is_scaled    ? torch_.addmm(like, x.tensor, other, scaling, false, nb::none())
                   : transposed ? torch_.mm(x.tensor, other)
                                : torch_.linear_of_rows(x.tensor, other);
    view.data = torch_.address(t);
    return {std::move(t), view};
  }
  Matrix t = new_matrix(view.rows, view.cols, view);
  return project_into(x, factor, transposed, scaling, dropout, t) ? t : Matrix{};
}

bool EagerLora::project_into(const Matrix& x, const Matrix& factor, bool transposed, float scaling,
                             const qn::Dropout& dropout, const Matrix& t) {
  const qn::LoraProjectArgs args{x.view,  factor.view, transposed,
                                 scaling, dropout,     writable(t.view)};
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

bool EagerLora::update(const Matrix& t, const Matrix& factor, bool transposed, float scaling,
                       const qn::Dropout& dropout, const Matrix& y) {
  const qn::LoraUpdateArgs args{t.view,  factor.view, transposed,
                                scaling, dropout,     writable(y.view)};
  const qn::MatmulPlan plan = qn::lora_update_plan(args);
  if (plan.prefers_dense) {
    const nb::object other = factor_for_torch(factor, y.view.dtype, !transposed);
    torch_.addmm(y.tensor, t.tensor, other, scaling, true, y.tensor);
    return true;
  }
  return products_.run(y.view.device, plan.workspace_bytes,
                       [&](qn::Workspace workspace, qn::Stream stream) {
                         qn::lora_update(args, workspace, stream);
                       });
}

/// The gradient of a factor of `dtype`; `looks` is a matrix of its shape and v's dtype, or None.
/// None when there is no memory.
nb::object EagerLora::gradient(const Matrix& s, const Matrix& v, bool transposed, float scaling,
                               const qn::Dropout& dropout, qn::DType dtype, nb::handle looks) {
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
  const Matrix grad = new_matrix(rows, cols, like);
  args.grad = writable(grad.view);
  const bool ran = products_.run(like.device, plan.workspace_bytes,
                                 [&](qn::Workspace workspace, qn::Stream stream) {
                                   qn::lora_gradient(args, workspace, stream);
                                 });
  return ran ? grad.tensor : nb::none();
}

/// The gradients of all A, by one pass over x.
bool EagerLora::set_da(const Matrix& u, const Matrix& x, const qn::Dropout& dropout,
                       const std::vector<Layer>& layers, nb::handle wanted, nb::list* results) {
  qn::DType dtype = layers[0].a.view.dtype;
  for (const Layer& layer : layers) {
    if (layer.a.view.dtype == qn::DType::kFloat32) dtype = qn::DType::kFloat32;
  }
  const nb::object all = gradient(u, x, false, 1.0f, dropout, dtype, nb::none());
  if (all.is_none()) return false;
  for (size_t i = 0; i < layers.size(); ++i) {
    const auto place = kFirstLayer + static_cast<Py_ssize_t>(i) * kPerLayer + 1;
    if (!is_true(wanted, place)) continue;
    const qn::MatrixView& a = layers[i].a.view;
    nb::object da =
        layers.size() == 1 ? all : torch_.narrowed(all, 0, layers[i].first_rank, a.rows);
    if (a.dtype != dtype) da = torch_.cast(da, a.dtype);
    (*results)[place] = da;
  }
  return true;
}
