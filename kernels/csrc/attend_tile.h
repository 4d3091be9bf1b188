// Attention of a tile of rows over a run of keys: online softmax (Milakov and Gimelshein, 1805.02867), block by block.
//
// Scores exist for kBlockKeys keys at a time. Who sees what follows from positions, window and segments; a block is
// trimmed to the keys that some row may see before any key or value is read. Included by products.cc only.
#ifndef HSAI_KERNELS_ATTEND_TILE_H_
#define HSAI_KERNELS_ATTEND_TILE_H_

#include <cfloat>

#include "attention_products.h"
#include "attention_tile.h"
#include "exponential.h"

namespace hsai {
namespace {

// Where a tile's rows stand, and the least and most of it.
struct Marks {
  std::int32_t positions[kMostRows];
  std::int32_t segments[kMostRows];
  std::int32_t first_position = INT32_MAX, last_position = INT32_MIN;
  std::int32_t first_segment = INT32_MAX, last_segment = INT32_MIN;
};

// The keys of a block, in arrays that whole vectors may be read from.
struct Block {
  std::int64_t count;
  std::int32_t positions[kBlockKeys];
  std::int32_t segments[kBlockKeys];
  float k_scale[kBlockKeys];
  float v_scale[kBlockKeys];
};

inline void mark_rows(const Attention& a, const AttentionTile& tile, Marks& marks) {
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    const std::int64_t at = tile.batch * a.queries + (tile.first_row + r) / a.group;
    const std::int32_t position = marks.positions[r] = a.q_positions[at];
    const std::int32_t segment = marks.segments[r] = a.q_segments != nullptr ? a.q_segments[at] : 0;
    if (position < marks.first_position) marks.first_position = position;
    if (position > marks.last_position) marks.last_position = position;
    if (segment < marks.first_segment) marks.first_segment = segment;
    if (segment > marks.last_segment) marks.last_segment = segment;
  }
}

// Whether any row between the marks may see key `at` (counted over the batch).
HSAI_INLINE bool may_see(const Attention& a, const Marks& marks, std::int64_t at) {
  const std::int32_t position = a.kv_positions[at];
  if (position > marks.last_position) return false;
  // In 64 bits: positions may be as far apart as int32 allows.
  if (a.window != 0 && std::int64_t{marks.first_position} - position >= a.window) return false;
  if (a.kv_segments == nullptr) return true;
  return a.kv_segments[at] >= marks.first_segment && a.kv_segments[at] <= marks.last_segment;
}

// Fills in the block of the `count` keys from `first` on (counted over the batch).
inline void fill_block(const Attention& a, std::int64_t kv_head, std::int64_t first, std::int64_t count, Block& block) {
  block.count = count;
  for (std::int64_t i = 0; i < kBlockKeys; ++i) {
    const std::int64_t at = first + (i < count ? i : count - 1);
    block.positions[i] = a.kv_positions[at];
    block.segments[i] = a.kv_segments != nullptr ? a.kv_segments[at] : 0;
    block.k_scale[i] = a.k_scale != nullptr ? a.k_scale[at * a.kv_heads + kv_head] : 1;
    block.v_scale[i] = a.v_scale != nullptr ? a.v_scale[at * a.kv_heads + kv_head] : 1;
  }
}

// Rows of q as floats, `width` apart.
inline void read_queries(const Attention& a, const AttentionTile& tile, float* q) {
  const std::int64_t bytes = a.bfloat16 ? Bfloat16::kBytes : Float32::kBytes;
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    const std::int64_t row = tile.first_row + r;
    const std::int64_t query = tile.batch * a.queries + row / a.group;
    const std::int64_t head = tile.kv_head * a.group + row % a.group;
    const Rows from = {static_cast<const char*>(a.q) + (query * a.heads + head) * a.head_dim * bytes, 0, 0};
    if (a.bfloat16) {
      widen_rows<Bfloat16>(from, 1, a.head_dim, a.width, q + r * a.width);
    } else {
      widen_rows<Float32>(from, 1, a.head_dim, a.width, q + r * a.width);
    }
  }
}

// Turns a row of scores into weights times the values' scales, zeros behind the last key, and brings the row's partial
// sums to the new maximum.
inline void weigh(const Attention& a, const Block& block, std::int32_t position, std::int32_t segment, float* scores,
                  float* values, float& largest, float& total) {
  using Float = Lanes<kLanes>::Float;
  using Int = Lanes<kLanes>::Int;
  using Word = Lanes<kLanes>::Word;
  constexpr int kVectors = kBlockKeys / kLanes;
  const Float zero = {};
  const Float lowest = zero - FLT_MAX;
  Int lane = {};
  unroll<kLanes>([&](auto i) HSAI_INLINE_LAMBDA { lane[i.value] = i.value; });
  const Int here = Int{} + position, own = Int{} + segment;
  const Word distance_limit = Word{} + static_cast<std::uint32_t>(a.window);

  Float most = lowest;
  Int visible[kVectors];
  Float score[kVectors];
  for (int i = 0; i < kVectors; ++i) {
    const Int there = load<Int>(block.positions + i * kLanes);
    Int seen = (there <= here) & (load<Int>(block.segments + i * kLanes) == own);
    seen &= lane + i * kLanes < static_cast<std::int32_t>(block.count);
    // The key is not after the query, so that the difference is right without a sign.
    if (a.window != 0) seen &= (Int)((Word)here - (Word)there < distance_limit);
    Float s = load<Float>(scores + i * kLanes) * (load<Float>(block.k_scale + i * kLanes) * a.scale);
    if (a.softcap != 0) s = tangent(s / a.softcap) * a.softcap;
    s = seen ? s : lowest;
    most = s > most ? s : most;
    visible[i] = seen;
    score[i] = s;
  }
  float higher = largest;
  for (int i = 0; i < kLanes; ++i) higher = most[i] > higher ? most[i] : higher;

  Float sum = {};
  for (int i = 0; i < kVectors; ++i) {
    const Float weight = visible[i] ? exponentiate(score[i] - higher) : zero;
    sum += weight;
    store(scores + i * kLanes, weight * load<Float>(block.v_scale + i * kLanes));
  }
  float added = 0;
  for (int i = 0; i < kLanes; ++i) added += sum[i];

  if (higher != largest) {
    const float shrink = exponentiate(zero + (largest - higher))[0];
    total *= shrink;
    for (std::int64_t h = 0; h < a.width; h += kLanes) store(values + h, load<Float>(values + h) * shrink);
    largest = higher;
  }
  total += added;
}

template <class Type>
void attend_typed(const Attention& a, const AttentionTile& tile) {
  const bool few = tile.rows <= kFewRows;
  const bool whole = a.width == a.head_dim;
  float* q = tile.scratch;
  float* scores = q + tile.rows * a.width;
  float* wide = scores + tile.rows * kBlockKeys;  // keys, then values, of a block
  float* columns = wide + kBlockKeys * a.width;   // keys of a block, transposed
  const std::int64_t stride = a.kv_heads * a.head_dim * Type::kBytes;
  const std::int64_t wide_stride = a.width * Float32::kBytes;
  const Partial& partial = tile.partial;

  Marks marks;
  mark_rows(a, tile, marks);
  read_queries(a, tile, q);
  for (std::int64_t i = 0; i < tile.rows * a.width; ++i) partial.values[i] = 0;
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    partial.largest[r] = -FLT_MAX;
    partial.total[r] = 0;
  }

  Block block;
  const std::int64_t row_of_keys = tile.batch * a.keys;
  const std::int64_t end = row_of_keys + tile.last_key;
  std::int64_t first = row_of_keys + tile.first_key;
  while (true) {
    while (first < end && !may_see(a, marks, first)) ++first;
    if (first == end) break;
    std::int64_t count = end - first < kBlockKeys ? end - first : kBlockKeys;
    while (!may_see(a, marks, first + count - 1)) --count;
    fill_block(a, tile.kv_head, first, count, block);

    const std::int64_t offset = (first * a.kv_heads + tile.kv_head) * a.head_dim * Type::kBytes;
    const Rows keys = {static_cast<const char*>(a.k) + offset, stride, end - first};
    const Rows values = {static_cast<const char*>(a.v) + offset, stride, end - first};
    const Rows widened = {reinterpret_cast<const char*>(wide), wide_stride, 0};
    if (few && whole) {
      dot<Type>(q, tile.rows, keys, count, a.width, scores);
    } else {
      widen_rows<Type>(keys, count, a.head_dim, a.width, wide);
      if (few) {
        dot<Float32>(q, tile.rows, widened, count, a.width, scores);
      } else {
        transpose_rows(wide, a.width, count, a.width, columns);
        const Rows transposed = {reinterpret_cast<const char*>(columns), kBlockKeys * Float32::kBytes, 0};
        multiply_rows<Float32>(tile.rows, q, a.width, transposed, a.width, kBlockKeys, scores, kBlockKeys, false);
      }
    }
    for (std::int64_t r = 0; r < tile.rows; ++r) {
      weigh(a, block, marks.positions[r], marks.segments[r], scores + r * kBlockKeys, partial.values + r * a.width,
            partial.largest[r], partial.total[r]);
    }
    if (few && whole) {
      multiply_rows<Type>(tile.rows, scores, kBlockKeys, values, count, a.width, partial.values, a.width, true);
    } else {
      widen_rows<Type>(values, count, a.head_dim, a.width, wide);
      multiply_rows<Float32>(tile.rows, scores, kBlockKeys, widened, count, a.width, partial.values, a.width, true);
    }
    first += count;
  }
}

void attend_tile(const Attention& attention, const AttentionTile& tile) {
  if (attention.cache == CacheType::kFloat32) return attend_typed<Float32>(attention, tile);
  if (attention.cache == CacheType::kBfloat16) return attend_typed<Bfloat16>(attention, tile);
  return attend_typed<Int8Cache>(attention, tile);
}

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_ATTEND_TILE_H_
