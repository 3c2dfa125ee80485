// The linear layers of well-known models.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "shape.h"

namespace bench {

/// A decoder layer with separate projections, as the model's config.json describes it.
struct Model {
  const char* name;
  int64_t layers;
  int64_t hidden;
  int64_t intermediate;
  int64_t query;      ///< attention heads * head size
  int64_t key_value;  ///< key-value heads * head size

  /// Elements of all linear layers of the decoder; embeddings and the head are not among them.
  int64_t linear_elements() const {
    return layers * (2 * hidden * query + 2 * hidden * key_value + 3 * hidden * intermediate);
  }
};

std::span<const Model> all_models();

/// Throws std::invalid_argument, listing the names there are.
const Model& model_named(const std::string& name);

struct Linear {
  Shape shape;
  std::string names;  ///< "q_proj, o_proj": the layers of that shape
};

/// The seven linear layers of a decoder layer, in the order of the forward pass.
std::vector<Linear> projections_of(const Model& model);

/// The same, layers of one shape together.
std::vector<Linear> linears_of(const Model& model);

/// A line per model, for people.
std::string model_table();

}  // namespace bench
