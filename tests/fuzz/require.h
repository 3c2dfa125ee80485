// What a fuzz target checks beyond crashes.
#pragma once

#include <cstdio>
#include <cstdlib>

/// Ends the program, as libFuzzer wants to be told, when `condition` does not hold.
inline void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "does not hold: %s\n", what);
  std::abort();
}
