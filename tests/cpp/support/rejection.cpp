#include "support/rejection.h"

#include <gtest/gtest.h>

#include "qlora_native/error.h"

namespace qlora_native::testing {

void expect_rejected(const std::function<void()>& call, const std::vector<std::string>& words) {
  try {
    call();
    ADD_FAILURE() << "accepted; expected a complaint about " << ::testing::PrintToString(words);
  } catch (const InvalidArgument& error) {
    const std::string message = error.what();
    for (const std::string& word : words) {
      EXPECT_NE(message.find(word), std::string::npos)
          << "'" << word << "' is missing from: " << message;
    }
  }
}

}  // namespace qlora_native::testing
