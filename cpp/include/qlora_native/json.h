// JSON as checkpoints have it: config.json, the index of shards, the headers of safetensors files.
#pragma once

#include <cstdint>
#include <filesystem>
#include <optional>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "qlora_native/export.h"

namespace qlora_native {

/// An immutable value of RFC 8259, strictly: valid UTF-8, no comments, no NaN, no key twice in an
/// object. What a value is not, its accessors say by an empty result, and never throw: the caller
/// knows what to call the value in a message.
class QN_API Json {
 public:
  struct Member;
  using Array = std::vector<Json>;
  using Object = std::vector<Member>;  ///< ascending by key (bytes, unsigned)

  /// Arrays and objects may lie in each other so deep.
  static constexpr int kMaxDepth = 64;

  /// The value that is the whole of `text`, but for white space around it.
  /// Throws InvalidArgument, which begins with `name`, what the text is to be called, and has the
  /// byte at which the text stops being JSON; also for a number that double cannot hold.
  static Json parse(std::string_view text, std::string_view name);

  /// The content of a file, of a hundred million bytes at most.
  /// Throws InvalidArgument as `parse` does, and when the file cannot be read.
  static Json read(const std::filesystem::path& path);

  Json() = default;  ///< null

  bool is_null() const noexcept { return std::holds_alternative<std::monostate>(value_); }
  std::optional<bool> boolean() const noexcept { return get<bool>(); }
  /// A number without fraction and exponent that int64 holds.
  std::optional<int64_t> integer() const noexcept { return get<int64_t>(); }
  /// Any number, rounded to the nearest double.
  std::optional<double> number() const noexcept;
  const std::string* string() const noexcept { return std::get_if<std::string>(&value_); }
  const Array* array() const noexcept { return std::get_if<Array>(&value_); }
  const Object* object() const noexcept { return std::get_if<Object>(&value_); }

  /// The value of a key; null when there is none, or this is no object.
  const Json* find(std::string_view key) const noexcept;

  /// "null", "a boolean", "a number", "a string", "an array" or "an object": for messages.
  const char* kind() const noexcept;

 private:
  friend class JsonParser;

  template <class T>
  std::optional<T> get() const noexcept {
    const T* value = std::get_if<T>(&value_);
    return value == nullptr ? std::nullopt : std::optional<T>(*value);
  }

  std::variant<std::monostate, bool, int64_t, double, std::string, Array, Object> value_;
};

struct Json::Member {
  std::string key;
  Json value;
};

}  // namespace qlora_native
