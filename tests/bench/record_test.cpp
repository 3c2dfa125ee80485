// Records and their JSON.
#include <gtest/gtest.h>

#include <cmath>
#include <sstream>

#include "cpp/record.h"

namespace bench {
namespace {

TEST(BenchRecord, KeepsItsOrderAndItsTypes) {
  Record record = {{"b", 1.5}, {"a", "text"}, {"n", int64_t{3}}};
  record.set("b", 2.5);
  record.merge({{"n", int64_t{4}}, {"z", true}});
  ASSERT_EQ(record.entries().size(), 4u);
  EXPECT_EQ(record.entries()[0].first, "b");
  EXPECT_EQ(*record.find<double>("b"), 2.5);
  EXPECT_EQ(*record.find<std::string>("a"), "text");
  EXPECT_EQ(*record.find<int64_t>("n"), 4);
  EXPECT_TRUE(*record.find<bool>("z"));
  EXPECT_EQ(record.find<double>("n"), nullptr);
  EXPECT_EQ(record.find<double>("none"), nullptr);
}

TEST(BenchRecord, JsonIsEscapedAndFinite) {
  std::ostringstream out;
  const Record records[] = {{{"list", std::vector<int64_t>{1, 2}}, {"flag", false}},
                            {{"rates", std::vector<double>{0.5, INFINITY}}, {"nan", NAN}}};
  write_json(out, {{"text", "a\"b\\c\nd"}}, records);
  EXPECT_EQ(out.str(),
            "{\n \"text\": \"a\\\"b\\\\c\\u000ad\",\n \"records\": [\n"
            "  {\"list\": [1, 2], \"flag\": false},\n"
            "  {\"rates\": [0.5, null], \"nan\": null}\n ]\n}\n");
}

TEST(BenchRecord, AReportWithoutRecordsIsJson) {
  std::ostringstream out;
  write_json(out, {{"a", int64_t{1}}}, {});
  EXPECT_EQ(out.str(), "{\n \"a\": 1,\n \"records\": [\n ]\n}\n");
}

}  // namespace
}  // namespace bench
