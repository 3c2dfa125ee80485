// Columns that several tables have.
#pragma once

#include <initializer_list>
#include <string>
#include <vector>

#include "case.h"

namespace bench {

/// What a column shows where the record has no value.
inline constexpr char kNoValue[] = "-";

/// A number of the record, times `scale`, in printf's format, or kNoValue.
Column number_column(const char* title, int width, const std::string& key, const char* format,
                     double scale = 1);
/// The same in four digits or as many as the whole part has, at most `decimals` after the point.
Column measured_column(const char* title, int width, const std::string& key, int decimals,
                       double scale = 1);
/// A string, or kNoValue.
Column text_column(const char* title, int width, const std::string& key);
/// The median, and the distance of the quartiles relative to it.
std::vector<Column> time_columns();
/// Bytes per second, and relative to the ceiling.
std::vector<Column> rate_columns(const std::string& ceiling);
/// The kernel's name, with " *" at the library's choice where kernels are compared, and " (dense)"
/// where it would rather leave the product to a dense one.
Column kernel_column();

/// All of `parts`, one after the other.
std::vector<Column> columns_of(std::initializer_list<std::vector<Column>> parts);

}  // namespace bench
