// What the library throws. Every message carries the offending values.
#pragma once

#include <stdexcept>
#include <string>

#include "qlora_native/export.h"

namespace qlora_native {

/// Base of everything the library throws on purpose.
class QN_API Error : public std::runtime_error {
 public:
  using std::runtime_error::runtime_error;
};

/// An argument is wrong; no output was touched.
class QN_API InvalidArgument : public Error {
 public:
  using Error::Error;
};

/// Memory could not be had; the message says how much was asked for.
class QN_API OutOfMemory : public Error {
 public:
  using Error::Error;
};

/// No kernel of this build runs the problem on this device; the message names each and why it
/// declined.
class QN_API Unsupported : public Error {
 public:
  using Error::Error;
};

/// The CUDA runtime or driver failed; `code()` is the cudaError_t.
class QN_API CudaError : public Error {
 public:
  CudaError(int code, const std::string& message) : Error(message), code_(code) {}
  int code() const noexcept { return code_; }

 private:
  int code_;
};

}  // namespace qlora_native
