// Greedy text generation with a Llama whose weights are in 4 bits: see README.md.
#include <qlora_native/device.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <exception>

#include "model.h"
#include "options.h"

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point begin) {
  return std::chrono::duration<double>(Clock::now() - begin).count();
}

int64_t most_likely(const std::vector<float>& logits) {
  return std::ranges::max_element(logits) - logits.begin();
}

void report(const char* what, size_t tokens, double seconds) {
  std::fprintf(stderr, "%s: %zu tokens in %.3f s, %.1f tokens/s\n", what, tokens, seconds,
               static_cast<double>(tokens) / seconds);
}

void generate(const llama::Options& options) {
  if (options.threads > 0) qlora_native::set_cpu_threads(options.threads);
  llama::Model model(options.model);
  const std::vector<int64_t>& eos = model.config().eos_tokens;
  const auto prompt_size = static_cast<int64_t>(options.tokens.size());
  llama::Context context = model.new_context(prompt_size + options.max_new_tokens);

  // All tokens of the text at once, then each new one by itself.
  const auto begin = Clock::now();
  std::vector<float> logits = model.forward(options.tokens, context);
  if (options.times) report("prompt", options.tokens.size(), seconds_since(begin));
  const auto begin_of_new = Clock::now();
  size_t passes = 0;
  for (int64_t i = 0; i < options.max_new_tokens; ++i) {
    const int64_t token = most_likely(logits);
    std::printf(i == 0 ? "%lld" : ",%lld", static_cast<long long>(token));
    std::fflush(stdout);
    const bool ends = !options.ignores_eos && std::ranges::find(eos, token) != eos.end();
    if (ends || i + 1 == options.max_new_tokens) break;
    logits = model.forward({&token, 1}, context);
    ++passes;
  }
  std::printf("\n");
  if (options.times && passes > 0) report("new", passes, seconds_since(begin_of_new));
}

}  // namespace

int main(int argc, char** argv) {
  try {
    const llama::Options options = llama::parse_options(argc, argv);
    if (options.wants_help) {
      std::fputs(llama::kUsage, stdout);
    } else {
      generate(options);
    }
    return 0;
  } catch (const std::exception& error) {
    std::fprintf(stderr, "nf4_infer: %s\n", error.what());
    return 1;
  }
}
