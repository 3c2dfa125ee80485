// The choice from a table of kernels, which are made up here: needs no hardware.
#include "dispatch.h"

#include <gtest/gtest.h>

#include <string>

namespace qlora_native::testing {
namespace {

struct Call {
  int rows;
  bool is_aligned = true;
};

bool runs_anywhere(Device, std::string*) { return true; }
bool runs_nowhere(Device, std::string* why_not) {
  *why_not = "not on this machine";
  return false;
}
bool is_aligned(const Call& call, std::string* why_not) {
  if (!call.is_aligned) *why_not = "not aligned";
  return call.is_aligned;
}

/// As the products on a GPU: the faster a kernel, the more it asks for.
constexpr KernelEntry<Call> kKernels[] = {
    {.name = "of_other_hardware", .usable = runs_nowhere},
    {.name = "few_rows",
     .usable = runs_anywhere,
     .prefers = [](const Call& call) { return call.rows <= 8; }},
    {.name = "tensor_cores",
     .usable = runs_anywhere,
     .supports = is_aligned,
     .workspace_bytes = [](const Call& call) { return int64_t{4} * call.rows; },
     .dense_is_faster_for = [](const Call& call) { return call.rows > 128; }},
    {.name = "any", .usable = runs_anywhere, .dense_is_faster = true},
};

const KernelEntry<Call>* find(const Call& call, const char* forced = nullptr) {
  return find_kernel<Call>(kKernels, call, Device::cpu(), forced);
}

MatmulPlan plan_of(const Call& call, const char* forced = nullptr) {
  return plan_with(*find(call, forced), call, forced != nullptr);
}

TEST(Dispatch, TakesTheFirstKernelThatRunsSuitsAndIsPreferred) {
  EXPECT_STREQ(find({8})->name, "few_rows");
  EXPECT_STREQ(find({9})->name, "tensor_cores");
  EXPECT_STREQ(find({9, false})->name, "any");
}

TEST(Dispatch, AFasterDenseLibraryIsAdviceAndChangesNoChoice) {
  EXPECT_FALSE(plan_of({128}).prefers_dense);
  EXPECT_TRUE(plan_of({129}).prefers_dense);
  EXPECT_STREQ(find({129})->name, "tensor_cores") << "a slower kernel would run without a library";
  EXPECT_EQ(plan_of({129}).workspace_bytes, 4 * 129) << "of the kernel that runs";
  EXPECT_TRUE(plan_of({9, false}).prefers_dense);
  EXPECT_FALSE(plan_of({8}).prefers_dense);
}

TEST(Dispatch, AForcedKernelNeedsNoPreferenceAndHearsNoAdvice) {
  EXPECT_STREQ(find({1000}, "few_rows")->name, "few_rows");
  EXPECT_FALSE(plan_of({1000}, "tensor_cores").prefers_dense);
  EXPECT_FALSE(plan_of({1000}, "any").prefers_dense);
  EXPECT_EQ(find({9, false}, "tensor_cores"), nullptr);
  EXPECT_EQ(find({9}, "of_other_hardware"), nullptr);
  EXPECT_EQ(find({9}, "unknown"), nullptr);
}

}  // namespace
}  // namespace qlora_native::testing
