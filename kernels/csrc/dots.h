// Products of bytes, four to a 32-bit lane: what the integer kernels are made of. Included by products.cc only.
#ifndef HSAI_KERNELS_DOTS_H_
#define HSAI_KERNELS_DOTS_H_

#include "lanes.h"

namespace hsai {
namespace {

// Most calls of Dots::add before `finish`. AVX2 alone sums pairs of products in 16 bits, and 8 times 2 products of a
// digit (255) and a 4-bit value (8), or of a digit (128) and a 4-bit code (15), is what they hold; NEON alone sums
// single ones there, twice as many. The others sum in 32 bits, and what limits them is combine_planes.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__aarch64__)
constexpr int kMostDots = 16;
#else
constexpr int kMostDots = 8;
#endif

// Whether `a` of Dots::add is unsigned, so that the digits which N:4 codes pick must be biased (planes.h). Before i8mm,
// ARM multiplies only bytes that are both signed or both unsigned; codes of dense weights are below 16 and fit either.
#if defined(__aarch64__) && !defined(__ARM_FEATURE_MATMUL_INT8)
constexpr bool kBiasedDigits = false;
#else
constexpr bool kBiasedDigits = true;
#endif

// Whether products with int8 take digits of two bytes: where four bytes by four, of 8 bits each, are not one instruction.
#if defined(__AVX512VNNI__) || defined(__AVXVNNI__) || defined(__ARM_FEATURE_MATMUL_INT8) || \
    defined(__ARM_FEATURE_DOTPROD)
constexpr bool kWideDigits = false;
#else
constexpr bool kWideDigits = true;
#endif

// In every lane, the sum of the products of 4 bytes of `a`, unsigned if kBiasedDigits, with those of `b`, signed. Where
// that is one instruction, it may start from any number (kStarts).
template <int L>
struct Dots {
  static constexpr bool kStarts = false;
  typename Lanes<L>::Int sum = {};

  HSAI_INLINE void add(const typename Lanes<L>::Word& a, const typename Lanes<L>::Word& b) {
    using Int = typename Lanes<L>::Int;
    unroll<4>([&](auto byte) HSAI_INLINE_LAMBDA {
      const Int left =
          kBiasedDigits ? (Int)((a >> (8 * byte.value)) & 0xffu) : (Int)(a << (24 - 8 * byte.value)) >> 24;
      const Int right = (Int)(b << (24 - 8 * byte.value)) >> 24;
      sum += left * right;
    });
  }

  HSAI_INLINE typename Lanes<L>::Int finish() const { return sum; }
};

#if defined(__AVX2__)
// Makes the compiler add a product to its sum at once. Left to itself, GCC puts off so many additions that sums are
// written to memory and read again.
HSAI_INLINE void keep_in_register(__m256i& sum) { __asm__("" : "+x"(sum)); }
#endif
#if defined(__AVX512F__)
HSAI_INLINE void keep_in_register(__m512i& sum) { __asm__("" : "+v"(sum)); }
#endif

#if defined(__AVX512VNNI__)
template <>
struct Dots<16> {
  static constexpr bool kStarts = true;
  __m512i sum = {};

  HSAI_INLINE void start(const Lanes<16>::Int& from) { sum = (__m512i)from; }

  HSAI_INLINE void add(const Lanes<16>::Word& a, const Lanes<16>::Word& b) {
    sum = _mm512_dpbusd_epi32(sum, (__m512i)a, (__m512i)b);
    keep_in_register(sum);
  }

  HSAI_INLINE Lanes<16>::Int finish() const { return (Lanes<16>::Int)sum; }
};
#elif defined(__AVXVNNI__)
template <>
struct Dots<8> {
  static constexpr bool kStarts = true;
  __m256i sum = {};

  HSAI_INLINE void start(const Lanes<8>::Int& from) { sum = (__m256i)from; }

  HSAI_INLINE void add(const Lanes<8>::Word& a, const Lanes<8>::Word& b) {
    sum = _mm256_dpbusd_avx_epi32(sum, (__m256i)a, (__m256i)b);
  }

  HSAI_INLINE Lanes<8>::Int finish() const { return (Lanes<8>::Int)sum; }
};
#elif defined(__AVX2__)
template <>
struct Dots<8> {
  static constexpr bool kStarts = false;
  __m256i sum = {};

  HSAI_INLINE void add(const Lanes<8>::Word& a, const Lanes<8>::Word& b) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16((__m256i)a, (__m256i)b));
    keep_in_register(sum);
  }

  HSAI_INLINE Lanes<8>::Int finish() const {
    return (Lanes<8>::Int)_mm256_madd_epi16(sum, _mm256_set1_epi16(1));
  }
};
#elif defined(__ARM_FEATURE_MATMUL_INT8) || defined(__ARM_FEATURE_DOTPROD)
template <>
struct Dots<4> {
  static constexpr bool kStarts = true;
  int32x4_t sum = {};

  HSAI_INLINE void start(const Lanes<4>::Int& from) { sum = (int32x4_t)from; }

  HSAI_INLINE void add(const Lanes<4>::Word& a, const Lanes<4>::Word& b) {
#if defined(__ARM_FEATURE_MATMUL_INT8)
    sum = vusdotq_s32(sum, (uint8x16_t)a, (int8x16_t)b);
#else
    sum = vdotq_s32(sum, (int8x16_t)a, (int8x16_t)b);
#endif
  }

  HSAI_INLINE Lanes<4>::Int finish() const { return (Lanes<4>::Int)sum; }
};
#elif defined(__SSE2__)
template <>
struct Dots<4> {
  static constexpr bool kStarts = false;
  __m128i sum = {};

  HSAI_INLINE void add(const Lanes<4>::Word& a, const Lanes<4>::Word& b) {
    const __m128i low = _mm_set1_epi16(0xff), x = (__m128i)a, y = (__m128i)b;
    const __m128i even = _mm_madd_epi16(_mm_and_si128(x, low), _mm_srai_epi16(_mm_slli_epi16(y, 8), 8));
    sum = _mm_add_epi32(sum, _mm_add_epi32(even, _mm_madd_epi16(_mm_srli_epi16(x, 8), _mm_srai_epi16(y, 8))));
  }

  HSAI_INLINE Lanes<4>::Int finish() const { return (Lanes<4>::Int)sum; }
};
#elif defined(__aarch64__)
template <>
struct Dots<4> {
  static constexpr bool kStarts = false;
  int16x8_t low = {}, high = {};  // of the bytes of the first two lanes, and of the last two

  HSAI_INLINE void add(const Lanes<4>::Word& a, const Lanes<4>::Word& b) {
    low = vmlal_s8(low, vget_low_s8((int8x16_t)a), vget_low_s8((int8x16_t)b));
    high = vmlal_high_s8(high, (int8x16_t)a, (int8x16_t)b);
  }

  HSAI_INLINE Lanes<4>::Int finish() const {
    return (Lanes<4>::Int)vpaddq_s32(vpaddlq_s16(low), vpaddlq_s16(high));
  }
};
#endif

// As Dots, of bytes that use all their bits: 16 bits would not hold the sums of their products, so that there they are
// summed in two parts, of bytes from -8 to 8.
template <int L>
struct SplitDots {
  static constexpr bool kStarts = false;
  Dots<L> low, high;

  HSAI_INLINE void add(const typename Lanes<L>::Word& a, const typename Lanes<L>::Word& b) {
    typedef std::uint8_t Bytes __attribute__((vector_size(4 * L)));
    using Word = typename Lanes<L>::Word;
    const auto sign = [](const Word& nibbles) HSAI_INLINE_LAMBDA { return (Bytes)(nibbles ^ 0x08080808u) - 8; };
    low.add(a, (Word)sign(b & 0x0f0f0f0fu));
    high.add(a, (Word)(sign((b >> 4) & 0x0f0f0f0fu) + (Bytes)((b >> 3) & 0x01010101u)));
  }

  HSAI_INLINE typename Lanes<L>::Int finish() const { return low.finish() + (high.finish() << 4); }
};

#if (defined(__AVX2__) && !defined(__AVX512VNNI__) && !defined(__AVXVNNI__)) || \
    (defined(__aarch64__) && !defined(__ARM_FEATURE_MATMUL_INT8) && !defined(__ARM_FEATURE_DOTPROD))
template <int L>
using ByteDots = std::conditional_t<L == kLanes, SplitDots<L>, Dots<L>>;
#else
template <int L>
using ByteDots = Dots<L>;
#endif

// In every lane, the sum of the products of two halves of `a` with those of `b`, all signed; at most 2^15 times 2^7 each,
// so that 32 bits hold the sum of 512.
template <int L>
struct WideDots {
  static constexpr bool kStarts = false;
  typename Lanes<L>::Int sum = {};

  HSAI_INLINE void add(const typename Lanes<L>::Word& a, const typename Lanes<L>::Word& b) {
    using Int = typename Lanes<L>::Int;
    sum += ((Int)(a << 16) >> 16) * ((Int)(b << 16) >> 16) + ((Int)a >> 16) * ((Int)b >> 16);
  }

  HSAI_INLINE typename Lanes<L>::Int finish() const { return sum; }
};

#if defined(__AVX2__)
template <>
struct WideDots<8> {
  static constexpr bool kStarts = false;
  __m256i sum = {};

  HSAI_INLINE void add(const Lanes<8>::Word& a, const Lanes<8>::Word& b) {
    sum = _mm256_add_epi32(sum, _mm256_madd_epi16((__m256i)a, (__m256i)b));
    keep_in_register(sum);
  }

  HSAI_INLINE Lanes<8>::Int finish() const { return (Lanes<8>::Int)sum; }
};
#elif defined(__SSE2__)
template <>
struct WideDots<4> {
  static constexpr bool kStarts = false;
  __m128i sum = {};

  HSAI_INLINE void add(const Lanes<4>::Word& a, const Lanes<4>::Word& b) {
    sum = _mm_add_epi32(sum, _mm_madd_epi16((__m128i)a, (__m128i)b));
  }

  HSAI_INLINE Lanes<4>::Int finish() const { return (Lanes<4>::Int)sum; }
};
#elif defined(__aarch64__)
template <>
struct WideDots<4> {
  static constexpr bool kStarts = false;
  int32x4_t low = {}, high = {};  // the products of the first two lanes, and of the last two

  HSAI_INLINE void add(const Lanes<4>::Word& a, const Lanes<4>::Word& b) {
    low = vmlal_s16(low, vget_low_s16((int16x8_t)a), vget_low_s16((int16x8_t)b));
    high = vmlal_high_s16(high, (int16x8_t)a, (int16x8_t)b);
  }

  HSAI_INLINE Lanes<4>::Int finish() const { return (Lanes<4>::Int)vpaddq_s32(low, high); }
};
#endif

// The 4-bit codes kPart, kPart + 2, ... of every word, which are in offset binary, as signed bytes: kCodeUnit times the
// value. Left in the upper half of its byte, a value costs AVX-512 two instructions less; 16 bits would not hold its
// products.
#if defined(__AVX512VNNI__)
constexpr int kCodeUnit = 16;
#else
constexpr int kCodeUnit = 1;
#endif

template <int L, int kPart>
HSAI_INLINE typename Lanes<L>::Word extract_signed(const typename Lanes<L>::Word& packed) {
  if constexpr (kCodeUnit == 16) return ((kPart == 0 ? packed << 4 : packed) ^ 0x88888888u) & 0xf0f0f0f0u;
  typedef std::uint8_t Bytes __attribute__((vector_size(4 * L)));
  const auto codes = (packed >> (4 * kPart)) & 0x0f0f0f0fu;
  return (typename Lanes<L>::Word)((Bytes)codes - 8);
}

// pick_bytes without an instruction for it; not inlined, which would take the compiler minutes and gain nothing.
template <int L>
__attribute__((noinline)) typename Lanes<L>::Word pick_singly(const std::uint8_t* table, typename Lanes<L>::Word places) {
  std::uint8_t bytes[4 * L];
  store(bytes, places);
  for (std::uint8_t& byte : bytes) byte = table[byte & 15];
  return load<typename Lanes<L>::Word>(bytes);
}

// In every byte, the one of table[0..15] that `places` names; all of them are below kSpan, 8 or 16.
template <int L, int kSpan>
HSAI_INLINE typename Lanes<L>::Word pick_bytes(const std::uint8_t* table, const typename Lanes<L>::Word& places) {
  using Word [[maybe_unused]] = typename Lanes<L>::Word;
#if defined(__AVX512F__)
  if constexpr (L == 16 && kSpan == 8) {
    // Loading 8 bytes to all lanes is no work for the units that shuffle, unlike loading 16.
    const __m512i eight = _mm512_maskz_set1_epi64(0xff, load<long long>(table));
    return (Word)_mm512_shuffle_epi8(eight, (__m512i)places);
  }
  if constexpr (L == 16) {
    const __m512i sixteen = _mm512_maskz_broadcast_i32x4(0xffff, _mm_loadu_si128((const __m128i*)table));
    return (Word)_mm512_shuffle_epi8(sixteen, (__m512i)places);
  }
#elif defined(__AVX2__)
  if constexpr (L == 8) {
    const __m256i sixteen = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
    return (Word)_mm256_shuffle_epi8(sixteen, (__m256i)places);
  }
#elif defined(__aarch64__)
  if constexpr (L == 4) return (Word)vqtbl1q_u8(vld1q_u8(table), (uint8x16_t)places);
#endif
  return pick_singly<L>(table, places);
}

// Bytes 0 and 1 of every word from `low`, 2 and 3 from `high`.
template <int L>
HSAI_INLINE typename Lanes<L>::Word join_halves(const typename Lanes<L>::Word& low,
                                                const typename Lanes<L>::Word& high) {
#if defined(__AVX2__)
  if constexpr (L == 8) return (typename Lanes<L>::Word)_mm256_blend_epi16((__m256i)low, (__m256i)high, 0xaa);
#endif
  return (low & 0x0000ffffu) | (high & 0xffff0000u);
}

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_DOTS_H_
