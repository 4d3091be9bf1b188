// The XLA FFI handler of attention; see ffi.cc. Dimensions as in attention_tile.h.

#include <exception>
#include <limits>
#include <string>
#include <utility>
#include <vector>

#include "attention.h"
#include "ffi_checks.h"
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

// Fills in k, v, their type and sizes; q's must be there.
ffi::Error read_cache(const AnyBuffer& k, const AnyBuffer& v, hsai::Attention& a) {
  const std::vector<std::int64_t> sizes = list_sizes(k);
  const std::int64_t a_byte = k.element_type() == DataType::U8 ? 2 : 1;
  if (sizes.size() != 4 || sizes[0] != a.batch || sizes[3] * a_byte != a.head_dim) {
    return invalid("k has shape " + describe(sizes) + " for a batch of " + std::to_string(a.batch) + " and head dim " +
                   std::to_string(a.head_dim));
  }
  if (list_sizes(v) != sizes || v.element_type() != k.element_type()) {
    return invalid("v has shape " + describe(list_sizes(v)) + " for k " + describe(sizes) +
                   ", and needs its shape and type");
  }
  if (sizes[2] < 1 || a.heads % sizes[2] != 0) {
    return invalid(std::to_string(a.heads) + " query heads are no multiple of " + std::to_string(sizes[2]));
  }
  if (k.element_type() == DataType::S8) {
    a.cache = CacheType::kInt8;
  } else if (k.element_type() == DataType::U8) {
    a.cache = CacheType::kInt4;
  } else if (k.element_type() == DataType::BF16) {
    a.cache = CacheType::kBfloat16;
  } else if (k.element_type() == DataType::F32) {
    a.cache = CacheType::kFloat32;
  } else {
    return invalid("k must be float32, bfloat16, int8, or uint8 of two 4-bit integers");
  }
  a.k = k.untyped_data();
  a.v = v.untyped_data();
  a.keys = sizes[1];
  a.kv_heads = sizes[2];
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

bool is_absent(const AnyBuffer& buffer) { return list_sizes(buffer) == std::vector<std::int64_t>{0}; }

// q, out (B, T, N, H); k, v (B, S, K, H), of int4 (B, S, K, H / 2); scales of int8 float32 (B, S, K), of int4 bfloat16
// (B, S, K, 2); positions and segments (B, T) and (B, S).
// Scales and segments that are not there have shape (0). window and softcap are 0 for none.
ffi::Error attend(ffi::ThreadPool pool, AnyBuffer q, AnyBuffer k, AnyBuffer v, AnyBuffer q_positions,
                  AnyBuffer kv_positions, AnyBuffer q_segments, AnyBuffer kv_segments, AnyBuffer k_scale,
                  AnyBuffer v_scale, ffi::Result<AnyBuffer> out, std::int64_t window, float softcap, float scale) {
  hsai::Attention a = {};
  if (auto error = read_queries(q, *out, a); error.failure()) return error;
  if (auto error = read_cache(k, v, a); error.failure()) return error;
  const std::vector<std::int64_t> of_q = {a.batch, a.queries}, of_k = {a.batch, a.keys};
  std::vector<std::int64_t> of_scale = {a.batch, a.keys, a.kv_heads};
  const bool halves = a.cache == CacheType::kInt4;
  if (halves) of_scale.push_back(2);
  const DataType scales = halves ? DataType::BF16 : DataType::F32;
  const bool unscaled = a.cache != CacheType::kInt8 && !halves, together = is_absent(q_segments);
  ffi::Error error = read_array("q_positions", q_positions, DataType::S32, of_q, false, a.q_positions);
  if (!error.failure()) {
    error = read_array("kv_positions", kv_positions, DataType::S32, of_k, false, a.kv_positions);
  }
  if (!error.failure()) error = read_array("q_segments", q_segments, DataType::S32, of_q, together, a.q_segments);
  if (!error.failure()) error = read_array("kv_segments", kv_segments, DataType::S32, of_k, together, a.kv_segments);
  if (!error.failure()) error = read_array("k_scale", k_scale, scales, of_scale, unscaled, a.k_scale);
  if (!error.failure()) error = read_array("v_scale", v_scale, scales, of_scale, unscaled, a.v_scale);
  if (error.failure()) return error;
  if (window < 0 || window > std::numeric_limits<std::int32_t>::max()) {
    return invalid("window=" + std::to_string(window) + " is no number of positions");
  }
  if (!(softcap >= 0)) return invalid("softcap=" + std::to_string(softcap) + " is negative");
  if (a.batch == 0 || a.queries == 0 || a.heads == 0 || a.keys == 0 || a.head_dim == 0) {
    return invalid("q " + describe(list_sizes(q)) + " or k " + describe(list_sizes(k)) + " is empty");
  }
  a.window = window;
  a.softcap = softcap;
  a.scale = scale;
  try {
    hsai::attend(a, pool.num_threads(), [&](std::function<void()> task) { pool.Schedule(std::move(task)); });
  } catch (const std::exception& failure) {
    return ffi::Error(ffi::ErrorCode::kResourceExhausted, std::string("hsai_kernels: ") + failure.what());
  }
  return ffi::Error::Success();
}

}  // namespace

extern "C" __attribute__((visibility("default"))) XLA_FFI_Error* HsaiAttention(XLA_FFI_CallFrame* call_frame);

XLA_FFI_DEFINE_HANDLER_SYMBOL(HsaiAttention, attend,
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
