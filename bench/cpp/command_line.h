// Options with values, and the help that lists them.
#pragma once

#include <cstdint>
#include <functional>
#include <span>
#include <string>
#include <vector>

namespace bench {

struct Option {
  std::string name;   ///< "--shapes"
  std::string value;  ///< what the help calls its value
  std::string help;   ///< lines after the first are indented by the help
  /// Throws std::invalid_argument with what is wrong with the text.
  std::function<void(const std::string& text)> parse;
};

/// Takes "--name=value" and "--name value" out of `arguments`, and leaves what begins with
/// "--benchmark_". Throws std::invalid_argument, naming the option and the value, for anything else.
void parse_options(std::vector<std::string>& arguments, std::span<const Option> options);

/// Lines of at most 80 characters, if the options' own are.
std::string help_of(std::span<const Option> options);

/// The parts between commas.
std::vector<std::string> split(const std::string& list);

/// A whole number from 1 to `most`. Throws std::invalid_argument.
int64_t positive(const std::string& text, int64_t most = INT64_C(1) << 30);

/// `text` when it is one of `names`. Throws std::invalid_argument, listing them.
std::string one_of(const std::string& text, std::span<const char* const> names);

/// Each part of a list, parsed; each value once. Throws as `parse`.
template <class Parse>
auto list_of(const std::string& text, Parse parse) {
  std::vector<decltype(parse(text))> values;
  for (const std::string& part : split(text)) {
    auto value = parse(part);
    bool is_new = true;
    for (const auto& known : values) is_new = is_new && !(known == value);
    if (is_new) values.push_back(std::move(value));
  }
  return values;
}

}  // namespace bench
