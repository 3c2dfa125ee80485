// Tensors ascending by name: how one is found.
#pragma once

#include <algorithm>
#include <span>
#include <string>
#include <string_view>

#include "in_quotes.h"
#include "qlora_native/safetensors.h"
#include "validation_failure.h"

namespace qlora_native {

inline const SafetensorsTensor* find_tensor(std::span<const SafetensorsTensor> tensors,
                                            std::string_view name) noexcept {
  const auto at = std::ranges::lower_bound(
      tensors, name, {},
      [](const SafetensorsTensor& tensor) -> std::string_view { return tensor.name; });
  return at != tensors.end() && at->name == name ? &*at : nullptr;
}

/// Throws InvalidArgument, which begins with `where`.
inline const SafetensorsTensor& tensor_at(std::span<const SafetensorsTensor> tensors,
                                          std::string_view name, const std::string& where) {
  const SafetensorsTensor* const found = find_tensor(tensors, name);
  if (found == nullptr) {
    fail(where, ": has no tensor ", in_quotes(name), " among its ", tensors.size());
  }
  return *found;
}

}  // namespace qlora_native
