// Cross-entropy and row statistics of softmax(base + aux) on CUDA devices. The mathematics is in
// auxkernels/cross_entropy/request.py.
#pragma once

#include "common/row_numbers.h"
#include "plan.h"

namespace auxk {
namespace cuda {

enum Divisor : int32_t { kByOne, kByNumber, kByTensor, kByKeptRows };

struct LossTerms {
  RowLoss<double> row;
  Divisor divisor = kByOne;
  double number = 1;
  const double* tensor = nullptr;  // on the device
  void* row_loss = nullptr;        // compute dtype, one for each row; null: only fields are wanted
  void* loss = nullptr;            // compute dtype
  unsigned* counter = nullptr;     // 0 before and after; null: one that calls on this stream share
};

// What a kernel over rows is given.
struct Parameters {
  Problem problem;
  Outputs out;
  LossTerms terms;
  Cut cut;
  Layout layout;
  int32_t cluster;
};

struct BackwardParameters {
  Problem problem;
  Outputs out;
  BackwardInputs in;
  Cut cut;
};

struct RescaleParameters {
  Problem problem;  // V: the gradient's width
  void* grad;
  DType dtype;
  const void* factor;
  DType factor_dtype;
};

struct Stream {
  int device;
  void* handle;
};

// Each starts its kernel and returns null, or what the driver said.
const char* forward(const Problem&, const Outputs&, const LossTerms&, bool is_double, const Stream&);
const char* backward(const Problem&, const Outputs&, const BackwardInputs&, bool is_double, const Stream&);
const char* rescale(const RescaleParameters&, const Stream&);
// null, or why nothing can be started; touches no device
const char* driver_problem();

// What `forward` would do on such a device.
struct Planned {
  Cut cut;
  Plan plan;
};
Planned plan_of_call(const Problem&, const Outputs&, const LossTerms&, bool is_double, const DeviceProperties&);
// What it does on this device, and how many blocks run there at once. Starts nothing and waits for nothing.
const char* plan_on_device(const Problem&, const Outputs&, const LossTerms&, bool is_double, int device,
                           Planned* planned, int* blocks_at_once);

}  // namespace cuda
}  // namespace auxk
