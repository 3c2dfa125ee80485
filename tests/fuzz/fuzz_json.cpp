// Any text is JSON, and then the same value after writing and reading it again, or InvalidArgument.
#include <charconv>
#include <cstdint>
#include <string>
#include <string_view>

#include "qlora_native/error.h"
#include "qlora_native/json.h"
#include "qlora_native/quantized_matrix.h"
#include "require.h"

namespace {

using qlora_native::InvalidArgument;
using qlora_native::Json;

void write(std::string& out, const std::string& text) {
  out += '"';
  for (const char c : text) {
    if (static_cast<unsigned char>(c) < 0x20 || c == '"' || c == '\\') {
      char escaped[8];
      std::snprintf(escaped, sizeof escaped, "\\u%04x", static_cast<unsigned char>(c));
      out += escaped;
    } else {
      out += c;
    }
  }
  out += '"';
}

void write(std::string& out, const Json& value) {
  if (const auto* array = value.array()) {
    out += '[';
    for (const Json& element : *array) {
      if (&element != array->data()) out += ',';
      write(out, element);
    }
    out += ']';
  } else if (const auto* members = value.object()) {
    out += '{';
    for (const Json::Member& member : *members) {
      if (&member != members->data()) out += ',';
      write(out, member.key);
      out += ':';
      write(out, member.value);
      require(value.find(member.key) == &member.value, "a member is found by its key");
    }
    out += '}';
  } else if (value.string() != nullptr) {
    write(out, *value.string());
  } else if (value.boolean()) {
    out += *value.boolean() ? "true" : "false";
  } else if (value.integer()) {
    out += std::to_string(*value.integer());
  } else if (value.number()) {
    char text[64];
    const auto [end, error] =
        std::to_chars(text, text + sizeof text, *value.number(), std::chars_format::scientific);
    require(error == std::errc(), "a number has a text");
    out.append(text, end);
  } else {
    require(value.is_null(), "a value is of one kind");
    out += "null";
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  const std::string_view text(reinterpret_cast<const char*>(data), size);
  Json value;
  try {
    value = Json::parse(text, "fuzz");
  } catch (const InvalidArgument&) {
    return 0;
  }
  std::string once, twice;
  write(once, value);
  write(twice, Json::parse(once, "written"));
  require(once == twice, "a value survives writing and reading");
  try {
    const auto config = qlora_native::QuantizationConfig::from_json(value, "fuzz");
    require(qlora_native::is_valid_block_size(config.settings_of("a").block_size),
            "settings that are accepted are valid");
  } catch (const InvalidArgument&) {
    return 0;
  }
  return 0;
}
