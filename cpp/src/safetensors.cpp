#include "qlora_native/safetensors.h"

#include <algorithm>
#include <tuple>

#include "in_quotes.h"
#include "mapped_file.h"
#include "qlora_native/json.h"
#include "tensor_list.h"
#include "validation_failure.h"

namespace qlora_native {
namespace {

constexpr size_t kLengthBytes = 8;
constexpr uint64_t kMaxHeaderBytes = 100'000'000;  // as the format's other readers have it
constexpr const char* kMetadata = "__metadata__";

struct NamedBits {
  std::string_view name;
  int64_t bits;
};
constexpr NamedBits kDTypes[] = {
    {"BOOL", 8},        {"U8", 8},         {"I8", 8},   {"F8_E5M2", 8}, {"F8_E4M3", 8},
    {"F8_E8M0", 8},     {"I16", 16},       {"U16", 16}, {"F16", 16},    {"BF16", 16},
    {"I32", 32},        {"U32", 32},       {"F32", 32}, {"F64", 64},    {"I64", 64},
    {"U64", 64},        {"C64", 64},       {"F4", 4},   {"F6_E2M3", 6}, {"F6_E3M2", 6},
    {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}};

/// One tensor of the header; `where` begins messages.
class TensorReader {
 public:
  TensorReader(std::string where, const Json& value) : where_(std::move(where)), value_(value) {
    if (value.object() == nullptr) fail(where_, ": is ", value.kind(), ", expected an object");
  }

  SafetensorsTensor read(const std::string& name, std::span<const std::byte> data) const {
    SafetensorsTensor tensor;
    tensor.name = name;
    tensor.dtype = dtype();
    tensor.shape = integers("shape");
    const int64_t expected = size_bytes(tensor);
    const std::vector<int64_t> offsets = integers("data_offsets");
    if (offsets.size() != 2) fail(where_, ": data_offsets has ", offsets.size(), " numbers, not 2");
    const auto size = static_cast<int64_t>(data.size());
    if (offsets[0] > offsets[1] || offsets[1] > size) {
      fail(where_, ": its bytes ", offsets[0], " to ", offsets[1],
           " do not lie in the file, which has ", size, " after the header");
    }
    if (offsets[1] - offsets[0] != expected) {
      fail(where_, ": has ", offsets[1] - offsets[0], " bytes, but ", tensor.dtype, " ",
           to_string(tensor.shape), " takes ", expected);
    }
    tensor.data = data.subspan(static_cast<size_t>(offsets[0]), static_cast<size_t>(expected));
    return tensor;
  }

 private:
  const Json& member(const char* key) const {
    const Json* const found = value_.find(key);
    if (found == nullptr) fail(where_, ": has no ", key);
    return *found;
  }

  std::string dtype() const {
    const Json& value = member("dtype");
    if (value.string() == nullptr) fail(where_, ": dtype is ", value.kind(), ", not a string");
    if (std::ranges::find(kDTypes, *value.string(), &NamedBits::name) == std::end(kDTypes)) {
      fail(where_, ": unknown dtype ", in_quotes(*value.string()));
    }
    return *value.string();
  }

  /// An array of integers that are not negative.
  std::vector<int64_t> integers(const char* key) const {
    const Json& value = member(key);
    if (value.array() == nullptr) fail(where_, ": ", key, " is ", value.kind(), ", not an array");
    std::vector<int64_t> result;
    for (const Json& element : *value.array()) {
      const auto number = element.integer();
      if (!number || *number < 0) {
        fail(where_, ": ", key, "[", result.size(), "] is no integer from 0 to 2^63 - 1");
      }
      result.push_back(*number);
    }
    return result;
  }

  int64_t size_bytes(const SafetensorsTensor& tensor) const {
    int64_t bits = std::ranges::find(kDTypes, tensor.dtype, &NamedBits::name)->bits;
    for (const int64_t dimension : tensor.shape) {
      if (__builtin_mul_overflow(bits, dimension, &bits)) {
        fail(where_, ": the size of ", tensor.dtype, " ", to_string(tensor.shape),
             " overflows 64 bits");
      }
    }
    if (bits % 8 != 0) {
      fail(where_, ": ", tensor.dtype, " ", to_string(tensor.shape),
           " is no whole number of bytes");
    }
    return bits / 8;
  }

  std::string where_;
  const Json& value_;
};

uint64_t little_endian(std::span<const std::byte> bytes) {
  uint64_t value = 0;
  for (size_t i = bytes.size(); i-- > 0;) value = value << 8 | std::to_integer<uint64_t>(bytes[i]);
  return value;
}

/// The tensors have every byte of `data` between them, and none twice.
void require_tiling(const std::string& file, std::span<const SafetensorsTensor> tensors,
                    std::span<const std::byte> data) {
  std::vector<const SafetensorsTensor*> by_place;
  for (const SafetensorsTensor& tensor : tensors) by_place.push_back(&tensor);
  std::ranges::sort(by_place, {}, [](const SafetensorsTensor* tensor) {
    return std::tuple(tensor->data.data(), tensor->data.size());
  });
  size_t end = 0;
  for (const SafetensorsTensor* tensor : by_place) {
    const auto begin = static_cast<size_t>(tensor->data.data() - data.data());
    if (begin != end) {
      fail(file, ": tensor ", in_quotes(tensor->name), ": begins at byte ", begin,
           " after the header, ", begin < end ? "inside of the one before it" : "behind a hole",
           ": that is up to byte ", end);
    }
    end += tensor->data.size();
  }
  if (end != data.size()) {
    fail(file, ": the tensors take ", end, " bytes, but ", data.size(), " follow the header");
  }
}

std::map<std::string, std::string> read_metadata(const std::string& file, const Json& value) {
  if (value.object() == nullptr) fail(file, ": ", kMetadata, " is ", value.kind());
  std::map<std::string, std::string> result;
  for (const Json::Member& entry : *value.object()) {
    if (entry.value.string() == nullptr) {
      fail(file, ": ", kMetadata, ": ", in_quotes(entry.key), " is ", entry.value.kind(),
           ", not a string");
    }
    result.emplace(entry.key, *entry.value.string());
  }
  return result;
}

}  // namespace

int64_t SafetensorsTensor::numel() const noexcept {
  int64_t product = 1;
  for (const int64_t dimension : shape) product *= dimension;
  return product;
}

std::optional<DType> SafetensorsTensor::float_dtype() const noexcept {
  if (dtype == "F32") return DType::kFloat32;
  if (dtype == "F16") return DType::kFloat16;
  if (dtype == "BF16") return DType::kBFloat16;
  return std::nullopt;
}

std::string to_string(std::span<const int64_t> shape) {
  std::string text = "[";
  for (const int64_t dimension : shape) {
    if (text.size() > 1) text += ", ";
    text += std::to_string(dimension);
  }
  return text + "]";
}

SafetensorsFile::SafetensorsFile(const std::filesystem::path& path) : name_(path.string()) {
  const MappedFile file = map_file(path);
  mapping_ = file.owner;
  read(file.bytes);
}

SafetensorsFile SafetensorsFile::over(std::span<const std::byte> bytes, std::string name) {
  SafetensorsFile result;
  result.name_ = std::move(name);
  result.read(bytes);
  return result;
}

void SafetensorsFile::read(std::span<const std::byte> bytes) {
  if (bytes.size() < kLengthBytes) {
    fail(name_, ": has ", bytes.size(), " bytes, fewer than the ", kLengthBytes,
         " that say how long its header is");
  }
  const uint64_t length = little_endian(bytes.first(kLengthBytes));
  if (length > kMaxHeaderBytes || length > bytes.size() - kLengthBytes) {
    fail(name_, ": says that its header has ", length, " bytes; there are ",
         bytes.size() - kLengthBytes, ", and ", kMaxHeaderBytes, " are allowed");
  }
  const auto header_bytes = bytes.subspan(kLengthBytes, static_cast<size_t>(length));
  const auto data = bytes.subspan(kLengthBytes + static_cast<size_t>(length));
  const std::string_view text(reinterpret_cast<const char*>(header_bytes.data()),
                              header_bytes.size());
  const Json header = Json::parse(text, name_ + ": header");
  if (header.object() == nullptr) fail(name_, ": the header is ", header.kind(), ", not an object");
  for (const Json::Member& entry : *header.object()) {
    if (entry.key == kMetadata) {
      metadata_ = read_metadata(name_, entry.value);
      continue;
    }
    const TensorReader reader(name_ + ": tensor " + in_quotes(entry.key), entry.value);
    tensors_.push_back(reader.read(entry.key, data));
  }
  require_tiling(name_, tensors_, data);
}

const SafetensorsTensor* SafetensorsFile::find(std::string_view name) const noexcept {
  return find_tensor(tensors_, name);
}

const SafetensorsTensor& SafetensorsFile::at(std::string_view name) const {
  return tensor_at(tensors_, name, name_);
}

}  // namespace qlora_native
