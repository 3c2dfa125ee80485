// How the C ABI reads and writes structs that grow: struct_size says which members the caller knows.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <span>
#include <string>

#include "qlora_native/error.h"

namespace qlora_native::c_api {

/// No struct will ever be larger: a struct_size beyond is garbage, and nothing is read there.
inline constexpr uint64_t kMaxStructBytes = 4096;

/// The sizes that a struct had in earlier versions of the library, ascending.
template <class Struct>
inline constexpr std::span<const uint64_t> kEarlierSizes{};

[[noreturn]] inline void fail(const char* function, const std::string& problem) {
  throw InvalidArgument(std::string(function) + ": " + problem);
}

/// Null is refused, and so is an address that is no multiple of `alignment` bytes.
inline void check_pointer(const char* function, const char* what, const void* data,
                          uint64_t alignment) {
  if (data == nullptr) fail(function, std::string(what) + " is null");
  if (reinterpret_cast<uintptr_t>(data) % alignment != 0) {
    fail(function,
         std::string(what) + " is not aligned to " + std::to_string(alignment) + " bytes");
  }
}

/// The struct_size of the caller's `data`, when it is one that the rule of c_api.h accepts.
template <class Struct>
uint64_t accepted_size(const char* function, const char* what, const Struct* data) {
  check_pointer(function, what, data, alignof(Struct));
  uint64_t size = 0;
  std::memcpy(&size, data, sizeof(size));
  const auto refuse = [&](const char* why) {
    fail(function, std::string(what) + " has struct_size " + std::to_string(size) + ", " + why +
                       " " + std::to_string(sizeof(Struct)));
  };
  if (size == sizeof(Struct)) return size;
  if (size < sizeof(Struct)) {
    const std::span<const uint64_t> earlier = kEarlierSizes<Struct>;
    if (std::find(earlier.begin(), earlier.end(), size) == earlier.end()) {
      refuse("which no version had; this one has");
    }
    return size;
  }
  if (size > kMaxStructBytes) refuse("which no version can have; this one has");
  const auto* bytes = reinterpret_cast<const unsigned char*>(data);
  if (std::any_of(bytes + sizeof(Struct), bytes + size, [](unsigned char b) { return b != 0; })) {
    refuse("and is not zero beyond what this version knows, which is");
  }
  return size;
}

/// A copy of the caller's struct; members that it lacks are zero.
template <class Struct>
Struct read_struct(const char* function, const char* what, const Struct* data) {
  const uint64_t size = accepted_size(function, what, data);
  Struct copy{};
  std::memcpy(&copy, data, std::min<uint64_t>(size, sizeof(Struct)));
  return copy;
}

/// Writes the members that the caller's struct has; its struct_size stays. `size` is its
/// `accepted_size`, asked for before the work was done.
template <class Struct>
void write_struct(Struct* data, uint64_t size, Struct filled) {
  filled.struct_size = size;
  std::memcpy(data, &filled, std::min<uint64_t>(size, sizeof(Struct)));
}

}  // namespace qlora_native::c_api
