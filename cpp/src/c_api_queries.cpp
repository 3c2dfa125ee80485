// What the C ABI tells of the build, the codebooks, the devices and the kernels, and what it sets.
#include <algorithm>
#include <iterator>
#include <vector>

#include "c_api_arguments.h"
#include "c_api_guard.h"
#include "c_api_struct.h"
#include "qlora_native/device.h"
#include "qlora_native/kernels.h"
#include "qlora_native/version.h"
#include "validate.h"

namespace qn = qlora_native;
using qn::c_api::accepted_size;
using qn::c_api::check_buffer;
using qn::c_api::check_device_type;
using qn::c_api::check_op;
using qn::c_api::check_pointer;
using qn::c_api::copy_cut;
using qn::c_api::copy_whole;
using qn::c_api::fail;
using qn::c_api::guarded;
using qn::c_api::write_struct;

static_assert(std::size(qn::kAllOps) == QN_GROUPED_MATMUL_4BIT_TRANSPOSED + 1);
static_assert(static_cast<int32_t>(qn::Op::kMatmul4bit) == QN_MATMUL_4BIT);
static_assert(static_cast<int32_t>(qn::Op::kOptimizerStep) == QN_OPTIMIZER_STEP);
static_assert(static_cast<int32_t>(qn::Op::kGroupedMatmul4bit) == QN_GROUPED_MATMUL_4BIT);
static_assert(static_cast<int32_t>(qn::QuantType::kCustom) == QN_CUSTOM);
static_assert(static_cast<int32_t>(qn::DType::kBFloat16) == QN_BFLOAT16);
static_assert(static_cast<int32_t>(qn::DeviceType::kCuda) == QN_CUDA);

namespace {

template <class Element>
const Element& element_at(const char* function, const char* what, int64_t number,
                          const std::vector<Element>& elements) {
  if (number < 0 || number >= static_cast<int64_t>(elements.size())) {
    fail(function, "there is no " + std::string(what) + " " + std::to_string(number) +
                       "; there are " + std::to_string(elements.size()));
  }
  return elements[static_cast<size_t>(number)];
}

qn::Op op_of(const char* function, qn_op op) {
  check_op(function, op);
  return static_cast<qn::Op>(op);
}

qn::DeviceType device_type_of(const char* function, qn_device_type type) {
  check_device_type(function, type);
  return static_cast<qn::DeviceType>(type);
}

qn_status write_map(const char* name, const qn::DynamicMap& map, float* values) {
  return guarded(name, [&](const char* function) {
    check_pointer(function, "values", values, alignof(float));
    std::copy(std::begin(map.values), std::end(map.values), values);
  });
}

}  // namespace

const char* qn_dtype_name(qn_dtype dtype) { return qn::name(static_cast<qn::DType>(dtype)); }

const char* qn_device_type_name(qn_device_type type) {
  return type == QN_CPU || type == QN_CUDA ? qn::name(static_cast<qn::DeviceType>(type))
                                           : "unknown";
}

const char* qn_quant_type_name(qn_quant_type type) {
  return qn::name(static_cast<qn::QuantType>(type));
}

const char* qn_op_name(qn_op op) { return qn::name(static_cast<qn::Op>(op)); }

const char* qn_version(void) { return qn::build_info().version; }

int32_t qn_abi_version(void) { return QN_ABI_VERSION; }

qn_status qn_describe_build(qn_build_info* info) {
  return guarded(__func__, [&](const char* function) {
    const uint64_t size = accepted_size(function, "info", info);
    const qn::BuildInfo build = qn::build_info();
    write_struct(info, size,
                 {0, build.version, build.compiler, build.cuda_toolkit, build.cuda_architectures});
  });
}

qn_status qn_describe_codebook(qn_quant_type quant_type, const float* custom_values,
                               qn_codebook* codebook) {
  return guarded(__func__, [&](const char* function) {
    const uint64_t size = accepted_size(function, "codebook", codebook);
    const qn::Codebook book = qn::c_api::to_codebook(function, quant_type, custom_values);
    qn::validate(function, book);
    qn_codebook filled{};
    filled.quant_type = quant_type;
    std::copy(std::begin(book.values), std::end(book.values), filled.values);
    std::copy(std::begin(book.decision_points), std::end(book.decision_points),
              filled.decision_points);
    std::copy(std::begin(book.code_of_rank), std::end(book.code_of_rank), filled.code_of_rank);
    filled.zero_code = book.zero_code;
    write_struct(codebook, size, filled);
  });
}

qn_status qn_signed_dynamic_map(float* values) {
  return write_map(__func__, qn::kSignedDynamicMap, values);
}

qn_status qn_unsigned_dynamic_map(float* values) {
  return write_map(__func__, qn::kUnsignedDynamicMap, values);
}

qn_status qn_describe_weight(int64_t rows, int64_t cols, int64_t block_size,
                             qn_weight_sizes* sizes) {
  return guarded(__func__, [&](const char* function) {
    const uint64_t size = accepted_size(function, "sizes", sizes);
    qn::validate(function, rows, cols, block_size);
    const int64_t numel = rows * cols;
    const int64_t blocks = qn::num_blocks(numel, block_size);
    write_struct(sizes, size, {0, qn::packed_bytes(numel), blocks, qn::num_groups(blocks)});
  });
}

qn_status qn_device_count(int64_t* count) {
  return guarded(__func__, [&](const char* function) {
    check_pointer(function, "count", count, alignof(int64_t));
    *count = static_cast<int64_t>(qn::list_devices().size());
  });
}

qn_status qn_describe_device(int64_t number, qn_device_info* info) {
  return guarded(__func__, [&](const char* function) {
    const uint64_t size = accepted_size(function, "info", info);
    const std::vector<qn::DeviceInfo> devices = qn::list_devices();
    const qn::DeviceInfo& device = element_at(function, "device", number, devices);
    qn_device_info filled{};
    filled.memory_bytes = device.memory_bytes;
    filled.device_type = static_cast<qn_device_type>(device.device.type);
    filled.device_index = device.device.index;
    copy_cut(device.name, filled.name, sizeof(filled.name));
    copy_cut(device.features, filled.features, sizeof(filled.features));
    write_struct(info, size, filled);
  });
}

qn_status qn_cuda_unavailable_reason(char* text, int64_t text_bytes) {
  return guarded(__func__, [&](const char* function) {
    check_buffer(function, "text", text, text_bytes);
    copy_cut(qn::cuda_unavailable_reason(), text, text_bytes);
  });
}

qn_status qn_cpu_threads(int32_t* threads) {
  return guarded(__func__, [&](const char* function) {
    check_pointer(function, "threads", threads, alignof(int32_t));
    *threads = qn::cpu_threads();
  });
}

qn_status qn_set_cpu_threads(int32_t threads) {
  return guarded(__func__, [&](const char*) { qn::set_cpu_threads(threads); });
}

qn_status qn_set_cpu_executor(qn_cpu_executor executor) {
  return guarded(__func__, [&](const char*) { qn::set_cpu_executor(executor); });
}

qn_status qn_kernel_count(int64_t* count) {
  return guarded(__func__, [&](const char* function) {
    check_pointer(function, "count", count, alignof(int64_t));
    *count = static_cast<int64_t>(qn::list_kernels().size());
  });
}

qn_status qn_describe_kernel(int64_t number, qn_kernel_info* info) {
  return guarded(__func__, [&](const char* function) {
    const uint64_t size = accepted_size(function, "info", info);
    const std::vector<qn::KernelInfo> kernels = qn::list_kernels();
    const qn::KernelInfo& kernel = element_at(function, "kernel", number, kernels);
    qn_kernel_info filled{};
    filled.op = static_cast<qn_op>(kernel.op);
    filled.device_type = static_cast<qn_device_type>(kernel.device);
    filled.usable = kernel.usable ? 1 : 0;
    copy_whole(function, kernel.name, filled.name, sizeof(filled.name));
    copy_cut(kernel.why_not, filled.why_not, sizeof(filled.why_not));
    write_struct(info, size, filled);
  });
}

qn_status qn_force_kernel(qn_op op, qn_device_type device_type, const char* name) {
  return guarded(__func__, [&](const char* function) {
    check_pointer(function, "name", name, 1);
    if (*name == '\0') fail(function, "name is empty; qn_unforce_kernel restores the choice");
    qn::force_kernel(op_of(function, op), device_type_of(function, device_type), name);
  });
}

qn_status qn_unforce_kernel(qn_op op, qn_device_type device_type) {
  return guarded(__func__, [&](const char* function) {
    qn::force_kernel(op_of(function, op), device_type_of(function, device_type), "");
  });
}

qn_status qn_forced_kernel(qn_op op, qn_device_type device_type, char* name, int64_t name_bytes) {
  return guarded(__func__, [&](const char* function) {
    check_buffer(function, "name", name, name_bytes);
    copy_whole(function,
               qn::forced_kernel(op_of(function, op), device_type_of(function, device_type)), name,
               name_bytes);
  });
}

qn_status qn_last_kernel(qn_op op, char* name, int64_t name_bytes) {
  return guarded(__func__, [&](const char* function) {
    check_buffer(function, "name", name, name_bytes);
    copy_whole(function, qn::last_kernel(op_of(function, op)), name, name_bytes);
  });
}
