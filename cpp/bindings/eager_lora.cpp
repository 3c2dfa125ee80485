#include "eager_lora.h"

#include <cmath>
#include <utility>

namespace nb = nanobind;
namespace qn = qlora_native;

namespace {

constexpr qn::Dropout kNoDropout{};
constexpr Py_ssize_t kFirstLayer = 3;  // among a Function's arguments

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
      !read_factors(rows.view.dtype, &layers) || !plan_outputs(rows.view, &layers)) {
    return nb::none();
  }
  rows.tensor =
      described.ndim == 2 ? nb::borrow(x) : torch_.as_matrix(x, rows.view.rows, rows.view.cols);
  const Matrix a = all_a(layers, rows.view.dtype);
  const Matrix t = passes_.project(rows, a, false, 1.0f, dropout, nb::none());
  if (!t.tensor.is_valid()) return nb::none();
  nb::list results;
  for (const Layer& layer : layers) {
    const nb::object y = output(x, described, rows, columns(t, layer), layer);
    if (y.is_none()) return y;
    results.append(y);
  }
  results.append(t.tensor);
  return tuple_of(results);
}

/// Whose product every y is. False if one cannot be computed here, before anything has been.
bool EagerLora::plan_outputs(const qn::MatrixView& x, std::vector<Layer>* layers) const {
  products_.share_threads(x.device);
  for (Layer& layer : *layers) {
    const auto y = Matrix::without_memory(x, layer.weight.view.rows);
    qn::MatmulArgs question{x, layer.weight.view, {}, y.writable()};
    if (!read_bias(torch_, layer.bias, layer.weight, x.dtype, &question.bias)) return false;
    layer.is_dense = qn::matmul_4bit_plan(question).prefers_dense;
    if (layer.is_dense && !products_.can_decode(layer.weight, x.dtype)) return false;
  }
  return true;
}

/// The same of the products that dx is the sum of.
bool EagerLora::plan_input_gradient(const std::vector<Matrix>& dy,
                                    std::vector<Layer>* layers) const {
  products_.share_threads(dy[0].view.device);
  for (size_t i = 0; i < layers->size(); ++i) {
    Layer& layer = (*layers)[i];
    const auto dx = Matrix::without_memory(dy[i].view, layer.weight.view.cols);
    layer.is_dense = qn::matmul_4bit_transposed_plan({dy[i].view, layer.weight.view, dx.writable()})
                         .prefers_dense;
    if (layer.is_dense && !products_.can_decode(layer.weight, dx.view.dtype)) return false;
  }
  return true;
}

/// y of a layer, of the shape of x but for the last dimension. None when there is no memory.
nb::object EagerLora::output(nb::handle x, const dlpack::Tensor& described, const Matrix& rows,
                             const Matrix& t, const Layer& layer) {
  auto out = Matrix::without_memory(rows.view, layer.weight.view.rows);
  const bool begins =
      layer.is_dense && passes_.update_is_dense(t, layer.b, false, layer.scaling, kNoDropout, out);
  nb::object y;
  if (begins) {
    Shape shape;
    if (!output_shape(described, out.view.cols, &shape)) return nb::none();
    y = torch_.empty(shape.span(), out.view.dtype, out.view.device);
  } else {
    y = products_.linear(x, layer.bias, layer.weight);
    if (y.is_none()) return y;
  }
  out.view.data = torch_.address(y);
  out.tensor = described.ndim == 2 ? y : torch_.as_matrix(y, out.view.rows, out.view.cols);
  if (!begins) {
    return passes_.update(t, layer.b, false, layer.scaling, kNoDropout, out) ? y : nb::none();
  }
  // A dense product adds on its way out, and saves the low-rank one a pass over y.
  const nb::object dense = products_.decode(layer.weight, out.view.dtype);
  passes_.add_low_rank(layer.bias, t, layer.b, false, layer.scaling, out);
  torch_.addmm(out.tensor, rows.tensor, torch_.transposed(dense), 1.0f, true, out.tensor);
  return y;
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
  if (!read_factors(like.dtype, &layers) ||
      (wants_dx && !plan_input_gradient(gradients, &layers))) {
    return nb::none();
  }
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
  if (wants_dx || wants_da) {
    const Matrix u = gradient_of_t(gradients, layers, t, ranks);
    if (!u.tensor.is_valid()) return nb::none();
    if (wants_dx) {
      const nb::object dx = input_gradient(item(dy, 0), gradients, u, dropout, layers);
      if (dx.is_none()) return dx;
      results[0] = dx;
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
    const nb::object db =
        passes_.gradient(columns(t_matrix, layer), gradients[i], true, layer.scaling, kNoDropout,
                         layer.dtype_of_b, layer.b.tensor);
    if (db.is_none()) return db;
    results[place + 2] = db;
  }
  return tuple_of(results);
}

/// dx of a group of layers. None when there is no memory.
nb::object EagerLora::input_gradient(nb::handle first_dy, const std::vector<Matrix>& dy,
                                     const Matrix& u, const qn::Dropout& dropout,
                                     const std::vector<Layer>& layers) {
  auto dx = Matrix::without_memory(dy[0].view, layers[0].weight.view.cols);
  const Matrix a = all_a(layers, dx.view.dtype);
  const bool begins = layers[0].is_dense && passes_.update_is_dense(u, a, true, 1.0f, dropout, dx);
  nb::object result;
  if (begins) {
    dlpack::Tensor described;
    Shape shape;
    if (!torch_.describe(first_dy, &described) || !output_shape(described, dx.view.cols, &shape)) {
      return nb::none();
    }
    result = torch_.empty(shape.span(), dx.view.dtype, dx.view.device);
  } else {
    result = products_.linear_dx(first_dy, layers[0].weight);
    if (result.is_none()) return result;
  }
  dx.view.data = torch_.address(result);
  dx.tensor = torch_.as_matrix(result, dx.view.rows, dx.view.cols);
  // As in `output`: what a dense product can add to comes first.
  if (begins) passes_.add_low_rank(nb::none(), u, a, true, 1.0f, dx);
  for (size_t i = begins ? 0 : 1; i < layers.size(); ++i) {
    if (!products_.add_linear_dx(dy[i].tensor, layers[i].weight, dx.tensor)) return nb::none();
  }
  return begins || passes_.update(u, a, true, 1.0f, dropout, dx) ? result : nb::none();
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
    return passes_.project(gradients[0], layers[0].b, true, layers[0].scaling, kNoDropout, like);
  }
  Matrix u = passes_.new_matrix(gradients[0].view.rows, ranks, gradients[0].view);
  for (size_t i = 0; i < layers.size(); ++i) {
    const Layer& layer = layers[i];
    const Matrix part = columns(u, layer);
    if (!passes_.project_into(gradients[i], layer.b, true, layer.scaling, kNoDropout, part))
      return {};
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
    parts.append(is_one_dtype ? layer.a.tensor : passes_.factor_for_torch(layer.a, dtype, false));
  }
  qn::MatrixView view = layers[0].a.view;
  if (!is_one_dtype) view.dtype = dtype;
  view.rows = layers.back().first_rank + layers.back().a.view.rows;
  view.row_stride = view.cols;
  nb::object all = torch_.stacked(parts);
  view.data = torch_.address(all);
  return {std::move(all), view};
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

/// The gradients of all A, by one pass over x.
bool EagerLora::set_da(const Matrix& u, const Matrix& x, const qn::Dropout& dropout,
                       const std::vector<Layer>& layers, nb::handle wanted, nb::list* results) {
  qn::DType dtype = layers[0].a.view.dtype;
  for (const Layer& layer : layers) {
    if (layer.a.view.dtype == qn::DType::kFloat32) dtype = qn::DType::kFloat32;
  }
  const nb::object all = passes_.gradient(u, x, false, 1.0f, dropout, dtype, nb::none());
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
