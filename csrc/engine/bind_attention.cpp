// Attention of one sequence and one key-value head, by itself: what tests compare with formulas, and benchmarks time.
#include "bind.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/string.h>

#include <algorithm>
#include <cmath>
#include <string>
#include <vector>

#include "../isa.hpp"
#include "ops.hpp"

namespace nb = nanobind;

namespace gossamer {

KvKind kv_kind(const std::string& name) {
  if (name == "f32") return KvKind::f32;
  if (name == "bf16") return KvKind::bf16;
  if (name == "int8") return KvKind::i8;
  if (name != "int4") throw nb::value_error("the KV cache can be f32, bf16, int8 or int4");
  return KvKind::i4;
}

namespace {

using Floats2 = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Floats3 = nb::ndarray<const float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;
using Out3 = nb::ndarray<float, nb::ndim<3>, nb::c_contig, nb::device::cpu>;

void require(bool holds, const char* what) {
  if (!holds) throw nb::value_error(what);
}

// Keys and values [context, head_dim] in pages.
std::vector<uint8_t> cached(const Ops& ops, KvKind kind, const Floats2& keys, const Floats2& values) {
  const int64_t context = keys.shape(0), dim = keys.shape(1), page = page_bytes(kind, dim);
  std::vector<uint8_t> pages((context + PageTokens - 1) / PageTokens * page);
  for (int64_t t = 0; t < context; ++t)
    ops.cache(pages.data() + t / PageTokens * page, kind, dim, int(t % PageTokens), keys.data() + t * dim,
              values.data() + t * dim);
  return pages;
}

// out [tokens, group, head_dim]: q, the last tokens of the context, over what a cache of this kind holds of keys and
// values [context, head_dim].
void attention(const std::string& name, Floats3 q, Floats2 keys, Floats2 values, Out3 out) {
  const KvKind kind = kv_kind(name);
  const int64_t tokens = q.shape(0), group = q.shape(1), dim = q.shape(2), context = keys.shape(0);
  require(dim > 0 && dim % 2 == 0 && dim <= MaxHeadDim, "head_dim must be even, up to 1024");
  require(tokens > 0 && tokens <= context && group > 0 && group <= MaxQueryRows, "q does not fit the context");
  require(int64_t(keys.shape(1)) == dim && values.shape(0) == keys.shape(0) && values.shape(1) == keys.shape(1),
          "keys and values do not fit q");
  require(out.shape(0) == q.shape(0) && out.shape(1) == q.shape(1) && out.shape(2) == q.shape(2), "out does not fit q");
  nb::gil_scoped_release release;
  const Ops& ops = engine_ops();
  const std::vector<uint8_t> pages = cached(ops, kind, keys, values);
  std::vector<int32_t> table((context + PageTokens - 1) / PageTokens);
  for (size_t i = 0; i < table.size(); ++i) table[i] = int32_t(i);
  std::vector<float> scaled(q.data(), q.data() + q.size()), scratch(scratch_floats(dim));
  std::vector<float> partial(MaxQueryRows * (dim + 2));
  for (float& x : scaled) x *= 1.4426950408889634f / std::sqrt(float(dim));
  const int64_t most = MaxQueryRows / group;
  for (int64_t first = 0; first < tokens; first += most) {
    Attend a{};
    a.q = scaled.data() + first * group * dim;
    a.q_stride = group * dim;
    a.tokens = int(std::min(most, tokens - first));
    a.group = int(group);
    a.head_dim = dim;
    a.kind = kind;
    a.pages = pages.data();
    a.block_stride = page_bytes(kind, dim);
    a.table = table.data();
    a.position = context - tokens + first;
    a.end = a.position + a.tokens;
    a.partial = partial.data();
    a.scratch = scratch.data();
    ops.attend(a);
    const float* row = partial.data();
    float* y = out.data() + first * group * dim;
    for (int64_t r = 0; r < a.tokens * group; ++r, row += dim + 2)
      for (int64_t d = 0; d < dim; ++d) *y++ = row[d] / row[dim + 1];
  }
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def("attention", attention, nb::arg("kind"), nb::arg("q").noconvert(), nb::arg("keys").noconvert(),
        nb::arg("values").noconvert(), nb::arg("out").noconvert());
}

}  // namespace gossamer
