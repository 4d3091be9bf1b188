// See attention.h. Compiled for the baseline instruction set: everything here is small beside the tiles.

#include "attention.h"

#include <algorithm>
#include <cmath>
#include <mutex>
#include <vector>

#include "bfloat16.h"
#include "threads.h"

namespace hsai {
namespace {

// Keys of a piece where few rows see a long cache: long beside what joining the pieces costs, and enough pieces for
// every thread of one row. A function of the shape alone, so that the number of threads changes no bit of the result.
constexpr std::int64_t kPieceKeys = 1024;

// Below this many products of numbers an attention is faster than waking a thread.
constexpr std::int64_t kAlone = 1 << 16;

// How a call falls into tiles: (B, K, row blocks, pieces of keys), the last fastest.
struct Plan {
  std::int64_t rows, row_blocks, pieces, piece_keys, tiles;
};

Plan plan_tiles(const Attention& a) {
  Plan plan;
  plan.rows = a.queries * a.group;
  plan.row_blocks = (plan.rows + kMostRows - 1) / kMostRows;
  plan.pieces = plan.row_blocks == 1 ? (a.keys + kPieceKeys - 1) / kPieceKeys : 1;
  plan.piece_keys = plan.pieces == 1 ? a.keys : kPieceKeys;
  plan.tiles = a.batch * a.kv_heads * plan.row_blocks * plan.pieces;
  return plan;
}

// Floats that a tile of that many rows works in (attend_tile.h lays them out).
std::int64_t count_scratch(std::int64_t rows, std::int64_t width) {
  return rows * (width + kMostParts * kBlockKeys) + (rows <= kFewRows ? 1 : 2) * kBlockKeys * width;
}

// Floats of a partial result.
std::int64_t count_partial(std::int64_t rows, std::int64_t width) { return rows * (width + 2); }

Partial place_partial(float* at, std::int64_t rows, std::int64_t width) {
  return {at, at + rows * width, at + rows * width + rows};
}

// Buffers that as many tiles as run at a time take in turn.
class Buffers {
 public:
  Buffers(std::int64_t count, std::int64_t size) : all_(static_cast<std::size_t>(count * size)) {
    for (std::int64_t i = 0; i < count; ++i) free_.push_back(all_.data() + i * size);
  }

  float* take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    float* buffer = free_.back();
    free_.pop_back();
    return buffer;
  }

  void give(float* buffer) {
    const std::lock_guard<std::mutex> lock(mutex_);
    free_.push_back(buffer);  // never more than there were: it does not allocate
  }

 private:
  std::mutex mutex_;
  std::vector<float> all_;
  std::vector<float*> free_;
};

// Writes the tile's rows from the partial results of all pieces, `step` floats apart; joins them in `partials[0]`.
void write_rows(const Attention& a, const AttentionTile& tile, float* partials, std::int64_t pieces,
                std::int64_t step) {
  const Partial joined = place_partial(partials, tile.rows, a.width);
  for (std::int64_t r = 0; r < tile.rows; ++r) {
    float* sums = joined.values + r * a.width;
    for (std::int64_t piece = 1; piece < pieces; ++piece) {
      const Partial other = place_partial(partials + piece * step, tile.rows, a.width);
      if (other.total[r] == 0) continue;
      const float largest = std::max(joined.largest[r], other.largest[r]);
      const float shrink = std::exp(joined.largest[r] - largest);
      const float share = std::exp(other.largest[r] - largest);
      for (std::int64_t h = 0; h < a.head_dim; ++h) sums[h] = sums[h] * shrink + other.values[r * a.width + h] * share;
      joined.total[r] = joined.total[r] * shrink + other.total[r] * share;
      joined.largest[r] = largest;
    }
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
    for (std::int64_t i = 0; i < a.batch * a.queries; ++i) a.keys = std::max<std::int64_t>(a.keys, a.q_positions[i] + 1);
  }
  const Plan plan = plan_tiles(a);
  if (a.batch * a.heads * a.queries * a.keys * a.head_dim < kAlone || threads < 1) threads = 1;
  threads = std::min(threads, plan.tiles);

  const AttendTile attend_tile = current_products().attend;
  const std::int64_t rows = std::min(plan.rows, kMostRows);
  const std::int64_t partial_size = count_partial(rows, a.width);
  const std::int64_t scratch_size = count_scratch(rows, a.width);
  // Partial results of pieces wait for one another; one that is alone is written at once.
  std::vector<float> partials(static_cast<std::size_t>(plan.pieces > 1 ? plan.tiles * partial_size : 0));
  Buffers buffers(threads, scratch_size + partial_size);

  const auto find_tile = [&](std::int64_t i) {
    const std::int64_t piece = i % plan.pieces, block = i / plan.pieces % plan.row_blocks;
    const std::int64_t head = i / (plan.pieces * plan.row_blocks);
    AttentionTile tile = {};
    tile.batch = head / a.kv_heads;
    tile.kv_head = head % a.kv_heads;
    tile.first_row = block * kMostRows;
    tile.rows = std::min(kMostRows, plan.rows - tile.first_row);
    tile.first_key = piece * plan.piece_keys;
    tile.last_key = std::min(a.keys, tile.first_key + plan.piece_keys);
    return tile;
  };
  run_tiles(plan.tiles, threads, schedule, [&](std::int64_t i) {
    AttentionTile tile = find_tile(i);
    float* buffer = buffers.take();
    float* partial = plan.pieces > 1 ? partials.data() + i * partial_size : buffer + scratch_size;
    tile.scratch = buffer;
    tile.partial = place_partial(partial, tile.rows, a.width);
    attend_tile(a, tile);
    if (plan.pieces == 1) write_rows(a, tile, partial, 1, 0);
    buffers.give(buffer);
  });
  if (plan.pieces == 1) return;
  for (std::int64_t i = 0; i < plan.tiles; i += plan.pieces) {
    write_rows(a, find_tile(i), partials.data() + i * partial_size, plan.pieces, partial_size);
  }
}

}  // namespace hsai
