// A decoder in the layout of the kernels, its paged KV cache, and one engine step over a flat batch: embedding, blocks,
// norm and head in one call. Knows no Python. Methods throw std::invalid_argument that says what is wrong.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "ops.hpp"
#include "pack.hpp"
#include "team.hpp"

namespace gossamer {

constexpr float log2e = 1.4426950408889634f;

using Weight = std::shared_ptr<PackedMatrix>;
using Floats = std::vector<float>;

struct NormWeights {
  Floats weight, bias;  // bias empty: none
};

// q, k and v as one weight or as three; gate and up as one in turns of tiles, or as two, or up alone where there is no
// gate. Biases as long as the rows.
struct LayerWeights {
  int64_t heads, kv_heads, ffn_width;
  bool gated;
  int64_t window;        // tokens that a token sees, itself included; 0: all before it
  int64_t rope;          // number of its rotary frequencies, -1: none
  Floats slopes;         // [heads] ALiBi, empty: none
  Floats q_norm, k_norm;  // [head_dim] weights of RMS norms of each head, empty: none
  NormWeights attention_norm, ffn_norm;
  NormWeights attention_post_norm, ffn_post_norm;  // of what is added to the residual; weight empty: none
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
  std::vector<Floats> inverse_frequencies;  // each up to [head_dim / 2]: that half of the columns which are turned
  float score_scale;                        // times log2(e)
  float embed_scale;
  bool parallel;                            // the feed-forward network reads the input of the block
  float attention_softcap, final_softcap;   // 0: none
  Floats positions;                         // [max_positions, hidden_size] learned, empty: none
  NormWeights embed_norm;                   // weight empty: none
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
  const float* states;         // [token_count, hidden_size] of the layers before these, or null: tokens are embedded
};

// Replaces floats by their sum over all ranks that hold a part of the model. May throw.
using Sum = std::function<void(float* data, int64_t count)>;

struct Options {
  bool exact;  // float activations
  int threads;
};

struct Input;

class Model {
 public:
  Model(ModelShape shape, Weight embedding, Weight head, NormWeights final_norm);

  void add_layer(LayerWeights layer);
  // The weights are one rank's part: token -1 is another rank's, and the residual is the sum of what all ranks add to it,
  // which begins with that of the one that leads.
  void share_with(Sum sum, bool leads);
  void allocate(int64_t blocks, KvKind kind);  // throws std::bad_alloc; what was cached is lost
  void touch(int threads);  // backs the cache by memory now, and not when it is first written to; loses nothing
  int64_t blocks() const { return blocks_; }
  int64_t block_bytes() const;

  void logits(const Step&, const Options&, float* out);         // [row_count, vocab_size]
  void hidden(const Step&, const Options&, float* out);         // [row_count, hidden_size], before the final norm
  // The largest logit [row_count] before any softcap, NaN where some are not finite, and its token.
  void best(const Step&, const Options&, int32_t* tokens, float* values);
  void head(const float* states, int64_t rows, const Options&, float* out);

  // Seconds that the calling thread has spent in each phase since the last call, waiting for others included.
  struct Phase {
    enum { embed, norm, qkv, rope, attention, mix, output, gate_up, quantize, down, head, count };
  };
  static constexpr const char* phase_names[Phase::count] = {
      "embed", "norm", "qkv", "rope", "attention", "mix", "output", "gate_up", "quantize", "down", "head"};
  std::vector<double> phase_seconds();

  const ModelShape shape;

  ~Model();
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;

 private:
  struct Layer;
  struct Unit;
  struct Plan;
  struct Run;
  struct Pages {
    uint8_t* data = nullptr;
    size_t size = 0;
  };

  void check(const Step&) const;
  // The phases of a step, each by all threads together (step.cpp).
  void execute(Run&);
  void blocks_of(Run&, Rank&);
  void begin(Run&, Rank&);
  void embed(const Ops&, int32_t token, int32_t position, float* x) const;
  void project(Run&, Rank&, const Layer&);
  void rotate_and_cache(Run&, Rank&, const Layer&, uint8_t* pages);
  void attend(Run&, Rank&, const Layer&, const Plan&, uint8_t* pages);
  void attend_unit(Run&, Rank&, const Layer&, const Unit&, const Unit* next, uint8_t* pages);
  void finish_unit(Run&, const Layer&, const Unit&, const float* partial) const;
  void add(Run&, Rank&, const Weight&, const Floats& bias, const NormWeights&, const Input&, int preparing,
           int multiplying);
  void widen(Run&, Rank&, const Layer&);
  void keep(Run&, Rank&);
  void sum(Run&, Rank&, float* rows);
  void finish(Run&, Rank&);
  void execute_step(const Step&, const Options&, float* out);
  void release_pages();

  Weight embedding_, head_;  // null in a part of a model that begins or ends elsewhere
  Sum sum_;                  // empty: the weights are whole
  bool leads_ = true;
  NormWeights final_norm_, embed_norm_;
  std::vector<std::unique_ptr<Layer>> layers_;
  std::vector<int64_t> layer_offset_;  // of a layer's pages in the cache
  Pages pages_;
  int64_t blocks_ = 0;
  KvKind kv_kind_ = KvKind::bf16;
  std::mutex mutex_;
  std::unique_ptr<Run> run_;  // buffers, kept from step to step
};

}  // namespace gossamer
