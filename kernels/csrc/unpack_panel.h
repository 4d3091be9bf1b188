// Unpacks a piece of a tile of columns into a panel (panels.h). Included by products.cc only. Lanes are columns.
//
// Each format has kFours and
//   unpack<L>(weight, element, left, column, sink): calls sink(i, word) for kFours fours of elements of L columns, the
//   first at `element`, of which `left` are in its block: signed bytes, in halves of a level if weight.zero is odd. The
//   sink of a sparse format is given places as well.
#ifndef HSAI_KERNELS_UNPACK_PANEL_H_
#define HSAI_KERNELS_UNPACK_PANEL_H_

#include "integer_products.h"
#include "panels.h"

namespace hsai {
namespace {

using PanelWord = Lanes<kLanes>::Word;
using PanelInt = Lanes<kLanes>::Int;
using PanelFloat = Lanes<kLanes>::Float;

// Neighbouring vectors that are multiplied together.
struct ColumnRun {
  std::int64_t column;  // of the weight
  std::int64_t at;      // the same, from the tile's begin
  std::int64_t vectors;
};

struct ColumnRuns {
  ColumnRun at[kPanelColumns / kLanes];
  int count = 0;
};

// A piece of the contraction of a tile.
struct Piece {
  std::int64_t first, blocks;  // of activations
  std::int64_t steps;          // words a block and column
  std::int64_t length;         // columns of the tile
};

// Runs of `most` vectors; single ones where not so many are left of the tile, or of the columns that share choices.
ColumnRuns list_runs(const Weight& w, std::int64_t begin, std::int64_t length, std::int64_t most) {
  ColumnRuns runs;
  for (std::int64_t column = begin; column < begin + length;) {
    std::int64_t end = begin + length;
    if (w.choices != nullptr) {
      const std::int64_t next = (column / w.width + 1) * w.width;
      end = next < end ? next : end;
    }
    const std::int64_t vectors = end - column >= most * kLanes ? most : 1;
    runs.at[runs.count++] = {column, column - begin, vectors};
    column += vectors * kLanes;
  }
  return runs;
}

// Where a run's words for a step of the piece begin, those of its vectors side by side.
HSAI_INLINE std::int64_t place_step(const ColumnRun& run, const Piece& piece, std::int64_t step) {
  return run.at * piece.blocks * piece.steps + step * run.vectors * kLanes;
}

// The same for what there is of each block.
HSAI_INLINE std::int64_t place_block(const ColumnRun& run, const Piece& piece, std::int64_t block) {
  return run.at * piece.blocks + block * run.vectors * kLanes;
}

// Bytes 0 and 1 of every word, or 2 and 3, as two halves with their signs.
template <int kPart>
HSAI_INLINE PanelWord widen_bytes(const PanelWord& word) {
  const auto low = (PanelWord)((PanelInt)(word << (24 - 16 * kPart)) >> 24);
  const auto high = (PanelWord)((PanelInt)(word << (16 - 16 * kPart)) >> 24);
  return (low & 0xffffu) | (high << 16);
}

// The words of a run, and its places; blocks are of `size` elements.
template <class Format, bool kWide>
void unpack_run(const Weight& weight, std::int64_t size, const Piece& given, const ColumnRun& run, const Panel& panel) {
  // Copies, which nothing that is written to the panel can change.
  const Weight w = weight;
  const Piece piece = given;
  const std::int64_t vectors = run.vectors, next = vectors * kLanes, column = run.column;
  std::uint32_t* words = panel.words + place_step(run, piece, 0);
  std::uint32_t* places = panel.places + place_step(run, piece, 0);
  for (std::int64_t block = 0; block < piece.blocks; ++block) {
    const std::int64_t first = (piece.first + block) * size, last = first + size;
    for (std::int64_t element = first; element < last; element += 4 * Format::kFours) {
      for (std::int64_t v = 0; v < vectors; ++v) {
        Format::template unpack<kLanes>(w, element, last - element, column + v * kLanes,
                                        [&](int four, const PanelWord& word, const auto&... place) HSAI_INLINE_LAMBDA {
                                          if constexpr (kWide) {
                                            store(words + 2 * four * next + v * kLanes, widen_bytes<0>(word));
                                            store(words + (2 * four + 1) * next + v * kLanes, widen_bytes<1>(word));
                                          } else {
                                            store(words + four * next + v * kLanes, word);
                                          }
                                          (store(places + four * next + v * kLanes, place), ...);
                                        });
      }
      words += (kWide ? 2 : 1) * Format::kFours * next;
      places += Format::kFours * next;
    }
  }
}

// Scales, and what they and the biased digits make of the words.
template <class Dot>
void unpack_blocks(const Weight& w, const Planes& x, const Piece& piece, const ColumnRuns& runs, const Panel& panel) {
  const float unit = w.zero % 2 != 0 ? 0.5f : 1.0f;
  for (std::int64_t block = 0; block < piece.blocks; ++block) {
    const std::int64_t scales = (piece.first + block) * x.block / w.group * w.columns;
    for (int i = 0; i < runs.count; ++i) {
      const ColumnRun run = runs.at[i];
      for (std::int64_t v = 0; v < run.vectors; ++v) {
        const std::int64_t to = place_block(run, piece, block) + v * kLanes;
        const PanelFloat scale = load_scale<kLanes>(w, scales + run.column + v * kLanes);
        store(panel.scale + to, scale * unit);
        if (panel.offset != nullptr) {
          // Of the code that words count from.
          store(panel.offset + to, load_minimum<kLanes>(w, scales + run.column + v * kLanes) + scale * kMiddle);
        }
        if (!x.biased) continue;
        Dot sum;
        for (std::int64_t step = 0; step < piece.steps; ++step) {
          const std::int64_t from = place_step(run, piece, block * piece.steps + step) + v * kLanes;
          sum.add(PanelWord{} + 0x80808080u, load<PanelWord>(panel.words + from));
        }
        store(panel.excess + to, -sum.finish());
      }
    }
  }
}

// The elements as floats, a row of a run after the other. Not every instruction set has products of floats.
[[maybe_unused]] void widen_words(const Planes& x, const Piece& piece, const ColumnRuns& runs, const Panel& panel) {
  for (int i = 0; i < runs.count; ++i) {
    const ColumnRun run = runs.at[i];
    const std::int64_t width = run.vectors * kLanes;
    for (std::int64_t block = 0; block < piece.blocks; ++block) {
      for (std::int64_t at = 0; at < width; at += kLanes) {
        const auto scale = load<PanelFloat>(panel.scale + place_block(run, piece, block) + at);
        PanelFloat offset = {};
        if (panel.offset != nullptr) offset = load<PanelFloat>(panel.offset + place_block(run, piece, block) + at);
        float* to = panel.floats + (run.at * piece.blocks + block * width) * x.block + at;
        for (std::int64_t element = 0; element < x.block; ++element, to += width) {
          const std::int64_t step = block * piece.steps + element / 4;
          const auto word = load<PanelWord>(panel.words + place_step(run, piece, step) + at);
          const PanelInt value = (PanelInt)(word << (24 - 8 * (element % 4))) >> 24;
          store(to, __builtin_convertvector(value, PanelFloat) * scale + offset);
        }
      }
    }
  }
}

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_UNPACK_PANEL_H_
