#include "c_api_guard.h"

#include <algorithm>
#include <cstring>
#include <exception>
#include <new>

#include "c_api_struct.h"
#include "qlora_native/error.h"

namespace qlora_native::c_api {
namespace {

/// Not a std::string: it has to hold what went wrong when there is no memory, too.
thread_local char t_message[4096] = "";

qn_status record(qn_status status, const char* message) noexcept {
  const size_t length = std::min(std::strlen(message), sizeof(t_message) - 1);
  std::memcpy(t_message, message, length);
  t_message[length] = '\0';
  return status;
}

}  // namespace

qn_status record_exception() noexcept {
  try {
    throw;
  } catch (const InvalidArgument& error) {
    return record(QN_INVALID_ARGUMENT, error.what());
  } catch (const Unsupported& error) {
    return record(QN_UNSUPPORTED, error.what());
  } catch (const OutOfMemory& error) {
    return record(QN_OUT_OF_MEMORY, error.what());
  } catch (const CudaError& error) {
    return record(QN_CUDA_ERROR, error.what());
  } catch (const std::bad_alloc& error) {
    return record(QN_OUT_OF_MEMORY, error.what());
  } catch (const std::exception& error) {
    return record(QN_INTERNAL_ERROR, error.what());
  } catch (...) {
    return record(QN_INTERNAL_ERROR, "an exception that is no std::exception");
  }
}

void check_enum(const char* function, const char* what, int32_t value, int32_t count) {
  if (value < 0 || value >= count) {
    fail(function, "there is no " + std::string(what) + " " + std::to_string(value));
  }
}

void check_op(const char* function, qn_op op) {
  check_enum(function, "operation", op, QN_GROUPED_MATMUL_4BIT_TRANSPOSED + 1);
}

void check_device_type(const char* function, qn_device_type type) {
  check_enum(function, "device_type", type, QN_CUDA + 1);
}

void check_quant_type(const char* function, qn_quant_type type) {
  check_enum(function, "quant_type", type, QN_CUSTOM + 1);
}

void copy_cut(const std::string& text, char* buffer, int64_t bytes) noexcept {
  const size_t length = std::min(text.size(), static_cast<size_t>(bytes) - 1);
  std::memcpy(buffer, text.data(), length);
  buffer[length] = '\0';
}

void check_buffer(const char* function, const char* what, const char* buffer, int64_t bytes) {
  check_pointer(function, what, buffer, 1);
  if (bytes < 1) fail(function, std::string(what) + " has " + std::to_string(bytes) + " bytes");
}

void copy_whole(const char* function, const std::string& text, char* buffer, int64_t bytes) {
  if (static_cast<size_t>(bytes) <= text.size()) {
    fail(function,
         "'" + text + "' and its final zero do not fit into " + std::to_string(bytes) + " bytes");
  }
  copy_cut(text, buffer, bytes);
}

}  // namespace qlora_native::c_api

const char* qn_last_error_message(void) { return qlora_native::c_api::t_message; }

const char* qn_status_string(qn_status status) {
  switch (status) {
    case QN_OK:
      return "ok";
    case QN_INVALID_ARGUMENT:
      return "invalid argument";
    case QN_UNSUPPORTED:
      return "unsupported";
    case QN_OUT_OF_MEMORY:
      return "out of memory";
    case QN_CUDA_ERROR:
      return "CUDA error";
    case QN_INTERNAL_ERROR:
      return "internal error";
    default:
      return "unknown";
  }
}
