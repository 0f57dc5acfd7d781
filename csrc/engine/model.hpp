// A decoder in the layout of the kernels, its paged KV cache, and one engine step over a flat batch: embedding, blocks,
// norm and head in one call. Knows no Python. Methods throw std::invalid_argument that says what is wrong.
#pragma once

#include <cstdint>
#include <memory>
#include <mutex>
#include <vector>

#include "ops.hpp"
#include "pack.hpp"
#include "team.hpp"

namespace gossamer {

using Weight = std::shared_ptr<PackedMatrix>;
using Floats = std::vector<float>;

struct NormWeights {
  Floats weight, bias;  // bias empty: none
};

// q, k and v as one weight or as three; gate and up as one in turns of tiles, or as two. Biases as long as the rows.
struct LayerWeights {
  int64_t heads, kv_heads, ffn_width;
  NormWeights attention_norm, ffn_norm;
  std::vector<Weight> qkv, gate_up;
  std::vector<Floats> qkv_bias, gate_up_bias;  // one for each weight, empty: none
  Weight output, down;
  Floats output_bias, down_bias;
};

struct ModelShape {
  int64_t hidden_size, vocab_size, head_dim, max_positions;
  float norm_eps;
  NormKind norm;
  Activation activation;
  Floats inverse_frequencies;  // [head_dim / 2]
};

// The flat batch of one step: sequences one after another.
struct Step {
  const int32_t* tokens;       // [token_count]
  int64_t token_count;
  const int32_t* query_start;  // [sequences + 1]
  const int32_t* context;      // [sequences] tokens in the cache after this step
  const int32_t* tables;       // [sequences, table_width]
  int64_t sequences, table_width;
  const int32_t* rows;         // [row_count] tokens whose results are wanted
  int64_t row_count;
};

struct Options {
  bool exact;  // float activations
  int threads;
};

class Model {
 public:
  Model(ModelShape shape, Weight embedding, Weight head, NormWeights final_norm);

  void add_layer(LayerWeights layer);
  void allocate(int64_t blocks, KvKind kind);  // throws std::bad_alloc; what was cached is lost
  int64_t blocks() const { return blocks_; }
  int64_t block_bytes() const;

  void logits(const Step&, const Options&, float* out);         // [row_count, vocab_size]
  void hidden(const Step&, const Options&, float* out);         // [row_count, hidden_size], before the final norm
  bool best(const Step&, const Options&, int32_t* tokens);      // [row_count]; false if some result is not finite
  void head(const float* states, int64_t rows, const Options&, float* out);

  // Seconds that the calling thread has spent in each phase since the last call, waiting for others included.
  static constexpr const char* phase_names[] = {"embed", "norm", "qkv", "rope", "attention", "mix", "output",
                                                "gate_up", "quantize", "down", "head"};
  static constexpr int phase_count = sizeof(phase_names) / sizeof(phase_names[0]);
  std::vector<double> phase_seconds();

  const ModelShape shape;

  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

 private:
  struct Layer;
  struct Unit;
  struct Run;
  struct Pages {
    uint8_t* data = nullptr;
    size_t size = 0;
  };

  void check(const Step&) const;
  void blocks_of(Run&, Rank&);
  void finish(Run&, Rank&);
  void execute(Run&);
  void execute_step(const Step&, const Options&, float* out);
  void release_pages();

  Weight embedding_, head_;
  NormWeights final_norm_;
  std::vector<std::unique_ptr<Layer>> layers_;
  std::vector<int64_t> layer_offset_;  // of a layer's pages in the cache
  Pages pages_;
  int64_t blocks_ = 0;
  KvKind kv_kind_ = KvKind::bf16;
  std::mutex mutex_;
  std::unique_ptr<Run> run_;  // buffers, kept from step to step
};

}  // namespace gossamer
