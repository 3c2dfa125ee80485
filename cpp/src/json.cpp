#include "qlora_native/json.h"

#include <algorithm>
#include <charconv>
#include <system_error>

#include "in_quotes.h"
#include "mapped_file.h"
#include "validation_failure.h"

namespace qlora_native {
namespace {

bool is_digit(char c) { return c >= '0' && c <= '9'; }

/// Bytes of the UTF-8 sequence that `text` begins with; 0 when that is none (overlong, a surrogate,
/// beyond U+10FFFF, cut off).
size_t utf8_length(std::string_view text) {
  const auto byte = [&](size_t i) { return static_cast<unsigned char>(text[i]); };
  const auto continues = [&](size_t i) { return i < text.size() && (byte(i) & 0xC0) == 0x80; };
  const unsigned lead = byte(0);
  if (lead < 0x80) return 1;
  if (!continues(1)) return 0;
  if (lead >= 0xC2 && lead <= 0xDF) return 2;
  if (!continues(2)) return 0;
  if (lead >= 0xE0 && lead <= 0xEF) {
    const bool is_overlong = lead == 0xE0 && byte(1) < 0xA0;
    const bool is_surrogate = lead == 0xED && byte(1) >= 0xA0;
    return is_overlong || is_surrogate ? 0 : 3;
  }
  if (!continues(3) || lead < 0xF0 || lead > 0xF4) return 0;
  const bool is_overlong = lead == 0xF0 && byte(1) < 0x90;
  const bool is_beyond = lead == 0xF4 && byte(1) >= 0x90;
  return is_overlong || is_beyond ? 0 : 4;
}

void append_utf8(std::string& out, uint32_t code) {
  const auto put = [&](uint32_t byte) { out += static_cast<char>(byte); };
  const auto put_tail = [&](int shift) { put(0x80 | ((code >> shift) & 0x3F)); };
  if (code < 0x80) {
    put(code);
  } else if (code < 0x800) {
    put(0xC0 | code >> 6);
    put_tail(0);
  } else if (code < 0x10000) {
    put(0xE0 | code >> 12);
    put_tail(6);
    put_tail(0);
  } else {
    put(0xF0 | code >> 18);
    put_tail(12);
    put_tail(6);
    put_tail(0);
  }
}

}  // namespace

/// Recursive descent; `at_` is the next byte.
class JsonParser {
 public:
  JsonParser(std::string_view text, std::string_view name) : text_(text), name_(name) {}

  Json document() {
    Json result = value(0);
    skip_space();
    if (at_ < text_.size()) refuse("something follows the value");
    return result;
  }

 private:
  [[noreturn]] void refuse(const std::string& what) const { refuse_at(at_, what); }
  [[noreturn]] void refuse_at(size_t byte, const std::string& what) const {
    fail(name_, ": not JSON at byte ", byte, " of ", text_.size(), ": ", what);
  }

  bool is_at(char c) const { return at_ < text_.size() && text_[at_] == c; }
  bool accept(char c) {
    if (!is_at(c)) return false;
    ++at_;
    return true;
  }
  void skip_space() {
    while (at_ < text_.size() && std::string_view(" \t\n\r").find(text_[at_]) != text_.npos) ++at_;
  }
  void require_depth(int depth) const {
    if (depth >= Json::kMaxDepth) {
      refuse("nested deeper than " + std::to_string(Json::kMaxDepth));
    }
  }

  Json value(int depth) {
    skip_space();
    if (at_ == text_.size()) refuse("the text ends where a value should be");
    Json result;
    const char c = text_[at_];
    if (c == '{') {
      require_depth(depth);
      result.value_ = object(depth);
    } else if (c == '[') {
      require_depth(depth);
      result.value_ = array(depth);
    } else if (c == '"') {
      result.value_ = string();
    } else if (c == '-' || is_digit(c)) {
      result.value_ = number();
    } else if (word("true")) {
      result.value_ = true;
    } else if (word("false")) {
      result.value_ = false;
    } else if (!word("null")) {
      refuse("no value begins with " + in_quotes(text_.substr(at_, 1)));
    }
    return result;
  }

  bool word(std::string_view expected) {
    if (text_.substr(at_, expected.size()) != expected) return false;
    at_ += expected.size();
    return true;
  }

  Json::Array array(int depth) {
    Json::Array elements;
    ++at_;
    skip_space();
    if (accept(']')) return elements;
    do {
      elements.push_back(value(depth + 1));
      skip_space();
    } while (accept(','));
    if (!accept(']')) refuse("expected , or ] after an element");
    return elements;
  }

  Json::Object object(int depth) {
    const size_t begin = at_++;
    Json::Object members;
    skip_space();
    if (accept('}')) return members;
    do {
      skip_space();
      if (!is_at('"')) refuse("expected a key in quotation marks");
      std::string key = string();
      skip_space();
      if (!accept(':')) refuse("expected : after the key " + in_quotes(key));
      members.push_back({std::move(key), value(depth + 1)});
      skip_space();
    } while (accept(','));
    if (!accept('}')) refuse("expected , or } after a member");
    const auto key = [](const Json::Member& member) -> const std::string& { return member.key; };
    std::ranges::sort(members, {}, key);
    const auto twice = std::ranges::adjacent_find(members, {}, key);
    if (twice != members.end()) {
      refuse_at(begin, "the object has the key " + in_quotes(twice->key) + " twice");
    }
    return members;
  }

  std::string string() {
    std::string result;
    ++at_;
    while (!accept('"')) {
      if (at_ == text_.size()) refuse("the text ends inside of a string");
      const std::string_view rest = text_.substr(at_);
      if (rest[0] == '\\') {
        escape(result);
        continue;
      }
      if (static_cast<unsigned char>(rest[0]) < 0x20) refuse("a control character in a string");
      const size_t length = utf8_length(rest);
      if (length == 0) refuse("a string is no valid UTF-8");
      result += rest.substr(0, length);
      at_ += length;
    }
    return result;
  }

  void escape(std::string& out) {
    constexpr std::string_view kNames = "\"\\/bfnrt", kMeanings = "\"\\/\b\f\n\r\t";
    const size_t begin = at_++;
    if (accept('u')) {
      append_utf8(out, escaped_code(begin));
      return;
    }
    const size_t which = at_ < text_.size() ? kNames.find(text_[at_]) : kNames.npos;
    if (which == kNames.npos) refuse_at(begin, "an unknown escape in a string");
    out += kMeanings[which];
    ++at_;
  }

  /// What follows a \u, of which a pair may be needed.
  uint32_t escaped_code(size_t begin) {
    const uint32_t code = four_hex_digits();
    if (code < 0xD800 || code > 0xDFFF) return code;
    if (code <= 0xDBFF && accept('\\') && accept('u')) {
      const uint32_t low = four_hex_digits();
      if (low >= 0xDC00 && low <= 0xDFFF) return 0x10000 + ((code - 0xD800) << 10 | (low - 0xDC00));
    }
    refuse_at(begin, "a surrogate without its other half");
  }

  uint32_t four_hex_digits() {
    const std::string_view digits = text_.substr(at_, 4);
    uint32_t code = 0;
    const auto [end, error] =
        std::from_chars(digits.data(), digits.data() + digits.size(), code, 16);
    if (error != std::errc() || digits.size() != 4 || end != digits.data() + 4) {
      refuse("expected four hexadecimal digits");
    }
    at_ += 4;
    return code;
  }

  void digits() {
    if (at_ == text_.size() || !is_digit(text_[at_])) refuse("expected a digit");
    while (at_ < text_.size() && is_digit(text_[at_])) ++at_;
  }

  decltype(Json::value_) number() {
    const size_t begin = at_;
    accept('-');
    if (!accept('0')) digits();
    bool is_whole = true;
    if (accept('.')) {
      is_whole = false;
      digits();
    }
    if (accept('e') || accept('E')) {
      is_whole = false;
      if (!accept('+')) accept('-');
      digits();
    }
    const char* const first = text_.data() + begin;
    const char* const last = text_.data() + at_;
    int64_t whole = 0;
    if (is_whole && std::from_chars(first, last, whole).ec == std::errc()) return whole;
    double real = 0;
    if (std::from_chars(first, last, real).ec != std::errc()) {
      refuse_at(begin,
                in_quotes(text_.substr(begin, at_ - begin)) + " is beyond what double holds");
    }
    return real;
  }

  std::string_view text_, name_;
  size_t at_ = 0;
};

Json Json::parse(std::string_view text, std::string_view name) {
  return JsonParser(text, name).document();
}

Json Json::read(const std::filesystem::path& path) {
  constexpr size_t kMaxBytes = 100'000'000;
  const MappedFile file = map_file(path);
  if (file.bytes.size() > kMaxBytes) {
    fail(path.string(), ": has ", file.bytes.size(), " bytes, more than ", kMaxBytes);
  }
  return parse(file.text(), path.string());
}

std::optional<double> Json::number() const noexcept {
  if (const auto whole = integer()) return static_cast<double>(*whole);
  return get<double>();
}

const Json* Json::find(std::string_view key) const noexcept {
  const Object* members = object();
  if (members == nullptr) return nullptr;
  const auto at = std::ranges::lower_bound(
      *members, key, {}, [](const Member& member) { return std::string_view(member.key); });
  return at != members->end() && at->key == key ? &at->value : nullptr;
}

const char* Json::kind() const noexcept {
  constexpr const char* kKinds[] = {"null",     "a boolean", "a number", "a number",
                                    "a string", "an array",  "an object"};
  return kKinds[value_.index()];
}

}  // namespace qlora_native
