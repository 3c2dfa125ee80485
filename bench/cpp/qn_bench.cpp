#include <iostream>

#include "program.h"

int main(int argc, char** argv) {
  return bench::run_program({argv + 1, argv + argc}, std::cout, std::cerr);
}
