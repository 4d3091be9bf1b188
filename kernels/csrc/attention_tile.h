// One attention call and one tile of it: plain data, shared by the FFI handler and the kernels (see products.h for why).
//
// Dimensions: B batch, T query, S key, N heads, K kv heads, H head dim, G = N / K query heads of a kv head. The rows of
// a kv head are its queries' heads, query by query: row r is query r / G, head r % G; there are T * G.
#ifndef HSAI_KERNELS_ATTENTION_TILE_H_
#define HSAI_KERNELS_ATTENTION_TILE_H_

#include <cstdint>

namespace hsai {

// kInt4: a byte holds two signed integers, of the first half of a head in its low bits and of the second in its high ones.
enum class CacheType { kFloat32, kBfloat16, kInt8, kInt4 };

struct Attention {
  const void* q;                       // (B, T, N, H)
  void* out;                           // (B, T, N, H), of q's type
  bool bfloat16;                       // q and out; else float
  const void* k;                       // (B, S, K, H), of kInt4 (B, S, K, H / 2) bytes
  const void* v;                       // as k
  CacheType cache;                     // k and v
  const void* k_scale;                 // kInt8: float (B, S, K); kInt4: bfloat16 (B, S, K, 2), of halves; others: null
  const void* v_scale;                 // as k_scale
  const std::int32_t* q_positions;     // (B, T)
  const std::int32_t* kv_positions;    // (B, S)
  const std::int32_t* q_segments;      // (B, T), or null
  const std::int32_t* kv_segments;     // (B, S), or null
  std::int64_t batch, queries, keys, heads, kv_heads, head_dim;
  // Of a cache in pages: k, v (L, P, R, K, H) and scales likewise, with R keys a page. Key s of a row stands at position
  // s, at place s % R of page table[s / R] of one layer; there are no kv_positions and no segments, and `keys` counts
  // those up to the last that any query may see.
  const std::int32_t* table;           // (B, M), or null: keys are (B, S), one row after the other
  std::int64_t layer, pages, page, row_pages;  // which of L; P, R, M
  std::int64_t window;                 // 0 for none
  float softcap;                       // 0 for none
  float scale;

  // Plain fields of this call, so that nothing is computed twice.
  std::int64_t group;                  // G
  std::int64_t width;                  // H rounded up to kHeadStep: the row length of every scratch array
};

constexpr std::int64_t kHeadStep = 16;   // a multiple of every instruction set's lanes
constexpr std::int64_t kBlockKeys = 64;  // keys whose scores exist at a time
constexpr std::int64_t kMostRows = 64;   // rows of a tile
constexpr std::int64_t kFewQueries = 17;  // up to here keys are multiplied as they lie; beyond, transposed first
constexpr int kMostParts = 2;            // of a head, with a scale each

// Where a tile leaves its rows: sums of weighted values, not yet divided, with the maximum and the sum behind them.
struct Partial {
  float* values;   // (rows, width)
  float* largest;  // (rows,): the largest score; the lowest float where no key was seen
  float* total;    // (rows,): the sum of weights
};

// Some rows of one kv head over some keys.
struct AttentionTile {
  std::int64_t batch, kv_head;
  std::int64_t first_row, rows;
  std::int64_t first_key, last_key;  // [first, last)
  float* scratch;                    // count_scratch() floats
  Partial partial;
};

using AttendTile = void (*)(const Attention& attention, const AttentionTile& tile);

}  // namespace hsai

#endif  // HSAI_KERNELS_ATTENTION_TILE_H_
