// What a command measures: cases, and the columns of their table.
#pragma once

#include <cstdint>
#include <functional>
#include <string>
#include <vector>

#include "record.h"

namespace bench {

/// A case that is ready to be timed, its results checked.
struct Timed {
  std::function<double()> replay;  ///< runs all calls once; returns seconds
  int64_t calls = 1;               ///< of a replay
  double bytes = 0;                ///< that a call has to move
  double ceiling = 0;              ///< bytes per second to compare with; 0: nothing is to move
  double weight_bytes = 0;         ///< of a 4-bit weight that is read; 0: none
  double flops = 0;                ///< of a product; 0: none
  Record facts{};                  ///< what was not known before, such as the kernel
};

struct Case {
  std::string name;     ///< unique, for --benchmark_filter
  std::string heading;  ///< over the part of the table that it belongs to
  Record facts;
  /// Throws qlora_native::Unsupported when a forced kernel does not take the case, other exceptions
  /// when something is wrong, results among it. What an earlier `Timed` of the command stands on may
  /// be gone after the call.
  std::function<Timed()> prepare;
};

/// A column of the table: `text` of the case's facts and figures.
struct Column {
  const char* title;
  int width;  ///< negative: to the left
  std::function<std::string(const Record& record)> text;
};

struct Plan {
  std::vector<Case> cases;
  std::vector<Column> columns;
  std::vector<std::string> notes;  ///< lines over the table
  /// What bytes per second are compared with: "copy", "link". The figure is "fraction_of_<this>".
  std::string ceiling = "copy";
};

}  // namespace bench
