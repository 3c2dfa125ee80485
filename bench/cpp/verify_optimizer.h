// A naive check of optimizer steps, from the formulas in the public header and fp64.
#pragma once

#include <string>
#include <vector>

#include "optimizer_problem.h"

namespace bench {

/// Looks at samples of the first, a middle and the last tensor: made before a step, compared after
/// it.
class StepCheck {
 public:
  explicit StepCheck(const OptimizerProblem& problem);

  /// "" or what is wrong with the step that was taken since.
  std::string compare() const;

 private:
  /// Elements of one tensor, whole blocks of its 8-bit moments, decoded.
  struct Sample {
    size_t tensor;
    int64_t begin;
    double steps;
    std::vector<double> param{}, grad{}, moment1{}, moment2{};
    std::vector<double> absmax1{}, absmax2{};  ///< of each block; empty for fp32 moments
  };

  Sample sample(size_t tensor, int64_t begin) const;
  std::string compare(const Sample& before, const Sample& after) const;
  std::string compare_moment(const char* name, const std::vector<double>& expected,
                             const std::vector<double>& got, const std::vector<double>& absmax,
                             double widest_gap) const;

  const OptimizerProblem& problem_;
  std::vector<Sample> before_;
};

}  // namespace bench
