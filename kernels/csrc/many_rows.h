// Products of many rows: a piece of a tile of columns is unpacked (unpack_panel.h), then every row is multiplied by it.
// Included by products.cc only. Lanes are columns.
#ifndef HSAI_KERNELS_MANY_ROWS_H_
#define HSAI_KERNELS_MANY_ROWS_H_

#include "integer_products.h"
#include "panels.h"
#include "unpack_panel.h"

namespace hsai {
namespace {

// Sums that leave enough registers for weights and activations.
constexpr int kMostPanelSums = kManyRegisters ? 24 : 12;

// Vectors of a run, where each has `sums` of every row.
constexpr int count_vectors(int sums) {
  const int most = kMostPanelSums / (sums * kRowsAtOnce);
  return most >= 4 ? 4 : most >= 2 ? 2 : 1;
}

// A run's part of `out` for rows [row, row + kRowsAtOnce), which are piece.length apart there: adds what `add`, called
// with the place of each step in the piece, makes of the sums.
template <class Dot, int P, int U, class Add>
HSAI_INLINE void add_run(const Planes& x, const Piece& piece, const ColumnRun& run, const Panel& panel, int row,
                         float* out, const Add& add) {
  constexpr bool kWide = std::is_same_v<Dot, WideDots<kLanes>>;
  for (std::int64_t block = 0; block < piece.blocks; ++block) {
    DotSums<kLanes, P, kRowsAtOnce, U, Dot> sums;
    const std::int64_t at = place_block(run, piece, block);
    if constexpr (kBiasedDigits && Dot::kStarts) {
      unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
        const auto excess = load<PanelInt>(panel.excess + at + u.value * kLanes);
        unroll<kRowsAtOnce>([&](auto r) HSAI_INLINE_LAMBDA { sums.at[P - 1][r.value][u.value].start(excess); });
      });
    }
    for (std::int64_t step = block * piece.steps; step < (block + 1) * piece.steps; ++step) add(step, sums);
    unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
      const auto scale = load<PanelFloat>(panel.scale + at + u.value * kLanes);
      unroll<kRowsAtOnce>([&](auto r) HSAI_INLINE_LAMBDA {
        PanelInt sum[P];
        unroll<P>([&](auto p) HSAI_INLINE_LAMBDA { sum[p.value] = sums.at[p.value][r.value][u.value].finish(); });
        if constexpr (kBiasedDigits && !kWide && !Dot::kStarts) {
          sum[P - 1] += load<PanelInt>(panel.excess + at + u.value * kLanes);
        }
        float* const to = out + r.value * piece.length + u.value * kLanes;
        const float unit = x.scale[(row + r.value) * x.blocks + piece.first + block];
        // In the order of add_integer_block: a row's bits do not depend on how many there are.
        const PanelFloat step = scale * unit;
        if constexpr (kWide) {
          store(to, load<PanelFloat>(to) + combine_wide<kLanes, P + 1>(sum) * step);
        } else {
          store(to, load<PanelFloat>(to) + combine_planes<kLanes, P, 1>(sum) * step);
        }
      });
      if (panel.offset == nullptr) return;
      const auto offset = load<PanelFloat>(panel.offset + at + u.value * kLanes);
      unroll<kRowsAtOnce>([&](auto r) HSAI_INLINE_LAMBDA {
        float* const to = out + r.value * piece.length + u.value * kLanes;
        store(to, load<PanelFloat>(to) + offset * x.total[(row + r.value) * x.blocks + piece.first + block]);
      });
    });
  }
}

// A run times all rows, from digits.
template <class Dot, int P, int U>
void multiply_run(const Planes& planes, const Piece& given, const ColumnRun& run, const Panel& filled, int row,
                  int rows, float* out) {
  const Planes x = planes;
  const Panel panel = filled;
  const Piece piece = given;
  const std::uint32_t* const words = panel.words + place_step(run, piece, 0);
  for (const int last = row + rows; row < last; row += kRowsAtOnce, out += kRowsAtOnce * piece.length) {
    const auto add = [&](std::int64_t step, auto& sums) HSAI_INLINE_LAMBDA {
      PanelWord codes[U];
      unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
        codes[u.value] = load<PanelWord>(words + (step * U + u.value) * kLanes);
      });
      const std::int64_t at = 4 * (piece.first * piece.steps + step);
      unroll<P>([&](auto p) HSAI_INLINE_LAMBDA {
        unroll<kRowsAtOnce>([&](auto r) HSAI_INLINE_LAMBDA {
          const PanelWord digits = PanelWord{} + load_word(find_digits(x, p.value, row + r.value) + at);
          unroll<U>([&](auto u) HSAI_INLINE_LAMBDA { sums.at[p.value][r.value][u.value].add(digits, codes[u.value]); });
        });
      });
    };
    add_run<Dot, P, U>(x, piece, run, panel, row, out, add);
  }
}

// The same for sparse weights, whose places choose among kSpan digits from a slot's begin on, or, of 32, as Slot says.
template <class Dot, int P, int U, int kSpan>
void pick_run(const Planes& planes, const Slot* slots, const Piece& given, const ColumnRun& run, const Panel& filled,
              int row, int rows, float* out) {
  const Planes x = planes;
  const Panel panel = filled;
  const Piece piece = given;
  const std::uint32_t* const words = panel.words + place_step(run, piece, 0);
  const std::uint32_t* const places = panel.places + place_step(run, piece, 0);
  for (const int last = row + rows; row < last; row += kRowsAtOnce, out += kRowsAtOnce * piece.length) {
    const auto add = [&](std::int64_t step, auto& sums) HSAI_INLINE_LAMBDA {
      const Slot& slot = slots[piece.first * piece.steps + step];
      PanelWord values[U], from[U];
      unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
        values[u.value] = load<PanelWord>(words + (step * U + u.value) * kLanes);
        from[u.value] = load<PanelWord>(places + (step * U + u.value) * kLanes);
      });
      unroll<P>([&](auto p) HSAI_INLINE_LAMBDA {
        unroll<kRowsAtOnce>([&](auto r) HSAI_INLINE_LAMBDA {
          const std::uint8_t* table = find_digits(x, p.value, row + r.value) + (slot.first - x.origin);
          unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
            PanelWord digits;
            if constexpr (kSpan == 32) {
              digits = join_halves<kLanes>(pick_bytes<kLanes, 16>(table, from[u.value]),
                                           pick_bytes<kLanes, 16>(table + slot.next, from[u.value]));
            } else {
              digits = pick_bytes<kLanes, kSpan>(table, from[u.value]);
            }
            sums.at[p.value][r.value][u.value].add(digits, values[u.value]);
          });
        });
      });
    };
    add_run<Dot, P, U>(x, piece, run, panel, row, out, add);
  }
}

// Products that are summed before they are added to others, so that rounding errors do not add up over a contraction.
constexpr std::int64_t kChain = 32;

// The same, from floats.
template <int U>
void multiply_floats(const Planes& planes, const Piece& piece, const ColumnRun& run, const Panel& panel, int row,
                     int rows, float* out) {
  const Planes x = planes;
  const std::int64_t count = piece.blocks * x.block, length = piece.length;
  const float* const weights = panel.floats + run.at * count;
  for (const int last = row + rows; row < last; row += kRowsAtOnce, out += kRowsAtOnce * length) {
    const float* from[kRowsAtOnce];
    for (int r = 0; r < kRowsAtOnce; ++r) {
      // There are no rows behind the last one, as there are digits.
      const int there = row + r < x.given ? row + r : x.given - 1;
      from[r] = x.numbers + there * x.blocks * x.span + piece.first * x.span;
    }
    for (std::int64_t first = 0; first < count; first += kChain) {
      const std::int64_t end = first + kChain < count ? first + kChain : count;
      PanelFloat sums[kRowsAtOnce][U] = {};
      for (std::int64_t i = first; i < end; ++i) {
        PanelFloat values[U];
        unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
          values[u.value] = load<PanelFloat>(weights + (i * U + u.value) * kLanes);
        });
        unroll<kRowsAtOnce>([&](auto r) HSAI_INLINE_LAMBDA {
          unroll<U>([&](auto u) HSAI_INLINE_LAMBDA { sums[r.value][u.value] += values[u.value] * from[r.value][i]; });
        });
      }
      unroll<kRowsAtOnce>([&](auto r) HSAI_INLINE_LAMBDA {
        unroll<U>([&](auto u) HSAI_INLINE_LAMBDA {
          float* const to = out + r.value * length + u.value * kLanes;
          store(to, load<PanelFloat>(to) + sums[r.value][u.value]);
        });
      });
    }
  }
}

// The digits that the columns from `column` on may pick of a V:N:M weight, which the next w.width share; all rows'.
template <int P>
Planes gather_rows(const Weight& w, const Planes& x, const Piece& piece, const Panel& panel, std::int64_t column,
                   int row, int rows) {
  const std::int64_t stride = panel.chosen_stride, first = piece.first * x.span, words = w.columns / w.width;
  for (int r = 0; r < rows; r += kRowsAtOnce) {
    gather_chosen<P, kRowsAtOnce>(x, row + r, first, piece.blocks * x.span,
                                  w.choices + first / 32 * words + column / w.width, words, w.pattern,
                                  panel.chosen + r * stride, stride, rows * stride);
  }
  Planes chosen = x;
  chosen.digits = panel.chosen;
  chosen.rows = rows;
  chosen.stride = stride;
  chosen.origin = first / w.pattern * 4;
  chosen.scale = x.scale + row * x.blocks;
  return chosen;
}

// A run times all rows; the panel is filled. `slots` are those of a sparse weight.
template <class Format, int P, int U>
void multiply_by_run(const Weight& w, const Planes& x, const Piece& piece, const ColumnRun& run, const Panel& panel,
                     int row, int rows, float* out) {
  using Dot = typename Format::template Dot<kLanes>;
  if constexpr (!Format::kSparse) {
    if constexpr (P == 0) {
      multiply_floats<U>(x, piece, run, panel, row, rows, out);
    } else {
      multiply_run<Dot, P, U>(x, piece, run, panel, row, rows, out);
    }
  } else if (kLanes == 16 && w.slot_span == 8) {
    pick_run<Dot, P, U, 8>(x, w.slots, piece, run, panel, row, rows, out);
  } else if (Format::kChosen || w.slot_span <= 16) {
    pick_run<Dot, P, U, 16>(x, w.slots, piece, run, panel, row, rows, out);
  } else {
    pick_run<Dot, P, U, 32>(x, w.slots, piece, run, panel, row, rows, out);
  }
}

// Columns [begin, begin + length) times rows [row, row + rows), to `out` (rows, length); P planes, or floats for 0.
template <class Format, int P>
void multiply_tile(const Weight& w, const Planes& x, const Panel& panel, std::int64_t begin, std::int64_t length,
                   int row, int rows, float* out) {
  constexpr int U = count_vectors(P == 0 ? 1 : P);
  const ColumnRuns runs = list_runs(w, begin, length, U);
  for (std::int64_t i = 0; i < rows * length; ++i) out[i] = 0;
  Piece piece = {0, 0, (x.block + 3) / 4 * (x.wide ? 2 : 1), length};
  for (; piece.first < x.blocks; piece.first += piece.blocks) {
    piece.blocks = x.blocks - piece.first < panel.blocks ? x.blocks - piece.first : panel.blocks;
    for (int i = 0; i < runs.count; ++i) {
      if (Format::kWide && x.wide) {
        unpack_run<Format, Format::kWide>(w, x.block, piece, runs.at[i], panel);
      } else {
        unpack_run<Format, false>(w, x.block, piece, runs.at[i], panel);
      }
    }
    unpack_blocks<typename Format::template Dot<kLanes>>(w, x, piece, runs, panel);
    if constexpr (P == 0) widen_words(x, piece, runs, panel);
    Planes chosen = x;
    int from = row;
    for (int i = 0; i < runs.count; ++i) {
      const ColumnRun& run = runs.at[i];
      if constexpr (Format::kChosen && P > 0) {
        if (w.choices != nullptr && (i == 0 || run.column % w.width == 0)) {
          chosen = gather_rows<P>(w, x, piece, panel, run.column, row, rows);
          from = 0;
        }
      }
      if (U > 1 && run.vectors == U) {
        multiply_by_run<Format, P, U>(w, chosen, piece, run, panel, from, rows, out + run.at);
      } else {
        multiply_by_run<Format, P, 1>(w, chosen, piece, run, panel, from, rows, out + run.at);
      }
    }
  }
}

template <class Format>
void multiply_many(const Weight& w, const Planes& x, const Panel& panel, std::int64_t begin, std::int64_t length,
                   int row, int rows, float* out) {
  constexpr bool kFloats = kWideDigits && !Format::kSparse;
  if constexpr (kFloats) {
    if (x.planes == 0) return multiply_tile<Format, 0>(w, x, panel, begin, length, row, rows, out);
    return multiply_tile<Format, 1>(w, x, panel, begin, length, row, rows, out);
  } else {
    if (x.planes == 1) return multiply_tile<Format, 1>(w, x, panel, begin, length, row, rows, out);
    if (x.planes == 2) return multiply_tile<Format, 2>(w, x, panel, begin, length, row, rows, out);
    return multiply_tile<Format, 3>(w, x, panel, begin, length, row, rows, out);
  }
}

}  // namespace
}  // namespace hsai

#endif  // HSAI_KERNELS_MANY_ROWS_H_
