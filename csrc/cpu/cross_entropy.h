// Cross-entropy and row statistics of softmax(base + aux) on CPU. The mathematics is in
// auxkernels/cross_entropy/request.py.
#pragma once

#include <vector>

#include "common/cross_entropy.h"

namespace auxk {

struct LossRequest {
  Problem problem;
  LossOptions options;
  Outputs out;
  int64_t num_kept = 0;  // rows that are not ignored
};

// The first row whose target is neither a class nor ignore_index, or -1. Counts the kept rows on the way.
int64_t first_bad_target(const Problem&, int64_t* num_kept);
int64_t target_of(const Problem&, int64_t row);

// C is the compute type: float, or double if a source is float64. Targets must have been checked.
template <class C>
void scan(const Problem&, const Outputs&);
template <class C>
double loss(const LossRequest&);
// The same for each request, of the same rows. Bits do not depend on what the others ask.
template <class C>
std::vector<double> losses(const std::vector<LossRequest>&);
template <class C>
void backward(const Problem&, const BackwardInputs&, const Outputs&);
// grad *= factor on all rows but the ignored ones
template <class C>
void rescale(const Problem&, void* grad, DType, int64_t width, double factor);

}  // namespace auxk
