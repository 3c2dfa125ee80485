#include "columns.h"

#include <cmath>
#include <cstdio>
#include <optional>

namespace bench {
namespace {

std::string formatted(const char* format, double value) {
  char text[32];
  std::snprintf(text, sizeof text, format, value);
  return text;
}

std::optional<double> number(const Record& record, const std::string& key) {
  if (const double* value = record.find<double>(key)) return *value;
  if (const int64_t* value = record.find<int64_t>(key)) return static_cast<double>(*value);
  return std::nullopt;
}

std::string spread(const Record& record) {
  const double* median = record.find<double>("median_us");
  const auto* quartiles = record.find<std::vector<double>>("quartiles_us");
  if (median == nullptr || quartiles == nullptr) return kNoValue;
  return formatted("%.1f%%", 100 * (quartiles->back() - quartiles->front()) / *median);
}

std::string kernel(const Record& record) {
  const std::string* name = record.find<std::string>("kernel");
  if (name == nullptr) return kNoValue;
  const bool* is_choice = record.find<bool>("is_choice");
  const bool* prefers_dense = record.find<bool>("prefers_dense");
  return *name + (is_choice != nullptr && *is_choice ? " *" : "") +
         (prefers_dense != nullptr && *prefers_dense ? " (dense)" : "");
}

}  // namespace

Column number_column(const char* title, int width, const std::string& key, const char* format,
                     double scale) {
  return {title, width, [=](const Record& record) {
            const std::optional<double> value = number(record, key);
            return value ? formatted(format, *value * scale) : kNoValue;
          }};
}

Column measured_column(const char* title, int width, const std::string& key, int decimals,
                       double scale) {
  return {title, width, [=](const Record& record) -> std::string {
            const std::optional<double> value = number(record, key);
            if (!value) return kNoValue;
            const double scaled = *value * scale;
            int places = decimals;
            while (places > 0 && scaled * std::pow(10, places) >= 1e4) --places;
            char text[32];
            std::snprintf(text, sizeof text, "%.*f", places, scaled);
            return text;
          }};
}

Column text_column(const char* title, int width, const std::string& key) {
  return {title, width, [=](const Record& record) -> std::string {
            const std::string* value = record.find<std::string>(key);
            return value == nullptr ? kNoValue : *value;
          }};
}

std::vector<Column> time_columns() {
  return {measured_column("median us", 11, "median_us", 2), {"spread", 8, spread}};
}

std::vector<Column> rate_columns(const std::string& ceiling) {
  return {measured_column("GB/s", 9, "tb_per_s", 2, 1000),
          number_column(ceiling == "link" ? "of link" : "of copy", 9, "fraction_of_" + ceiling,
                        "%.1f%%", 100)};
}

Column kernel_column() { return {"kernel", -18, kernel}; }

std::vector<Column> columns_of(std::initializer_list<std::vector<Column>> parts) {
  std::vector<Column> columns;
  for (const auto& part : parts) columns.insert(columns.end(), part.begin(), part.end());
  return columns;
}

}  // namespace bench
