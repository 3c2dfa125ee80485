#include "program.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <exception>
#include <fstream>
#include <memory>
#include <ostream>
#include <stdexcept>

#include "kernel_names.h"
#include "machine.h"
#include "optimizer_cases.h"
#include "options.h"
#include "paged_cases.h"
#include "qlora_native/error.h"
#include "qlora_native/version.h"
#include "runner.h"
#include "weight_cases.h"

namespace bench {
namespace {

namespace qn = qlora_native;

constexpr int kFailed = 1;
constexpr int kMisused = 2;
constexpr double kGiga = 1e9;
constexpr double kTera = 1e12;
/// The JSON's; bench/README.md describes it.
constexpr int64_t kSchemaVersion = 1;

struct Command {
  const char* name;
  const char* summary;
  const char* rate;  ///< what the bytes of GB/s are
  const char* examples;
  std::vector<qn::Op> ops;
  std::vector<std::vector<Option> (*)(Options&)> options;  ///< beside those of all commands
  Plan (*plan)(const Options&, Machine&, double copy_rate);
};

const std::vector<Command>& commands() {
  static const std::vector<Command> all = {
      {"quantize",
       "weights to 4 bits",
       "the weight read, codes and scales written, over the median",
       "  qn_bench quantize --model llama3-8b\n"
       "  qn_bench quantize --quant-type nf4,fp4 --double-quant yes,no\n",
       {qn::Op::kQuantize4bit},
       {weight_options, kernel_options},
       quantize_plan},
      {"dequantize",
       "4-bit weights back to 16 or 32 bits",
       "codes and scales read, the weight written, over the median",
       "  qn_bench dequantize --model qwen2.5-7b --dtype bf16,fp32\n",
       {qn::Op::kDequantize4bit},
       {weight_options, kernel_options},
       dequantize_plan},
      {"matmul",
       "products of activations and a 4-bit weight, in both directions",
       "the 4-bit weight, X and Y, each once, over the median",
       "  qn_bench matmul --model llama3-8b --m 1,2,4,8,16\n"
       "  qn_bench matmul --shapes 4096x4096 --direction forward,transposed\n"
       "  qn_bench matmul --device cpu --threads 1 --kernel all --m 1,64\n",
       {qn::Op::kMatmul4bit, qn::Op::kMatmul4bitTransposed},
       {product_options, weight_options, kernel_options},
       matmul_plan},
      {"lora",
       "a 4-bit weight and its adapter, forward and backward",
       "weight, factors, activations and gradients, each once, over the median",
       "  qn_bench lora --model llama3-8b --m 16,512 --rank 8,64\n",
       {qn::Op::kMatmul4bit, qn::Op::kMatmul4bitTransposed, qn::Op::kLoraProject,
        qn::Op::kLoraUpdate, qn::Op::kLoraGradient},
       {lora_options, weight_options},
       lora_plan},
      {"optimizer",
       "steps of AdamW and Lion, with 32-bit and 8-bit state",
       "parameters and moments read and written, gradients read, over the median",
       "  qn_bench optimizer --case lora --optimizer adamw,adamw8bit\n",
       {qn::Op::kOptimizerStep},
       {optimizer_options},
       optimizer_plan},
      {"paged",
       "movement of paged memory between host and device",
       "what was moved, in both directions together, over the median",
       "  qn_bench paged --backing pinned --budget 1024\n",
       {},
       {paged_options},
       [](const Options& options, Machine& machine, double) {
         return paged_plan(options, machine);
       }},
  };
  return all;
}

std::string program_help() {
  std::string help =
      "qn_bench COMMAND [options]\n"
      "Measures the operations of qlora_native on this machine, on a GPU or the CPU, and\n"
      "compares them with what the memory can do. Every result is verified before it is\n"
      "timed.\n\ncommands\n";
  for (const Command& command : commands()) {
    std::string line = std::string("  ") + command.name;
    line += std::string(14 - line.size(), ' ') + command.summary + "\n";
    help += line;
  }
  return help +
         "\nqn_bench COMMAND --help shows the options of a command, such as --model, --device,\n"
         "--kernel and --json.\n\nexamples\n"
         "  qn_bench matmul --model llama3-8b --m 1,16\n"
         "  qn_bench quantize --device cpu --threads 4\n";
}

std::vector<Option> options_of(const Command& command, Options& options) {
  std::vector<Option> all;
  for (const auto& kind : command.options) {
    for (Option& option : kind(options)) all.push_back(std::move(option));
  }
  for (Option& option : machine_options(options)) all.push_back(std::move(option));
  return all;
}

/// What the columns of a command's table mean.
std::string explanation_of(const Command& command) {
  const auto has = [&](qn::Op op) {
    return std::find(command.ops.begin(), command.ops.end(), op) != command.ops.end();
  };
  std::string lines = "  spread   distance of the quartiles, relative to the median\n";
  lines += std::string("  GB/s     ") + command.rate + "\n";
  if (command.ops.empty()) return lines + "  of link  that, relative to the link's rate\n";
  lines += "  of copy  that, relative to the copy; more than 100% is the work of caches\n";
  if (has(qn::Op::kMatmul4bit)) {
    lines += "  TFLOP/s  2 for each product's term; the peak of the tensor cores is not measured\n";
  }
  // Its kernels are those of several operations.
  if (has(qn::Op::kLoraProject)) return lines;
  if (has(qn::Op::kMatmul4bit)) {
    lines += "  (dense)  the library says: decode the weight once, and let a dense product do it\n";
  }
  return lines + "  *        with --kernel all: what the library would choose\n";
}

std::string command_help(const Command& command) {
  Options unused;
  return std::string("qn_bench ") + command.name + " [options]: " + command.summary +
         "\n\noptions (lists are separated by commas; --name VALUE or --name=VALUE)\n" +
         help_of(options_of(command, unused)) +
         "  --benchmark_...         Google Benchmark's own, such as --benchmark_filter=REGEX\n"
         "\ncolumns\n" +
         explanation_of(command) + "\nexamples\n" + command.examples;
}

const Command& command_named(const std::string& name) {
  std::string message = "there is no command '" + name + "'; there are";
  for (const Command& command : commands()) {
    if (name == command.name) return command;
    message += std::string(" ") + command.name;
  }
  throw std::invalid_argument(message);
}

std::unique_ptr<Machine> make_machine(const std::string& name) {
  if (name == "cpu" || (name.empty() && !qn::cuda_unavailable_reason().empty())) {
    return make_cpu_machine();
  }
  const int index = name.size() > 5 ? std::stoi(name.substr(5)) : 0;
  if (auto machine = make_cuda_machine(index)) return machine;
  const std::string why = qn::cuda_unavailable_reason();
  throw std::invalid_argument("--device: there is no " + name + (why.empty() ? "" : ": " + why));
}

/// The load of a CPU that others keep busy; else 0.
double load_of(const Machine& machine) {
  double load = 0;
  const bool is_known = machine.device().is_cpu() && getloadavg(&load, 1) == 1;
  return is_known && load >= 0.25 * qn::cpu_threads() ? load : 0;
}

std::string today() {
  const std::time_t now = std::time(nullptr);
  char text[32];
  std::strftime(text, sizeof text, "%Y-%m-%dT%H:%M:%S+00:00", std::gmtime(&now));
  return text;
}

void print_head(const Command& command, const Machine& machine, const Plan& plan, double copy_rate,
                std::ostream& out) {
  char number[32];
  out << "qn_bench " << command.name << ", qlora_native " << qn::build_info().version << "\n  "
      << machine.name() << "\n";
  if (copy_rate > 0) {
    std::snprintf(number, sizeof number, "%.1f", copy_rate / kGiga);
    out << "  copy: " << number << " GB/s, read plus written, by " << machine.copy_method() << "\n";
  }
  for (const std::string& note : plan.notes) out << "  " << note << "\n";
  out << "  median of " << machine.timing_method() << "\n";
  if (const double load = load_of(machine); load > 0) {
    std::snprintf(number, sizeof number, "%.1f", load);
    out << "  WARNING: the machine is busy (load " << number << "); on an idle one this differs\n";
  }
}

Record json_head(const Command& command, const Machine& machine, double copy_rate) {
  Record head = {{"schema_version", kSchemaVersion},
                 {"program", "qn_bench"},
                 {"command", command.name},
                 {"version", qn::build_info().version},
                 {"compiler", qn::build_info().compiler},
                 {"date", today()},
                 {"device", machine.model()},
                 {"features", machine.features()}};
  if (machine.device().is_cpu()) head.set("threads", int64_t{qn::cpu_threads()});
  if (copy_rate > 0) head.set("copy_tb_per_s", copy_rate / kTera);
  return head;
}

std::string kernel_list(const Command& command) {
  std::string list;
  for (const qn::KernelInfo& kernel : qn::list_kernels()) {
    for (const qn::Op op : command.ops) {
      if (kernel.op != op) continue;
      char line[160];
      std::snprintf(line, sizeof line, "%-24s %-6s %-16s ", qn::name(op), qn::name(kernel.device),
                    kernel.name.c_str());
      list += line + (kernel.usable ? std::string("usable") : kernel.why_not) + "\n";
    }
  }
  return list;
}

void open_or_throw(std::ofstream& file, const std::string& path, std::ios::openmode mode) {
  file.open(path, mode);
  if (!file) throw std::invalid_argument("--json: cannot write '" + path + "'");
}

int measure(const Command& command, const Options& options,
            const std::vector<std::string>& google_benchmark, std::ostream& out) {
  if (options.threads > 0) qn::set_cpu_threads(options.threads);
  initialize_google_benchmark(google_benchmark);
  const std::unique_ptr<Machine> machine = make_machine(options.device);
  if (std::ofstream file; !options.json.empty()) {
    // Before minutes of measuring; what is there stays for now.
    open_or_throw(file, options.json, std::ios::app);
  }
  const bool has_copies = !command.ops.empty();
  const double copy_rate = has_copies ? machine->measure_copy_rate(options.min_seconds) : 0;
  const Plan plan = command.plan(options, *machine, copy_rate);
  print_head(command, *machine, plan, copy_rate, out);
  const RunResult result = run_plan(
      plan,
      {.min_seconds = options.min_seconds, .skips_unsupported = options.kernel == kAllKernels},
      out);
  out << "\n" << explanation_of(command);
  if (!options.json.empty()) {
    std::ofstream file;
    open_or_throw(file, options.json, std::ios::trunc);
    write_json(file, json_head(command, *machine, copy_rate), result.records);
    if (!file.flush()) throw std::runtime_error("--json: cannot write '" + options.json + "'");
  }
  return result.failed || result.measured == 0 ? kFailed : 0;
}

}  // namespace

int run_program(std::vector<std::string> arguments, std::ostream& out, std::ostream& err) {
  const auto is_help = [](const std::string& argument) {
    return argument == "--help" || argument == "-h" || argument == "help";
  };
  std::string help = "qn_bench --help";
  try {
    if (arguments.empty()) {
      err << program_help();
      return kMisused;
    }
    if (is_help(arguments[0])) {
      out << program_help();
      return 0;
    }
    const Command& command = command_named(arguments[0]);
    help = std::string("qn_bench ") + command.name + " --help";
    arguments.erase(arguments.begin());
    for (const std::string& argument : arguments) {
      if (is_help(argument)) {
        out << command_help(command);
        return 0;
      }
    }
    Options options;
    parse_options(arguments, options_of(command, options));
    if (options.lists_models || options.kernel == kListKernels) {
      out << (options.lists_models ? model_table() : kernel_list(command));
      return 0;
    }
    return measure(command, options, arguments, out);
  } catch (const std::invalid_argument& error) {
    err << "qn_bench: " << error.what() << "\n" << help << " says more.\n";
    return kMisused;
  } catch (const std::exception& error) {
    err << "qn_bench: " << error.what() << "\n";
    return kFailed;
  }
}

}  // namespace bench
