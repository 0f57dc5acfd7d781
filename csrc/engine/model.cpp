#include "model.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <stdexcept>
#include <string>

#include "step.hpp"

namespace gossamer {
namespace {

constexpr int64_t max_step_tokens = 1 << 16;

int64_t tile_padded(int64_t count) { return (count + TileRows - 1) / TileRows * TileRows; }

void require(bool holds, const std::string& what) {
  if (!holds) throw std::invalid_argument(what);
}

NormWeights padded_norm(NormWeights norm, int64_t size, const char* what) {
  require(int64_t(norm.weight.size()) == size, std::string(what) + " has another size than the model");
  require(norm.bias.empty() || int64_t(norm.bias.size()) == size, std::string(what) + ": bias has another size");
  norm.weight.resize(padded(size));
  if (!norm.bias.empty()) norm.bias.resize(padded(size));
  return norm;
}

// Columns that the products of first factors take, one after another.
int64_t middle_columns(const std::vector<Weight>& weights) {
  int64_t total = 0;
  for (const Weight& w : weights) total += w->first ? w->first->matrix.tiles * TileRows : 0;
  return total;
}

}  // namespace

Model::Model(ModelShape s, Weight embedding, Weight head, NormWeights final_norm)
    : shape(std::move(s)), embedding_(std::move(embedding)), head_(std::move(head)), run_(new Run) {
  require(shape.hidden_size > 0 && shape.vocab_size > 0 && shape.max_positions > 0, "the model is empty");
  require(shape.head_dim > 0 && shape.head_dim % 2 == 0 && shape.head_dim <= MaxHeadDim,
          "head_dim must be even, up to " + std::to_string(MaxHeadDim));
  for (const Floats& frequencies : shape.inverse_frequencies)
    require(int64_t(frequencies.size()) <= shape.head_dim / 2, "inverse_frequencies must be up to half a head");
  require(shape.positions.empty() || int64_t(shape.positions.size()) == shape.max_positions * shape.hidden_size,
          "positions must be [max_positions, hidden_size]");
  require(shape.embed_norm.weight.empty() || int64_t(shape.embed_norm.weight.size()) == shape.hidden_size,
          "the norm of the embedding has another size than the model");
  embed_norm_ = shape.embed_norm;
  if (!embed_norm_.weight.empty())
    embed_norm_ = padded_norm(std::move(embed_norm_), shape.hidden_size, "the norm of the embedding");
  for (const Weight& w : {embedding_, head_}) {
    if (!w) continue;
    require(w != embedding_ || w->tile_start.empty(), "a squeezed weight cannot be the embedding");
    require(w->matrix.columns == shape.hidden_size && w->matrix.rows == shape.vocab_size,
            "embedding and head must be [vocab_size, hidden_size]");
    require(!w->first, "embedding and head cannot be two factors");
  }
  final_norm_ = padded_norm(std::move(final_norm), shape.hidden_size, "the final norm");
}

Model::~Model() { release_pages(); }

void Model::release_pages() {
  if (pages_.data) munmap(pages_.data, pages_.size);
  pages_ = {};
  blocks_ = 0;
}

void Model::add_layer(LayerWeights w) {
  auto layer = std::make_unique<Layer>();
  const std::string where = "layer " + std::to_string(layers_.size()) + ": ";
  require(w.heads > 0 && w.kv_heads > 0 && w.heads % w.kv_heads == 0 && w.ffn_width > 0, where + "bad head counts");
  require(w.heads / w.kv_heads <= MaxQueryRows, where + "too many query heads for a key-value head");
  layer->q_size = w.heads * shape.head_dim;
  layer->kv_size = w.kv_heads * shape.head_dim;
  layer->group = w.heads / w.kv_heads;
  const int64_t sizes[3] = {layer->q_size, layer->kv_size, layer->kv_size};
  auto fits = [&](const Weight& m, int64_t rows, int64_t columns, const char* what) {
    require(m && m->matrix.rows == rows && m->inputs() == columns, where + what + " has another shape");
  };
  auto with_bias = [&](Floats& bias, const Weight& m, const char* what) {
    require(bias.empty() || int64_t(bias.size()) == m->matrix.rows, where + what + ": bias has another size");
    if (!bias.empty()) bias.resize(m->matrix.tiles * TileRows);
  };
  require(w.qkv.size() == 1 || w.qkv.size() == 3, where + "q, k and v must be one weight or three");
  require(w.qkv_bias.size() == w.qkv.size(), where + "one bias for each weight of q, k and v");
  if (w.qkv.size() == 1) {
    fits(w.qkv[0], sizes[0] + 2 * sizes[1], shape.hidden_size, "qkv");
    layer->qkv_at = {0};
    layer->k_at = sizes[0];
    layer->v_at = sizes[0] + sizes[1];
    layer->qkv_stride = tile_padded(sizes[0] + 2 * sizes[1]);
  } else {
    for (int i = 0; i < 3; ++i) fits(w.qkv[i], sizes[i], shape.hidden_size, "q, k or v");
    layer->k_at = tile_padded(sizes[0]);
    layer->v_at = layer->k_at + tile_padded(sizes[1]);
    layer->qkv_at = {0, layer->k_at, layer->v_at};
    layer->qkv_stride = layer->v_at + tile_padded(sizes[2]);
  }
  layer->q_at = 0;
  for (size_t i = 0; i < w.qkv.size(); ++i) with_bias(w.qkv_bias[i], w.qkv[i], "qkv");
  const size_t most = w.gated ? 2 : 1;
  require(w.gate_up.size() == 1 || w.gate_up.size() == most, where + "gate and up must be one weight or two");
  require(w.gate_up_bias.size() == w.gate_up.size(), where + "one bias for each weight of gate and up");
  layer->fused = w.gated && w.gate_up.size() == 1;
  for (const Weight& m : w.gate_up) fits(m, layer->fused ? 2 * w.ffn_width : w.ffn_width, shape.hidden_size, "gate or up");
  if (layer->fused) {
    const Matrix& m = w.gate_up[0]->matrix;
    require(m.tiles == 2 * (tile_padded(w.ffn_width) / TileRows), where + "gate and up are not in turns of tiles");
    Floats& bias = w.gate_up_bias[0];  // comes as gate, then up: is laid out as the tiles are
    require(bias.empty() || int64_t(bias.size()) == 2 * w.ffn_width, where + "gate and up: bias has another size");
    if (!bias.empty()) {
      Floats laid(m.tiles * TileRows);
      for (int64_t i = 0; i < w.ffn_width; ++i)
        for (int64_t up = 0; up < 2; ++up)
          laid[(2 * (i / TileRows) + up) * TileRows + i % TileRows] = bias[up * w.ffn_width + i];
      bias = std::move(laid);
    }
  } else {
    for (size_t i = 0; i < w.gate_up.size(); ++i) with_bias(w.gate_up_bias[i], w.gate_up[i], "gate or up");
  }
  layer->ffn_stride = tile_padded(w.ffn_width);
  fits(w.output, shape.hidden_size, layer->q_size, "the attention's output");
  fits(w.down, shape.hidden_size, w.ffn_width, "down");
  with_bias(w.output_bias, w.output, "the attention's output");
  with_bias(w.down_bias, w.down, "down");
  layer->middle_stride = std::max({middle_columns(w.qkv), middle_columns({w.output}), middle_columns(w.gate_up),
                                   middle_columns({w.down})});
  w.attention_norm = padded_norm(std::move(w.attention_norm), shape.hidden_size, (where + "attention norm").c_str());
  w.ffn_norm = padded_norm(std::move(w.ffn_norm), shape.hidden_size, (where + "ffn norm").c_str());
  for (NormWeights* norm : {&w.attention_post_norm, &w.ffn_post_norm})
    if (!norm->weight.empty()) *norm = padded_norm(std::move(*norm), shape.hidden_size, (where + "post norm").c_str());
  for (const Floats* norm : {&w.q_norm, &w.k_norm})
    require(norm->empty() || int64_t(norm->size()) == shape.head_dim, where + "a norm of heads has another size");
  require(w.window >= 0, where + "a window must not be negative");
  require(-1 <= w.rope && w.rope < int64_t(shape.inverse_frequencies.size()), where + "it has no such rotary frequencies");
  require(w.slopes.empty() || int64_t(w.slopes.size()) == w.heads, where + "a slope for each query head");
  for (float& slope : w.slopes) slope *= log2e;
  layer->w = std::move(w);
  const std::scoped_lock lock(mutex_);
  release_pages();
  layers_.push_back(std::move(layer));
}

void Model::share_with(Sum sum, bool leads) {
  const std::scoped_lock lock(mutex_);
  sum_ = std::move(sum);
  leads_ = leads;
}

int64_t Model::block_bytes() const {
  int64_t total = 0;
  for (const auto& layer : layers_) total += layer->w.kv_heads * page_bytes(kv_kind_, shape.head_dim);
  return total;
}

void Model::allocate(int64_t blocks, KvKind kind) {
  require(blocks > 0 && blocks <= (int64_t(1) << 31) - 1, "the number of blocks must be from 1 to 2^31 - 1");
  const std::scoped_lock lock(mutex_);
  std::vector<int64_t> offsets;
  size_t size = 0;
  for (const auto& layer : layers_) {
    offsets.push_back(int64_t(size));
    size += size_t(blocks) * size_t(layer->w.kv_heads * page_bytes(kind, shape.head_dim));
  }
  require(size > 0, "the model has no layers");
  void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (data == MAP_FAILED) throw std::bad_alloc();
  madvise(data, size, MADV_HUGEPAGE);
  release_pages();
  kv_kind_ = kind;
  layer_offset_ = std::move(offsets);
  pages_ = {static_cast<uint8_t*>(data), size};
  blocks_ = blocks;
}

void Model::touch(int threads) {
  constexpr size_t piece = size_t(1) << 21, page = 4096;
  const std::scoped_lock lock(mutex_);
  const int64_t pieces = int64_t((pages_.size + piece - 1) / piece);
  Team::instance().run(threads, Work::many_tokens, [&](Rank& rank) {
    rank.share(pieces, 1, false, [&](int64_t begin, int64_t end) {
      for (size_t at = size_t(begin) * piece; at < std::min(size_t(end) * piece, pages_.size); at += page) {
        volatile uint8_t* byte = pages_.data + at;
        *byte = *byte;
      }
    });
  });
}

void Model::check(const Step& s) const {
  require(!layers_.empty(), "the model has no layers");
  require(blocks_ > 0, "the KV cache has not been allocated");
  require(s.token_count > 0 && s.token_count <= max_step_tokens, "a step takes 1 to 65536 tokens");
  require(s.sequences > 0 && s.query_start[0] == 0 && s.query_start[s.sequences] == s.token_count,
          "query_start must begin with 0 and end with the number of tokens");
  require(s.states || embedding_, "this part of a model has no embedding: it needs states");
  for (int64_t t = 0; t < s.token_count && !s.states; ++t)
    require((sum_ ? -1 : 0) <= s.tokens[t] && s.tokens[t] < shape.vocab_size,
            "token " + std::to_string(s.tokens[t]) + " is not in the vocabulary");
  for (int64_t i = 0; i < s.sequences; ++i) {
    const std::string where = "sequence " + std::to_string(i) + ": ";
    const int64_t count = int64_t(s.query_start[i + 1]) - s.query_start[i];
    require(count > 0 && s.query_start[i + 1] <= s.token_count, where + "query_start does not rise");
    require(s.context[i] >= count && s.context[i] <= shape.max_positions,
            where + "its context must hold its new tokens, and be no more than max_positions");
    const int64_t used = (s.context[i] + PageTokens - 1) / PageTokens;
    require(used <= s.table_width, where + "its block table is too short for its context");
    for (int64_t b = 0; b < used; ++b) {
      const int32_t block = s.tables[i * s.table_width + b];
      require(0 <= block && block < blocks_, where + "block " + std::to_string(block) + " does not exist");
    }
  }
  for (int64_t r = 0; r < s.row_count; ++r)
    require(0 <= s.rows[r] && s.rows[r] < s.token_count, "a row of the results is no token of the step");
}

std::vector<double> Model::phase_seconds() {
  const std::scoped_lock lock(mutex_);
  std::vector<double> found(run_->seconds, run_->seconds + Phase::count);
  std::fill(run_->seconds, run_->seconds + Phase::count, 0.0);
  return found;
}

void Model::logits(const Step& step, const Options& options, float* out) {
  const std::scoped_lock lock(mutex_);
  run_->what = Run::logits;
  execute_step(step, options, out);
}

void Model::hidden(const Step& step, const Options& options, float* out) {
  const std::scoped_lock lock(mutex_);
  run_->what = Run::hidden;
  execute_step(step, options, out);
}

// Checks a step and runs it for what run_ says; the lock is held.
void Model::execute_step(const Step& step, const Options& options, float* out) {
  check(step);
  Run& run = *run_;
  run.step = &step;
  run.options = options;
  run.out = out;
  execute(run);
}

void Model::best(const Step& step, const Options& options, int32_t* tokens, float* values) {
  const std::scoped_lock lock(mutex_);
  Run& run = *run_;
  run.what = Run::best;
  execute_step(step, options, nullptr);
  const int threads = std::max(1, options.threads);
  for (int64_t r = 0; r < step.row_count; ++r) {
    float most = -INFINITY, poison = 0.0f;
    int32_t index = 0;
    for (int i = 0; i < threads; ++i) {
      const Run::Best& found = *run.found[i];
      const float value = found.value.data()[r];
      // Of equals the first, as argmax has it.
      if (value > most || (value == most && found.index.data()[r] < index)) {
        most = value;
        index = found.index.data()[r];
      }
      for (int k = 0; k < TileRows; ++k) poison += found.poison.data()[r * TileRows + k];
    }
    tokens[r] = index;
    values[r] = poison == 0.0f && std::isfinite(most) ? most : NAN;
  }
}

void Model::head(const float* states, int64_t rows, const Options& options, float* out) {
  const std::scoped_lock lock(mutex_);
  if (rows == 0) return;
  require(rows <= max_step_tokens, "too many rows at once");
  Run& run = *run_;
  run.step = nullptr;
  run.options = options;
  run.what = Run::head;
  run.out = out;
  run.states = states;
  run.state_count = rows;
  execute(run);
}

}  // namespace gossamer
