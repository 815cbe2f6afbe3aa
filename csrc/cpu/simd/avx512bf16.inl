// AVX-512 where the processor rounds to bfloat16 by an instruction. Only the gradient of a loss spends its time on that, and
// has a form of its own. The instruction flushes subnormals, as FlushSubnormals does for all who call this.

namespace auxk {
namespace avx512bf16 {

// out = e * factor + S, past the caches or not
__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma"))) static void scale_into(
    const float* e, float factor, float S, int64_t n, bfloat16* out, bool stream) {
  constexpr int64_t kAtOnce = 32;
  const __m512 factors = _mm512_set1_ps(factor), added = _mm512_set1_ps(S == 0 ? -0.0f : S);
  int64_t i = stream ? avx512::before_line(out, n) : 0;
  avx512::scale_into<float, bfloat16>(e, factor, S, nullptr, i, out);
  for (; i + kAtOnce <= n; i += kAtOnce) {
    const __m512 low = _mm512_fmadd_ps(_mm512_loadu_ps(e + i), factors, added);
    const __m512 high = _mm512_fmadd_ps(_mm512_loadu_ps(e + i + 16), factors, added);
    const __m512i line = (__m512i)_mm512_cvtne2ps_pbh(high, low);
    stream ? _mm512_stream_si512(reinterpret_cast<__m512i*>(out + i), line) : _mm512_storeu_si512(out + i, line);
  }
  avx512::scale_into<float, bfloat16>(e + i, factor, S, nullptr, n - i, out + i);
}

static void store_scaled(const float* e, float factor, float S, const float* w, int64_t n, int64_t y, float y_value,
                         DType dtype, void* out, bool stream) {
  if (dtype != DType::kBFloat16 || w != nullptr)
    return avx512::store_scaled(e, factor, S, w, n, y, y_value, dtype, out, stream);
  bfloat16* place = static_cast<bfloat16*>(out);
  scale_into(e, factor, S, n, place, stream);
  if (y >= 0 && y < n) narrow(y_value, place[y]);
}

static constexpr BlockOps<float> table() {
  BlockOps<float> ops = avx512::table<float>();
  ops.store_scaled = &store_scaled;
  return ops;
}

static const InstructionSet instruction_set = {"avx512bf16", table(), avx512::table<double>()};

}  // namespace avx512bf16
}  // namespace auxk
