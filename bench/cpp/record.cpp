#include "record.h"

#include <cmath>
#include <cstdio>
#include <ostream>
#include <type_traits>

namespace bench {
namespace {

std::string quoted(std::string_view text) {
  std::string json = "\"";
  for (const char c : text) {
    const auto byte = static_cast<unsigned char>(c);
    if (c == '"' || c == '\\') {
      json += {'\\', c};
    } else if (byte < 0x20) {
      char escape[8];
      std::snprintf(escape, sizeof escape, "\\u%04x", byte);
      json += escape;
    } else {
      json += c;
    }
  }
  return json + '"';
}

std::string json_of(const std::string& text) { return quoted(text); }
std::string json_of(bool value) { return value ? "true" : "false"; }
std::string json_of(int64_t value) { return std::to_string(value); }
std::string json_of(double value) {
  if (!std::isfinite(value)) return "null";
  char text[32];
  std::snprintf(text, sizeof text, "%.6g", value);
  return text;
}
template <class T>
std::string json_of(const std::vector<T>& values) {
  std::string json = "[";
  for (const T& value : values) json += (json.size() > 1 ? ", " : "") + json_of(value);
  return json + "]";
}

std::string json_of(const std::pair<std::string, Value>& entry) {
  return quoted(entry.first) + ": " +
         std::visit([](const auto& value) { return json_of(value); }, entry.second);
}

}  // namespace

void Record::set(std::string_view key, Value value) {
  for (auto& [name, old] : entries_) {
    if (name == key) {
      old = std::move(value);
      return;
    }
  }
  entries_.emplace_back(key, std::move(value));
}

void Record::merge(const Record& other) {
  for (const auto& [name, value] : other.entries_) set(name, value);
}

void write_json(std::ostream& out, const Record& head, std::span<const Record> records) {
  out << "{";
  for (const auto& entry : head.entries()) out << "\n " << json_of(entry) << ",";
  out << "\n \"records\": [";
  for (size_t i = 0; i < records.size(); ++i) {
    out << (i == 0 ? "\n  {" : ",\n  {");
    const char* separator = "";
    for (const auto& entry : records[i].entries()) {
      out << separator << json_of(entry);
      separator = ", ";
    }
    out << "}";
  }
  out << "\n ]\n}\n";
}

}  // namespace bench
