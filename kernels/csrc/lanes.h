// Vectors of L columns, in the vector extensions that GCC and Clang share, so that one source serves every instruction
// set. Included by products.cc only; everything has internal linkage (see products.h for why).
#ifndef HSAI_KERNELS_LANES_H_
#define HSAI_KERNELS_LANES_H_

#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

// The second is written between a lambda's parameters and its body; sums live in registers only where everything is
// inlined. Sanitized, such functions would grow until GCC needs many minutes for them.
#if defined(__SANITIZE_ADDRESS__)
#define HSAI_INLINE inline
#define HSAI_INLINE_LAMBDA
#else
#define HSAI_INLINE __attribute__((always_inline)) inline
#define HSAI_INLINE_LAMBDA __attribute__((always_inline))
#endif

namespace hsai {
namespace {

// Columns a vector register of this compilation's instruction set holds.
#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

// Whether there are 32 vector registers, and not 16.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr bool kManyRegisters = true;
#else
constexpr bool kManyRegisters = false;
#endif

// Sums that a product of few rows may hold in registers: what they leave holds weights and activations.
constexpr int kFewSums = 8;

template <int L>
struct Lanes {
  typedef float Float __attribute__((vector_size(4 * L)));
  typedef std::int32_t Int __attribute__((vector_size(4 * L)));
  typedef std::uint32_t Word __attribute__((vector_size(4 * L)));
  typedef std::uint16_t Half __attribute__((vector_size(2 * L)));
  typedef std::int8_t Byte __attribute__((vector_size(L)));
};

// Reads a vector from any alignment.
template <class Vector>
HSAI_INLINE Vector load(const void* from) {
  Vector vector;
  __builtin_memcpy(&vector, from, sizeof(Vector));
  return vector;
}

template <class Vector>
HSAI_INLINE void store(void* to, const Vector& vector) {
  __builtin_memcpy(to, &vector, sizeof(Vector));
}

template <int L>
HSAI_INLINE typename Lanes<L>::Int load_int8(const void* from) {
  // GCC 12 compiles __builtin_convertvector from bytes lane by lane.
#if defined(__AVX512F__)
  if constexpr (L == 16) return (typename Lanes<L>::Int)_mm512_maskz_cvtepi8_epi32(0xffff, load<__m128i>(from));
#elif defined(__AVX2__)
  if constexpr (L == 8) return (typename Lanes<L>::Int)_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)from));
#elif defined(__aarch64__)
  if constexpr (L == 4) {
    const int8x8_t bytes = vreinterpret_s8_u32(vdup_n_u32(load<std::uint32_t>(from)));
    return (typename Lanes<L>::Int)vmovl_s16(vget_low_s16(vmovl_s8(bytes)));
  }
#endif
  return __builtin_convertvector(load<typename Lanes<L>::Byte>(from), typename Lanes<L>::Int);
}

template <int L>
HSAI_INLINE typename Lanes<L>::Float load_bfloat16(const void* from) {
  using Word = typename Lanes<L>::Word;
  const Word wide = __builtin_convertvector(load<typename Lanes<L>::Half>(from), Word) << 16;
  return (typename Lanes<L>::Float)wide;
}

template <int L>
HSAI_INLINE typename Lanes<L>::Float load_float16(const void* from) {
  using Float = typename Lanes<L>::Float;
  using Word = typename Lanes<L>::Word;
#if defined(__AVX512F__)
  if constexpr (L == 16) return (Float)_mm512_maskz_cvtph_ps(0xffff, load<__m256i>(from));
#elif defined(__aarch64__)
  if constexpr (L == 4) return (Float)vcvt_f32_f16(vreinterpret_f16_u64(load<uint64x1_t>(from)));
#endif
  const Word half = __builtin_convertvector(load<typename Lanes<L>::Half>(from), Word);
  const Word magnitude = half & 0x7fffu;
  // Exponents of 5 bits count from 15, those of 8 from 127, and the largest of either is no number's.
  const Word normal = (magnitude << 13) + (magnitude >= 0x7c00u ? Word{} + (224u << 23) : Word{} + (112u << 23));
  const Float below = __builtin_convertvector((typename Lanes<L>::Int)magnitude, Float) * 0x1p-24f;
  return (Float)((magnitude >= 0x400u ? normal : (Word)below) | (half & 0x8000u) << 16);
}

// In every lane, the one of quad[0..3] that the low 2 bits of `index` name; higher bits are ignored.
template <int L>
HSAI_INLINE typename Lanes<L>::Float pick(const float* quad, const typename Lanes<L>::Word& index) {
  using Float = typename Lanes<L>::Float;
#if defined(__AVX512F__)
  if constexpr (L == 16) {
    // The zeroing forms with a full mask are the plain instructions; GCC 12 warns of its own headers for the others.
    const __m512 fours = _mm512_maskz_broadcast_f32x4(0xffff, _mm_loadu_ps(quad));
    return (Float)_mm512_maskz_permutevar_ps(0xffff, fours, (__m512i)index);
  }
#elif defined(__AVX2__)
  if constexpr (L == 8) {
    const __m128 four = _mm_loadu_ps(quad);
    return (Float)_mm256_permutevar_ps(_mm256_set_m128(four, four), (__m256i)index);
  }
#elif defined(__aarch64__)
  if constexpr (L == 4) {
    // Byte b of the number that an index names stands at 4 * index + b.
    const typename Lanes<L>::Word bytes = (index & 3u) * 0x04040404u + 0x03020100u;
    return (Float)vqtbl1q_u8(vreinterpretq_u8_f32(vld1q_f32(quad)), (uint8x16_t)bytes);
  }
#endif
  const Float zero = {};
  const auto odd = (index & 1) != 0;
  const Float low = odd ? zero + quad[1] : zero + quad[0];
  const Float high = odd ? zero + quad[3] : zero + quad[2];
  return (index & 2) != 0 ? high : low;
}

// Calls f(integral_constant<int, 0>) ... f(integral_constant<int, N - 1>): a loop whose index is a constant.
template <class F, int... I>
HSAI_INLINE void unroll_sequence(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

template <int N, class F>
HSAI_INLINE void unroll(F&& f) {
  unroll_sequence(static_cast<F&&>(f), std::make_integer_sequence<int, N>{});
}

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_LANES_H_
