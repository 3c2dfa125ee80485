// What leaves a function of the C ABI when something is thrown in it: a status and a message.
#include "c_api_guard.h"

#include <gtest/gtest.h>

#include <cstring>
#include <new>
#include <stdexcept>
#include <string>

#include "qlora_native/error.h"

namespace qlora_native::c_api {
namespace {

template <class Exception>
qn_status status_of(const Exception& exception) {
  return guarded("f", [&](const char*) { throw exception; });
}

TEST(CApiGuard, EveryExceptionIsAStatus) {
  EXPECT_EQ(status_of(InvalidArgument("wrong 7")), QN_INVALID_ARGUMENT);
  EXPECT_STREQ(qn_last_error_message(), "wrong 7");
  EXPECT_EQ(status_of(Unsupported("no kernel")), QN_UNSUPPORTED);
  EXPECT_STREQ(qn_last_error_message(), "no kernel");
  EXPECT_EQ(status_of(OutOfMemory("5 GiB")), QN_OUT_OF_MEMORY);
  EXPECT_STREQ(qn_last_error_message(), "5 GiB");
  EXPECT_EQ(status_of(CudaError(700, "an address")), QN_CUDA_ERROR);
  EXPECT_STREQ(qn_last_error_message(), "an address");
  EXPECT_EQ(status_of(std::bad_alloc()), QN_OUT_OF_MEMORY);
  EXPECT_STRNE(qn_last_error_message(), "");
  EXPECT_EQ(status_of(Error("of no kind")), QN_INTERNAL_ERROR);
  EXPECT_EQ(status_of(std::runtime_error("a bug")), QN_INTERNAL_ERROR);
  EXPECT_STREQ(qn_last_error_message(), "a bug");
  EXPECT_EQ(status_of(42), QN_INTERNAL_ERROR);
  EXPECT_STREQ(qn_last_error_message(), "an exception that is no std::exception");
}

TEST(CApiGuard, SuccessLeavesTheMessage) {
  status_of(InvalidArgument("earlier"));
  EXPECT_EQ(guarded("f", [](const char* function) { EXPECT_STREQ(function, "f"); }), QN_OK);
  EXPECT_STREQ(qn_last_error_message(), "earlier");
}

TEST(CApiGuard, LongMessagesAreCut) {
  status_of(InvalidArgument(std::string(10'000, 'x')));
  EXPECT_EQ(std::strlen(qn_last_error_message()), 4095u);
  status_of(InvalidArgument("short"));
  EXPECT_STREQ(qn_last_error_message(), "short");
}

TEST(CApiGuard, TextsAreCutToTheBuffer) {
  char buffer[5] = "####";
  copy_cut("abcdef", buffer, 4);
  EXPECT_STREQ(buffer, "abc");
  copy_cut("abcdef", buffer, 1);
  EXPECT_STREQ(buffer, "");
  copy_whole("f", "abcd", buffer, 5);
  EXPECT_STREQ(buffer, "abcd");
  EXPECT_THROW(copy_whole("f", "abcde", buffer, 5), InvalidArgument);
  EXPECT_STREQ(buffer, "abcd");
}

}  // namespace
}  // namespace qlora_native::c_api
