// The reader of safetensors files and of checkpoints in several of them.
#include "qlora_native/safetensors.h"

#include <gtest/gtest.h>
#include <sys/stat.h>

#include <cstring>
#include <utility>

#include "support/rejection.h"
#include "support/safetensors_bytes.h"

namespace qlora_native::testing {
namespace {

std::string entry(const std::string& name, const std::string& dtype, const std::string& shape,
                  const std::string& offsets) {
  return "\"" + name + "\":{\"dtype\":\"" + dtype + "\",\"shape\":" + shape +
         ",\"data_offsets\":" + offsets + "}";
}

/// A file whose header is {`entries`} is refused, by name and with `words`.
void rejects(const std::string& entries, size_t data_bytes, std::vector<std::string> words) {
  const Bytes file = file_with_header("{" + entries + "}", data_bytes);
  words.push_back("some.file: ");
  expect_rejected([&] { SafetensorsFile::over(file, "some.file"); }, words);
}

TEST(SafetensorsFile, Tensors) {
  const Bytes bytes = safetensors_bytes({
      {"z", "F32", {2, 3}, bytes_of<float>({1, 2, 3, 4, 5, 6})},
      {"a", "BF16", {}, bytes_of<uint16_t>({0x3F80})},
      {"none", "U8", {0, 7}, {}},
      {"b", "F4", {3, 2}, bytes_of<uint8_t>({1, 2, 3})},
      {"i", "I64", {1}, bytes_of<int64_t>({-5})},
  });
  const auto file = SafetensorsFile::over(bytes, "x");
  std::vector<std::string> names;
  for (const SafetensorsTensor& tensor : file.tensors()) names.push_back(tensor.name);
  EXPECT_EQ(names, (std::vector<std::string>{"a", "b", "i", "none", "z"}));
  const SafetensorsTensor& z = file.at("z");
  EXPECT_EQ(z.float_dtype(), DType::kFloat32);
  EXPECT_EQ(z.numel(), 6);
  EXPECT_EQ(to_string(z.shape), "[2, 3]");
  float third = 0;
  std::memcpy(&third, z.data.data() + 8, 4);
  EXPECT_EQ(third, 3.0f);
  EXPECT_EQ(file.at("a").numel(), 1);
  EXPECT_EQ(file.at("a").float_dtype(), DType::kBFloat16);
  EXPECT_EQ(file.at("none").numel(), 0);
  EXPECT_EQ(file.at("b").data.size(), 3u);
  EXPECT_EQ(file.at("i").float_dtype(), std::nullopt);
  EXPECT_EQ(file.find("y"), nullptr);
  expect_rejected([&] { file.at("y"); }, {"x: ", "\"y\"", "5"});
}

TEST(SafetensorsFile, NoTensorsAndMetadata) {
  EXPECT_TRUE(SafetensorsFile::over(file_with_header("{}"), "x").tensors().empty());
  const Bytes bytes = file_with_header("{\"__metadata__\":{\"format\":\"pt\"}}   ");
  const auto file = SafetensorsFile::over(bytes, "x");
  EXPECT_TRUE(file.tensors().empty());
  EXPECT_EQ(file.metadata().at("format"), "pt");
  rejects("\"__metadata__\":{\"a\":1}", 0, {"__metadata__", "\"a\"", "a number"});
  rejects("\"__metadata__\":[]", 0, {"__metadata__", "an array"});
}

TEST(SafetensorsFile, EveryPrefixOfAFileIsRefused) {
  const Bytes whole = safetensors_bytes(
      {{"a", "F32", {2}, bytes_of<float>({1, 2})}, {"b", "U8", {3}, bytes_of<uint8_t>({1, 2, 3})}});
  SafetensorsFile::over(whole, "whole");
  for (size_t size = 0; size < whole.size(); ++size) {
    const Bytes cut(whole.begin(), whole.begin() + static_cast<ptrdiff_t>(size));
    expect_rejected([&] { SafetensorsFile::over(cut, "cut.file"); }, {"cut.file: "});
  }
  Bytes longer = whole;
  longer.push_back({});
  expect_rejected([&] { SafetensorsFile::over(longer, "x"); }, {"x: ", "11 bytes", "12 follow"});
}

TEST(SafetensorsFile, HeaderLength) {
  Bytes file = file_with_header("{}");
  for (const uint64_t length :
       {uint64_t{3}, uint64_t{100'000'001}, uint64_t{1} << 63, ~uint64_t{0}}) {
    std::memcpy(file.data(), &length, 8);
    expect_rejected([&] { SafetensorsFile::over(file, "x"); },
                    {"x: ", std::to_string(length), "there are 2"});
  }
}

TEST(SafetensorsFile, HeaderContent) {
  const auto rejects_header = [](const std::string& header, const std::string& word) {
    expect_rejected([&] { SafetensorsFile::over(file_with_header(header), "x"); }, {"x: ", word});
  };
  rejects_header("", "not JSON");
  rejects_header("[]", "an array");
  rejects_header("{\"a\":1}", "tensor \"a\": is a number");
  rejects_header("{\"a\":null}", "tensor \"a\": is null");
  const std::string a = entry("a", "U8", "[0]", "[0,0]");
  rejects_header("{" + a + "," + a + "}", "\"a\" twice");
  rejects_header(std::string(1000, '['), "deeper");
  rejects_header("{\"\xFF\":1}", "UTF-8");
}

TEST(SafetensorsFile, TensorEntries) {
  rejects("\"a\":{}", 0, {"tensor \"a\"", "has no dtype"});
  rejects("\"a\":{\"dtype\":\"U8\"}", 0, {"has no shape"});
  rejects("\"a\":{\"dtype\":\"U8\",\"shape\":[]}", 0, {"has no data_offsets"});
  rejects("\"a\":{\"dtype\":8}", 0, {"dtype is a number"});
  rejects(entry("a", "float32", "[1]", "[0,4]"), 4, {"unknown dtype \"float32\""});
  rejects(entry("a", "U8", "4", "[0,4]"), 4, {"shape is a number"});
  rejects(entry("a", "U8", "[4,-1]", "[0,4]"), 4, {"shape[1]"});
  rejects(entry("a", "U8", "[4.0]", "[0,4]"), 4, {"shape[0]"});
  rejects(entry("a", "U8", "[\"4\"]", "[0,4]"), 4, {"shape[0]"});
  rejects(entry("a", "U8", "[4]", "[0,4,4]"), 4, {"data_offsets has 3"});
  rejects(entry("a", "U8", "[4]", "[0,null]"), 4, {"data_offsets[1]"});
  rejects(entry("a", "U8", "[4]", "[-4,0]"), 4, {"data_offsets[0]"});
}

TEST(SafetensorsFile, SizesThatOverflow) {
  rejects(entry("a", "F32", "[4611686018427387904,4]", "[0,0]"), 0,
          {"tensor \"a\"", "F32 [4611686018427387904, 4]", "overflows"});
  rejects(entry("a", "U8", "[9223372036854775807]", "[0,0]"), 0, {"overflows"});
  rejects(entry("a", "U8", "[9223372036854775808]", "[0,0]"), 0, {"shape[0]"});
  rejects(entry("a", "U8", "[4]", "[99999999999999999999,4]"), 4, {"data_offsets[0]"});
  rejects(entry("a", "U8", "[4]", "[1e3,4]"), 4, {"data_offsets[0]"});
  // Wraps around to four bytes in 64 bits.
  rejects(entry("a", "U8", "[4294967297,4294967300]", "[0,4]"), 4, {"overflows"});
}

TEST(SafetensorsFile, Offsets) {
  rejects(entry("a", "U8", "[4]", "[0,5]"), 5, {"has 5 bytes", "U8 [4] takes 4"});
  rejects(entry("a", "U8", "[4]", "[0,4]"), 3, {"bytes 0 to 4", "has 3"});
  rejects(entry("a", "U8", "[4]", "[4,0]"), 4, {"bytes 4 to 0"});
  rejects(entry("a", "U8", "[4]", "[9223372036854775803,9223372036854775807]"), 4,
          {"9223372036854775807"});
  rejects(entry("a", "F4", "[3]", "[0,2]"), 2, {"whole number of bytes"});
  const std::string a = entry("a", "U8", "[4]", "[0,4]");
  rejects(a + "," + entry("b", "U8", "[4]", "[3,7]"), 7, {"tensor \"b\"", "byte 3", "inside"});
  rejects(a + "," + entry("b", "U8", "[4]", "[0,4]"), 4, {"inside"});
  rejects(a + "," + entry("b", "U8", "[4]", "[5,9]"), 9, {"tensor \"b\"", "byte 5", "hole"});
  rejects(entry("b", "U8", "[4]", "[1,5]"), 5, {"byte 1", "hole"});
  rejects(a, 5, {"take 4 bytes", "5 follow"});
  rejects(a + "," + entry("b", "U8", "[0]", "[2,2]"), 4, {"tensor \"b\"", "inside"});
}

TEST(SafetensorsFile, IsMappedAndOutlivesItsMoves) {
  const TemporaryFolder folder;
  const auto path = folder.write(
      "a.safetensors", safetensors_bytes({{"a", "U8", {3}, bytes_of<uint8_t>({7, 8, 9})}}));
  SafetensorsFile file(path);
  EXPECT_EQ(file.name(), path.string());
  const std::span<const std::byte> data = file.at("a").data;
  std::vector<SafetensorsFile> moved;
  moved.push_back(std::move(file));
  const SafetensorsFile copy = moved.front();
  moved.clear();
  std::filesystem::remove(path);
  EXPECT_EQ(copy.at("a").data.data(), data.data());
  EXPECT_EQ(std::to_integer<int>(data[2]), 9);
}

TEST(SafetensorsFile, WhatIsNoFile) {
  const TemporaryFolder folder;
  expect_rejected([&] { SafetensorsFile(folder.path() / "none"); }, {folder.path() / "none"});
  expect_rejected([&] { SafetensorsFile{folder.path()}; }, {folder.path(), "not a regular file"});
  const auto pipe = folder.path() / "pipe";
  ASSERT_EQ(mkfifo(pipe.c_str(), 0600), 0);
  expect_rejected([&] { SafetensorsFile{pipe}; }, {pipe, "not a regular file"});
  const auto empty = folder.write("empty", Bytes{});
  expect_rejected([&] { SafetensorsFile{empty}; }, {empty, "has 0 bytes"});
}

class Checkpoint : public ::testing::Test {
 protected:
  Checkpoint() {
    folder_.write("one.safetensors", safetensors_bytes({{"a", "U8", {1}, bytes_of<uint8_t>({1})},
                                                        {"c", "U8", {1}, bytes_of<uint8_t>({3})}}));
    folder_.write("two.safetensors", safetensors_bytes({{"b", "U8", {1}, bytes_of<uint8_t>({2})}}));
  }

  void rejects(const std::string& index, std::vector<std::string> words) const {
    const auto path = folder_.write("model.safetensors.index.json", index);
    words.push_back(path);
    expect_rejected([&] { SafetensorsCheckpoint{folder_.path()}; }, words);
  }

  TemporaryFolder folder_;
};

TEST_F(Checkpoint, Shards) {
  const auto index = folder_.write("model.safetensors.index.json",
                                   R"({"metadata": {"total_size": 3}, "weight_map": {
          "c": "one.safetensors", "b": "two.safetensors", "a": "one.safetensors"}})");
  for (const std::filesystem::path& path : {folder_.path(), index}) {
    const SafetensorsCheckpoint checkpoint(path);
    EXPECT_EQ(checkpoint.name(), index.string());
    EXPECT_EQ(checkpoint.files().size(), 2u);
    ASSERT_EQ(checkpoint.tensors().size(), 3u);
    for (const auto& [name, value] : {std::pair{"a", 1}, {"b", 2}, {"c", 3}}) {
      EXPECT_EQ(std::to_integer<int>(checkpoint.at(name).data[0]), value);
    }
    EXPECT_EQ(checkpoint.find("d"), nullptr);
    expect_rejected([&] { checkpoint.at("d"); }, {index, "\"d\"", "3"});
  }
}

TEST_F(Checkpoint, OneFile) {
  const auto path = folder_.write("model.safetensors",
                                  safetensors_bytes({{"x", "U8", {1}, bytes_of<uint8_t>({9})}}));
  EXPECT_EQ(SafetensorsCheckpoint(folder_.path()).at("x").numel(), 1);
  EXPECT_EQ(SafetensorsCheckpoint(path).at("x").numel(), 1);
  EXPECT_EQ(SafetensorsCheckpoint(SafetensorsFile(path)).at("x").numel(), 1);
}

TEST_F(Checkpoint, WrongIndices) {
  rejects("[]", {"weight_map"});
  rejects("{}", {"weight_map"});
  rejects(R"({"weight_map": []})", {"weight_map"});
  rejects(R"({"weight_map": {"a": 1}})", {"\"a\"", "a number"});
  rejects("{", {"not JSON"});
  for (const char* name : {"../one.safetensors", "/one.safetensors", "", ".", "..", "x/y", "x\\\\y",
                           "one.safetensors\\u0000"}) {
    rejects(R"({"weight_map": {"a": ")" + std::string(name) + "\"}}",
            {"\"a\"", "beside the index"});
  }
}

TEST_F(Checkpoint, ShardsThatAreNotThere) {
  folder_.write("model.safetensors.index.json", R"({"weight_map": {"a": "three.safetensors"}})");
  expect_rejected([&] { SafetensorsCheckpoint{folder_.path()}; },
                  {folder_.path() / "three.safetensors"});
  folder_.write("model.safetensors.index.json", R"({"weight_map": {"b": "one.safetensors"}})");
  expect_rejected([&] { SafetensorsCheckpoint{folder_.path()}; },
                  {folder_.path() / "one.safetensors", "\"b\""});
}

TEST_F(Checkpoint, FolderWithoutOne) {
  const TemporaryFolder empty;
  expect_rejected([&] { SafetensorsCheckpoint{empty.path()}; },
                  {empty.path(), "model.safetensors", "index.json"});
  expect_rejected([&] { SafetensorsCheckpoint{empty.path() / "none"}; }, {empty.path() / "none"});
  const std::string too_long(300, 'a');
  expect_rejected([&] { SafetensorsCheckpoint{empty.path() / too_long}; }, {too_long});
}

}  // namespace
}  // namespace qlora_native::testing
