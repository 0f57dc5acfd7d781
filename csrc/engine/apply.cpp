// How an input meets the weights that read it: normed and rounded once, then multiplied, tiles shared by all threads.
#include <algorithm>

#include "squeeze.hpp"
#include "step.hpp"

namespace gossamer {

Epilogue to(Epilogue::What what, float* y, int64_t stride, const Floats* bias, int64_t rows) {
  Epilogue e{};
  e.what = what;
  e.y = y;
  e.stride = stride;
  e.bias = bias && !bias->empty() ? bias->data() : nullptr;
  e.rows = rows;
  return e;
}

void prepare(const Ops& ops, bool exact, const ModelShape& shape, const Input& in, int64_t tokens,
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

void multiply(const Ops& ops, bool exact, const std::vector<Product>& products, const Acts* acts, Rank& rank,
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

}  // namespace gossamer
