#include <map>
#include <system_error>

#include "in_quotes.h"
#include "qlora_native/json.h"
#include "qlora_native/safetensors.h"
#include "tensor_list.h"
#include "validation_failure.h"

namespace qlora_native {
namespace {

constexpr const char* kSingle = "model.safetensors";
constexpr const char* kIndex = "model.safetensors.index.json";

/// What the system cannot say is left to the opening of the file, which reports it.
std::filesystem::path file_of(const std::filesystem::path& path) {
  std::error_code ignored;
  if (!std::filesystem::is_directory(path, ignored)) return path;
  // As transformers has it: one file goes before an index.
  for (const char* name : {kSingle, kIndex}) {
    if (std::filesystem::exists(path / name, ignored)) return path / name;
  }
  fail(path.string(), ": holds neither ", kSingle, " nor ", kIndex);
}

std::vector<SafetensorsTensor> tensors_of(const SafetensorsFile& file) {
  return {file.tensors().begin(), file.tensors().end()};
}

/// A name in the folder of the index, and nowhere else.
bool is_plain_name(const std::string& name) {
  return !name.empty() && name != "." && name != ".." && name.find_first_of("/\\") == name.npos &&
         name.find('\0') == name.npos;
}

}  // namespace

SafetensorsCheckpoint::SafetensorsCheckpoint(const std::filesystem::path& path) {
  const std::filesystem::path file = file_of(path);
  name_ = file.string();
  if (file.extension() == ".json") {
    open_shards(file);
  } else {
    files_.emplace_back(file);
    tensors_ = tensors_of(files_.front());
  }
}

SafetensorsCheckpoint::SafetensorsCheckpoint(SafetensorsFile file) : name_(file.name()) {
  tensors_ = tensors_of(file);
  files_.push_back(std::move(file));
}

void SafetensorsCheckpoint::open_shards(const std::filesystem::path& index) {
  const Json content = Json::read(index);
  const Json* const map = content.find("weight_map");
  if (map == nullptr || map->object() == nullptr) fail(name_, ": has no object weight_map");
  std::map<std::string, size_t> opened;
  for (const Json::Member& entry : *map->object()) {
    const std::string* const shard = entry.value.string();
    if (shard == nullptr || !is_plain_name(*shard)) {
      fail(name_, ": tensor ", in_quotes(entry.key), " is in ",
           shard == nullptr ? std::string(entry.value.kind()) : in_quotes(*shard),
           ", which is no name of a file beside the index");
    }
    const auto [place, is_new] = opened.try_emplace(*shard, files_.size());
    if (is_new) files_.emplace_back(index.parent_path() / *shard);
    tensors_.push_back(files_[place->second].at(entry.key));
  }
}

const SafetensorsTensor* SafetensorsCheckpoint::find(std::string_view name) const noexcept {
  return find_tensor(tensors_, name);
}

const SafetensorsTensor& SafetensorsCheckpoint::at(std::string_view name) const {
  return tensor_at(tensors_, name, name_);
}

}  // namespace qlora_native
