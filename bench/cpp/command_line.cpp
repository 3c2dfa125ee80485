#include "command_line.h"

#include <algorithm>
#include <charconv>
#include <stdexcept>
#include <string_view>

namespace bench {
namespace {

constexpr size_t kHelpColumn = 26;

[[noreturn]] void refuse(const std::string& name, std::span<const Option> options) {
  std::string message = "there is no option '" + name + "'; there are";
  for (const Option& option : options) message += " " + option.name;
  throw std::invalid_argument(message);
}

}  // namespace

void parse_options(std::vector<std::string>& arguments, std::span<const Option> options) {
  std::vector<std::string> others;
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    if (argument.starts_with("--benchmark_")) {
      others.push_back(argument);
      continue;
    }
    const size_t equals = argument.find('=');
    const std::string name = argument.substr(0, equals);
    const auto found = std::find_if(options.begin(), options.end(),
                                    [&](const Option& option) { return option.name == name; });
    if (found == options.end()) refuse(name, options);
    if (equals == std::string::npos && i + 1 == arguments.size()) {
      throw std::invalid_argument(name + " needs a value: " + name + " " + found->value);
    }
    const std::string text =
        equals == std::string::npos ? arguments[++i] : argument.substr(equals + 1);
    try {
      found->parse(text);
    } catch (const std::invalid_argument& error) {
      throw std::invalid_argument(name + ": " + error.what());
    }
  }
  arguments = others;
}

std::string help_of(std::span<const Option> options) {
  std::string help;
  for (const Option& option : options) {
    std::string line = "  " + option.name + " " + option.value;
    line += std::string(line.size() < kHelpColumn ? kHelpColumn - line.size() : 1, ' ');
    for (const char c : option.help) {
      line += c;
      if (c == '\n') line += std::string(kHelpColumn, ' ');
    }
    help += line + "\n";
  }
  return help;
}

std::vector<std::string> split(const std::string& list) {
  std::vector<std::string> parts;
  for (size_t begin = 0; begin <= list.size();) {
    const size_t end = std::min(list.find(',', begin), list.size());
    parts.push_back(list.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

int64_t positive(const std::string& text, int64_t most) {
  int64_t value = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  if (error != std::errc() || end != text.data() + text.size() || value < 1 || value > most) {
    throw std::invalid_argument("'" + text + "' is no whole number from 1 to " +
                                std::to_string(most));
  }
  return value;
}

std::string one_of(const std::string& text, std::span<const char* const> names) {
  std::string message = "'" + text + "' is none of";
  const char* separator = " ";
  for (const char* name : names) {
    if (text == name) return text;
    message += separator + std::string(name);
    separator = ", ";
  }
  throw std::invalid_argument(message);
}

}  // namespace bench
