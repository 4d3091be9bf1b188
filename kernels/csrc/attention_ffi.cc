// The XLA FFI handlers of attention, over rows and over pages; see ffi.cc. Dimensions as in attention_tile.h.

#include <algorithm>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "attention.h"
#include "ffi_checks.h"
#include "stopwatch.h"
#include "xla/ffi/api/ffi.h"

namespace {

namespace ffi = xla::ffi;
using ffi::AnyBuffer;
using ffi::DataType;
using hsai::CacheType;
using hsai::describe;
using hsai::list_sizes;

ffi::Error invalid(const std::string& message) { return hsai::invalid("attention: " + message); }

// Fills in q, out and their sizes.
ffi::Error read_queries(const AnyBuffer& q, const AnyBuffer& out, hsai::Attention& a) {
  const std::vector<std::int64_t> sizes = list_sizes(q);
  if (sizes.size() != 4) return invalid("q has shape " + describe(sizes) + ", needs 4 dimensions");
  if (q.element_type() != DataType::F32 && q.element_type() != DataType::BF16) {
    return invalid("q must be float32 or bfloat16");
  }
  if (out.element_type() != q.element_type() || list_sizes(out) != sizes) {
    return invalid("the result has shape " + describe(list_sizes(out)) + " for q " + describe(sizes) +
                   ", and needs its shape and type");
  }
  a.q = q.untyped_data();
  a.out = out.untyped_data();
  a.bfloat16 = q.element_type() == DataType::BF16;
  a.batch = sizes[0];
  a.queries = sizes[1];
  a.heads = sizes[2];
  a.head_dim = sizes[3];
  return ffi::Error::Success();
}

// Fills in k, v, their type, and how many kv heads there are; q's sizes must be there. The last two of the `dimensions`
// of k are kv heads and the head dim.
ffi::Error read_cache(const AnyBuffer& k, const AnyBuffer& v, std::size_t dimensions, hsai::Attention& a) {
  const std::vector<std::int64_t> sizes = list_sizes(k);
  const std::int64_t a_byte = k.element_type() == DataType::U8 ? 2 : 1;
  if (sizes.size() != dimensions || sizes.back() * a_byte != a.head_dim) {
    return invalid("k has shape " + describe(sizes) + ", needs " + std::to_string(dimensions) + " dimensions for head dim " +
                   std::to_string(a.head_dim));
  }
  if (list_sizes(v) != sizes || v.element_type() != k.element_type()) {
    return invalid("v has shape " + describe(list_sizes(v)) + " for k " + describe(sizes) +
                   ", and needs its shape and type");
  }
  a.kv_heads = sizes[dimensions - 2];
  if (a.kv_heads < 1 || a.heads % a.kv_heads != 0) {
    return invalid(std::to_string(a.heads) + " query heads are no multiple of " + std::to_string(a.kv_heads));
  }
  if (k.element_type() == DataType::S8) {
    a.cache = CacheType::kInt8;
  } else if (k.element_type() == DataType::U8) {
    a.cache = CacheType::kInt4;
  } else if (k.element_type() == DataType::BF16 || k.element_type() == DataType::U16) {
    a.cache = CacheType::kBfloat16;
  } else if (k.element_type() == DataType::F32) {
    a.cache = CacheType::kFloat32;
  } else {
    return invalid("k must be float32, bfloat16 (or its bits, uint16), int8, or uint8 of two 4-bit integers");
  }
  a.k = k.untyped_data();
  a.v = v.untyped_data();
  return ffi::Error::Success();
}

// Gives `data` of an array of `type` and `sizes`; null for one of no elements and one dimension, if it may be absent.
template <class T>
ffi::Error read_array(const std::string& name, const AnyBuffer& buffer, DataType type,
                      const std::vector<std::int64_t>& sizes, bool absent, const T*& data) {
  const std::vector<std::int64_t> wanted = absent ? std::vector<std::int64_t>{0} : sizes;
  if (list_sizes(buffer) != wanted || buffer.element_type() != type) {
    const char* names = type == DataType::S32 ? " of int32" : type == DataType::F32 ? " of float32" : " of bfloat16";
    return invalid(name + " has shape " + describe(list_sizes(buffer)) + ", needs " + describe(wanted) + names);
  }
  data = absent ? nullptr : static_cast<const T*>(buffer.untyped_data());
  return ffi::Error::Success();
}

// Fills in the scales of a cache whose tokens are `tokens`, all of its dimensions before the kv heads: of int8 a float a
// head, of int4 two bfloat16 (or their bits); absent otherwise.
ffi::Error read_scales(const AnyBuffer& k_scale, const AnyBuffer& v_scale, std::vector<std::int64_t> tokens,
                       hsai::Attention& a) {
  const bool halves = a.cache == CacheType::kInt4, absent = !halves && a.cache != CacheType::kInt8;
  tokens.push_back(a.kv_heads);
  if (halves) tokens.push_back(2);
  const DataType bits = k_scale.element_type() == DataType::U16 ? DataType::U16 : DataType::BF16;
  const DataType type = halves ? bits : DataType::F32;
  ffi::Error error = read_array("k_scale", k_scale, type, tokens, absent, a.k_scale);
  return error.failure() ? error : read_array("v_scale", v_scale, type, tokens, absent, a.v_scale);
}

bool is_absent(const AnyBuffer& buffer) { return list_sizes(buffer) == std::vector<std::int64_t>{0}; }

// Fills in the options, and runs what was read.
ffi::Error run(hsai::Attention& a, ffi::ThreadPool& pool, std::int64_t window, float softcap, float scale) {
  if (window < 0 || window > std::numeric_limits<std::int32_t>::max()) {
    return invalid("window=" + std::to_string(window) + " is no number of positions");
  }
  if (!(softcap >= 0)) return invalid("softcap=" + std::to_string(softcap) + " is negative");
  if (a.batch == 0 || a.queries == 0 || a.heads == 0 || a.keys == 0 || a.head_dim == 0) {
    return invalid("queries (" + std::to_string(a.batch) + "," + std::to_string(a.queries) + ",...) or keys are empty");
  }
  a.window = window;
  a.softcap = softcap;
  a.scale = scale;
  const hsai::Stopwatch stopwatch;
  hsai::attend(a, pool.num_threads(), [&](std::function<void()> task) { pool.Schedule(std::move(task)); });
  return ffi::Error::Success();
}

// q, out (B, T, N, H); k, v (B, S, K, H), of int4 (B, S, K, H / 2); scales of int8 float32 (B, S, K), of int4 bfloat16
// (B, S, K, 2); positions and segments (B, T) and (B, S).
// Scales and segments that are not there have shape (0). window and softcap are 0 for none.
ffi::Error attend(ffi::ThreadPool pool, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer q_positions,
                  AnyBuffer kv_positions, AnyBuffer q_segments, AnyBuffer kv_segments, AnyBuffer k_scale,
                  AnyBuffer v_scale, ffi::Result<AnyBuffer> out, std::int64_t window, float softcap, float scale) {
  hsai::Attention a = {};
  if (auto error = read_queries(q, *out, a); error.failure()) return error;
  if (auto error = read_cache(k, v, 4, a); error.failure()) return error;
  a.keys = list_sizes(k)[1];
  if (list_sizes(k)[0] != a.batch) {
    return invalid("k has shape " + hsai::describe(k) + " for a batch of " + std::to_string(a.batch));
  }
  const std::vector<std::int64_t> of_q = {a.batch, a.queries}, of_k = {a.batch, a.keys};
  const bool together = is_absent(q_segments);
  ffi::Error error = read_array("q_positions", q_positions, DataType::S32, of_q, false, a.q_positions);
  if (!error.failure()) {
    error = read_array("kv_positions", kv_positions, DataType::S32, of_k, false, a.kv_positions);
  }
  if (!error.failure()) error = read_array("q_segments", q_segments, DataType::S32, of_q, together, a.q_segments);
  if (!error.failure()) error = read_array("kv_segments", kv_segments, DataType::S32, of_k, together, a.kv_segments);
  if (!error.failure()) error = read_scales(k_scale, v_scale, of_k, a);
  return error.failure() ? error : run(a, pool, window, softcap, scale);
}

// Whether the table names a page that there is wherever some query of a row looks.
ffi::Error check_table(const hsai::Attention& a) {
  for (std::int64_t b = 0; b < a.batch; ++b) {
    std::int64_t keys = 0;
    for (std::int64_t t = 0; t < a.queries; ++t) {
      keys = std::max<std::int64_t>(keys, std::int64_t{a.q_positions[b * a.queries + t]} + 1);
    }
    const std::int64_t used = (keys + a.page - 1) / a.page;
    if (used > a.row_pages) {
      return invalid("a query at position " + std::to_string(keys - 1) + " of a row of " + std::to_string(a.row_pages) +
                     " pages of " + std::to_string(a.page));
    }
    for (std::int64_t m = 0; m < used; ++m) {
      const std::int32_t page = a.table[b * a.row_pages + m];
      if (page < 0 || page >= a.pages) {
        return invalid("row " + std::to_string(b) + " has page " + std::to_string(page) + " of " +
                       std::to_string(a.pages));
      }
    }
  }
  return ffi::Error::Success();
}

// As `attend`, over k, v (L, P, R, K, H) and their scales, of layer (), int32, through table (B, M).
ffi::Error attend_pages(ffi::ThreadPool pool, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer layer, AnyBuffer table,
                        AnyBuffer q_positions, AnyBuffer k_scale, AnyBuffer v_scale, ffi::Result<AnyBuffer> out,
                        std::int64_t window, float softcap, float scale) {
  hsai::Attention a = {};
  if (auto error = read_queries(q, *out, a); error.failure()) return error;
  if (auto error = read_cache(k, v, 5, a); error.failure()) return error;
  const std::vector<std::int64_t> sizes = list_sizes(k), of_table = list_sizes(table);
  a.pages = sizes[1];
  a.page = sizes[2];
  a.row_pages = of_table.size() == 2 ? of_table[1] : 0;
  a.keys = std::min(a.page, a.row_pages);
  const std::int32_t* number = nullptr;
  ffi::Error error = read_array("layer", layer, DataType::S32, {}, false, number);
  if (!error.failure()) error = read_array("table", table, DataType::S32, {a.batch, a.row_pages}, false, a.table);
  if (!error.failure()) {
    error = read_array("q_positions", q_positions, DataType::S32, {a.batch, a.queries}, false, a.q_positions);
  }
  if (!error.failure()) error = read_scales(k_scale, v_scale, {sizes[0], a.pages, a.page}, a);
  if (error.failure()) return error;
  a.layer = *number;
  if (a.layer < 0 || a.layer >= sizes[0]) {
    return invalid("layer " + std::to_string(a.layer) + " of " + std::to_string(sizes[0]));
  }
  if (a.page > 0) error = check_table(a);
  return error.failure() ? error : run(a, pool, window, softcap, scale);
}

}  // namespace

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* HsaiAttention(XLA_FFI_CallFrame* call_frame);
extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* HsaiPagedAttention(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(HsaiAttention, hsai::Guarded<attend>(),
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Attr<std::int64_t>("window")
                                  .Attr<float>("softcap")
                                  .Attr<float>("scale"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(HsaiPagedAttention, hsai::Guarded<attend_pages>(),
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Arg<AnyBuffer>()
                                  .Ret<AnyBuffer>()
                                  .Attr<std::int64_t>("window")
                                  .Attr<float>("softcap")
                                  .Attr<float>("scale"));
