#include "model.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstring>
#include <exception>
#include <new>
#include <stdexcept>
#include <string>

#include "../isa.hpp"
#include "squeeze.hpp"

namespace gossamer {
namespace {

// Up to so many tokens every thread prepares the activations of all by itself, which saves a barrier.
constexpr int64_t redundant_tokens = 2;
// From so many tokens on, work is handed out in small pieces: whoever is held up does less of it.
constexpr int64_t dynamic_tokens = 16;
constexpr int64_t max_step_tokens = 1 << 16;
// Tokens of context whose results are made apart and merged in order: the same parts whatever else is in the batch and
// whoever computes them, so that a token's result does not depend on either. A multiple of ChunkTokens.
constexpr int64_t part_tokens = 256;

int64_t padded(int64_t count) { return (count + BlockColumns - 1) / BlockColumns * BlockColumns; }
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

float capped(float x, float cap) { return cap * std::tanh(x / cap); }

// Norms one head in place (RMS), as long as it is: heads lie side by side.
void norm_head(float* head, const Floats& weight, float eps) {
  float sum = 0.0f;
  for (size_t i = 0; i < weight.size(); ++i) sum += head[i] * head[i];
  const float factor = 1.0f / std::sqrt(sum / float(weight.size()) + eps);
  for (size_t i = 0; i < weight.size(); ++i) head[i] *= factor * weight[i];
}

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

// Columns that the products of first factors take, one after another.
int64_t middle_columns(const std::vector<Weight>& weights) {
  int64_t total = 0;
  for (const Weight& w : weights) total += w->first ? w->first->matrix.tiles * TileRows : 0;
  return total;
}

}  // namespace

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
  struct Plan {
    int64_t group, kv_heads;
    std::vector<Unit> units;
    std::vector<Unit> split;  // the first of every run of partial results
    int64_t partial_floats;
  };
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
  double seconds[Model::phase_count] = {};
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
};

static Epilogue to(Epilogue::What what, float* y, int64_t stride, const Floats* bias, int64_t rows) {
  Epilogue e{};
  e.what = what;
  e.y = y;
  e.stride = stride;
  e.bias = bias && !bias->empty() ? bias->data() : nullptr;
  e.rows = rows;
  return e;
}

// Makes `tokens` rows of an input ready for these weights, alone or together with the other threads.
static void prepare(const Ops& ops, bool exact, const ModelShape& shape, const Input& in, int64_t tokens,
                    const std::vector<Product>& products, Ready& ready, Rank& rank, bool alone, Acts* acts) {
  const int64_t blocks = padded(in.columns) / BlockColumns, width = blocks * BlockColumns;
  bool codes = false;
  for (const Product& p : products) codes |= is_coded(p.weight->matrix.kind) && !exact;
  const bool copies = in.norm || in.columns % BlockColumns;
  // A normed row is kept where floats are wanted; else it only passes through on its way to codes.
  float* x = copies ? ready.x.data() : nullptr;
  int8_t* q = ready.q.data();
  float* scale = ready.scale.data();
  const bool one = products.size() == 1 && !products[0].weight->matrix.halves;
  int span = 2;
  for (const Product& p : products) span = std::min(span, span_of(p.weight->matrix));
  const int32_t factor = one ? sum_factor(products[0].weight->matrix) : 1;
  auto body = [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      const float* row = in.x + t * in.stride;
      if (copies) {
        float* y = x + t * width;
        if (in.norm) {
          ops.norm(shape.norm, row, in.norm->weight.data(), in.norm->bias.empty() ? nullptr : in.norm->bias.data(),
                   in.columns, shape.norm_eps, y);
        } else {
          std::memcpy(y, row, sizeof(float) * in.columns);
          std::fill(y + in.columns, y + width, 0.0f);
        }
        row = y;
      }
      if (!codes) continue;
      int32_t* sums = ready.sums[0].data() + 2 * t * blocks;
      ops.quantize(row, blocks, span, factor, q + t * width, scale + t * blocks, sums);
      if (one) continue;
      for (size_t i = products.size(); i-- > 0;) {  // the first last: the others are made from it
        const Matrix& m = products[i].weight->matrix;
        int32_t* scaled = ready.sums[i].data() + 2 * t * blocks;
        if (m.halves)
          half_sums(q + t * width, blocks, sum_factor(m), scaled);
        else
          for (int64_t b = 0; b < blocks; ++b) scaled[b] = sum_factor(m) * sums[b];
      }
    }
  };
  if (alone) {
    body(0, tokens);
  } else {
    rank.share(tokens, 4, true, body);
    rank.barrier();
  }
  for (size_t i = 0; i < products.size(); ++i)
    acts[i] = {copies ? x : in.x, copies ? width : in.stride, q, scale, ready.sums[i].data(), blocks, tokens, span};
}

// The products themselves, tiles shared among the threads. A barrier must follow.
static void multiply(const Ops& ops, bool exact, const std::vector<Product>& products, const Acts* acts, Rank& rank,
                     bool evenly) {
  int64_t pairs = 0;
  for (const Product& p : products) pairs += (p.weight->matrix.tiles + 1) / 2;
  const Acts& a = acts[0];
  // Pieces of about half a million products are worth handing out one by one.
  const int64_t work = a.tokens * a.blocks * BlockColumns * 2 * TileRows;
  const int64_t grain = evenly ? 1 : std::max<int64_t>(1, (int64_t(1) << 22) / std::max<int64_t>(work, 1));
  rank.share(pairs, grain, evenly, [&](int64_t begin, int64_t end) {
    int64_t first = 0;
    for (size_t i = 0; i < products.size(); ++i) {
      const Matrix& m = products[i].weight->matrix;
      const int64_t count = (m.tiles + 1) / 2;
      const int64_t from = std::max(begin, first) - first, until = std::min(end, first + count) - first;
      if (from < until)
        multiply(ops, *products[i].weight, acts[i], exact, 2 * from, std::min(2 * until, m.tiles), products[i].epilogue);
      first += count;
    }
  });
}

// Multiplies an input by weights that all read it; one that is two factors, by the first and what comes out of it by the
// second. All threads have the products at its end. Its time counts as the phases `preparing` and `multiplying`.
void Model::Run::apply(const ModelShape& shape, const Input& in, const std::vector<Product>& products, Rank& rank,
                       int preparing, int multiplying) {
  const bool alone = tokens() <= redundant_tokens, even = evenly(tokens());
  Ready& ready = alone ? *own[rank.id] : shared;
  Acts acts[3];
  std::vector<Product> firsts = products;
  int64_t at = 0;
  for (Product& p : firsts) {
    if (!p.weight->first) continue;
    const PackedMatrix& first = *p.weight->first;
    const int64_t rows = first.matrix.tiles * TileRows;
    p = {&first, to(Epilogue::store, middle.data() + at, middle_stride, nullptr, rows)};
    at += rows;
  }
  prepare(*ops, options.exact, shape, in, tokens(), firsts, ready, rank, alone, acts);
  spent(rank, preparing);
  multiply(*ops, options.exact, firsts, acts, rank, even);
  at = 0;
  for (const Product& p : products) {
    if (!p.weight->first) continue;
    if (at == 0 || !alone) rank.barrier();  // what came out of the first is there; what all share may be written anew
    const Input between{middle.data() + at, middle_stride, p.weight->matrix.columns, nullptr};
    prepare(*ops, options.exact, shape, between, tokens(), {p}, ready, rank, alone, acts);
    multiply(*ops, options.exact, {p}, acts, rank, even);
    at += p.weight->first->matrix.tiles * TileRows;
  }
  rank.barrier();
  spent(rank, multiplying);
}

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

static int64_t partial_floats_of(int64_t head_dim) { return MaxQueryRows * (head_dim + 2); }

// The mean that a partial result [rows, dim + 2] stands for, into rows of `group` heads.
static void finish_partial(const float* partial, int64_t tokens, int64_t group, int64_t dim, float* out,
                           int64_t stride) {
  for (int64_t r = 0; r < tokens * group; ++r, partial += dim + 2) {
    float* row = out + r / group * stride + r % group * dim;
    for (int64_t d = 0; d < dim; ++d) row[d] = partial[d] / partial[dim + 1];
  }
}

// Pieces of attention for layers with so many key-value heads and query heads to each.
static void plan_units(const Step& s, int64_t group, int64_t kv_heads, int64_t head_dim, int threads, auto& plan) {
  plan.units.clear();
  plan.split.clear();
  plan.partial_floats = 0;
  const int64_t per_unit = std::max<int64_t>(1, MaxQueryRows / group);
  const int64_t size = partial_floats_of(head_dim);
  int64_t whole = 0;
  for (int64_t i = 0; i < s.sequences; ++i)
    whole += (s.query_start[i + 1] - s.query_start[i] + per_unit - 1) / per_unit * kv_heads;
  for (int64_t i = 0; i < s.sequences; ++i) {
    const int64_t count = s.query_start[i + 1] - s.query_start[i];
    for (int64_t first = 0; first < count; first += per_unit) {
      const int64_t tokens = std::min(per_unit, count - first);
      const int64_t position = s.context[i] - count + first, end = position + tokens;
      const int64_t parts = (end + part_tokens - 1) / part_tokens;
      const bool apart = parts > 1 && threads > 1 && whole < 4 * threads;  // too few for all threads
      for (int64_t head = 0; head < kv_heads; ++head)
        for (int64_t k = 0; k < (apart ? parts : 1); ++k) {
          plan.units.push_back({int32_t(i), int32_t(head), int32_t(s.query_start[i] + first), int32_t(tokens), position,
                                k * part_tokens, apart ? std::min(end, (k + 1) * part_tokens) : end, -1,
                                int32_t(parts)});
          if (!apart) continue;
          auto& unit = plan.units.back();
          unit.partial = int32_t(plan.partial_floats / size);
          plan.partial_floats += size;
          if (k == 0) plan.split.push_back(unit);
        }
    }
  }
}

void Model::execute(Run& run) {
  const Ops& ops = engine_ops();
  run.ops = &ops;
  run.failure = nullptr;
  const bool steps = run.what != Run::head;
  require(run.what == Run::hidden || head_, "this part of a model has no head");
  const int64_t tokens = steps ? run.tokens() : run.state_count;
  run.stride = padded(shape.hidden_size);
  int64_t widest = run.stride;
  run.qkv_stride = run.mixed_stride = run.ffn_stride = run.middle_stride = 0;
  for (const auto& layer : layers_) {
    run.qkv_stride = std::max(run.qkv_stride, layer->qkv_stride);
    run.mixed_stride = std::max(run.mixed_stride, padded(layer->q_size));
    run.ffn_stride = std::max(run.ffn_stride, padded(layer->ffn_stride));
    run.middle_stride = std::max(run.middle_stride, padded(layer->middle_stride));
  }
  widest = std::max({widest, run.mixed_stride, run.ffn_stride, run.middle_stride});
  const int64_t blocks = widest / BlockColumns;
  auto size_ready = [&](Ready& ready, int64_t rows) {
    ready.x.get(rows * widest);
    ready.q.get(rows * widest);
    ready.scale.get(rows * blocks);
    for (auto& sums : ready.sums) sums.get(2 * rows * blocks);
  };
  size_ready(run.shared, tokens);
  const int threads = std::max(1, run.options.threads);
  while (int(run.own.size()) < threads) {
    run.own.push_back(std::make_unique<Ready>());
    run.scratch.push_back(std::make_unique<Buffer<float>>());
    run.found.push_back(std::make_unique<Run::Best>());
  }
  for (int i = 0; i < threads; ++i) {
    size_ready(*run.own[i], redundant_tokens);
    run.scratch[i]->get(scratch_floats(shape.head_dim) + 2 * partial_floats_of(shape.head_dim));
    if (run.what == Run::best) {
      const int64_t rows = run.step->row_count;
      std::fill_n(run.found[i]->value.get(rows), rows, -INFINITY);
      std::fill_n(run.found[i]->index.get(rows), rows, 0);
      std::fill_n(run.found[i]->poison.get(rows * TileRows), rows * TileRows, 0.0f);
    }
  }
  if (steps) {
    const Step& s = *run.step;
    run.x.get(tokens * run.stride);
    run.qkv.get(tokens * run.qkv_stride);
    run.mixed.get(tokens * run.mixed_stride);
    run.ffn.get(tokens * run.ffn_stride);
    run.ffn_up.get(tokens * run.ffn_stride);
    run.middle.get(tokens * run.middle_stride);
    run.added.get(tokens * run.stride);
    const int64_t ropes = std::max<int64_t>(1, int64_t(shape.inverse_frequencies.size()));
    run.cosine.get(ropes * tokens * shape.head_dim / 2);
    run.sine.get(ropes * tokens * shape.head_dim / 2);
    run.rows.get(std::max<int64_t>(1, s.row_count) * run.stride);
    run.sequence_of.resize(tokens);
    run.position_of.resize(tokens);
    for (int64_t i = 0; i < s.sequences; ++i)
      for (int64_t t = s.query_start[i]; t < s.query_start[i + 1]; ++t) {
        run.sequence_of[t] = int32_t(i);
        run.position_of[t] = int32_t(s.context[i] - s.query_start[i + 1] + t);
      }
    run.plans.clear();
    run.plan_of.clear();
    int64_t partial = 0;
    for (const auto& layer : layers_) {
      int found = -1;
      for (size_t p = 0; p < run.plans.size(); ++p)
        if (run.plans[p].group == layer->group && run.plans[p].kv_heads == layer->w.kv_heads) found = int(p);
      if (found < 0) {
        found = int(run.plans.size());
        run.plans.push_back({layer->group, layer->w.kv_heads, {}, {}, 0});
        plan_units(s, layer->group, layer->w.kv_heads, shape.head_dim, threads, run.plans.back());
        partial = std::max(partial, run.plans.back().partial_floats);
      }
      run.plan_of.push_back(found);
    }
    run.partial.get(std::max<int64_t>(1, partial));
  } else {
    run.rows.get(tokens * run.stride);
  }
  Team::instance().run(threads, [&](Rank& rank) {
    if (steps) blocks_of(run, rank);
    if (run.what != Run::hidden) finish(run, rank);
  });
  if (run.failure) std::rethrow_exception(run.failure);
}

// The residual, or what is added to it, as the sum over all ranks; a barrier stands before and behind it.
void Model::sum(Run& run, Rank& rank, float* rows) {
  if (!sum_) return;
  if (rank.id == 0 && !run.failure) {
    try {
      sum_(rows, run.tokens() * run.stride);
    } catch (...) {
      run.failure = std::current_exception();
    }
  }
  rank.barrier();
}

// What the first block reads of a token [stride].
void Model::embed(const Ops& ops, int32_t token, int32_t position, float* x) const {
  const int64_t hidden = shape.hidden_size;
  row_floats(embedding_->matrix, token, x);
  if (shape.embed_scale != 1.0f)
    for (int64_t d = 0; d < hidden; ++d) x[d] *= shape.embed_scale;
  if (!shape.positions.empty())
    for (int64_t d = 0; d < hidden; ++d) x[d] += shape.positions[position * hidden + d];
  if (!embed_norm_.weight.empty())
    ops.norm(shape.norm, x, embed_norm_.weight.data(), embed_norm_.bias.empty() ? nullptr : embed_norm_.bias.data(),
             hidden, shape.norm_eps, x);
}

// Embedding and blocks; the rows that are wanted end in run.rows (or in run.out, if hidden states are).
void Model::blocks_of(Run& run, Rank& rank) {
  const Step& s = *run.step;
  const Ops& ops = *run.ops;
  const int64_t tokens = run.tokens(), dim = shape.head_dim, half = dim / 2;
  const bool evenly = run.evenly(tokens);
  float* x = run.x.data();
  run.spent(rank, -1);
  rank.share(tokens, 1, true, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* row = x + t * run.stride;
      if (s.states) {
        std::memcpy(row, s.states + t * shape.hidden_size, sizeof(float) * shape.hidden_size);
        std::fill(row + shape.hidden_size, row + run.stride, 0.0f);
      } else if (s.tokens[t] < 0) {
        std::fill(row, row + run.stride, 0.0f);
      } else {
        embed(ops, s.tokens[t], run.position_of[t], row);
      }
      for (size_t rope = 0; rope < shape.inverse_frequencies.size(); ++rope) {
        const Floats& frequencies = shape.inverse_frequencies[rope];
        const int64_t at = (int64_t(rope) * tokens + t) * half;
        for (size_t i = 0; i < frequencies.size(); ++i) {
          const float angle = float(run.position_of[t]) * frequencies[i];
          run.cosine.data()[at + i] = float(std::cos(double(angle)));
          run.sine.data()[at + i] = float(std::sin(double(angle)));
        }
      }
    }
  });
  rank.barrier();
  if (!s.states) sum(run, rank, x);
  run.spent(rank, 0);
  const int64_t partial_size = partial_floats_of(dim);
  const auto onto = leads_ ? Epilogue::accumulate : Epilogue::store;
  std::vector<Product> products;
  for (size_t l = 0; l < layers_.size(); ++l) {
    const Layer& layer = *layers_[l];
    const Run::Plan& plan = run.plans[run.plan_of[l]];
    float *qkv = run.qkv.data(), *mixed = run.mixed.data(), *ffn = run.ffn.data();
    // 1. norm, q, k and v
    products.clear();
    for (size_t i = 0; i < layer.w.qkv.size(); ++i)
      products.push_back({layer.w.qkv[i].get(), to(Epilogue::store, qkv + layer.qkv_at[i], run.qkv_stride,
                                                   &layer.w.qkv_bias[i], layer.w.qkv[i]->matrix.tiles * TileRows)});
    run.apply(shape, {x, run.stride, shape.hidden_size, &layer.w.attention_norm}, products, rank, 1, 2);
    // 2. rotation, and keys and values into the cache
    const int64_t heads = layer.w.heads, kv_heads = layer.w.kv_heads, page = page_bytes(kv_kind_, dim);
    uint8_t* pages = pages_.data + layer_offset_[l];
    rank.share(tokens * (heads + kv_heads), tokens == 1 ? 1 : heads + kv_heads, true, [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t t = item / (heads + kv_heads), head = item % (heads + kv_heads);
        float* row = qkv + t * run.qkv_stride;
        auto turn = [&](float* columns, const Floats& norm, float scale) {
          if (!norm.empty()) norm_head(columns, norm, shape.norm_eps);
          int64_t width = 0;
          if (layer.w.rope >= 0) {
            const int64_t at = (layer.w.rope * tokens + t) * half;
            width = 2 * int64_t(shape.inverse_frequencies[layer.w.rope].size());
            ops.rotate(columns, run.cosine.data() + at, run.sine.data() + at, width, scale);
          }
          if (scale != 1.0f)
            for (int64_t d = width; d < dim; ++d) columns[d] *= scale;
        };
        if (head < heads) {
          turn(row + layer.q_at + head * dim, layer.w.q_norm, shape.score_scale);
          continue;
        }
        const int64_t h = head - heads, position = run.position_of[t];
        float* key = row + layer.k_at + h * dim;
        turn(key, layer.w.k_norm, 1.0f);
        const int64_t block = s.tables[run.sequence_of[t] * s.table_width + position / PageTokens];
        ops.cache(pages + (block * kv_heads + h) * page, kv_kind_, dim, int(position % PageTokens), key,
                  row + layer.v_at + h * dim);
      }
    });
    rank.barrier();
    run.spent(rank, 3);
    // 3. attention
    rank.share(int64_t(plan.units.size()), 1, evenly && plan.units.size() < 8, [&](int64_t begin, int64_t end) {
      for (int64_t u = begin; u < end; ++u) {
        const Unit& unit = plan.units[u];
        Attend a{};
        a.q = qkv + unit.first * run.qkv_stride + layer.q_at + unit.kv_head * layer.group * dim;
        a.q_stride = run.qkv_stride;
        a.tokens = unit.tokens;
        a.group = int(layer.group);
        a.head_dim = dim;
        a.kind = kv_kind_;
        a.pages = pages + unit.kv_head * page;
        a.block_stride = kv_heads * page;
        a.table = s.tables + unit.sequence * s.table_width;
        a.position = unit.position;
        a.scratch = run.scratch[rank.id]->data();
        a.window = layer.w.window;
        a.softcap = log2e * shape.attention_softcap;
        a.slopes = layer.w.slopes.empty() ? nullptr : layer.w.slopes.data() + unit.kv_head * layer.group;
        float* own = a.scratch + scratch_floats(dim);  // two partial results
        float* into = unit.partial < 0 ? own : run.partial.data() + int64_t(unit.partial) * partial_size;
        int64_t from = unit.begin;  // whole parts that no token of the unit sees are left out
        while (a.window && from + part_tokens <= a.position - a.window + 1 && from + part_tokens < unit.end)
          from += part_tokens;
        for (a.begin = from; a.begin < unit.end; a.begin = a.end) {
          a.end = std::min(unit.end, a.begin + part_tokens);
          a.partial = a.begin == from ? into : own + partial_size;
          ops.attend(a);
          if (a.begin > from) ops.merge(into, a.partial, int(unit.tokens * layer.group), dim);
        }
        if (unit.partial < 0)
          finish_partial(into, unit.tokens, layer.group, dim,
                         mixed + unit.first * run.mixed_stride + unit.kv_head * layer.group * dim, run.mixed_stride);
      }
    });
    rank.barrier();
    if (!plan.split.empty()) {
      rank.share(int64_t(plan.split.size()), 1, true, [&](int64_t begin, int64_t end) {
        for (int64_t u = begin; u < end; ++u) {
          const Unit& unit = plan.split[u];
          float* first = run.partial.data() + int64_t(unit.partial) * partial_size;
          for (int k = 1; k < unit.parts; ++k)
            ops.merge(first, first + k * partial_size, int(unit.tokens * layer.group), dim);
          finish_partial(first, unit.tokens, layer.group, dim,
                         mixed + unit.first * run.mixed_stride + unit.kv_head * layer.group * dim, run.mixed_stride);
        }
      });
      rank.barrier();
    }
    run.spent(rank, 4);
    // What a linear layer makes of `in` onto the residual, behind a norm where there is one.
    auto add = [&](const Weight& weight, const Floats& bias, const NormWeights& norm, const Input& in, int ready_phase,
                   int phase) {
      const bool plain = norm.weight.empty();
      float* added = run.added.data();
      products = {{weight.get(), to(plain ? onto : Epilogue::store, plain ? x : added, run.stride, &bias, run.stride)}};
      run.apply(shape, in, products, rank, ready_phase, phase);
      sum(run, rank, plain ? x : added);
      if (!plain) {
        rank.share(tokens, 1, true, [&](int64_t begin, int64_t end) {
          for (int64_t t = begin; t < end; ++t) {
            float *row = added + t * run.stride, *base = x + t * run.stride;
            ops.norm(shape.norm, row, norm.weight.data(), norm.bias.empty() ? nullptr : norm.bias.data(),
                     shape.hidden_size, shape.norm_eps, row);
            for (int64_t d = 0; d < shape.hidden_size; ++d) base[d] += row[d];
          }
        });
        rank.barrier();
        run.spent(rank, phase);
      }
    };
    // 4. output projection onto the residual
    auto add_attention = [&] {
      add(layer.w.output, layer.w.output_bias, layer.w.attention_post_norm,
          {mixed, run.mixed_stride, layer.q_size, nullptr}, 5, 6);
    };
    if (!shape.parallel) add_attention();
    // 5. norm, gate and up, activation
    products.clear();
    for (size_t i = 0; i < layer.w.gate_up.size(); ++i) {
      const auto what = layer.fused ? Epilogue::gate : layer.w.gated ? Epilogue::store : Epilogue::activate;
      Epilogue e = to(what, i ? run.ffn_up.data() : ffn, run.ffn_stride, &layer.w.gate_up_bias[i], layer.ffn_stride);
      e.activation = shape.activation;
      products.push_back({layer.w.gate_up[i].get(), e});
    }
    run.apply(shape, {x, run.stride, shape.hidden_size, &layer.w.ffn_norm}, products, rank, 1, 7);
    if (layer.w.gate_up.size() == 2) {
      rank.share(tokens, 1, true, [&](int64_t begin, int64_t end) {
        for (int64_t t = begin; t < end; ++t) {
          float* row = ffn + t * run.ffn_stride;
          ops.gate(shape.activation, row, run.ffn_up.data() + t * run.ffn_stride, layer.ffn_stride, row);
        }
      });
      rank.barrier();
    }
    run.spent(rank, 7);
    if (shape.parallel) add_attention();
    // 6. down onto the residual
    add(layer.w.down, layer.w.down_bias, layer.w.ffn_post_norm, {ffn, run.ffn_stride, layer.w.ffn_width, nullptr}, 8, 9);
  }
  rank.share(s.row_count, 1, true, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      const float* row = x + s.rows[r] * run.stride;
      if (run.what == Run::hidden)
        std::memcpy(run.out + r * shape.hidden_size, row, sizeof(float) * shape.hidden_size);
      else
        std::memcpy(run.rows.data() + r * run.stride, row, sizeof(float) * run.stride);
    }
  });
  rank.barrier();
}

// Final norm and head over run.rows.
void Model::finish(Run& run, Rank& rank) {
  const Ops& ops = *run.ops;
  const bool exact = run.options.exact;
  const int64_t rows = run.what == Run::head ? run.state_count : run.step->row_count;
  run.spent(rank, -1);
  if (run.what == Run::head) {
    rank.share(rows, 1, true, [&](int64_t begin, int64_t end) {
      for (int64_t r = begin; r < end; ++r) {
        float* row = run.rows.data() + r * run.stride;
        std::memcpy(row, run.states + r * shape.hidden_size, sizeof(float) * shape.hidden_size);
        std::fill(row + shape.hidden_size, row + run.stride, 0.0f);
      }
    });
    rank.barrier();
  }
  if (rows == 0) return;
  Epilogue e = to(run.what == Run::best ? Epilogue::best : Epilogue::store, run.out, shape.vocab_size, nullptr,
                  shape.vocab_size);
  if (run.what == Run::best) {
    Run::Best& best = *run.found[rank.id];
    e.best_value = best.value.data();
    e.best_index = best.index.data();
    e.poison = best.poison.data();
  }
  const std::vector<Product> products{{head_.get(), e}};
  Acts acts[3];
  const bool alone = rows <= redundant_tokens;
  prepare(ops, exact, shape, {run.rows.data(), run.stride, shape.hidden_size, &final_norm_}, rows, products,
          alone ? *run.own[rank.id] : run.shared, rank, alone, acts);
  multiply(ops, exact, products, acts, rank, run.evenly(rows));
  rank.barrier();
  if (shape.final_softcap > 0.0f && run.what != Run::best) {  // which changes no order
    rank.share(rows * shape.vocab_size, 4096, true, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) run.out[i] = capped(run.out[i], shape.final_softcap);
    });
    rank.barrier();
  }
  run.spent(rank, 10);
}

std::vector<double> Model::phase_seconds() {
  const std::scoped_lock lock(mutex_);
  std::vector<double> found(run_->seconds, run_->seconds + phase_count);
  std::fill(run_->seconds, run_->seconds + phase_count, 0.0);
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

bool Model::best(const Step& step, const Options& options, int32_t* tokens) {
  const std::scoped_lock lock(mutex_);
  Run& run = *run_;
  run.what = Run::best;
  execute_step(step, options, nullptr);
  bool finite = true;
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
    finite = finite && poison == 0.0f && std::isfinite(most);
    tokens[r] = index;
  }
  return finite;
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
