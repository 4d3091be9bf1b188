// See attention.h. Compiled for the baseline instruction set: everything here is small beside the tiles.

#include "attention.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <vector>

#include "bfloat16.h"
#include "buffers.h"
#include "threads.h"

namespace hsai {
namespace {

// Keys of a piece, whose weighted values are summed by themselves before they are joined: long beside what that costs, and
// enough pieces for every thread where few rows see a long cache. Many rows go from piece to piece, so that a row's bits
// are the same in any company.
constexpr std::int64_t kPieceKeys = 1024;

// Below this many products of numbers an attention is faster than sharing it.
constexpr std::int64_t kAlone = 1 << 14;

// How a call falls into tiles: (B, K, row blocks, pieces of keys), the last fastest. With one piece a tile has them all.
struct Plan {
  std::int64_t rows, row_blocks, pieces, tiles;
};

Plan plan_tiles(const Attention& a) {
  Plan plan;
  plan.rows = a.queries * a.group;
  plan.row_blocks = (plan.rows + kMostRows - 1) / kMostRows;
  plan.pieces = plan.row_blocks == 1 ? (a.keys + kPieceKeys - 1) / kPieceKeys : 1;
  plan.tiles = a.batch * a.kv_heads * plan.row_blocks * plan.pieces;
  return plan;
}

// Floats that a tile of that many rows works in (attend_tile.h lays them out).
std::int64_t count_scratch(std::int64_t rows, const Attention& a) {
  return rows * (a.width + kMostParts * kBlockKeys) + (a.queries <= kFewQueries ? 1 : 2) * kBlockKeys * a.width;
}

// Floats of a partial result.
std::int64_t count_partial(std::int64_t rows, std::int64_t width) { return rows * (width + 2); }

Partial place_partial(float* at, std::int64_t rows, std::int64_t width) {
  return {at, at + rows * width, at + rows * width + rows};
}

// Adds the partial result of the next piece.
void join(const Attention& a, std::int64_t rows, const Partial& joined, const Partial& other) {
  for (std::int64_t r = 0; r < rows; ++r) {
    if (other.total[r] == 0) continue;
    float* sums = joined.values + r * a.width;
    const float largest = std::max(joined.largest[r], other.largest[r]);
    const float shrink = std::exp(joined.largest[r] - largest);
    const float share = std::exp(other.largest[r] - largest);
    for (std::int64_t h = 0; h < a.head_dim; ++h) sums[h] = sums[h] * shrink + other.values[r * a.width + h] * share;
    joined.total[r] = joined.total[r] * shrink + other.total[r] * share;
    joined.largest[r] = largest;
  }
}

// Writes the tile's rows.
void write_rows(const Attention& a, const AttentionTile& tile, const Partial& joined) {
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    const float* sums = joined.values + r * a.width;
    const float total = joined.total[r] == 0 ? 1 : joined.total[r];
    const std::int64_t row = tile.first_row + r;
    const std::int64_t query = tile.batch * a.queries + row / a.group;
    const std::int64_t to = (query * a.heads + tile.kv_head * a.group + row % a.group) * a.head_dim;
    if (a.bfloat16) {
      auto* out = static_cast<std::uint16_t*>(a.out) + to;
      std::transform(sums, sums + a.head_dim, out, [&](float sum) { return narrow(sum / total); });
    } else {
      auto* out = static_cast<float*>(a.out) + to;
      std::transform(sums, sums + a.head_dim, out, [&](float sum) { return sum / total; });
    }
  }
}

}  // namespace

void attend(Attention a, std::int64_t threads, const Schedule& schedule) {
  a.group = a.heads / a.kv_heads;
  a.width = (a.head_dim + kHeadStep - 1) / kHeadStep * kHeadStep;
  if (a.table != nullptr) {  // the longest row: what lies behind it costs nothing, and changes no bit
    a.keys = 1;
    for (std::int64_t i = 0; i < a.batch * a.queries; ++i) {
      a.keys = std::max(a.keys, std::int64_t{a.q_positions[i]} + 1);
    }
  }
  const Plan plan = plan_tiles(a);
  if (a.batch * a.heads * a.queries * a.keys * a.head_dim < kAlone || threads < 1) threads = 1;
  threads = std::min(threads, plan.tiles);

  const AttendTile attend_tile = current_products().attend;
  const std::int64_t rows = std::min(plan.rows, kMostRows);
  const std::int64_t partial_size = count_partial(rows, a.width);
  const std::int64_t scratch_size = count_scratch(rows, a);
  // Partial results of pieces that are tiles wait for one another; of others a tile has two, the joined one and the next.
  std::vector<float> partials(static_cast<std::size_t>(plan.pieces > 1 ? plan.tiles * partial_size : 0));
  Buffers buffers(threads, scratch_size + 2 * partial_size);

  const auto find_tile = [&](std::int64_t i) {
    const std::int64_t piece = i % plan.pieces, block = i / plan.pieces % plan.row_blocks;
    const std::int64_t head = i / (plan.pieces * plan.row_blocks);
    AttentionTile tile = {};
    tile.batch = head / a.kv_heads;
    tile.kv_head = head % a.kv_heads;
    tile.first_row = block * kMostRows;
    tile.rows = std::min(kMostRows, plan.rows - tile.first_row);
    tile.first_key = piece * kPieceKeys;
    return tile;
  };
  const auto attend_piece = [&](AttentionTile& tile, float* partial) {
    tile.last_key = std::min(a.keys, tile.first_key + kPieceKeys);
    tile.partial = place_partial(partial, tile.rows, a.width);
    attend_tile(a, tile);
  };
  run_tiles(plan.tiles, threads, schedule, [&](std::int64_t i) {
    AttentionTile tile = find_tile(i);
    float* const buffer = buffers.take();
    tile.scratch = buffer;
    if (plan.pieces > 1) {
      attend_piece(tile, partials.data() + i * partial_size);
    } else {
      float* const partial = buffer + scratch_size;
      attend_piece(tile, partial);
      const Partial joined = tile.partial;
      while ((tile.first_key += kPieceKeys) < a.keys) {
        attend_piece(tile, partial + partial_size);
        join(a, tile.rows, joined, tile.partial);
      }
      write_rows(a, tile, joined);
    }
    buffers.give(buffer);
  });
  if (plan.pieces == 1) return;
  for (std::int64_t i = 0; i < plan.tiles; i += plan.pieces) {
    const AttentionTile tile = find_tile(i);
    const auto place = [&](std::int64_t piece) {
      return place_partial(partials.data() + (i + piece) * partial_size, tile.rows, a.width);
    };
    for (std::int64_t piece = 1; piece < plan.pieces; ++piece) join(a, tile.rows, place(0), place(piece));
    write_rows(a, tile, place(0));
  }
}

}  // namespace hsai
