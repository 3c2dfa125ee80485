// Reading of safetensors files, one or the shards of a checkpoint, by mapping them into memory.
//
// Everything in a file is checked when it is opened, before any tensor is given out: the header's
// length and JSON, dtypes, shapes, and that the tensors tile the rest of the file. What is wrong is
// an InvalidArgument with the file, the tensor and the values in it. Reading needs no device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "qlora_native/dtype.h"
#include "qlora_native/export.h"

namespace qlora_native {

/// A tensor in a file. `data` stays good as long as what gave the tensor out.
struct SafetensorsTensor {
  std::string name;
  std::string dtype;  ///< in the format's words: "F32", "F16", "BF16", "U8", "I64", ...
  std::vector<int64_t> shape;
  /// Row-major, little-endian. Its address need not be a multiple of the element's size.
  std::span<const std::byte> data;

  /// Product of the shape.
  QN_API int64_t numel() const noexcept;
  /// The dtype, if it is one of those that this library computes with.
  QN_API std::optional<DType> float_dtype() const noexcept;
};

/// "[4096, 11008]", for messages.
QN_API std::string to_string(std::span<const int64_t> shape);

/// One file. Whoever shortens a file that is mapped takes its pages away from under the reader,
/// which ends the process: replace files, as savers do, rather than write into them.
class QN_API SafetensorsFile {
 public:
  /// Maps the file read-only; its pages are read when they are first touched, and belong to the
  /// system's cache, not to the process.
  /// Throws InvalidArgument when the file cannot be read or is not a valid one.
  explicit SafetensorsFile(const std::filesystem::path& path);

  /// The same for bytes that are in memory already; they stay the caller's and must outlive the
  /// result. `name` stands for the path in messages.
  static SafetensorsFile over(std::span<const std::byte> bytes, std::string name);

  const std::string& name() const noexcept { return name_; }
  /// Ascending by name.
  std::span<const SafetensorsTensor> tensors() const noexcept { return tensors_; }
  /// Null when there is none of that name.
  const SafetensorsTensor* find(std::string_view name) const noexcept;
  /// Throws InvalidArgument when there is none of that name.
  const SafetensorsTensor& at(std::string_view name) const;
  /// What the header has as "__metadata__".
  const std::map<std::string, std::string>& metadata() const noexcept { return metadata_; }

 private:
  SafetensorsFile() = default;
  void read(std::span<const std::byte> bytes);

  std::string name_;
  std::shared_ptr<const void> mapping_;
  std::vector<SafetensorsTensor> tensors_;
  std::map<std::string, std::string> metadata_;
};

/// All tensors of a checkpoint, in however many files.
class QN_API SafetensorsCheckpoint {
 public:
  /// `path` is a folder that holds model.safetensors or model.safetensors.index.json, or one file:
  /// an index (.json), or a safetensors file. The shards lie beside their index.
  /// Throws InvalidArgument as SafetensorsFile does, and for an index that is none, names files
  /// elsewhere or tensors that are not in their file.
  explicit SafetensorsCheckpoint(const std::filesystem::path& path);
  /// Of one file.
  explicit SafetensorsCheckpoint(SafetensorsFile file);

  /// What the checkpoint is called in messages: the path of the file or of the index.
  const std::string& name() const noexcept { return name_; }
  /// Ascending by name.
  std::span<const SafetensorsTensor> tensors() const noexcept { return tensors_; }
  /// Null when there is none of that name.
  const SafetensorsTensor* find(std::string_view name) const noexcept;
  /// Throws InvalidArgument when there is none of that name.
  const SafetensorsTensor& at(std::string_view name) const;
  std::span<const SafetensorsFile> files() const noexcept { return files_; }

 private:
  void open_shards(const std::filesystem::path& index);

  std::string name_;
  std::vector<SafetensorsFile> files_;
  std::vector<SafetensorsTensor> tensors_;
};

}  // namespace qlora_native
