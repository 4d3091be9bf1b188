// See multiply.h. Compiled for the baseline instruction set: everything here is small beside reading the weight.

#include "multiply.h"

#include <algorithm>
#include <vector>

#include "bfloat16.h"
#include "threads.h"

namespace hsai {
namespace {

// Most columns of a tile: long runs of the weight, while the sums of 8 rows (128 KiB) stay in the second-level cache.
constexpr std::int64_t kMostColumns = 4096;

// Bytes of weights that a tile of many rows may walk over again for every few of them: half a second-level cache.
constexpr std::int64_t kCachedBytes = 1 << 19;

// Tiles start at multiples of this: whole cache lines of every format.
constexpr std::int64_t kAlignment = 64;

// Below this many stored elements a product is faster than waking a thread.
constexpr std::int64_t kAlone = 1 << 16;

// The row counts that kernels are compiled for; a product of 3 rows computes a fourth of zeros.
int round_rows(std::int64_t rows) { return rows <= 2 ? static_cast<int>(rows) : rows <= 4 ? 4 : 8; }

std::vector<float> widen_activations(const Activations& a, std::int64_t dense, int padded_rows) {
  std::vector<float> x(static_cast<std::size_t>(padded_rows * dense), 0.0f);
  const std::int64_t count = a.rows * dense;
  if (a.bfloat16) {
    std::transform(static_cast<const std::uint16_t*>(a.x), static_cast<const std::uint16_t*>(a.x) + count, x.begin(),
                   widen);
  } else {
    std::copy_n(static_cast<const float*>(a.x), count, x.begin());
  }
  return x;
}

// How many positions of a group a sparse weight keeps: of the 4 that were chosen, for V:N:M.
std::int64_t count_kept(const Weight& weight) { return weight.stored / (weight.dense / weight.pattern); }

// How many positions a group has from which elements pick: M, but for V:N:M the 4 that were chosen.
std::int64_t count_positions(const Weight& weight) { return weight.choices != nullptr ? 4 : weight.pattern; }

// Where every stored element's group of 4 starts.
std::vector<std::int32_t> list_quads(const Weight& weight) {
  const std::int64_t kept = count_kept(weight);
  std::vector<std::int32_t> quads(static_cast<std::size_t>(weight.stored));
  for (std::int64_t c = 0; c < weight.stored; ++c) {
    quads[static_cast<std::size_t>(c)] = static_cast<std::int32_t>(c / kept * 4);
  }
  return quads;
}

struct Tile {
  std::int64_t begin, length;
  std::int64_t first;  // columns before this one belong to another tile
};

// Columns in tiles of whole vectors, enough of them for every thread. The last columns are covered by one vector more,
// which overlaps the others; where there is not even one vector, columns go singly.
std::vector<Tile> list_tiles(std::int64_t columns, int lanes, std::int64_t threads, std::int64_t most) {
  if (columns < lanes) return {{0, columns, 0}};
  std::vector<Tile> tiles;
  const std::int64_t whole = columns / lanes * lanes;
  const auto round_up = [](std::int64_t n, std::int64_t to) { return (n + to - 1) / to * to; };
  // Tiles of equal size, as many for each thread: with three tiles for two threads one of them waits for half the time.
  const std::int64_t share = round_up(whole, threads * kAlignment) / threads;
  const std::int64_t pieces = round_up(share, std::max(most, kAlignment)) / std::max(most, kAlignment);
  const std::int64_t size = round_up(share, pieces * kAlignment) / pieces;
  for (std::int64_t begin = 0; begin < whole; begin += size) {
    tiles.push_back({begin, std::min(size, whole - begin), begin});
  }
  if (whole < columns) tiles.push_back({columns - lanes, lanes, whole});
  return tiles;
}

ProductTile choose_kernel(const Products& products, Format format) {
  return format == Format::kSparseFloat32 ? products.sparse_float32 : products.sparse_bfloat16;
}

IntegerTile choose_integer_kernel(const Products& products, Format format, const Weight& weight) {
  if (format == Format::kInt8) return products.int8;
  if (format == Format::kInt4) return products.int4;
  if (format == Format::kInt3) return products.int3;
  if (format == Format::kInt2) return products.int2;
  const bool eighths = count_positions(weight) == 8;
  if (format == Format::kSparseInt8) return eighths ? products.sparse_int8_of_8 : products.sparse_int8;
  return eighths ? products.sparse_int4_of_8 : products.sparse_int4;
}

// Copies the tile's columns from `sums` (rows, length) to the result.
void write_tile(const Tile& tile, const float* sums, const Activations& a, std::int64_t columns) {
  for (std::int64_t row = 0; row < a.rows; ++row) {
    const float* from = sums + row * tile.length + (tile.first - tile.begin);
    const float* end = sums + (row + 1) * tile.length;
    const std::int64_t to = row * columns + tile.first;
    if (a.bfloat16) {
      std::transform(from, end, static_cast<std::uint16_t*>(a.out) + to, narrow);
    } else {
      std::copy(from, end, static_cast<float*>(a.out) + to);
    }
  }
}

std::vector<Slot> list_slots(const Weight& weight) {
  const std::int64_t kept = count_kept(weight), positions = count_positions(weight);
  std::vector<Slot> slots(static_cast<std::size_t>(weight.stored / 4));
  std::int64_t element = 0;
  for (Slot& slot : slots) {
    const std::int64_t first = element / kept;
    slot = {static_cast<std::int32_t>(positions * first), 0, 0};
    for (int byte = 0; byte < 4; ++byte, ++element) {
      const std::int64_t offset = positions * (element / kept - first);
      if (offset >= 16) slot.next = 16;
      slot.offsets |= static_cast<std::uint32_t>(offset % 16) << (8 * byte);
    }
  }
  return slots;
}

// Stored elements of a block of activations: the most that the kernels take, of whole words and whole groups of 4, and
// so many that blocks fill a group of the weight. int8 weights have no words; their groups may be of any size.
std::int64_t choose_block(const Weight& weight, Format format, std::int64_t most) {
  std::int64_t unit = format == Format::kInt2 ? 16 : format == Format::kInt3 ? 32 : 8;
  if (format == Format::kInt8 && weight.group % unit != 0) unit = 1;
  if (weight.indices != nullptr && count_kept(weight) == 3) unit = 24;
  std::int64_t block = unit;
  for (std::int64_t size = unit; size <= most; size += unit) {
    if (weight.group % size == 0) block = size;
  }
  return block;
}

// What a product needs beside weight and activations, made before any tile starts.
struct Plan {
  std::vector<float> x;
  std::vector<std::int32_t> quads;
  std::vector<Slot> slots;
  std::vector<std::uint8_t> digits;
  std::vector<float> scale;
  std::vector<std::int32_t> sum;
  Planes planes = {};
};

void plan_planes(Format format, const Weight& weight, const Activations& a, const Products& products, Plan& plan) {
  Planes& planes = plan.planes;
  planes.int8 = a.int8;
  planes.wide = products.wide && format == Format::kInt8;
  planes.planes = a.int8 ? 1 : a.bfloat16 ? 2 : 3;
  if (planes.wide && planes.planes == 1) planes.planes = 2;
  planes.biased = products.biased && weight.indices != nullptr;
  planes.rows = static_cast<int>(a.rows);
  planes.block = choose_block(weight, format, products.most_block);
  planes.blocks = weight.stored / planes.block;
  planes.span = weight.dense / planes.blocks;
  planes.padded = (planes.span + 3) / 4 * 4;
  planes.stride = planes.blocks * planes.padded * (planes.wide ? 2 : 1) + kPlanePadding;
  planes.shared = a.int8 ? weight.group / planes.block : 1;
  plan.digits.resize(static_cast<std::size_t>(planes.planes * planes.rows * planes.stride));
  plan.scale.resize(static_cast<std::size_t>(planes.rows * planes.blocks));
  plan.sum.resize(static_cast<std::size_t>(planes.planes * planes.rows * planes.blocks));
  planes.digits = plan.digits.data();
  planes.scale = plan.scale.data();
  planes.sum = plan.sum.data();
}

}  // namespace

bool is_integer(Format format) {
  return format != Format::kSparseFloat32 && format != Format::kSparseBfloat16;
}

void multiply_packed(Format format, const Weight& weight, const Activations& activations, std::int64_t threads,
                     const Schedule& schedule) {
  const Products& current = current_products();
  const Products& products = weight.columns < current.lanes ? kBaselineProducts : current;
  const bool integer = is_integer(format);
  const int rows = integer ? static_cast<int>(activations.rows) : round_rows(activations.rows);
  if (weight.stored * weight.columns * rows < kAlone || threads < 1) threads = 1;

  Plan plan;
  Weight prepared = weight;
  plan.x = widen_activations(activations, weight.dense, rows);
  if (integer) {
    plan_planes(format, weight, activations, products, plan);
    if (weight.indices != nullptr) plan.slots = list_slots(weight);
    prepared.slots = plan.slots.data();
  } else if (weight.indices != nullptr) {
    plan.quads = list_quads(weight);
    prepared.quads = plan.quads.data();
  }
  const int a_byte = format == Format::kInt8 || format == Format::kSparseInt8 ? 1 : 2;
  const std::int64_t most = rows <= kMaxRows ? kMostColumns : kCachedBytes / (weight.stored / a_byte);
  const std::vector<Tile> tiles = list_tiles(weight.columns, products.lanes, threads, most);
  std::vector<std::vector<float>> sums;
  sums.reserve(tiles.size());
  for (const Tile& tile : tiles) sums.emplace_back(static_cast<std::size_t>(rows * tile.length));

  if (integer) {
    run_tiles(rows, rows > kMaxRows ? threads : 1, schedule, [&](std::int64_t row) {
      products.fill_planes(plan.planes, static_cast<int>(row), plan.x.data() + row * weight.dense);
    });
  }
  const ProductTile floats = choose_kernel(products, format);
  const IntegerTile integers = choose_integer_kernel(products, format, weight);
  run_tiles(static_cast<std::int64_t>(tiles.size()), threads, schedule, [&](std::int64_t i) {
    const Tile& tile = tiles[static_cast<std::size_t>(i)];
    float* out = sums[static_cast<std::size_t>(i)].data();
    if (integer) {
      integers(prepared, plan.planes, tile.begin, tile.length, out);
    } else {
      floats(prepared, plan.x.data(), rows, tile.begin, tile.length, out);
    }
    write_tile(tile, out, activations, weight.columns);
  });
}

}  // namespace hsai
