// See plan.h. Compiled for the baseline instruction set: everything here is small beside reading the weight.

#include "plan.h"

#include <algorithm>

#include "bfloat16.h"

namespace hsai {
namespace {

// From so many rows on unpacking a weight once is faster than on the way, which is most work for int8 weights. Codes of
// dense weights take little: two passes over them, the second from a cache, are faster than one and the unpacking.
std::int64_t count_many(Format format) {
  if (format == Format::kInt8) return 4;
  const bool codes = format == Format::kInt4 || format == Format::kInt3 || format == Format::kInt2;
  return (codes ? 2 * kMaxRows : kMaxRows) + 1;
}

// Rows of int8 weights that one row of activations takes at a time.
constexpr std::int64_t kInt8Streams = 8;

std::int64_t round_up(std::int64_t number, std::int64_t unit) { return (number + unit - 1) / unit * unit; }

// The row counts that kernels of floats are compiled for; a product of 3 rows computes a fourth of zeros.
int round_rows(std::int64_t rows) { return rows <= 2 ? static_cast<int>(rows) : rows <= 4 ? 4 : 8; }

// How many positions of a group a sparse weight keeps: of the 4 that were chosen, for V:N:M.
std::int64_t count_kept(const Weight& weight) { return weight.stored / (weight.dense / weight.pattern); }

// How many positions a group has from which elements pick: M, but for V:N:M the 4 that were chosen.
std::int64_t count_positions(const Weight& weight) { return weight.choices != nullptr ? 4 : weight.pattern; }

// Goes through the groups of a weight by its stored elements: divisions, one for each, took as long as a small product.
class Groups {
 public:
  explicit Groups(std::int64_t kept) : kept_(kept) {}

  std::int64_t now() const { return group_; }

  void step() {
    if (++element_ < kept_) return;
    element_ = 0;
    ++group_;
  }

 private:
  std::int64_t kept_, element_ = 0, group_ = 0;
};

// Where every stored element's group of 4 starts.
std::vector<std::int32_t> list_quads(const Weight& weight) {
  Groups groups(count_kept(weight));
  std::vector<std::int32_t> quads(static_cast<std::size_t>(weight.stored));
  for (std::int32_t& quad : quads) {
    quad = static_cast<std::int32_t>(groups.now() * 4);
    groups.step();
  }
  return quads;
}

std::vector<Slot> list_slots(const Weight& weight) {
  const std::int64_t positions = count_positions(weight);
  Groups groups(count_kept(weight));
  std::vector<Slot> slots(static_cast<std::size_t>(weight.stored / 4));
  for (Slot& slot : slots) {
    const std::int64_t first = groups.now();
    slot = {static_cast<std::int32_t>(positions * first), 0, 0};
    for (int byte = 0; byte < 4; ++byte, groups.step()) {
      const std::int64_t offset = positions * (groups.now() - first);
      if (offset >= 16) slot.next = 16;
      slot.offsets |= static_cast<std::uint32_t>(offset % 16) << (8 * byte);
    }
  }
  return slots;
}

// Digits that a slot sees: the four elements of one are of at most so many groups.
std::int32_t find_span(const Weight& weight) {
  const std::int64_t kept = count_kept(weight), groups = 4 % kept == 0 ? 4 / kept : 2;
  const std::int64_t span = groups * count_positions(weight);
  return span <= 8 ? 8 : span <= 16 ? 16 : 32;
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

// The most that kernels of `plan` take.
std::int64_t count_most(const Plan& plan, Format format, int digits) {
  const Products& table = *plan.table;
  // The rows of int8 weights are long, and each is a stream of its own: of few at a time the hardware reads ahead.
  if (!plan.many) return format == Format::kInt8 && plan.rows == 1 && digits == 1 ? kInt8Streams : table.most_block;
  if (digits == 0) return kPanelFloats;
  // Sums of 32 bits hold those of a long block, if they are of one digit. The others' blocks are those of few rows, so
  // that a row's bits do not depend on how many there are.
  if (digits == 1 && format == Format::kInt8) return kPanelElements;
  // Levels of 4 bits around zero are up to 15 halves, and sums of 16 bits hold half as many of them.
  return format == Format::kInt4 && plan.weight().zero % 2 != 0 ? table.most_block / 2 : table.most_block;
}

void plan_planes(Format format, const Activations& a, Plan& plan) {
  const Weight& weight = plan.weight();
  Planes& planes = plan.planes;
  planes.int8 = a.int8;
  int digits = a.int8 ? 1 : a.bfloat16 ? 2 : 3;
  if (plan.many && plan.table->wide && digits > 1 && weight.indices == nullptr) digits = 0;
  planes.wide = plan.table->wide && format == Format::kInt8 && digits > 0;
  planes.planes = planes.wide && digits == 1 ? 2 : digits;
  planes.biased = plan.table->biased && digits > 0 && (plan.many ? !planes.wide : weight.indices != nullptr);
  planes.rows = plan.rows;
  planes.given = static_cast<int>(a.rows);
  planes.block = choose_block(weight, format, count_most(plan, format, digits));
  planes.blocks = weight.stored / planes.block;
  planes.span = weight.dense / planes.blocks;
  planes.padded = round_up(planes.span, 4);
  planes.shared = a.int8 ? weight.group / planes.block : 1;
  if (digits == 0) {
    planes.numbers = a.bfloat16 ? plan.x.data() : static_cast<const float*>(a.x);
    return;
  }
  // An odd number of cache lines, so that rows do not share places in a cache.
  const std::int64_t lines = (planes.blocks * planes.padded * (planes.wide ? 2 : 1) + kPlanePadding + 63) / 64;
  planes.stride = (lines | 1) * 64;
  plan.digits.resize(static_cast<std::size_t>(planes.planes * planes.rows * planes.stride));
  plan.scale.resize(static_cast<std::size_t>(planes.rows * planes.blocks));
  plan.sum.resize(static_cast<std::size_t>(planes.planes * planes.rows * planes.blocks));
  plan.total.resize(static_cast<std::size_t>(planes.rows * planes.blocks));
  planes.digits = plan.digits.data();
  planes.scale = plan.scale.data();
  planes.sum = plan.sum.data();
  planes.total = plan.total.data();
}

}  // namespace

Plan plan_products(Format format, const std::vector<Product>& products, const Activations& a) {
  Plan plan = {};
  const Products& current = current_products();
  const std::int64_t columns = products.front().weight.columns;
  plan.table = columns < current.lanes ? &kBaselineProducts : &current;
  plan.integer = is_integer(format);
  plan.many = plan.integer && a.rows >= count_many(format) && columns >= plan.table->lanes;
  plan.rows = static_cast<int>(plan.many ? round_up(a.rows, kRowsAtOnce) : plan.integer ? a.rows : round_rows(a.rows));
  plan.products = products;
  if (a.bfloat16 || !plan.integer) plan.x.resize(static_cast<std::size_t>(plan.rows * plan.weight().dense));
  if (plan.integer) {
    plan_planes(format, a, plan);
    if (plan.weight().indices != nullptr) plan.slots = list_slots(plan.weight());
  } else {
    plan.quads = list_quads(plan.weight());
  }
  for (Product& product : plan.products) {
    product.weight.quads = plan.quads.data();
    product.weight.slots = plan.slots.data();
    product.weight.slot_span = plan.slots.empty() ? 0 : find_span(product.weight);
  }
  return plan;
}

void fill_row(Plan& plan, const Activations& a, std::int64_t row) {
  const std::int64_t dense = plan.weight().dense;
  const float* numbers = plan.x.data() + row * dense;
  if (a.bfloat16) {
    const auto* from = static_cast<const std::uint16_t*>(a.x) + row * dense;
    std::transform(from, from + dense, plan.x.begin() + row * dense, widen);
  } else if (plan.integer) {
    numbers = static_cast<const float*>(a.x) + row * dense;
  } else {
    std::copy_n(static_cast<const float*>(a.x) + row * dense, dense, plan.x.begin() + row * dense);
  }
  if (plan.planes.planes > 0) plan.table->fill_planes(plan.planes, static_cast<int>(row), numbers);
}

}  // namespace hsai
