// The JSON parser: what RFC 8259 allows is read, all else is refused with the byte where it ends.
#include "qlora_native/json.h"

#include <gtest/gtest.h>

#include <limits>

#include "support/rejection.h"

namespace qlora_native::testing {
namespace {

Json parse(std::string_view text) { return Json::parse(text, "test"); }

std::string text_of(std::string_view text) {
  const Json value = parse(text);
  return value.string() == nullptr ? "not a string" : *value.string();
}

void rejects(std::string_view text, const std::vector<std::string>& words) {
  std::vector<std::string> expected = {"test: not JSON at byte "};
  expected.insert(expected.end(), words.begin(), words.end());
  SCOPED_TRACE(text.substr(0, 60));
  expect_rejected([&] { parse(text); }, expected);
}

TEST(Json, Values) {
  EXPECT_TRUE(parse("null").is_null());
  EXPECT_EQ(parse(" true\n").boolean(), true);
  EXPECT_EQ(parse("false").boolean(), false);
  EXPECT_EQ(parse("-12").integer(), -12);
  EXPECT_EQ(parse("-12").number(), -12.0);
  EXPECT_EQ(parse("2.5e-3").number(), 2.5e-3);
  EXPECT_EQ(parse("\t\"x\"\r\n").string()->size(), 1u);
  const Json array = parse("[1, [], {\"a\": [null]}]");
  ASSERT_EQ(array.array()->size(), 3u);
  EXPECT_EQ(array.array()->at(0).integer(), 1);
  EXPECT_TRUE(array.array()->at(1).array()->empty());
  EXPECT_TRUE(array.array()->at(2).find("a")->array()->at(0).is_null());
}

TEST(Json, WhatAValueIsNot) {
  const Json number = parse("1");
  EXPECT_FALSE(number.is_null());
  EXPECT_EQ(number.boolean(), std::nullopt);
  EXPECT_EQ(number.string(), nullptr);
  EXPECT_EQ(number.array(), nullptr);
  EXPECT_EQ(number.object(), nullptr);
  EXPECT_EQ(number.find("1"), nullptr);
  EXPECT_EQ(parse("\"1\"").integer(), std::nullopt);
  EXPECT_EQ(parse("true").number(), std::nullopt);
  EXPECT_EQ(parse("1.0").integer(), std::nullopt);
}

TEST(Json, Kinds) {
  const std::pair<const char*, const char*> kinds[] = {
      {"null", "null"},     {"true", "a boolean"}, {"1", "a number"},  {"1.5", "a number"},
      {"\"\"", "a string"}, {"[]", "an array"},    {"{}", "an object"}};
  for (const auto& [text, kind] : kinds) EXPECT_STREQ(parse(text).kind(), kind);
}

TEST(Json, MembersAreFoundByKey) {
  const Json value = parse("{\"b\": 2, \"\": 0, \"a\": 1, \"ab\": 3, \"B\": 4}");
  EXPECT_EQ(value.find("")->integer(), 0);
  EXPECT_EQ(value.find("a")->integer(), 1);
  EXPECT_EQ(value.find("ab")->integer(), 3);
  EXPECT_EQ(value.find("b")->integer(), 2);
  EXPECT_EQ(value.find("B")->integer(), 4);
  EXPECT_EQ(value.find("c"), nullptr);
  EXPECT_EQ(value.object()->front().key, "");
  EXPECT_EQ(value.object()->back().key, "b");
}

TEST(Json, Integers) {
  constexpr int64_t kMin = std::numeric_limits<int64_t>::min();
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  EXPECT_EQ(parse(std::to_string(kMin)).integer(), kMin);
  EXPECT_EQ(parse(std::to_string(kMax)).integer(), kMax);
  EXPECT_EQ(parse("9223372036854775808").integer(), std::nullopt);
  EXPECT_EQ(parse("9223372036854775808").number(), 0x1p63);
  EXPECT_EQ(parse("-0").integer(), 0);
}

TEST(Json, NumbersThatAreNone) {
  for (const char* text : {"-", "+1", ".5", "1.", "1.e3", "1e", "1e+", "01", "-01", "0x10", "1 2",
                           "NaN", "Infinity", "-Infinity", "1_000", "1,"}) {
    rejects(text, {});
  }
  rejects("1e999", {"byte 0 of 5", "\"1e999\"", "double"});
  rejects("[-1e999]", {"byte 1 of 8", "double"});
  rejects("1" + std::string(400, '0'), {"byte 0 of 401", "..."});
}

TEST(Json, Escapes) {
  EXPECT_EQ(text_of(R"("\"\\\/\b\f\n\r\t")"), "\"\\/\b\f\n\r\t");
  EXPECT_EQ(text_of(R"("\u0041\u00e9\u20AC\uD83D\uDE00")"),
            "A\xC3\xA9\xE2\x82\xAC\xF0\x9F\x98\x80");
  EXPECT_EQ(text_of(R"("\u0000")"), std::string(1, '\0'));
  for (const char* text : {R"("\x")", R"("\U0041")", R"("\u12")", R"("\u12G4")", R"("\u-123")",
                           R"("\ud800")", R"("\ud800\n")", R"("\ud800A")", R"("\udc00")",
                           R"("\ud800\ud800")", "\"\\", "\"\\u", "\"\\ud800\\", "\"\\ud800\\u"}) {
    rejects(text, {});
  }
}

TEST(Json, Utf8) {
  for (const std::string text :
       {"\xC2\x80", "\xDF\xBF", "\xE0\xA0\x80", "\xED\x9F\xBF", "\xEE\x80\x80", "\xEF\xBF\xBF",
        "\xF0\x90\x80\x80", "\xF4\x8F\xBF\xBF", "\x7F"}) {
    EXPECT_EQ(text_of('"' + text + '"'), text);
  }
  for (const std::string text :
       {"\x80", "\xBF", "\xC0\x80", "\xC1\xBF", "\xC2", "\xC2\x41", "\xE0\x9F\xBF", "\xE0\xA0",
        "\xED\xA0\x80", "\xED\xBF\xBF", "\xE2\x82", "\xF0\x8F\xBF\xBF", "\xF0\x90\x80",
        "\xF4\x90\x80\x80", "\xF5\x80\x80\x80", "\xFE", "\xFF"}) {
    rejects('"' + text + '"', {"byte 1 of", "UTF-8"});
    rejects('"' + text, {"byte 1 of"});
  }
}

TEST(Json, ControlCharactersInStrings) {
  for (char c = 0; c < 0x20; ++c) rejects(std::string("\"") + c + '"', {"byte 1 of 3", "control"});
}

TEST(Json, Structure) {
  for (const char* text : {"",
                           "  ",
                           "nul",
                           "nulll",
                           "True",
                           "'a'",
                           "[",
                           "]",
                           "[1",
                           "[1,",
                           "[1,]",
                           "[,1]",
                           "[1 2]",
                           "{",
                           "}",
                           "{\"a\"",
                           "{\"a\":",
                           "{\"a\":1",
                           "{\"a\":1,",
                           "{\"a\":1,}",
                           "{,}",
                           "{1:2}",
                           "{\"a\" 1}",
                           "{\"a\":1 \"b\":2}",
                           "{a:1}",
                           "\"",
                           "\"abc",
                           "[]]",
                           "// no\n1",
                           "\xEF\xBB\xBF"
                           "1"}) {
    rejects(text, {});
  }
  rejects(std::string_view("1\0", 2), {"byte 1 of 2", "follows"});
  rejects("[1, ?]", {"byte 4 of 6", "\"?\""});
  rejects("{\"a\" 1}", {"\"a\""});
}

TEST(Json, KeysOccurOnce) {
  rejects("[{\"a\": 1, \"b\": 2, \"a\": 3}]", {"byte 1 of", "\"a\" twice"});
  rejects("{\"a\": 1, \"\\u0061\": 3}", {"\"a\" twice"});
}

TEST(Json, Depth) {
  const auto nested = [](size_t depth, char open, char close) {
    return std::string(depth, open) + std::string(depth, close);
  };
  parse(nested(Json::kMaxDepth, '[', ']'));
  rejects(nested(Json::kMaxDepth + 1, '[', ']'), {"byte 64", "deeper than 64"});
  rejects(std::string(10'000'000, '['), {"byte 64", "deeper than 64"});
  std::string objects;
  for (int i = 0; i <= Json::kMaxDepth; ++i) objects += "{\"a\":";
  rejects(objects, {"deeper than 64"});
}

TEST(Json, MessagesAreShortAndPrintable) {
  const std::string key(100'000, '\x7F');
  try {
    parse("{\"" + key + "\" 1}");
    FAIL();
  } catch (const std::exception& error) {
    EXPECT_LT(std::string(error.what()).size(), 1000u);
    EXPECT_NE(std::string(error.what()).find("\\x7f\\x7f"), std::string::npos);
  }
}

TEST(Json, WhatCannotBeRead) {
  expect_rejected([] { Json::read("no/such/config.json"); }, {"no/such/config.json: "});
}

}  // namespace
}  // namespace qlora_native::testing
