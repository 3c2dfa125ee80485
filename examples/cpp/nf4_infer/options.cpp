#include "options.h"

#include <charconv>
#include <limits>
#include <stdexcept>
#include <string_view>

namespace llama {

const char* const kUsage =
    "usage: nf4_infer MODEL --tokens 1,2,3 [--max-new-tokens 32] [--ignore-eos] [--threads N]\n"
    "                 [--timing]\n"
    "\n"
    "Continues a text, given as token ids, with a Llama that was saved in 4 bits, choosing the "
    "most\n"
    "likely token each time. Prints the new ids.\n"
    "\n"
    "  MODEL             folder with config.json and safetensors files, of qlora_native or of\n"
    "                    bitsandbytes\n"
    "  --tokens          ids of the text, with commas between them\n"
    "  --max-new-tokens  how many ids to add at most\n"
    "  --ignore-eos      go on after the token that ends a text\n"
    "  --threads         number of CPU threads\n"
    "  --timing          tokens per second, on stderr\n";

namespace {

int64_t to_number(std::string_view text, const std::string& what, int64_t least, int64_t most) {
  int64_t number = 0;
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), number);
  if (error != std::errc() || end != text.data() + text.size() || number < least || number > most) {
    throw std::runtime_error(what + ": \"" + std::string(text) + "\" is no number from " +
                             std::to_string(least) + " to " + std::to_string(most));
  }
  return number;
}

std::vector<int64_t> to_tokens(std::string_view text) {
  std::vector<int64_t> tokens;
  while (true) {
    const size_t comma = text.find(',');
    tokens.push_back(
        to_number(text.substr(0, comma), "--tokens", 0, std::numeric_limits<int32_t>::max()));
    if (comma == text.npos) return tokens;
    text.remove_prefix(comma + 1);
  }
}

}  // namespace

Options parse_options(int argc, char** argv) {
  Options options;
  const std::vector<std::string> arguments(argv + 1, argv + argc);
  for (size_t i = 0; i < arguments.size(); ++i) {
    const std::string& argument = arguments[i];
    const auto value = [&]() -> const std::string& {
      if (i + 1 == arguments.size()) throw std::runtime_error(argument + " needs a value");
      return arguments[++i];
    };
    if (argument == "--tokens") {
      options.tokens = to_tokens(value());
    } else if (argument == "--max-new-tokens") {
      options.max_new_tokens = to_number(value(), argument, 0, 1 << 24);
    } else if (argument == "--threads") {
      options.threads = static_cast<int>(to_number(value(), argument, 1, 1 << 16));
    } else if (argument == "--ignore-eos") {
      options.ignores_eos = true;
    } else if (argument == "--timing") {
      options.times = true;
    } else if (argument == "--help" || argument == "-h") {
      options.wants_help = true;
      return options;
    } else if (argument.starts_with("-") || !options.model.empty()) {
      throw std::runtime_error("unknown argument " + argument + "; --help lists them");
    } else {
      options.model = argument;
    }
  }
  if (options.model.empty()) throw std::runtime_error("which MODEL? --help says more");
  if (options.tokens.empty()) throw std::runtime_error("--tokens is needed: there is no tokenizer");
  return options;
}

}  // namespace llama
