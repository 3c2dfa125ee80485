// The options of qn_bench, and its table of models.
#include <gtest/gtest.h>

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "cpp/command_line.h"
#include "cpp/models.h"
#include "cpp/options.h"

namespace bench {
namespace {

namespace qn = qlora_native;

Options parsed(std::vector<std::string>& arguments) {
  Options options;
  std::vector<Option> known;
  for (const auto& kind : {machine_options, weight_options, kernel_options, product_options}) {
    for (Option& option : kind(options)) known.push_back(option);
  }
  parse_options(arguments, known);
  // Where `known` wrote to.
  return options;
}

TEST(BenchOptions, AreTakenOutAndGoogleBenchmarksAreLeft) {
  std::vector<std::string> arguments = {"--shapes=64x128,256x32,64x128",
                                        "--benchmark_filter=x",
                                        "--m",
                                        "1,64",
                                        "--dtype=fp16,fp32",
                                        "--kernel",
                                        "scalar",
                                        "--device=cuda:1",
                                        "--quant-type=int4",
                                        "--block-size",
                                        "32,4096",
                                        "--double-quant=no,yes",
                                        "--direction=transposed",
                                        "--threads=2",
                                        "--min-time=0.25",
                                        "--json",
                                        "a.json"};
  const Options options = parsed(arguments);
  EXPECT_EQ(arguments, std::vector<std::string>{"--benchmark_filter=x"});
  EXPECT_EQ(options.shapes, (std::vector<Shape>{{64, 128}, {256, 32}}));
  EXPECT_EQ(options.rows, (std::vector<int64_t>{1, 64}));
  EXPECT_EQ(options.dtypes, (std::vector{qn::DType::kFloat16, qn::DType::kFloat32}));
  EXPECT_EQ(options.kernel, "scalar");
  EXPECT_EQ(options.device, "cuda:1");
  EXPECT_EQ(options.quant_types, std::vector{qn::QuantType::kINT4});
  EXPECT_EQ(options.block_sizes, (std::vector<int64_t>{32, 4096}));
  EXPECT_EQ(options.double_quants, (std::vector<bool>{false, true}));
  EXPECT_EQ(options.transposed, std::vector<bool>{true});
  EXPECT_EQ(options.threads, 2);
  EXPECT_EQ(options.min_seconds, 0.25);
  EXPECT_EQ(options.json, "a.json");
}

TEST(BenchOptions, SayWhatIsWrong) {
  for (const char* bad : {"--shapes=64",
                          "--shapes=64x",
                          "--shapes=64x0",
                          "--m=0",
                          "--m=",
                          "--m",
                          "--m=99999999999",
                          "--dtype=int8",
                          "--device=tpu",
                          "--device=cuda:",
                          "--device=cuda:x",
                          "--threads=many",
                          "--quant-type=nf3",
                          "--block-size=48",
                          "--double-quant=maybe",
                          "--direction=up",
                          "--model=gpt",
                          "--min-time=0",
                          "--min-time=nan",
                          "--json=",
                          "--kernel=",
                          "--nothing=1"}) {
    std::vector<std::string> arguments = {bad};
    try {
      parsed(arguments);
      ADD_FAILURE() << bad << " was accepted";
    } catch (const std::invalid_argument& error) {
      const std::string name = std::string(bad).substr(0, std::string(bad).find('='));
      EXPECT_NE(std::string(error.what()).find(name), std::string::npos) << error.what();
    }
  }
}

TEST(BenchOptions, ModelsAndShapesAddUp) {
  std::vector<std::string> arguments = {"--model=llama3-8b,mistral-7b", "--shapes=4096x4096,8x16"};
  const std::vector<Shape> expected = {
      {4096, 4096}, {1024, 4096}, {14336, 4096}, {4096, 14336}, {8, 16}};
  EXPECT_EQ(shapes_of(parsed(arguments)), expected);
  arguments = {};
  EXPECT_FALSE(shapes_of(parsed(arguments)).empty());
}

TEST(BenchOptions, HelpFitsIntoATerminal) {
  Options options;
  for (const auto& kind : {machine_options, weight_options, kernel_options, product_options,
                           lora_options, optimizer_options, paged_options}) {
    const std::vector<Option> known = kind(options);
    std::string line;
    for (const char c : help_of(known)) {
      if (c != '\n') {
        line += c;
        continue;
      }
      EXPECT_LE(line.size(), 86u) << line;
      line.clear();
    }
    for (const Option& option : known) {
      EXPECT_NE(help_of(known).find(option.name + " " + option.value), std::string::npos);
    }
  }
}

/// A model as it was published: all of its parameters, its vocabulary, and whether the output
/// embedding is a matrix of its own.
struct Published {
  const char* name;
  double parameters;
  int64_t vocabulary;
  int embeddings;
};

TEST(BenchModels, HaveAsManyWeightsAsPublished) {
  const std::vector<Published> published = {
      {"llama2-7b", 6738415616, 32000, 2},     {"llama2-13b", 13015864320, 32000, 2},
      {"llama2-70b", 68976648192, 32000, 2},   {"llama3-8b", 8030261248, 128256, 2},
      {"llama3-70b", 70553706496, 128256, 2},  {"llama3.2-1b", 1235814400, 128256, 1},
      {"llama3.2-3b", 3212749824, 128256, 1},  {"mistral-7b", 7241732096, 32000, 2},
      {"qwen2.5-0.5b", 494032768, 151936, 1},  {"qwen2.5-7b", 7615616512, 152064, 2},
      {"qwen2.5-14b", 14770033664, 152064, 2}, {"qwen2.5-32b", 32763876352, 152064, 2},
      {"qwen2.5-72b", 72706203648, 152064, 2}, {"qwen3-8b", 8190735360, 151936, 2},
      {"qwen3-32b", 32762123264, 151936, 2},   {"gemma-7b", 8537680896, 256000, 1},
      {"gemma2-2b", 2614341888, 256000, 1},    {"gemma2-9b", 9241705984, 256000, 1},
      {"gemma2-27b", 27227128320, 256000, 1}};
  ASSERT_EQ(published.size(), all_models().size());
  for (const Published& expected : published) {
    const Model& model = model_named(expected.name);
    const int64_t found =
        model.linear_elements() + expected.embeddings * expected.vocabulary * model.hidden;
    // The rest are norms and biases.
    EXPECT_LE(static_cast<double>(found), expected.parameters) << expected.name;
    EXPECT_GE(static_cast<double>(found), expected.parameters * 0.9998) << expected.name;
  }
}

TEST(BenchModels, ShapesAreThoseOfTheProjections) {
  for (const Model& model : all_models()) {
    int64_t elements = 0;
    for (const Linear& linear : projections_of(model)) elements += linear.shape.n * linear.shape.k;
    EXPECT_EQ(elements * model.layers, model.linear_elements()) << model.name;
    EXPECT_NE(model_table().find(std::string(model.name) + " "), std::string::npos);
  }
  EXPECT_EQ(linears_of(model_named("llama3-8b"))[0].names, "q_proj, o_proj");
}

}  // namespace
}  // namespace bench
