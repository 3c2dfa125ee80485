// What every function of the C ABI stands in: exceptions become a status and a message.
#pragma once

#include <string>

#include "qlora_native/c_api.h"

namespace qlora_native::c_api {

/// The status of the exception being handled, whose message becomes the thread's.
qn_status record_exception() noexcept;

/// Runs `body(function)`; `function` is the name of the C function, for messages.
template <class Body>
qn_status guarded(const char* function, const Body& body) noexcept {
  try {
    body(function);
    return QN_OK;
  } catch (...) {
    return record_exception();
  }
}

/// Throws InvalidArgument unless `value` is in [0, count).
void check_enum(const char* function, const char* what, int32_t value, int32_t count);
void check_op(const char* function, qn_op op);
void check_device_type(const char* function, qn_device_type type);
void check_quant_type(const char* function, qn_quant_type type);

/// Copies `text` with a final zero, cut to `bytes`; `bytes` is at least 1.
void copy_cut(const std::string& text, char* buffer, int64_t bytes) noexcept;

/// Throws InvalidArgument when there is no buffer.
void check_buffer(const char* function, const char* what, const char* buffer, int64_t bytes);

/// Copies all of `text` with a final zero, or throws InvalidArgument.
void copy_whole(const char* function, const std::string& text, char* buffer, int64_t bytes);

}  // namespace qlora_native::c_api
