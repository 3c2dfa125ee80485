/* Runs the groups of tests that it is given, or all. */
#include <stdio.h>
#include <string.h>

#include "check.h"

static const struct {
  const char* name;
  void (*run)(void);
} groups[] = {
    {"operations", test_operations},
    {"optimizer", test_optimizer},
    {"paged_optimizer", test_paged_optimizer},
    {"lora", test_lora},
    {"grouped", test_grouped},
    {"queries", test_queries},
    {"kernels", test_kernels},
    {"memory", test_memory},
    {"bad_arguments", test_bad_arguments},
    {"bad_structs", test_bad_structs},
    {"bad_optimizer_structs", test_bad_optimizer_structs},
    {"threads", test_threads},
};

int main(int argc, char** argv) {
  int runs = 0;
  for (size_t g = 0; g < sizeof(groups) / sizeof(groups[0]); ++g) {
    bool wanted = argc == 1;
    for (int i = 1; i < argc; ++i) wanted = wanted || strcmp(argv[i], groups[g].name) == 0;
    if (!wanted) continue;
    groups[g].run();
    ++runs;
  }
  if (runs < argc - 1 || runs == 0) {
    fprintf(stderr, "no such group of tests\n");
    return 2;
  }
  printf("%d groups, %d failures\n", runs, failures());
  return failures() == 0 ? 0 : 1;
}
