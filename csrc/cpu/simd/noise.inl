// Random words of noise, for the bodies that instruction_sets.inl includes.

// The words of kCount / 4 counters from `counter` on, in the columns' order, as philox.h has them. A counter's words are
// the lower halves of 64-bit lanes, whose upper halves no product looks at: left to itself the compiler keeps one counter
// at a time.
#if AUXK_VECTOR_BITS != 0
constexpr int kCounters = AUXK_VECTOR_BITS / 64;                 // of a vector
constexpr int kVectorsAtOnce = AUXK_VECTOR_BITS == 512 ? 4 : 2;  // that are worked on together
typedef uint64_t Counters __attribute__((vector_size(AUXK_VECTOR_BITS / 8)));

// of the lower halves. By hand: gcc 12 makes a 64-bit product of its own intrinsic, which takes three times as long
static AUXK_INLINE Counters product(Counters a, Counters b) {
  Counters c;
#if AUXK_VECTOR_BITS == 512
  __asm__("vpmuludq %2, %1, %0" : "=v"(c) : "v"(a), "v"(b));
#else
  __asm__("vpmuludq %2, %1, %0" : "=x"(c) : "x"(a), "x"(b));
#endif
  return c;
}

// four words of each counter, one after the other
static AUXK_INLINE void store_words(Counters a, Counters b, Counters c, Counters d, uint32_t* out) {
  const Counters ab = (a & 0xffffffffu) | (b << 32), cd = (c & 0xffffffffu) | (d << 32);
#if AUXK_VECTOR_BITS == 512
  const __m512i first = _mm512_setr_epi64(0, 8, 1, 9, 2, 10, 3, 11),
                second = _mm512_setr_epi64(4, 12, 5, 13, 6, 14, 7, 15);
  _mm512_storeu_si512(out, _mm512_permutex2var_epi64((__m512i)ab, first, (__m512i)cd));
  _mm512_storeu_si512(out + 16, _mm512_permutex2var_epi64((__m512i)ab, second, (__m512i)cd));
#else
  const __m256i even = _mm256_unpacklo_epi64((__m256i)ab, (__m256i)cd);  // counters 0 and 2
  const __m256i odd = _mm256_unpackhi_epi64((__m256i)ab, (__m256i)cd);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out), _mm256_permute2x128_si256(even, odd, 0x20));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + 8), _mm256_permute2x128_si256(even, odd, 0x31));
#endif
}

template <int64_t kCount>
static void fill_bits(uint64_t seed, uint64_t position, uint32_t counter, uint32_t* bits) {
  constexpr int64_t kColumns = 4 * kCounters;
  const Counters none = {}, m0 = none + 0xD2511F53u, m1 = none + 0xCD9E8D57u;
  Counters numbers;
  for (int i = 0; i < kCounters; ++i) numbers[i] = static_cast<uint64_t>(i);
  for (int64_t start = 0; start < kCount; start += kVectorsAtOnce * kColumns) {
    Counters c0[kVectorsAtOnce], c1[kVectorsAtOnce], c2[kVectorsAtOnce], c3[kVectorsAtOnce];
    for (int i = 0; i < kVectorsAtOnce; ++i) {
      c0[i] = numbers + (counter + static_cast<uint64_t>(start / 4 + i * kCounters));
      c1[i] = none + (position & 0xffffffffu), c2[i] = none + (position >> 32), c3[i] = none;
    }
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
    for (int round = 0; round < 10; ++round) {
      const Counters key0 = none + k0, key1 = none + k1;
      for (int i = 0; i < kVectorsAtOnce; ++i) {
        const Counters a = product(c0[i], m0), b = product(c2[i], m1);
        c0[i] = (b >> 32) ^ c1[i] ^ key0, c1[i] = b;
        c2[i] = (a >> 32) ^ c3[i] ^ key1, c3[i] = a;
      }
      k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    for (int i = 0; i < kVectorsAtOnce; ++i) store_words(c0[i], c1[i], c2[i], c3[i], bits + start + i * kColumns);
  }
}
#else
template <int64_t kCount>
static void fill_bits(uint64_t seed, uint64_t position, uint32_t counter, uint32_t* bits) {
  for (uint32_t i = 0; i < kCount / 4; ++i) philox(counter + i, position, seed, bits + 4 * i);
}
#endif
