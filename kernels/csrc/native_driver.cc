// Runs products and attention from a file of cases (tests/kernels/native_cases.py writes it) and writes their results to
// another, without Python: under an emulator, or built with sanitizers.
//
//   native_driver                               prints the instruction set that this machine's kernels use
//   native_driver CASES RESULTS [NAME]          uses the one called NAME; exit status 3 if this machine lacks it

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <thread>
#include <vector>

#include "attention.h"
#include "multiply.h"

namespace {

// What stands before a case.
enum class Kind : std::int64_t { kProduct, kAttention };

// What stands before the arrays of a product: x, values, indices, scale, choices and minimum, each of as many bytes as
// it says.
struct ProductHeader {
  std::int64_t format, dense, stored, group, zero, columns, pattern, width, scale_type;
  std::int64_t rows, bfloat16, int8, threads;
  std::int64_t bytes[6];
};

// What stands before the arrays of attention: q, k, v, scales of k and v, positions of q and k, segments of q and k,
// softcap and scale, two floats, and the table of a cache in pages. What is not there has no bytes.
struct AttentionHeader {
  std::int64_t cache, bfloat16, batch, queries, keys, heads, kv_heads, head_dim, window, threads;
  std::int64_t layer, pages, page, row_pages;
  std::int64_t bytes[11];
};

// Exactly so many bytes: reading one more ends the program. With the address sanitizer that is its work; without, a
// page that nobody may touch follows the last byte, which works under an emulator too.
class Buffer {
 public:
  explicit Buffer(std::int64_t size) : size_(static_cast<std::size_t>(size)) {
#if defined(__SANITIZE_ADDRESS__)
    data_ = static_cast<char*>(std::malloc(size_));
#else
    const auto page = static_cast<std::size_t>(sysconf(_SC_PAGESIZE));
    mapped_ = (size_ + page - 1) / page * page + page;
    void* const start = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (start == MAP_FAILED || mprotect(static_cast<char*>(start) + mapped_ - page, page, PROT_NONE) != 0) std::abort();
    start_ = static_cast<char*>(start);
    data_ = start_ + mapped_ - page - size_;
#endif
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;

  ~Buffer() {
#if defined(__SANITIZE_ADDRESS__)
    std::free(data_);
#else
    munmap(start_, mapped_);
#endif
  }

  char* data() { return size_ == 0 ? nullptr : data_; }
  std::size_t size() const { return size_; }

 private:
  std::size_t size_;
  char* data_;
#if !defined(__SANITIZE_ADDRESS__)
  std::size_t mapped_;
  char* start_;
#endif
};

std::unique_ptr<Buffer> read_buffer(std::int64_t bytes, std::FILE* file) {
  auto buffer = std::make_unique<Buffer>(bytes);
  if (std::fread(buffer->data(), 1, buffer->size(), file) != buffer->size()) {
    std::fprintf(stderr, "the file of cases ends within one\n");
    std::exit(2);
  }
  return buffer;
}

template <class Header>
Header read_header(std::FILE* cases) {
  Header header;
  if (std::fread(&header, sizeof(header), 1, cases) != 1) {
    std::fprintf(stderr, "the file of cases ends within a header\n");
    std::exit(2);
  }
  return header;
}

// Threads of its own for each task.
class Helpers {
 public:
  hsai::Schedule schedule() {
    return [this](std::function<void()> task) { threads_.emplace_back(std::move(task)); };
  }

  void join() {
    for (std::thread& thread : threads_) thread.join();
  }

 private:
  std::vector<std::thread> threads_;
};

void run_product(std::FILE* cases, std::FILE* results) {
  const auto header = read_header<ProductHeader>(cases);
  std::unique_ptr<Buffer> arrays[6];
  for (int i = 0; i < 6; ++i) arrays[i] = read_buffer(header.bytes[i], cases);
  Buffer out(header.rows * header.columns * (header.bfloat16 != 0 ? 2 : 4));

  hsai::Weight weight = {};
  weight.values = arrays[1]->data();
  weight.indices = reinterpret_cast<const std::uint32_t*>(arrays[2]->data());
  weight.scale = arrays[3]->data();
  weight.scale_type = static_cast<hsai::ScaleType>(header.scale_type);
  weight.dense = header.dense;
  weight.stored = header.stored;
  weight.group = header.group;
  weight.zero = static_cast<std::int32_t>(header.zero);
  weight.columns = header.columns;
  weight.choices = reinterpret_cast<const std::uint32_t*>(arrays[4]->data());
  weight.minimum = arrays[5]->data();
  weight.pattern = header.pattern;
  weight.width = header.width;
  const hsai::Activations activations = {arrays[0]->data(), header.bfloat16 != 0, header.rows, header.int8 != 0};
  Helpers helpers;
  hsai::multiply_packed(static_cast<hsai::Format>(header.format), {{weight, out.data()}}, activations, header.threads,
                        helpers.schedule());
  helpers.join();
  std::fwrite(out.data(), 1, out.size(), results);
}

void run_attention(std::FILE* cases, std::FILE* results) {
  const auto header = read_header<AttentionHeader>(cases);
  std::unique_ptr<Buffer> arrays[11];
  for (int i = 0; i < 11; ++i) arrays[i] = read_buffer(header.bytes[i], cases);
  Buffer out(header.bytes[0]);
  const auto floats = [&](int i) { return reinterpret_cast<const float*>(arrays[i]->data()); };
  const auto integers = [&](int i) { return reinterpret_cast<const std::int32_t*>(arrays[i]->data()); };

  hsai::Attention a = {};
  a.q = arrays[0]->data();
  a.out = out.data();
  a.bfloat16 = header.bfloat16 != 0;
  a.k = arrays[1]->data();
  a.v = arrays[2]->data();
  a.cache = static_cast<hsai::CacheType>(header.cache);
  a.k_scale = arrays[3]->data();
  a.v_scale = arrays[4]->data();
  a.q_positions = integers(5);
  a.kv_positions = integers(6);
  a.q_segments = integers(7);
  a.kv_segments = integers(8);
  a.batch = header.batch;
  a.queries = header.queries;
  a.keys = header.keys;
  a.heads = header.heads;
  a.kv_heads = header.kv_heads;
  a.head_dim = header.head_dim;
  a.table = integers(10);
  a.layer = header.layer;
  a.pages = header.pages;
  a.page = header.page;
  a.row_pages = header.row_pages;
  a.window = header.window;
  a.softcap = floats(9)[0];
  a.scale = floats(9)[1];
  Helpers helpers;
  hsai::attend(a, header.threads, helpers.schedule());
  helpers.join();
  std::fwrite(out.data(), 1, out.size(), results);
}

}  // namespace

int main(int count, char** arguments) {
  if (count == 1) {
    std::puts(hsai::current_products().name);
    return 0;
  }
  if (count > 3 && !hsai::use_products(arguments[3])) return 3;
  std::FILE* const cases = std::fopen(arguments[1], "rb");
  std::FILE* const results = count > 2 ? std::fopen(arguments[2], "wb") : nullptr;
  if (cases == nullptr || results == nullptr) {
    std::fprintf(stderr, "cannot open the files\n");
    return 2;
  }
  Kind kind;
  while (std::fread(&kind, sizeof(kind), 1, cases) == 1) {
    if (kind == Kind::kProduct) {
      run_product(cases, results);
    } else {
      run_attention(cases, results);
    }
  }
  std::fclose(cases);
  return std::fclose(results) == 0 ? 0 : 2;
}
