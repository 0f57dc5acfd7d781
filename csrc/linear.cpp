#include "linear.hpp"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <memory>
#include <new>

#include "codes.hpp"
#include "isa.hpp"
#include "threads.hpp"

namespace gossamer {
namespace {

// Kernels may read so many bytes past the end of a packed row.
constexpr int64_t row_padding = 16;

// Multiplications below which one more thread costs more than it brings.
constexpr int64_t work_per_thread = 1 << 16;

// Memory of one thread that grows and stays, aligned to a cache line.
class Scratch {
 public:
  template <class T>
  T* get(int64_t count) {
    const size_t bytes = size_t(count) * sizeof(T);
    if (bytes > size_) {
      data_.reset(static_cast<char*>(::operator new(bytes, std::align_val_t{64})));
      size_ = bytes;
    }
    return reinterpret_cast<T*>(data_.get());
  }

 private:
  struct Free {
    void operator()(char* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<char, Free> data_;
  size_t size_ = 0;
};

thread_local Scratch arranged_scratch, sums_scratch, tail_scratch, rows_scratch;

int useful_threads(int threads, int64_t work) {
  return int(std::clamp<int64_t>(work / work_per_thread, 1, threads));
}

// Of every 2 * lanes columns the even ones first, padded with zeros to `stride` columns.
void split_columns(const float* x, int64_t columns, int64_t stride, int lanes, float* out) {
  const int64_t block = 2 * lanes;
  for (int64_t start = 0; start < stride; start += block, out += block)
    for (int64_t i = 0; i < block; ++i) {
      const int64_t column = start + i;
      out[(i & 1) * lanes + i / 2] = column < columns ? x[column] : 0.0f;
    }
}

Activations split(const float* x, int64_t tokens, int64_t columns, int lanes) {
  const int64_t stride = (columns + 2 * lanes - 1) / (2 * lanes) * (2 * lanes);
  float* out = arranged_scratch.get<float>(tokens * stride);
  for (int64_t t = 0; t < tokens; ++t) split_columns(x + t * columns, columns, stride, lanes, out + t * stride);
  return {out, nullptr, tokens, stride};
}

// -2^(bits-1) times the sum over each group, lane by lane: [tokens, groups, lanes].
const float* group_sums(const Activations& a, const Packed& w, int lanes) {
  const int64_t group_size = w.columns / w.groups;
  const float offset = -float(1 << (w.bits - 1));
  float* sums = sums_scratch.get<float>(a.tokens * w.groups * lanes);
  for (int64_t t = 0; t < a.tokens; ++t)
    for (int64_t g = 0; g < w.groups; ++g) {
      const float* x = a.x + t * a.stride + g * group_size;
      float* out = sums + (t * w.groups + g) * lanes;
      std::fill(out, out + lanes, 0.0f);
      for (int64_t i = 0; i < group_size; i += lanes)
        for (int lane = 0; lane < lanes; ++lane) out[lane] += x[i + lane];
      for (int lane = 0; lane < lanes; ++lane) out[lane] *= offset;
    }
  return sums;
}

PackedWeight view(const Packed& w) {
  const int64_t row_bytes = 4 * words_for(w.columns, w.bits);
  const auto* bytes = reinterpret_cast<const uint8_t*>(w.words);
  const int64_t tail_rows = std::min(w.rows, (row_padding + row_bytes - 1) / row_bytes);
  const int64_t first_tail_row = w.rows - tail_rows, tail_bytes = tail_rows * row_bytes;
  auto* tail = tail_scratch.get<uint8_t>(tail_bytes + row_padding);
  std::memcpy(tail, bytes + first_tail_row * row_bytes, tail_bytes);
  std::memset(tail + tail_bytes, 0, row_padding);
  return {bytes,  tail,      first_tail_row, w.scale,              w.zero,
          w.rows, w.columns, w.groups,       w.columns / w.groups, row_bytes,
          w.bits};
}

}  // namespace

void packed_linear(const float* x, int64_t tokens, const Packed& weight, int threads, float* y) {
  const Kernels& k = kernels();
  const PackedWeight w = view(weight);
  const bool fits = k.groups_fit(w.bits, w.group_size);
  Activations a{x, nullptr, tokens, w.columns};
  if (fits) {
    if (split_order(w.bits)) a = split(x, tokens, w.columns, k.lanes);
    a.sums = group_sums(a, weight, k.lanes);
  }
  threads = useful_threads(threads, tokens * w.rows * w.columns);
  float* buffers = fits ? nullptr : rows_scratch.get<float>(threads * w.columns);
  parallel_for(w.rows, threads, [&](int64_t begin, int64_t end, int slot) {
    k.packed_linear(w, a, y, begin, end, fits ? nullptr : buffers + slot * w.columns);
  });
}

void bf16_linear(const float* x, int64_t tokens, const uint16_t* weight, int64_t rows, int64_t columns, int threads,
                 float* y) {
  const Kernels& k = kernels();
  const Activations a = split(x, tokens, columns, k.lanes);
  parallel_for(rows, useful_threads(threads, tokens * rows * columns), [&](int64_t begin, int64_t end, int) {
    k.bf16_linear(weight, rows, columns, a, y, begin, end);
  });
}

void dequantize(const Packed& weight, int threads, float* out) {
  const Kernels& k = kernels();
  const PackedWeight w = view(weight);
  parallel_for(w.rows, useful_threads(threads, w.rows * w.columns),
               [&](int64_t begin, int64_t end, int) { k.dequantize(w, out, begin, end); });
}

uint64_t read_bytes(const uint8_t* data, int64_t count, int threads) {
  const Kernels& k = kernels();
  std::atomic<uint64_t> seen{0};
  parallel_for(count / 64, threads, [&](int64_t begin, int64_t end, int) {
    seen ^= k.read_blocks(data + 64 * begin, end - begin);
  });
  return seen;
}

}  // namespace gossamer
