// One step over a flat batch: embedding, blocks, norm and head, by all threads together.
#include <algorithm>
#include <cmath>

#include "../isa.hpp"
#include "step.hpp"

namespace gossamer {
namespace {

// Tokens of context whose results are made apart and merged in order: the same parts whatever else is in the batch and
// whoever computes them, so that a token's result does not depend on either. A multiple of ChunkTokens.
constexpr int64_t part_tokens = 256;

float capped(float x, float cap) { return cap * std::tanh(x / cap); }

// Norms one head in place (RMS), as long as it is: heads lie side by side.
void norm_head(float* head, const Floats& weight, float eps) {
  float sum = 0.0f;
  for (size_t i = 0; i < weight.size(); ++i) sum += head[i] * head[i];
  const float factor = 1.0f / std::sqrt(sum / float(weight.size()) + eps);
  for (size_t i = 0; i < weight.size(); ++i) head[i] *= factor * weight[i];
}

// The mean that a partial result [rows, dim + 2] stands for, into rows of `group` heads.
void finish_partial(const float* partial, int64_t tokens, int64_t group, int64_t dim, float* out, int64_t stride) {
  for (int64_t r = 0; r < tokens * group; ++r, partial += dim + 2) {
    float* row = out + r / group * stride + r % group * dim;
    for (int64_t d = 0; d < dim; ++d) row[d] = partial[d] / partial[dim + 1];
  }
}

}  // namespace

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

// Room for the inputs of products, of so many rows and columns, shared and of each thread.
void Model::Run::size_inputs(int64_t rows, int64_t widest, int threads) {
  auto size = [&](Ready& ready, int64_t rows) {
    ready.x.get(rows * widest);
    ready.q.get(rows * widest);
    ready.scale.get(rows * widest / BlockColumns);
    for (auto& sums : ready.sums) sums.get(2 * rows * widest / BlockColumns);
  };
  size(shared, rows);
  while (int(own.size()) < threads) {
    own.push_back(std::make_unique<Ready>());
    scratch.push_back(std::make_unique<Buffer<float>>());
    found.push_back(std::make_unique<Best>());
  }
  for (int i = 0; i < threads; ++i) size(*own[i], redundant_tokens);
}

// Room for what goes from phase to phase.
void Model::Run::size_states(const ModelShape& shape) {
  const int64_t count = tokens();
  x.get(count * stride);
  qkv.get(count * qkv_stride);
  mixed.get(count * mixed_stride);
  ffn.get(count * ffn_stride);
  ffn_up.get(count * ffn_stride);
  middle.get(count * middle_stride);
  added.get(count * stride);
  const int64_t ropes = std::max<int64_t>(1, int64_t(shape.inverse_frequencies.size()));
  cosine.get(ropes * count * shape.head_dim / 2);
  sine.get(ropes * count * shape.head_dim / 2);
  rows.get(std::max<int64_t>(1, step->row_count) * stride);
}

// Which sequence each token is of, and where in it.
void Model::Run::place_tokens() {
  sequence_of.resize(tokens());
  position_of.resize(tokens());
  for (int64_t i = 0; i < step->sequences; ++i)
    for (int64_t t = step->query_start[i]; t < step->query_start[i + 1]; ++t) {
      sequence_of[t] = int32_t(i);
      position_of[t] = int32_t(step->context[i] - step->query_start[i + 1] + t);
    }
}

// One plan for all layers of the same heads.
void Model::Run::plan_attention(const ModelShape& shape, const std::vector<std::unique_ptr<Layer>>& layers,
                                int threads) {
  plans.clear();
  plan_of.clear();
  int64_t most = 0;
  for (const auto& layer : layers) {
    auto same = [&](const Plan& p) { return p.group == layer->group && p.kv_heads == layer->w.kv_heads; };
    const auto at = std::find_if(plans.begin(), plans.end(), same);
    plan_of.push_back(int(at - plans.begin()));
    if (at != plans.end()) continue;
    plans.push_back({layer->group, layer->w.kv_heads, {}, {}, 0});
    plan_units(*step, layer->group, layer->w.kv_heads, shape.head_dim, threads, plans.back());
    most = std::max(most, plans.back().partial_floats);
  }
  partial.get(std::max<int64_t>(1, most));
}

void Model::execute(Run& run) {
  run.ops = &engine_ops();
  run.failure = nullptr;
  const bool steps = run.what != Run::head;
  if (run.what != Run::hidden && !head_) throw std::invalid_argument("this part of a model has no head");
  run.stride = padded(shape.hidden_size);
  run.qkv_stride = run.mixed_stride = run.ffn_stride = run.middle_stride = 0;
  for (const auto& layer : layers_) {
    run.qkv_stride = std::max(run.qkv_stride, layer->qkv_stride);
    run.mixed_stride = std::max(run.mixed_stride, padded(layer->q_size));
    run.ffn_stride = std::max(run.ffn_stride, padded(layer->ffn_stride));
    run.middle_stride = std::max(run.middle_stride, padded(layer->middle_stride));
  }
  const int64_t rows = steps ? run.tokens() : run.state_count;
  const int threads = std::max(1, run.options.threads);
  run.size_inputs(rows, std::max({run.stride, run.mixed_stride, run.ffn_stride, run.middle_stride}), threads);
  for (int i = 0; i < threads; ++i) {
    run.scratch[i]->get(scratch_floats(shape.head_dim) + 2 * partial_floats_of(shape.head_dim));
    if (run.what != Run::best) continue;
    const int64_t wanted = run.step->row_count;
    std::fill_n(run.found[i]->value.get(wanted), wanted, -INFINITY);
    std::fill_n(run.found[i]->index.get(wanted), wanted, 0);
    std::fill_n(run.found[i]->poison.get(wanted * TileRows), wanted * TileRows, 0.0f);
  }
  if (steps) {
    run.size_states(shape);
    run.place_tokens();
    run.plan_attention(shape, layers_, threads);
  } else {
    run.rows.get(rows * run.stride);
  }
  Team::instance().run(threads, run.evenly(rows) ? Work::few_tokens : Work::many_tokens, [&](Rank& rank) {
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

// The first block's input: embeddings or the states of the layers before; and the angles of every position.
void Model::begin(Run& run, Rank& rank) {
  const Step& s = *run.step;
  const int64_t half = shape.head_dim / 2;
  rank.share(run.tokens(), 1, true, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float* row = run.x.data() + t * run.stride;
      if (s.states) {
        std::memcpy(row, s.states + t * shape.hidden_size, sizeof(float) * shape.hidden_size);
        std::fill(row + shape.hidden_size, row + run.stride, 0.0f);
      } else if (s.tokens[t] < 0) {
        std::fill(row, row + run.stride, 0.0f);
      } else {
        embed(*run.ops, s.tokens[t], run.position_of[t], row);
      }
      for (size_t rope = 0; rope < shape.inverse_frequencies.size(); ++rope) {
        const Floats& frequencies = shape.inverse_frequencies[rope];
        const int64_t at = (int64_t(rope) * run.tokens() + t) * half;
        for (size_t i = 0; i < frequencies.size(); ++i) {
          const float angle = float(run.position_of[t]) * frequencies[i];
          run.cosine.data()[at + i] = float(std::cos(double(angle)));
          run.sine.data()[at + i] = float(std::sin(double(angle)));
        }
      }
    }
  });
  rank.barrier();
  if (!s.states) sum(run, rank, run.x.data());
}

// Norms and rotates queries and keys in place, and puts keys and values into the layer's pages.
void Model::rotate_and_cache(Run& run, Rank& rank, const Layer& layer, uint8_t* pages) {
  const Step& s = *run.step;
  const Ops& ops = *run.ops;
  const int64_t tokens = run.tokens(), dim = shape.head_dim, half = dim / 2;
  const int64_t heads = layer.w.heads, kv_heads = layer.w.kv_heads, page = page_bytes(kv_kind_, dim);
  auto turn = [&](int64_t t, float* columns, const Floats& norm, float scale) {
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
  rank.share(tokens * (heads + kv_heads), tokens == 1 ? 1 : heads + kv_heads, true, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t t = item / (heads + kv_heads), head = item % (heads + kv_heads);
      float* row = run.qkv.data() + t * run.qkv_stride;
      if (head < heads) {
        turn(t, row + layer.q_at + head * dim, layer.w.q_norm, shape.score_scale);
        continue;
      }
      const int64_t h = head - heads, position = run.position_of[t];
      float* key = row + layer.k_at + h * dim;
      turn(t, key, layer.w.k_norm, 1.0f);
      const int64_t block = s.tables[run.sequence_of[t] * s.table_width + position / PageTokens];
      ops.cache(pages + (block * kv_heads + h) * page, kv_kind_, dim, int(position % PageTokens), key,
                row + layer.v_at + h * dim);
    }
  });
  rank.barrier();
}

// The mean that a unit's merged result stands for, into its rows of what goes to the output projection.
void Model::finish_unit(Run& run, const Layer& layer, const Unit& unit, const float* partial) const {
  const int64_t dim = shape.head_dim;
  finish_partial(partial, unit.tokens, layer.group, dim,
                 run.mixed.data() + unit.first * run.mixed_stride + unit.kv_head * layer.group * dim, run.mixed_stride);
}

// The parts of one unit, merged in order as they come.
// The first tokens of context that a unit looks at: whole parts that none of its tokens sees are left out.
static int64_t context_begin(const auto& unit, int64_t window) {
  int64_t from = unit.begin;
  while (window && from + part_tokens <= unit.position - window + 1 && from + part_tokens < unit.end)
    from += part_tokens;
  return from;
}

void Model::attend_unit(Run& run, Rank& rank, const Layer& layer, const Unit& unit, const Unit* next, uint8_t* pages) {
  const Step& s = *run.step;
  const int64_t dim = shape.head_dim, page = page_bytes(kv_kind_, dim), partial_size = partial_floats_of(dim);
  auto table_of = [&](const Unit& unit) { return s.tables + unit.sequence * s.table_width; };
  auto pages_of = [&](const Unit& unit, int64_t from) {
    return chunk_pages(pages + unit.kv_head * page, layer.w.kv_heads * page, table_of(unit), from, unit.end);
  };
  Attend a{};
  a.q = run.qkv.data() + unit.first * run.qkv_stride + layer.q_at + unit.kv_head * layer.group * dim;
  a.q_stride = run.qkv_stride;
  a.tokens = unit.tokens;
  a.group = int(layer.group);
  a.head_dim = dim;
  a.kind = kv_kind_;
  a.pages = pages + unit.kv_head * page;
  a.block_stride = layer.w.kv_heads * page;
  a.table = table_of(unit);
  a.position = unit.position;
  a.scratch = run.scratch[rank.id]->data();
  a.window = layer.w.window;
  a.softcap = log2e * shape.attention_softcap;
  a.slopes = layer.w.slopes.empty() ? nullptr : layer.w.slopes.data() + unit.kv_head * layer.group;
  float* own = a.scratch + scratch_floats(dim);  // two partial results
  float* into = unit.partial < 0 ? own : run.partial.data() + int64_t(unit.partial) * partial_size;
  const int64_t from = context_begin(unit, a.window);
  for (a.begin = from; a.begin < unit.end; a.begin = a.end) {
    a.end = std::min(unit.end, a.begin + part_tokens);
    a.partial = a.begin == from ? into : own + partial_size;
    a.after.count = 0;
    if (a.end < unit.end) a.after = pages_of(unit, a.end);
    else if (next) a.after = pages_of(*next, context_begin(*next, a.window));
    run.ops->attend(a);
    if (a.begin > from) run.ops->merge(into, a.partial, int(unit.tokens * layer.group), dim);
  }
  if (unit.partial < 0) finish_unit(run, layer, unit, into);
}

void Model::attend(Run& run, Rank& rank, const Layer& layer, const Plan& plan, uint8_t* pages) {
  const int64_t dim = shape.head_dim, partial_size = partial_floats_of(dim);
  const bool evenly = run.evenly(run.tokens()) && plan.units.size() < 8;
  const int64_t units = int64_t(plan.units.size());
  rank.share_ahead(units, evenly, [&](int64_t unit, int64_t next) {
    attend_unit(run, rank, layer, plan.units[unit], next < units ? &plan.units[next] : nullptr, pages);
  });
  rank.barrier();
  if (plan.split.empty()) return;
  rank.share(int64_t(plan.split.size()), 1, true, [&](int64_t begin, int64_t end) {
    for (int64_t u = begin; u < end; ++u) {
      const Unit& unit = plan.split[u];
      float* first = run.partial.data() + int64_t(unit.partial) * partial_size;
      for (int k = 1; k < unit.parts; ++k)
        run.ops->merge(first, first + k * partial_size, int(unit.tokens * layer.group), dim);
      finish_unit(run, layer, unit, first);
    }
  });
  rank.barrier();
}

// What a linear layer makes of `in` onto the residual, behind a norm where there is one.
void Model::add(Run& run, Rank& rank, const Weight& weight, const Floats& bias, const NormWeights& norm,
                const Input& in, int preparing, int multiplying) {
  const bool plain = norm.weight.empty();
  float *x = run.x.data(), *added = plain ? x : run.added.data();
  const auto what = plain && leads_ ? Epilogue::accumulate : Epilogue::store;
  run.apply(shape, in, {{weight.get(), to(what, added, run.stride, &bias, run.stride)}}, rank, preparing, multiplying);
  sum(run, rank, added);
  if (plain) return;
  rank.share(run.tokens(), 1, true, [&](int64_t begin, int64_t end) {
    for (int64_t t = begin; t < end; ++t) {
      float *row = added + t * run.stride, *base = x + t * run.stride;
      run.ops->norm(shape.norm, row, norm.weight.data(), norm.bias.empty() ? nullptr : norm.bias.data(),
                    shape.hidden_size, shape.norm_eps, row);
      for (int64_t d = 0; d < shape.hidden_size; ++d) base[d] += row[d];
    }
  });
  rank.barrier();
  run.spent(rank, multiplying);
}

// Queries, keys and values of a layer.
void Model::project(Run& run, Rank& rank, const Layer& layer) {
  std::vector<Product> products;
  for (size_t i = 0; i < layer.w.qkv.size(); ++i)
    products.push_back({layer.w.qkv[i].get(), to(Epilogue::store, run.qkv.data() + layer.qkv_at[i], run.qkv_stride,
                                                 &layer.w.qkv_bias[i], layer.w.qkv[i]->matrix.tiles * TileRows)});
  run.apply(shape, {run.x.data(), run.stride, shape.hidden_size, &layer.w.attention_norm}, products, rank, Phase::norm, Phase::qkv);
}

// Gate and up of a layer, and the activation, into run.ffn.
void Model::widen(Run& run, Rank& rank, const Layer& layer) {
  std::vector<Product> products;
  float* ffn = run.ffn.data();
  for (size_t i = 0; i < layer.w.gate_up.size(); ++i) {
    const auto what = layer.fused ? Epilogue::gate : layer.w.gated ? Epilogue::store : Epilogue::activate;
    Epilogue e = to(what, i ? run.ffn_up.data() : ffn, run.ffn_stride, &layer.w.gate_up_bias[i], layer.ffn_stride);
    e.activation = shape.activation;
    products.push_back({layer.w.gate_up[i].get(), e});
  }
  run.apply(shape, {run.x.data(), run.stride, shape.hidden_size, &layer.w.ffn_norm}, products, rank, Phase::norm,
            Phase::gate_up);
  if (layer.w.gate_up.size() == 2) {
    rank.share(run.tokens(), 1, true, [&](int64_t begin, int64_t end) {
      for (int64_t t = begin; t < end; ++t) {
        float* row = ffn + t * run.ffn_stride;
        run.ops->gate(shape.activation, row, run.ffn_up.data() + t * run.ffn_stride, layer.ffn_stride, row);
      }
    });
    rank.barrier();
  }
  run.spent(rank, Phase::gate_up);
}

// Embedding and blocks; the rows that are wanted end in run.rows (or in run.out, if hidden states are).
void Model::blocks_of(Run& run, Rank& rank) {
  run.spent(rank, -1);
  begin(run, rank);
  run.spent(rank, Phase::embed);
  for (size_t l = 0; l < layers_.size(); ++l) {
    const Layer& layer = *layers_[l];
    uint8_t* pages = pages_.data + layer_offset_[l];
    project(run, rank, layer);
    rotate_and_cache(run, rank, layer, pages);
    run.spent(rank, Phase::rope);
    attend(run, rank, layer, run.plans[run.plan_of[l]], pages);
    run.spent(rank, Phase::attention);
    auto add_attention = [&] {
      add(run, rank, layer.w.output, layer.w.output_bias, layer.w.attention_post_norm,
          {run.mixed.data(), run.mixed_stride, layer.q_size, nullptr}, Phase::mix, Phase::output);
    };
    if (!shape.parallel) add_attention();
    widen(run, rank, layer);
    if (shape.parallel) add_attention();
    add(run, rank, layer.w.down, layer.w.down_bias, layer.w.ffn_post_norm,
        {run.ffn.data(), run.ffn_stride, layer.w.ffn_width, nullptr}, Phase::quantize, Phase::down);
  }
  keep(run, rank);
}

// The rows that are wanted, out of the residual.
void Model::keep(Run& run, Rank& rank) {
  const bool hidden = run.what == Run::hidden;
  float* to = hidden ? run.out : run.rows.data();
  const int64_t width = hidden ? shape.hidden_size : run.stride;
  rank.share(run.step->row_count, 1, true, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r)
      std::memcpy(to + r * width, run.x.data() + run.step->rows[r] * run.stride, sizeof(float) * width);
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
  run.spent(rank, Phase::head);
}

}  // namespace gossamer
