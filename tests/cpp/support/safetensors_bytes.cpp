#include "support/safetensors_bytes.h"

#include <gtest/gtest.h>
#include <stdlib.h>

#include <fstream>

namespace qlora_native::testing {

Bytes file_with_header(const std::string& header, size_t data_bytes) {
  Bytes file;
  for (int byte = 0; byte < 8; ++byte) {
    file.push_back(static_cast<std::byte>(static_cast<uint64_t>(header.size()) >> (8 * byte)));
  }
  const auto text = std::as_bytes(std::span(header));
  file.insert(file.end(), text.begin(), text.end());
  for (size_t i = 0; i < data_bytes; ++i) file.push_back(static_cast<std::byte>(i));
  return file;
}

Bytes safetensors_bytes(const std::vector<FileTensor>& tensors, size_t padding) {
  std::string header;
  Bytes data;
  for (const FileTensor& tensor : tensors) {
    std::string shape;
    for (const int64_t size : tensor.shape) {
      shape += (shape.empty() ? "" : ",") + std::to_string(size);
    }
    const std::string begin = std::to_string(data.size());
    data.insert(data.end(), tensor.data.begin(), tensor.data.end());
    header += (header.empty() ? "{\"" : ",\"") + tensor.name + "\":{\"dtype\":\"" + tensor.dtype +
              "\",\"shape\":[" + shape + "],\"data_offsets\":[" + begin + "," +
              std::to_string(data.size()) + "]}";
  }
  Bytes file = file_with_header(header + (header.empty() ? "{}" : "}") + std::string(padding, ' '));
  file.insert(file.end(), data.begin(), data.end());
  return file;
}

TemporaryFolder::TemporaryFolder() {
  std::string name = (std::filesystem::temp_directory_path() / "qlora_native_XXXXXX").string();
  if (mkdtemp(name.data()) == nullptr) ADD_FAILURE() << "no temporary folder like " << name;
  path_ = name;
}

TemporaryFolder::~TemporaryFolder() {
  std::error_code ignored;
  std::filesystem::remove_all(path_, ignored);
}

std::filesystem::path TemporaryFolder::write(const std::string& name, const Bytes& bytes) const {
  std::ofstream file(path_ / name, std::ios::binary);
  file.write(reinterpret_cast<const char*>(bytes.data()),
             static_cast<std::streamsize>(bytes.size()));
  EXPECT_TRUE(file.flush().good()) << path_ / name;
  return path_ / name;
}

std::filesystem::path TemporaryFolder::write(const std::string& name,
                                             const std::string& text) const {
  return write(name, bytes_of(std::vector<char>(text.begin(), text.end())));
}

}  // namespace qlora_native::testing
