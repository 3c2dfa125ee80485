// What is known of a case: named values, in the order in which the JSON has them.
#pragma once

#include <cstdint>
#include <iosfwd>
#include <span>
#include <string>
#include <string_view>
#include <utility>
#include <variant>
#include <vector>

namespace bench {

using Value =
    std::variant<std::string, bool, int64_t, double, std::vector<int64_t>, std::vector<double>>;

class Record {
 public:
  Record() = default;
  Record(std::initializer_list<std::pair<std::string, Value>> entries) : entries_(entries) {}

  /// Adds a value, or replaces the one of that name.
  void set(std::string_view key, Value value);
  /// Sets everything that `other` has.
  void merge(const Record& other);

  /// The value, or null where there is none of that name and type.
  template <class T>
  const T* find(std::string_view key) const {
    for (const auto& [name, value] : entries_) {
      if (name == key) return std::get_if<T>(&value);
    }
    return nullptr;
  }
  const std::vector<std::pair<std::string, Value>>& entries() const { return entries_; }

 private:
  std::vector<std::pair<std::string, Value>> entries_;
};

/// One JSON object: the entries of `head`, then the array "records". Numbers that are not finite are
/// null.
void write_json(std::ostream& out, const Record& head, std::span<const Record> records);

}  // namespace bench
