// What a config.json says of the quantization.
#include <gtest/gtest.h>

#include "qlora_native/quantized_matrix.h"
#include "support/rejection.h"
#include "support/safetensors_bytes.h"

namespace qlora_native::testing {
namespace {

QuantizationConfig config_from(const std::string& quantization_config) {
  const std::string text = "{\"quantization_config\": " + quantization_config + "}";
  return QuantizationConfig::from_json(Json::parse(text, "x"), "my/config.json");
}

TEST(QuantizationConfig, SettingsAndOverrides) {
  const auto config = config_from(R"({"quant_method": "qlora_native", "quant_type": "fp4",
      "double_quant": false, "block_size": 128, "compute_dtype": null,
      "overrides": {"a.b": {"double_quant": true, "block_size": 32}}})");
  const QuantizationSettings& usual = config.settings_of("a");
  EXPECT_EQ(usual.quant_type, QuantType::kFP4);
  EXPECT_EQ(usual.block_size, 128);
  EXPECT_FALSE(usual.double_quant);
  const QuantizationSettings& other = config.settings_of("a.b");
  EXPECT_EQ(other.quant_type, QuantType::kFP4);
  EXPECT_EQ(other.block_size, 32);
  EXPECT_TRUE(other.double_quant);
}

TEST(QuantizationConfig, DefaultsAndForeignOnes) {
  for (const char* text : {"null", R"({"quant_method": "qlora_native"})",
                           R"({"quant_method": "bitsandbytes", "block_size": "?"})"}) {
    const QuantizationConfig config = config_from(text);
    const QuantizationSettings& settings = config.settings_of("a");
    EXPECT_EQ(settings.quant_type, QuantType::kNF4);
    EXPECT_EQ(settings.block_size, 64);
    EXPECT_TRUE(settings.double_quant);
  }
  EXPECT_EQ(QuantizationConfig::from_json(Json::parse("{}", "x"), "x").settings_of("").block_size,
            64);
}

TEST(QuantizationConfig, WrongValues) {
  const auto rejects = [](const std::string& text, const std::string& word) {
    SCOPED_TRACE(text);
    expect_rejected([&] { config_from(text); }, {"my/config.json: quantization_config", word});
  };
  const auto with = [](const std::string& rest) {
    return "{\"quant_method\": \"qlora_native\", " + rest + "}";
  };
  rejects("{}", "quant_method");
  rejects("[]", "quant_method");
  rejects(R"({"quant_method": 4})", "quant_method");
  rejects(R"({"quant_method": "gptq"})", "\"gptq\"");
  rejects(with(R"("quant_type": "int8")"), "\"int8\"");
  rejects(with(R"("quant_type": null)"), "null");
  rejects(with(R"("block_size": 63)"), "block_size 63");
  rejects(with(R"("block_size": 8192)"), "block_size 8192");
  rejects(with(R"("block_size": 64.0)"), "block_size");
  rejects(with(R"("double_quant": 1)"), "double_quant");
  rejects(with(R"("overrides": [])"), "overrides");
  rejects(with(R"("overrides": {"a": 1})"), "\"a\"");
  rejects(with(R"("overrides": {"a": {"block_size": 1}})"), "overrides of \"a\"");
}

TEST(QuantizationConfig, IsReadFromAFile) {
  const TemporaryFolder folder;
  const auto path = folder.write(
      "config.json",
      R"({"quantization_config": {"quant_method": "qlora_native", "block_size": 4096}})");
  EXPECT_EQ(QuantizationConfig::read(path).settings_of("x").block_size, 4096);
  expect_rejected([&] { QuantizationConfig::read(folder.path() / "none"); },
                  {folder.path() / "none"});
}

}  // namespace
}  // namespace qlora_native::testing
