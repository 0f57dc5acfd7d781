// The inside of a step: buffers that are kept from step to step, how layers are laid out, and how an input meets the
// weights that read it (apply.cpp). For model.cpp and step.cpp alone.
#pragma once

#include <chrono>
#include <cstring>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#include "model.hpp"

namespace gossamer {

// Up to so many tokens every thread prepares the activations of all by itself, which saves a barrier.
constexpr int64_t redundant_tokens = 2;
// From so many tokens on, work is handed out in small pieces: whoever is held up does less of it.
constexpr int64_t dynamic_tokens = 16;

inline int64_t padded(int64_t count) { return (count + BlockColumns - 1) / BlockColumns * BlockColumns; }
inline int64_t partial_floats_of(int64_t head_dim) { return MaxQueryRows * (head_dim + 2); }

// Memory of floats that only grows, aligned for vectors.
template <class T>
class Buffer {
 public:
  T* get(size_t count) {
    if (count > size_) {
      data_.reset();
      size_ = 0;
      data_.reset(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t{64})));
      std::memset(static_cast<void*>(data_.get()), 0, count * sizeof(T));
      size_ = count;
    }
    return data_.get();
  }
  T* data() const { return data_.get(); }

 private:
  struct Free {
    void operator()(T* p) const { ::operator delete(p, std::align_val_t{64}); }
  };
  std::unique_ptr<T, Free> data_;
  size_t size_ = 0;
};

// Activations made ready for a weight: normed, filled up to whole blocks, quantized. One for each thread, or shared.
struct Ready {
  Buffer<float> x;
  Buffer<int8_t> q;
  Buffer<float> scale;
  Buffer<int32_t> sums[3];
};

struct Input {
  const float* x;
  int64_t stride, columns;
  const NormWeights* norm;  // or null
};

// What a phase multiplies: weights that read the same input, and where their products go.
struct Product {
  const PackedMatrix* weight;
  Epilogue epilogue;
};

// Results of products into rows of y [.., stride]; a bias may be null or empty.
Epilogue to(Epilogue::What what, float* y, int64_t stride, const Floats* bias, int64_t rows);

// Makes `tokens` rows of an input ready for these weights, alone or together with the other threads.
void prepare(const Ops& ops, bool exact, const ModelShape& shape, const Input& in, int64_t tokens,
             const std::vector<Product>& products, Ready& ready, Rank& rank, bool alone, Acts* acts);

// The products themselves, tiles shared among the threads. A barrier must follow.
void multiply(const Ops& ops, bool exact, const std::vector<Product>& products, const Acts* acts, Rank& rank,
              bool evenly);

struct Model::Layer {
  LayerWeights w;
  int64_t q_size, kv_size, group;
  int64_t q_at, k_at, v_at, qkv_stride;    // columns of the buffer that takes the products of q, k and v
  std::vector<int64_t> qkv_at;             // where each weight's products go
  int64_t ffn_stride, middle_stride;
  bool fused;                              // gate and up are one weight
};

// A piece of attention: some query tokens of one sequence, the heads that share a key-value head, and parts of the context.
struct Model::Unit {
  int32_t sequence, kv_head, first, tokens;  // first: of the query tokens, counted over the batch
  int64_t position, begin, end;
  int32_t partial;  // number of the partial result, or -1: all parts are here
  int32_t parts;    // of the whole context
};

// The attention of layers that have the same heads.
struct Model::Plan {
  int64_t group, kv_heads;
  std::vector<Unit> units;
  std::vector<Unit> split;  // the first of every run of partial results
  int64_t partial_floats;
};

struct Model::Run {
  const Step* step = nullptr;
  Options options{};
  const Ops* ops = nullptr;
  enum What { logits, hidden, best, head } what = logits;
  float* out = nullptr;
  const float* states = nullptr;
  int64_t state_count = 0;
  std::exception_ptr failure;  // of a sum over the ranks; what follows it is meaningless

  std::vector<int32_t> sequence_of;   // [tokens]
  std::vector<int32_t> position_of;   // [tokens]
  std::vector<Plan> plans;
  std::vector<int> plan_of;  // [layers]

  int64_t stride = 0, qkv_stride = 0, mixed_stride = 0, ffn_stride = 0, middle_stride = 0;
  Buffer<float> x, qkv, mixed, ffn, ffn_up, added, middle, cosine, sine, partial, rows;
  Ready shared;
  std::vector<std::unique_ptr<Ready>> own;
  std::vector<std::unique_ptr<Buffer<float>>> scratch;
  struct Best {
    Buffer<float> value, poison;
    Buffer<int32_t> index;
  };
  std::vector<std::unique_ptr<Best>> found;

  // The caller's clock: what has passed since the last mark was spent in this phase.
  double seconds[Phase::count] = {};
  std::chrono::steady_clock::time_point mark{};
  void spent(const Rank& rank, int phase) {
    if (rank.id != 0) return;
    const auto now = std::chrono::steady_clock::now();
    if (phase >= 0) seconds[phase] += std::chrono::duration<double>(now - mark).count();
    mark = now;
  }

  int64_t tokens() const { return step->token_count; }
  bool evenly(int64_t tokens) const { return tokens < dynamic_tokens; }
  void apply(const ModelShape&, const Input&, const std::vector<Product>&, Rank&, int preparing, int multiplying);
  void size_inputs(int64_t rows, int64_t widest, int threads);
  void size_states(const ModelShape&);
  void place_tokens();
  void plan_attention(const ModelShape&, const std::vector<std::unique_ptr<Layer>>&, int threads);
};

}  // namespace gossamer
