// A file's bytes in memory, read-only.
#pragma once

#include <cstddef>
#include <filesystem>
#include <memory>
#include <span>
#include <string_view>

namespace qlora_native {

struct MappedFile {
  std::shared_ptr<const void> owner;  ///< null for an empty file; unmaps with its last copy
  std::span<const std::byte> bytes;

  std::string_view text() const {
    return {reinterpret_cast<const char*>(bytes.data()), bytes.size()};
  }
};

/// Throws InvalidArgument with the path when it is not a regular file that can be read.
MappedFile map_file(const std::filesystem::path& path);

}  // namespace qlora_native
