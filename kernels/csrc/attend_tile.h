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
  float k_scale[kMostParts][kBlockKeys];
  float v_scale[kMostParts][kBlockKeys];
};

using Scales = const float (*)[kBlockKeys];  // of the keys of a block, a row for each part of the head

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

// Keys that follow one another in memory.
struct Run {
  std::int64_t first;     // in their row
  std::int64_t at;        // in the cache, counted over all rows, or pages
  std::int64_t count;     // of them, at most kBlockKeys
  std::int64_t readable;  // that follow, these included
};

// The next run of the tile, from key `next` of the row on, whose first and last key some row may see; false if none is.
inline bool find_run(const Attention& a, const AttentionTile& tile, const Marks& marks, std::int64_t next, Run& run) {
  if (a.table == nullptr) {
    const std::int64_t row = tile.batch * a.keys;
    while (next < tile.last_key && !may_see(a, marks, row + next)) ++next;
    if (next == tile.last_key) return false;
    const std::int64_t left = tile.last_key - next;
    run = {next, row + next, left < kBlockKeys ? left : kBlockKeys, left};
    while (!may_see(a, marks, run.at + run.count - 1)) --run.count;
    return true;
  }
  // Keys stand at their positions: what is seen is an interval.
  if (a.window != 0 && next <= marks.first_position - a.window) {
    // Blocks begin and end where they do for any row, whoever is in its tile.
    const std::int64_t first = marks.first_position - a.window + 1, block = first - first % a.page % kBlockKeys;
    next = block > next ? block : next;
  }
  const std::int64_t end = marks.last_position < tile.last_key ? marks.last_position + 1 : tile.last_key;
  if (next >= end) return false;
  const std::int64_t place = next % a.page, page = a.table[tile.batch * a.row_pages + next / a.page];
  const std::int64_t left = a.page - place < end - next ? a.page - place : end - next;
  const std::int64_t whole = kBlockKeys - place % kBlockKeys;
  run = {next, (a.layer * a.pages + page) * a.page + place, left < whole ? left : whole, a.page - place};
  return true;
}

// The scale of one part of the head, which is number `at` in (B, S, K).
template <int kParts>
float read_scale(const void* scales, std::int64_t at, int part) {
  if constexpr (kParts == 1) return static_cast<const float*>(scales)[at];
  return load_bfloat16<1>(static_cast<const std::uint16_t*>(scales) + at * kParts + part)[0];
}

// Fills in the block of a run; scales where the cache has any.
template <int kParts>
void fill_block(const Attention& a, std::int64_t kv_head, const Run& run, Block& block) {
  block.count = run.count;
  for (std::int64_t i = 0; i < kBlockKeys; ++i) {
    const std::int64_t place = i < run.count ? i : run.count - 1, at = run.at + place;
    block.positions[i] = a.table != nullptr ? static_cast<std::int32_t>(run.first + place) : a.kv_positions[at];
    block.segments[i] = a.kv_segments != nullptr ? a.kv_segments[at] : 0;
    for (int part = 0; part < kParts; ++part) {
      const std::int64_t head = at * a.kv_heads + kv_head;
      block.k_scale[part][i] = a.k_scale != nullptr ? read_scale<kParts>(a.k_scale, head, part) : 1;
      block.v_scale[part][i] = a.v_scale != nullptr ? read_scale<kParts>(a.v_scale, head, part) : 1;
    }
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
      widen_rows<Bfloat16>(from, 1, a.head_dim, nullptr, a.width, a.width, q + r * a.width);
    } else {
      widen_rows<Float32>(from, 1, a.head_dim, nullptr, a.width, a.width, q + r * a.width);
    }
  }
}

// Turns a row of scores into weights times the values' scales, zeros behind the last key, and brings the row's partial
// sums to the new maximum. The scores of the parts of the head, which the keys' scales multiply, are `step` floats apart,
// and so are the weights for them.
template <int kParts>
void weigh(const Attention& a, const Block& block, Scales k_scale, Scales v_scale, std::int32_t position,
           std::int32_t segment, float* scores, std::int64_t step, float* values, float& largest, float& total) {
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
    Float s = load<Float>(scores + i * kLanes) * (load<Float>(k_scale[0] + i * kLanes) * a.scale);
    for (int part = 1; part < kParts; ++part) {
      const Float scale = load<Float>(k_scale[part] + i * kLanes) * a.scale;
      s += load<Float>(scores + part * step + i * kLanes) * scale;
    }
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
    for (int part = 0; part < kParts; ++part) {
      store(scores + part * step + i * kLanes, weight * load<Float>(v_scale[part] + i * kLanes));
    }
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

// The rows of a block as floats in `wide`, a.width apart; of several parts of the head each times its `scales`.
template <class Head>
void widen_heads(const Attention& a, const Rows& from, std::int64_t count, Scales scales, float* wide) {
  constexpr int kParts = Head::kParts;
  const std::int64_t length = a.head_dim / kParts;
  unroll<kParts>([&](auto part) {
    const std::int64_t padded = part.value + 1 < kParts ? length : a.width - part.value * length;
    widen_rows<typename Head::template Part<part.value>>(from, count, length, kParts > 1 ? scales[part.value] : nullptr,
                                                         padded, a.width, wide + part.value * length);
  });
}

template <class Head>
void attend_typed(const Attention& a, const AttentionTile& tile) {
  constexpr int kParts = Head::kParts;
  constexpr std::int64_t kBytes = Head::template Part<0>::kBytes;
  const std::int64_t part_width = a.head_dim / kParts;
  // Few keys and values are used as they lie, part by part, if vectors tile the parts; else as floats, scaled already.
  // So many tokens as a draft may have: theirs are the same bits as a token's by itself.
  const bool few = a.queries <= kFewQueries;
  const bool direct = few && part_width % kHeadStep == 0;
  const std::int64_t step = tile.rows * kBlockKeys;
  float* q = tile.scratch;
  float* scores = q + tile.rows * a.width;
  float* wide = scores + kParts * step;          // keys, then values, of a block
  float* columns = wide + kBlockKeys * a.width;  // keys of a block, transposed
  const std::int64_t stride = a.kv_heads * part_width * kBytes;
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
  float ones[1][kBlockKeys];
  for (float& one : ones[0]) one = 1;
  Run run = {};
  for (std::int64_t next = tile.first_key; find_run(a, tile, marks, next, run); next = run.first + run.count) {
    fill_block<kParts>(a, tile.kv_head, run, block);

    const std::int64_t count = run.count;
    const std::int64_t offset = (run.at * a.kv_heads + tile.kv_head) * part_width * kBytes;
    const Rows keys = {static_cast<const char*>(a.k) + offset, stride, run.readable};
    const Rows values = {static_cast<const char*>(a.v) + offset, stride, run.readable};
    const Rows widened = {reinterpret_cast<const char*>(wide), wide_stride, 0};
    if (direct) {
      unroll<kParts>([&](auto part) {
        using Part = typename Head::template Part<part.value>;
        dot<Part>(q + part.value * part_width, a.width, tile.rows, keys, count, part_width, scores + part.value * step);
      });
    } else {
      widen_heads<Head>(a, keys, count, block.k_scale, wide);
      if (few) {
        dot<Float32>(q, a.width, tile.rows, widened, count, a.width, scores);
      } else {
        transpose_rows(wide, a.width, count, a.width, columns);
        const Rows transposed = {reinterpret_cast<const char*>(columns), kBlockKeys * Float32::kBytes, 0};
        multiply_rows<Float32>(tile.rows, q, a.width, transposed, a.width, kBlockKeys, scores, kBlockKeys, false);
      }
    }
    const auto weigh_rows = [&](auto parts, Scales k_scale, Scales v_scale) {
      for (std::int64_t r = 0; r < tile.rows; ++r) {
        weigh<parts.value>(a, block, k_scale, v_scale, marks.positions[r], marks.segments[r], scores + r * kBlockKeys,
                           step, partial.values + r * a.width, partial.largest[r], partial.total[r]);
      }
    };
    if (kParts == 1 || direct) {
      weigh_rows(std::integral_constant<int, kParts>{}, block.k_scale, block.v_scale);
    } else {
      weigh_rows(std::integral_constant<int, 1>{}, ones, ones);
    }
    if (direct) {
      unroll<kParts>([&](auto part) {
        using Part = typename Head::template Part<part.value>;
        multiply_rows<Part>(tile.rows, scores + part.value * step, kBlockKeys, values, count, part_width,
                            partial.values + part.value * part_width, a.width, true);
      });
    } else {
      widen_heads<Head>(a, values, count, block.v_scale, wide);
      multiply_rows<Float32>(tile.rows, scores, kBlockKeys, widened, count, a.width, partial.values, a.width, true);
    }
  }
}

void attend_tile(const Attention& attention, const AttentionTile& tile) {
  switch (attention.cache) {
    case CacheType::kFloat32:
      return attend_typed<WholeHead<Float32>>(attention, tile);
    case CacheType::kBfloat16:
      return attend_typed<WholeHead<Bfloat16>>(attention, tile);
    case CacheType::kInt8:
      return attend_typed<WholeHead<Int8Cache>>(attention, tile);
    case CacheType::kInt4:
      return attend_typed<HeadHalves>(attention, tile);
  }
}

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_ATTEND_TILE_H_
