// Safetensors files for the tests, right and wrong ones, written from the format's description.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <span>
#include <string>
#include <vector>

namespace qlora_native::testing {

using Bytes = std::vector<std::byte>;

/// The bytes of an array's elements.
template <class T>
Bytes bytes_of(const std::vector<T>& values) {
  const auto bytes = std::as_bytes(std::span(values));
  return {bytes.begin(), bytes.end()};
}

/// The length of the header, the header, `data_bytes` bytes that count up from 0.
Bytes file_with_header(const std::string& header, size_t data_bytes = 0);

struct FileTensor {
  std::string name;
  std::string dtype;
  std::vector<int64_t> shape;
  Bytes data;
};

/// A file of these tensors in this order. `padding` spaces follow the header, which moves the
/// tensors to other addresses.
Bytes safetensors_bytes(const std::vector<FileTensor>& tensors, size_t padding = 0);

/// A folder that goes with its content.
class TemporaryFolder {
 public:
  TemporaryFolder();
  ~TemporaryFolder();
  TemporaryFolder(const TemporaryFolder&) = delete;
  TemporaryFolder& operator=(const TemporaryFolder&) = delete;

  const std::filesystem::path& path() const { return path_; }
  /// Writes a file in it; the path of the file.
  std::filesystem::path write(const std::string& name, const Bytes& bytes) const;
  std::filesystem::path write(const std::string& name, const std::string& text) const;

 private:
  std::filesystem::path path_;
};

}  // namespace qlora_native::testing
