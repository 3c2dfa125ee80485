// Text of unknown origin, for messages.
#pragma once

#include <string>
#include <string_view>

namespace qlora_native {

/// `text` in quotation marks: what is no printable ASCII escaped, bytes beyond the hundredth
/// replaced by dots.
inline std::string in_quotes(std::string_view text) {
  constexpr size_t kLongest = 100;
  constexpr char kDigits[] = "0123456789abcdef";
  std::string result = "\"";
  for (const char c : text.substr(0, kLongest)) {
    const auto byte = static_cast<unsigned char>(c);
    if (byte < 0x20 || byte > 0x7E) {
      result += {'\\', 'x', kDigits[byte >> 4], kDigits[byte & 0xF]};
      continue;
    }
    if (c == '"' || c == '\\') result += '\\';
    result += c;
  }
  if (text.size() > kLongest) result += "...";
  return result + '"';
}

}  // namespace qlora_native
