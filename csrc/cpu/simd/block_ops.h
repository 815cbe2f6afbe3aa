// Loops over one block of a row, compiled once for each instruction set from one body (block_ops.inl).
#pragma once

#include <cstdint>

#include "vector_math.h"

namespace auxk {

// Columns are processed in blocks of this size; the cut depends on nothing but V, so that a row's bits do not depend on
// how the work was shared out. 4096 floats (16 KiB) and the sources' block together stay in a 48 KiB first-level cache.
constexpr int64_t kBlock = 4096;

// memory that will be read soon
struct Ahead {
  const char* first = nullptr;
  int64_t bytes = 0;
};

template <class C>
struct SourceBlock {
  const void* values;  // first element of the block
  DType dtype;
  C scale;
  C softcap;         // 0: none
  Ahead ahead = {};  // what is fetched while the block is loaded
};

template <class C>
struct ScanSums {
  C sum = 0;             // sum_v exp(s_v - m)
  C sum_times_s = 0;     // sum_v exp(s_v - m) (s_v - m)
  C sum_times_base = 0;  // sum_v exp(s_v - m) (z_b,v - m_b)
  C base_sum = 0;        // sum_v exp(z_b,v - m_b)
  // With moments, the sums without some ones of columns at m and at m_b, beside which float would lose 1e-8: without all
  // where the rest is less than they are, otherwise without one. How many, the difference from the sum tells.
  C others = 0, base_others = 0;
};

// one row's numbers in the backward form of auxkernels/cross_entropy/request.py
template <class C>
struct RowCoefficients {
  C p_factor = 0;  // A + G
  C C_ = 0, D = 0, Q = 0, S = 0, Q_b = 0;
  C max = 0, log_denom = 0, base_max = 0, base_log_denom = 0;
};

// a matrix whose rows are `stride` elements apart; values null: not there
struct Matrix {
  void* values = nullptr;
  DType dtype = DType::kFloat32;
  int64_t stride = 0;
};

// rows of scores and what a softmax without noise, mask and statistics makes of them; null: not wanted
template <class C>
struct SoftmaxRows {
  Matrix scores;
  int64_t num_rows = 0;  // how many there are: what may be fetched ahead
  int64_t K = 0;
  const C* factors = nullptr;  // 1 / temperature of each row; null: factor
  C factor = 1;
  C* max = nullptr;        // read by the backward form, as log_denom is
  C* log_denom = nullptr;  // log sum exp((score - max) factor)
  Matrix probabilities;
  Matrix grad_probabilities, grad_scores;  // of the backward form; both may be one
};

// out [num_rows, num_columns] = a [num_rows, inner] @ b [inner, num_columns], added to what is there if `accumulate`; meant
// for matrices that caches hold
template <class C>
struct SmallProduct {
  int64_t num_rows, num_columns, inner;
  const C* a;
  int64_t a_row, a_column;  // strides
  const C* b;
  int64_t b_stride;  // of rows, whose elements are contiguous, as out's are
  C* out;
  int64_t out_stride;
  bool accumulate = false;
};

template <class C>
struct BlockOps {
  // z = scale * softcap(values); returns the largest z, NaN passed over
  C (*load)(const SourceBlock<C>&, int64_t n, C* z);
  // s = z + scale * softcap(values), s may be z; returns the largest s
  C (*load_add)(const SourceBlock<C>&, int64_t n, const C* z, C* s);
  // s = sum of two sources, the same bits as load and load_add; returns the largest s
  C (*load_sum)(const SourceBlock<C>&, const SourceBlock<C>&, int64_t n, C* s);
  // s := exp(s - m); returns the sum. What comes next is fetched meanwhile
  C (*exp_sum)(C* s, C m, int64_t n, const Ahead&, const Ahead&);
  // s := exp(s - m), z_b := exp(z_b - m_b); the sums of a scan with statistics, each only if asked for
  ScanSums<C> (*scan_sums)(C* s, C* z_b, C m, C m_b, int64_t n, bool moments, bool base, const Ahead&, const Ahead&);
  // how many s are greater than the bound; s may be up to kBlock columns
  int64_t (*count_above)(const C* s, C bound, int64_t n);
  // the first i with s[i] == value, or that is NaN, or n
  int64_t (*first_equal)(const C* s, C value, int64_t n);
  int64_t (*first_nan)(const C* s, int64_t n);
  // sum_v w_v (s_v - m); w null: 1
  C (*weighted_sum)(const C* s, const C* w, C m, int64_t n);
  // out = e * factor + S w, element `y` (if in the block) replaced by `y_value`; `stream`: past the caches. Where an
  // e is NaN, the factor must be too
  void (*store_scaled)(const C* e, C factor, C S, const C* w, int64_t n, int64_t y, C y_value, DType, void* out,
                       bool stream);
  // ds, and the base's own ds_b = ds + D p + Q_b q, of the backward form, without the terms at v = y
  void (*backward)(const C* s, const C* z_b, const C* w, const RowCoefficients<C>&, int64_t n, C* ds, C* ds_b);
  // out = scale * softcap' * ds (out null: not wanted); returns sum_v ds softcap(values) if `wants_dscale`
  C (*finish)(const SourceBlock<C>&, const C* ds, int64_t n, bool wants_dscale, void* out, bool stream);
  // values *= factor, in place
  void (*multiply)(void* values, DType, C factor, int64_t n);
  // v += scale * Gumbel noise of (seed, row, first + i); first is a multiple of four
  void (*add_gumbel)(C* v, C scale, uint64_t seed, int64_t row, int64_t first, int64_t n);
  // v := -inf where the mask is not 0
  void (*forbid)(C* v, const uint8_t* mask, int64_t n);
  // the largest v, NaN passed over
  C (*largest)(const C* v, int64_t n);
  // how many v are NaN
  int64_t (*count_nan)(const C* v, int64_t n);
  // the first i >= from with v[i] > bound, or n
  int64_t (*next_above)(const C* v, C bound, int64_t from, int64_t n);
  // v := (v - m) * factor
  void (*shift_and_scale)(C* v, C m, C factor, int64_t n);
  // sum_i a b, where a = 0 counts nothing whatever b is
  C (*dot)(const C* a, const C* b, int64_t n);
  // g += factor * x where p is not 0
  void (*add_where)(C* g, const C* p, const C* x, C factor, int64_t n);
  // g := p (g - mean), 0 where p is
  void (*center)(C* g, const C* p, C mean, int64_t n);
  // rows [first, last), each with K numbers of scratch
  void (*softmax_rows)(const SoftmaxRows<C>&, int64_t first, int64_t last, C* scratch);
  // their gradients and probabilities; twice the scratch
  void (*softmax_rows_backward)(const SoftmaxRows<C>&, int64_t first, int64_t last, C* scratch);
  // out = factor p (g - <p, g>), 0 where p is: the gradient of a softmax, row by row; p and g have rows `stride` apart
  void (*center_rows)(const C* p, const C* g, int64_t stride, C factor, int64_t num_rows, int64_t K, DType, void* out);
  void (*multiply_small)(const SmallProduct<C>&);
  // out [num_columns, num_rows] = from [num_rows, num_columns], the other way round; strides of rows
  void (*transpose)(const C* from, int64_t from_stride, int64_t num_rows, int64_t num_columns, C* out,
                    int64_t out_stride);
};

struct InstructionSet {
  const char* name;
  BlockOps<float> f32;
  BlockOps<double> f64;
};

// Those that this processor can run, best first; the last is the baseline.
int num_instruction_sets();
const InstructionSet& instruction_set(int i);
// The one in use: the best, unless capped for tests.
const InstructionSet& current_instruction_set();
void use_instruction_set(int i);

template <class C>
const BlockOps<C>& block_ops();

}  // namespace auxk
