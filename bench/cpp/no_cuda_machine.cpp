// In the place of cuda_machine.cpp where the core is built without CUDA.
#include "machine.h"

namespace bench {

std::unique_ptr<Machine> make_cuda_machine(int) { return nullptr; }

}  // namespace bench
