// qn_bench from its arguments to its tables, its JSON and its exit status, on tiny problems.
#include <gtest/gtest.h>

#include <cstdio>
#include <filesystem>
#include <fstream>
#include <map>
#include <sstream>
#include <string>
#include <vector>

#include "cpp/program.h"
#include "qlora_native/kernels.h"

namespace bench {
namespace {

namespace qn = qlora_native;

struct Result {
  int status;
  std::string out;
  std::string err;
};

Result run(std::vector<std::string> arguments) {
  std::ostringstream out;
  std::ostringstream err;
  const int status = run_program(std::move(arguments), out, err);
  return {status, out.str(), err.str()};
}

/// On the CPU, for as short as can be.
Result run_briefly(std::vector<std::string> arguments) {
  for (const char* more : {"--device=cpu", "--min-time=0.001"}) arguments.emplace_back(more);
  return run(std::move(arguments));
}

/// Lines of the table that end in a kernel's name.
std::vector<std::string> lines_with(const std::string& text, const std::string& part) {
  std::vector<std::string> found;
  std::istringstream lines(text);
  for (std::string line; std::getline(lines, line);) {
    if (line.find(part) != std::string::npos) found.push_back(line);
  }
  return found;
}

std::vector<std::string> usable_kernels(qn::Op op) {
  std::vector<std::string> names;
  for (const qn::KernelInfo& kernel : qn::list_kernels()) {
    if (kernel.op == op && kernel.device == qn::DeviceType::kCpu && kernel.usable) {
      names.push_back(kernel.name);
    }
  }
  return names;
}

void expect_terminal_width(const std::string& text) {
  for (const std::string& line : lines_with(text, "")) EXPECT_LE(line.size(), 100u) << line;
}

TEST(QnBench, HelpNamesEveryCommandAndEveryOption) {
  const Result help = run({"--help"});
  EXPECT_EQ(help.status, 0);
  expect_terminal_width(help.out);
  for (const char* command : {"quantize", "dequantize", "matmul", "lora", "optimizer", "paged"}) {
    EXPECT_NE(help.out.find(std::string("  ") + command + " "), std::string::npos);
    const Result of_command = run({command, "--help"});
    EXPECT_EQ(of_command.status, 0);
    expect_terminal_width(of_command.out);
    for (const char* part : {"--device", "--json", "--min-time", "columns", "examples"}) {
      EXPECT_NE(of_command.out.find(part), std::string::npos) << command << ": " << part;
    }
  }
  EXPECT_NE(run({"matmul", "--help"}).out.find("--direction"), std::string::npos);
  EXPECT_EQ(run({"quantize", "--help"}).out.find("--direction"), std::string::npos);
  EXPECT_EQ(run({"paged", "--help"}).out.find("--shapes"), std::string::npos);
}

TEST(QnBench, ListsModelsAndKernels) {
  const Result models = run({"matmul", "--model", "list"});
  EXPECT_EQ(models.status, 0);
  EXPECT_NE(models.out.find("llama3-8b"), std::string::npos);
  const Result kernels = run({"optimizer", "--kernel", "list"});
  EXPECT_EQ(kernels.status, 0);
  for (const std::string& name : usable_kernels(qn::Op::kOptimizerStep)) {
    EXPECT_NE(kernels.out.find(" " + name + " "), std::string::npos);
  }
}

TEST(QnBench, WrongArgumentsAreRefusedBeforeAnythingIsMeasured) {
  const std::map<std::string, std::vector<std::string>> cases = {
      {"COMMAND", {}},
      {"no command 'multiply'", {"multiply"}},
      {"no option '--shape'", {"matmul", "--shape=1x1"}},
      {"no option '64x64'", {"matmul", "64x64"}},
      {"no option '--m'", {"quantize", "--m=1"}},
      {"--kernel: 'fastest' is none of", {"matmul", "--kernel=fastest", "--device=cpu"}},
      {"cuda:99", {"quantize", "--device=cuda:99"}},
      {"cannot write '/no/such/folder/x.json'",
       {"quantize", "--device=cpu", "--json=/no/such/folder/x.json"}},
      {"--backing: 'managed' is not for cpu", {"paged", "--device=cpu", "--backing=managed"}},
      {"Google Benchmark does not know --benchmark_nothing",
       {"dequantize", "--device=cpu", "--shapes=64x64", "--benchmark_nothing=1"}}};
  for (const auto& [message, arguments] : cases) {
    const Result result = run(arguments);
    EXPECT_EQ(result.status, 2) << message;
    EXPECT_NE(result.err.find(message), std::string::npos) << result.err;
    EXPECT_EQ(result.out.find("median us"), std::string::npos);
  }
}

TEST(QnBench, ConversionsHaveALinePerShapeAndFormat) {
  for (const char* command : {"quantize", "dequantize"}) {
    const Result result = run_briefly(
        {command, "--shapes=64x128,33x50", "--quant-type=nf4,int4", "--double-quant=yes,no"});
    EXPECT_EQ(result.status, 0) << result.out << result.err;
    expect_terminal_width(result.out);
    EXPECT_EQ(lines_with(result.out, "64x128 ").size(), 4u) << result.out;
    EXPECT_EQ(lines_with(result.out, "33x50 ").size(), 4u);
    EXPECT_EQ(lines_with(result.out, "median us").size(), 4u);
    EXPECT_EQ(lines_with(result.out, "copy: ").size(), 1u);
  }
}

TEST(QnBench, ProductsGoInBothDirections) {
  const Result result = run_briefly(
      {"matmul", "--shapes", "64x128", "--m", "1,5", "--direction", "forward,transposed"});
  EXPECT_EQ(result.status, 0) << result.out << result.err;
  EXPECT_EQ(lines_with(result.out, "64x128 ").size(), 4u) << result.out;
  EXPECT_EQ(lines_with(result.out, "Y[M, N] = X").size(), 1u);
  EXPECT_EQ(lines_with(result.out, "dX[M, K] = dY").size(), 1u);
}

TEST(QnBench, ComparesKernelsAndMarksTheLibrarysChoice) {
  const Result result =
      run_briefly({"matmul", "--kernel=all", "--shapes=64x128", "--m=3", "--dtype=bf16"});
  EXPECT_EQ(result.status, 0) << result.out << result.err;
  for (const std::string& name : usable_kernels(qn::Op::kMatmul4bit)) {
    EXPECT_GE(lines_with(result.out, " " + name).size(), 1u) << result.out;
  }
  EXPECT_EQ(lines_with(lines_with(result.out, "64x128 ").empty() ? "" : result.out, " *").size(),
            2u)  // the choice, and the explanation
      << result.out;
  EXPECT_EQ(qn::forced_kernel(qn::Op::kMatmul4bit, qn::DeviceType::kCpu), "");
}

TEST(QnBench, AForcedKernelIsTheOneThatRuns) {
  const Result result = run_briefly({"dequantize", "--kernel", "scalar", "--shapes", "64x128"});
  EXPECT_EQ(result.status, 0) << result.out << result.err;
  EXPECT_EQ(lines_with(result.out, " scalar").size(), 1u) << result.out;
  EXPECT_EQ(qn::last_kernel(qn::Op::kDequantize4bit), "scalar");
  EXPECT_EQ(qn::forced_kernel(qn::Op::kDequantize4bit, qn::DeviceType::kCpu), "");
}

TEST(QnBench, AKernelThatDoesNotTakeTheCaseSaysWhy) {
  const std::vector<std::string> kernels = usable_kernels(qn::Op::kMatmul4bit);
  if (std::find(kernels.begin(), kernels.end(), "gemm_amx") == kernels.end()) {
    GTEST_SKIP() << "every kernel of this machine takes every case";
  }
  const std::vector<std::string> arguments = {"matmul", "--dtype=fp32", "--shapes=64x128", "--m=4"};
  std::vector<std::string> forced = arguments;
  forced.emplace_back("--kernel=gemm_amx");
  const Result refused = run_briefly(forced);
  EXPECT_EQ(refused.status, 1);
  EXPECT_EQ(lines_with(refused.out, "gemm_amx: ").size(), 1u) << refused.out;
  std::vector<std::string> all = arguments;
  all.emplace_back("--kernel=all");
  const Result compared = run_briefly(all);
  EXPECT_EQ(compared.status, 0);
  EXPECT_NE(compared.out.find("Not measured:\n  gemm_amx: "), std::string::npos) << compared.out;
}

TEST(QnBench, AdaptersGoForwardAndBackward) {
  const Result result = run_briefly({"lora", "--shapes=64x128", "--m=1,5", "--rank=3,16"});
  EXPECT_EQ(result.status, 0) << result.out << result.err;
  expect_terminal_width(result.out);
  EXPECT_EQ(lines_with(result.out, "64x128 ").size(), 8u) << result.out;
  EXPECT_EQ(lines_with(result.out, "dX, dA and dB").size(), 1u);
  EXPECT_EQ(run({"lora", "--kernel=all"}).status, 2);
}

TEST(QnBench, OptimizersHaveALineEach) {
  const Result result = run_briefly({"optimizer", "--case=tiny", "--dtype=fp32,bf16"});
  EXPECT_EQ(result.status, 0) << result.out << result.err;
  expect_terminal_width(result.out);
  for (const char* name : {"adamw ", "adamw8bit ", "lion ", "lion8bit "}) {
    EXPECT_EQ(lines_with(result.out, std::string("  ") + name).size(), 2u) << result.out;
  }
  EXPECT_EQ(lines_with(result.out, "tiny: 2 tensors").size(), 2u);
}

TEST(QnBench, PagedMemoryIsAcquired) {
  const Result result = run_briefly({"paged", "--backing=host", "--budget=1"});
  EXPECT_EQ(result.status, 0) << result.out << result.err;
  expect_terminal_width(result.out);
  EXPECT_EQ(lines_with(result.out, "acquire what is there").size(), 1u) << result.out;
}

TEST(QnBench, WritesRecords) {
  const std::filesystem::path file =
      std::filesystem::path(testing::TempDir()) / "qn_bench_records.json";
  const Result result =
      run_briefly({"matmul", "--shapes=64x128", "--m=2", "--json", file.string()});
  EXPECT_EQ(result.status, 0) << result.out << result.err;
  std::ifstream stream(file);
  const std::string json((std::istreambuf_iterator<char>(stream)), {});
  std::filesystem::remove(file);
  for (const char* part :
       {"\"schema_version\": 1", "\"program\": \"qn_bench\"", "\"command\": \"matmul\"",
        "\"copy_tb_per_s\": ", "\"threads\": ", "\"op\": \"matmul\"", "\"shape\": [64, 128]",
        "\"m\": 2", "\"quant_type\": \"nf4\"", "\"block_size\": 64", "\"double_quant\": true",
        "\"kernel\": \"", "\"median_us\": ", "\"quartiles_us\": [",
        "\"fraction_of_copy\": ", "\"tflop_per_s\": ", "\"bytes\": "}) {
    EXPECT_NE(json.find(part), std::string::npos) << part << " in\n" << json;
  }
}

TEST(QnBench, AFilterThatMatchesNothingIsNoSuccess) {
  EXPECT_EQ(run_briefly({"quantize", "--shapes=64x64", "--benchmark_filter=nothing"}).status, 1);
  const Result one =
      run_briefly({"matmul", "--shapes=64x64", "--m=1,2", "--benchmark_filter=/M=2/"});
  EXPECT_EQ(one.status, 0);
  EXPECT_EQ(lines_with(one.out, "64x64 ").size(), 1u) << one.out;
}

}  // namespace
}  // namespace bench
