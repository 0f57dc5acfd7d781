// The Python face of the engine. As in module.cpp, checks here only make sure that no call, however wrong, reads or
// writes outside its arrays; src/gossamer/engine/cpu.py words errors for users.
#include "bind.hpp"

#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <stdexcept>
#include <string>

#include "../codes.hpp"
#include "../isa.hpp"
#include "../threads.hpp"
#include "model.hpp"
#include "sample.hpp"
#include "shared_sum.hpp"
#include "squeeze.hpp"
#include "team.hpp"

namespace nb = nanobind;

namespace gossamer {
namespace {

template <class T, int N>
using Array = nb::ndarray<T, nb::ndim<N>, nb::c_contig, nb::device::cpu>;
using Ints = Array<const int32_t, 1>;
using OptionalFloats = std::optional<Array<const float, 1>>;

void require(bool holds, const char* what) {
  if (!holds) throw nb::value_error(what);
}

int checked(int threads) {
  require(1 <= threads && threads <= 1024, "threads must be from 1 to 1024");
  return threads;
}

Floats floats(const OptionalFloats& array) {
  return array ? Floats(array->data(), array->data() + array->shape(0)) : Floats();
}

// What Python calls a Packed part: codes, scales and zero points of rows [rows, columns].
struct IntegerPart {
  Array<const int32_t, 2> packed;
  Array<const float, 2> scale;
  std::optional<Array<const int8_t, 2>> zero;
  int bits;
};

Part part_of(const IntegerPart& p, int64_t columns) {
  const int64_t rows = p.packed.shape(0), groups = p.scale.shape(1);
  require(2 <= p.bits && p.bits <= 8, "bits must be from 2 to 8");
  require(rows > 0 && groups > 0, "the weight is empty");
  require(int64_t(p.packed.shape(1)) == words_for(columns, p.bits), "packed does not hold so many columns");
  require(int64_t(p.scale.shape(0)) == rows && columns % groups == 0, "scale does not fit the weight");
  require(!p.zero || (int64_t(p.zero->shape(0)) == rows && int64_t(p.zero->shape(1)) == groups),
          "zero does not fit scale");
  Part part{};
  part.rows = rows;
  part.words = reinterpret_cast<const uint32_t*>(p.packed.data());
  part.scale = p.scale.data();
  part.zero = p.zero ? p.zero->data() : nullptr;
  part.groups = groups;
  part.bits = p.bits;
  return part;
}

void require_parts(const std::vector<Part>& parts, int64_t columns, bool interleave) {
  require(!parts.empty() && columns > 0 && columns <= (int64_t(1) << 24), "a weight needs rows and columns");
  require(!interleave || (parts.size() == 2 && parts[0].rows == parts[1].rows), "two equal parts can take turns");
}

Weight packed_integer(std::shared_ptr<Arena> arena, const std::vector<IntegerPart>& given, int64_t columns,
                      bool interleave, int threads) {
  std::vector<Part> parts;
  require(columns > 0, "a weight needs columns");
  for (const IntegerPart& p : given) parts.push_back(part_of(p, columns));
  require_parts(parts, columns, interleave);
  checked(threads);
  auto weight = std::make_shared<PackedMatrix>();
  weight->arena = std::move(arena);
  bool fits;
  {
    nb::gil_scoped_release release;
    fits = pack_integer(parts, columns, interleave, threads, *weight);
  }
  require(fits, "groups must be whole rows or multiples of 32 columns");
  return weight;
}

// What a codebook's or an 8-bit float weight's rows are multiplied by: a vector for each part, or none.
using Factors = std::vector<OptionalFloats>;

void set_factors(std::vector<Part>& parts, const Factors& factors) {
  require(factors.size() == parts.size(), "one factor, or None, for each part");
  for (size_t i = 0; i < parts.size(); ++i) {
    require(!factors[i] || int64_t(factors[i]->shape(0)) == parts[i].rows, "a factor does not fit its part's rows");
    parts[i].factor = factors[i] ? factors[i]->data() : nullptr;
  }
}

Weight packed_codebook(std::shared_ptr<Arena> arena, const std::vector<IntegerPart>& given, const Factors& factors,
                       Array<const float, 1> levels, int64_t columns, bool interleave, int threads) {
  std::vector<Part> parts;
  require(columns > 0, "a weight needs columns");
  for (const IntegerPart& p : given) {
    parts.push_back(part_of(p, columns));
    require(p.bits == 4 && !p.zero, "codes of levels have 4 bits, and no zero points");
  }
  require_parts(parts, columns, interleave);
  set_factors(parts, factors);
  require(levels.shape(0) == 16, "levels must be 16");
  for (int i = 0; i < 16; ++i)
    require(levels.data()[i] - levels.data()[i] == 0.0f, "levels must be finite");
  checked(threads);
  auto weight = std::make_shared<PackedMatrix>();
  weight->arena = std::move(arena);
  bool fits;
  {
    nb::gil_scoped_release release;
    fits = pack_codebook(parts, levels.data(), columns, interleave, threads, *weight);
  }
  require(fits, "groups must be whole rows, 16 columns or multiples of 32");
  return weight;
}

Weight packed_e4m3(std::shared_ptr<Arena> arena, const std::vector<Array<const uint8_t, 2>>& given,
                   const Factors& factors, bool interleave, int threads) {
  require(!given.empty(), "a weight needs rows");
  const int64_t columns = given[0].shape(1);
  std::vector<Part> parts;
  for (const auto& array : given) {
    require(int64_t(array.shape(1)) == columns && array.shape(0) > 0, "parts must have rows, and equal columns");
    for (int64_t i = 0; i < int64_t(array.size()); ++i)
      require((array.data()[i] & 127) != 127, "a weight is not a number");
    Part part{};
    part.rows = array.shape(0);
    part.e4m3 = array.data();
    parts.push_back(part);
  }
  require_parts(parts, columns, interleave);
  set_factors(parts, factors);
  checked(threads);
  auto weight = std::make_shared<PackedMatrix>();
  weight->arena = std::move(arena);
  nb::gil_scoped_release release;
  pack_e4m3(parts, columns, interleave, threads, *weight);
  return weight;
}

// Weights kept beside a packed one; rows count over its parts, one part after another.
void keep(PackedMatrix& weight, Ints rows, Ints columns, Array<const float, 1> values) {
  const Matrix& m = weight.matrix;
  const size_t count = rows.shape(0);
  require(columns.shape(0) == count && values.shape(0) == count, "rows, columns and values must be equally many");
  require(weight.tile_start.empty(), "nothing can be kept beside a squeezed weight");
  require(!m.sparse_start, "weights are kept beside this one already");
  require(m.columns <= 65536, "weights can be kept beside those of up to 65536 columns");
  for (size_t i = 0; i < count; ++i)
    require(0 <= rows.data()[i] && rows.data()[i] < m.rows && 0 <= columns.data()[i] && columns.data()[i] < m.columns,
            "no such weight");
  keep_beside(weight, int64_t(count), rows.data(), columns.data(), values.data());
}

// Makes a weight the second of two factors.
void after(PackedMatrix& weight, Weight first) {
  require(first && first->matrix.rows == weight.matrix.columns, "the first factor has no row for each column");
  require(!weight.first && !first->first && first.get() != &weight, "a weight has two factors at most");
  require(!weight.turns && !first->turns, "the rows of factors are in order");
  weight.first = std::move(first);
}

Weight squeezed(std::shared_ptr<Arena> arena, const PackedMatrix& whole, int threads) {
  require(can_squeeze(whole), "only whole integers of 8 bits without zero points, and bfloat16, can be squeezed");
  checked(threads);
  auto weight = std::make_shared<PackedMatrix>();
  weight->arena = std::move(arena);
  nb::gil_scoped_release release;
  squeeze(whole, threads, *weight);
  return weight;
}

template <class T>
Weight packed_dense(std::shared_ptr<Arena> arena, const std::vector<Array<const T, 2>>& given, bool interleave,
                    int threads) {
  require(!given.empty(), "a weight needs rows");
  const int64_t columns = given[0].shape(1);
  std::vector<Part> parts;
  for (const auto& array : given) {
    require(int64_t(array.shape(1)) == columns && array.shape(0) > 0, "parts must have rows, and equal columns");
    Part part{};
    part.rows = array.shape(0);
    if constexpr (sizeof(T) == 2)
      part.bf16 = array.data();
    else
      part.f32 = array.data();
    parts.push_back(part);
  }
  require_parts(parts, columns, interleave);
  checked(threads);
  auto weight = std::make_shared<PackedMatrix>();
  weight->arena = std::move(arena);
  nb::gil_scoped_release release;
  pack_dense(parts, columns, interleave, threads, *weight);
  return weight;
}

// y [tokens, rows] = x [tokens, columns] times a packed weight, as the engine multiplies.
void linear(const PackedMatrix& weight, Array<const float, 2> x, bool exact, int threads, Array<float, 2> y) {
  const Matrix& m = weight.matrix;
  const int64_t tokens = x.shape(0), width = m.blocks * BlockColumns;
  require(!weight.first, "two factors are multiplied by a model alone");
  require(int64_t(x.shape(1)) == m.columns, "x does not fit the weight");
  require(int64_t(y.shape(0)) == tokens && int64_t(y.shape(1)) == m.rows, "y does not fit x and the weight");
  require(m.tiles * TileRows < m.rows + TileRows, "a weight in turns of tiles has no rows of its own");
  checked(threads);
  if (tokens == 0) return;
  nb::gil_scoped_release release;
  const Ops& ops = engine_ops();
  std::vector<float> padded(tokens * width), scale(tokens * m.blocks);
  std::vector<int8_t> q(tokens * width);
  std::vector<int32_t> sums(2 * tokens * m.blocks);
  for (int64_t t = 0; t < tokens; ++t) {
    std::copy_n(x.data() + t * m.columns, m.columns, padded.data() + t * width);
    int32_t* row_sums = sums.data() + 2 * t * m.blocks;
    ops.quantize(padded.data() + t * width, m.blocks, span_of(m), sum_factor(m), q.data() + t * width,
                 scale.data() + t * m.blocks, row_sums);
    if (m.halves) half_sums(q.data() + t * width, m.blocks, sum_factor(m), row_sums);
  }
  const Acts acts{padded.data(), width, q.data(), scale.data(), sums.data(), m.blocks, tokens, span_of(m)};
  Epilogue e{};
  e.what = Epilogue::store;
  e.y = y.data();
  e.stride = e.rows = m.rows;
  parallel_for((m.tiles + 1) / 2, threads, [&](int64_t begin, int64_t end, int) {
    multiply(ops, weight, acts, exact, 2 * begin, std::min(2 * end, m.tiles), e);
  });
}

void rows_of(const PackedMatrix& weight, Ints rows, Array<float, 2> out) {
  const Matrix& m = weight.matrix;
  require(!weight.first, "two factors have no rows");
  require(out.shape(0) == rows.shape(0) && int64_t(out.shape(1)) == m.columns, "out does not fit the rows");
  require(m.tiles * TileRows < m.rows + TileRows, "a weight in turns of tiles has no rows of its own");
  require(weight.tile_start.empty(), "a squeezed weight has no rows of its own");
  std::vector<float> row(m.blocks * BlockColumns);
  for (size_t i = 0; i < rows.shape(0); ++i) {
    require(0 <= rows.data()[i] && rows.data()[i] < m.rows, "no such row");
    row_floats(m, rows.data()[i], row.data());
    std::copy_n(row.data(), m.columns, out.data() + i * m.columns);
  }
}

// y = norm(x) * weight + bias for each token.
void norm_rows(const std::string& kind, Array<const float, 2> x, Array<const float, 1> weight, OptionalFloats bias,
               float eps, Array<float, 2> y) {
  const int64_t columns = x.shape(1), width = (columns + BlockColumns - 1) / BlockColumns * BlockColumns;
  require(kind == "rms" || kind == "layer", "norm must be rms or layer");
  require(int64_t(weight.shape(0)) == columns && (!bias || int64_t(bias->shape(0)) == columns), "sizes differ");
  require(y.shape(0) == x.shape(0) && int64_t(y.shape(1)) == columns, "y does not fit x");
  Floats w(width), b(width), in(width), out(width);
  std::copy_n(weight.data(), columns, w.data());
  if (bias) std::copy_n(bias->data(), columns, b.data());
  for (size_t t = 0; t < x.shape(0); ++t) {
    std::copy_n(x.data() + t * columns, columns, in.data());
    engine_ops().norm(kind == "rms" ? NormKind::rms : NormKind::layer, in.data(), w.data(), bias ? b.data() : nullptr,
                      columns, eps, out.data());
    std::copy_n(out.data(), columns, y.data() + t * columns);
  }
}

// Products done on one core; the caller takes the time.
int64_t peak_products(bool integer, int64_t rounds) {
  require(0 <= rounds && rounds <= (int64_t(1) << 32), "rounds must be from 0 to 2^32");
  nb::gil_scoped_release release;
  volatile float kept = 1e-3f;
  float keep = kept;
  const int64_t count = engine_ops().peak(integer, rounds, &keep);
  kept = keep;
  return count;
}

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  if (name == "relu") return Activation::relu;
  require(name == "gelu_pytorch_tanh", "activation must be silu, gelu, gelu_pytorch_tanh or relu");
  return Activation::gelu_tanh;
}

void gate_rows(const std::string& activation, Array<const float, 1> g, Array<const float, 1> u, Array<float, 1> y) {
  require(g.shape(0) == u.shape(0) && g.shape(0) == y.shape(0), "sizes differ");
  require(g.shape(0) % BlockColumns == 0, "sizes must be multiples of 32");
  engine_ops().gate(activation_of(activation), g.data(), u.data(), g.shape(0), y.data());
}

NormWeights norm_weights(const Array<const float, 1>& weight, const OptionalFloats& bias) {
  return {Floats(weight.data(), weight.data() + weight.shape(0)), floats(bias)};
}

NormWeights norm_weights(const OptionalFloats& weight, const OptionalFloats& bias) {
  require(weight || !bias, "a norm has a bias and no weight");
  return {floats(weight), floats(bias)};
}

std::shared_ptr<Model> make_model(int64_t hidden_size, int64_t vocab_size, int64_t head_dim, int64_t max_positions,
                                  float norm_eps, const std::string& norm, const std::string& activation,
                                  const std::vector<Array<const float, 1>>& inverse_frequencies, Weight embedding,
                                  Weight head, Array<const float, 1> final_norm, OptionalFloats final_norm_bias,
                                  std::optional<float> query_scale, float embed_scale, bool parallel,
                                  float attention_softcap, float final_softcap,
                                  std::optional<Array<const float, 2>> positions, OptionalFloats embed_norm,
                                  OptionalFloats embed_norm_bias) {
  require(norm == "rms" || norm == "layer", "norm must be rms or layer");
  ModelShape shape{hidden_size,
                   vocab_size,
                   head_dim,
                   max_positions,
                   norm_eps,
                   norm == "rms" ? NormKind::rms : NormKind::layer,
                   activation_of(activation),
                   {},
                   query_scale ? log2e * *query_scale : log2e / std::sqrt(float(head_dim)),
                   embed_scale,
                   parallel,
                   attention_softcap,
                   final_softcap,
                   {},
                   norm_weights(embed_norm, embed_norm_bias)};
  for (const auto& each : inverse_frequencies)
    shape.inverse_frequencies.emplace_back(each.data(), each.data() + each.shape(0));
  if (positions) {
    require(int64_t(positions->shape(1)) == hidden_size, "positions must be [max_positions, hidden_size]");
    shape.positions.assign(positions->data(), positions->data() + positions->size());
  }
  return std::make_shared<Model>(std::move(shape), std::move(embedding), std::move(head),
                                 norm_weights(final_norm, final_norm_bias));
}

void add_layer(Model& model, int64_t heads, int64_t kv_heads, int64_t ffn_width, Array<const float, 1> attention_norm,
               OptionalFloats attention_norm_bias, Array<const float, 1> ffn_norm, OptionalFloats ffn_norm_bias,
               std::vector<Weight> qkv, std::vector<OptionalFloats> qkv_bias, Weight output, OptionalFloats output_bias,
               std::vector<Weight> gate_up, std::vector<OptionalFloats> gate_up_bias, Weight down,
               OptionalFloats down_bias, bool gated, int64_t window, int64_t rope, OptionalFloats slopes,
               OptionalFloats q_norm, OptionalFloats k_norm, OptionalFloats attention_post_norm,
               OptionalFloats ffn_post_norm) {
  LayerWeights w{};
  w.heads = heads;
  w.kv_heads = kv_heads;
  w.ffn_width = ffn_width;
  w.gated = gated;
  w.window = window;
  w.rope = rope;
  w.slopes = floats(slopes);
  w.q_norm = floats(q_norm);
  w.k_norm = floats(k_norm);
  w.attention_post_norm = norm_weights(attention_post_norm, std::nullopt);
  w.ffn_post_norm = norm_weights(ffn_post_norm, std::nullopt);
  w.attention_norm = norm_weights(attention_norm, attention_norm_bias);
  w.ffn_norm = norm_weights(ffn_norm, ffn_norm_bias);
  w.qkv = std::move(qkv);
  w.gate_up = std::move(gate_up);
  for (const auto& bias : qkv_bias) w.qkv_bias.push_back(floats(bias));
  for (const auto& bias : gate_up_bias) w.gate_up_bias.push_back(floats(bias));
  w.output = std::move(output);
  w.output_bias = floats(output_bias);
  w.down = std::move(down);
  w.down_bias = floats(down_bias);
  model.add_layer(std::move(w));
}

// A sum over the ranks in C++, or any callable that takes a float32 array and changes it in its place.
void share_with(Model& model, nb::object sum, bool leads) {
  if (nb::isinstance<SharedSum>(sum)) {
    auto shared = nb::cast<std::shared_ptr<SharedSum>>(sum);
    return model.share_with([shared](float* data, int64_t count) { (*shared)(data, count); }, leads);
  }
  require(PyCallable_Check(sum.ptr()), "sum must be a SharedSum or a callable");
  model.share_with(
      [sum](float* data, int64_t count) {
        nb::gil_scoped_acquire acquire;
        try {
          const nb::ndarray<nb::numpy, float, nb::ndim<1>> array(data, {size_t(count)}, nb::handle());
          sum(nb::cast(array, nb::rv_policy::reference));  // else it would get a copy
        } catch (nb::python_error& error) {  // which must not outlive the GIL
          throw std::runtime_error(error.what());
        }
      },
      leads);
}

Step step_of(const Ints& tokens, const Ints& query_start, const Ints& context_lens,
             const Array<const int32_t, 2>& block_tables, const Ints& logit_rows) {
  const int64_t sequences = context_lens.shape(0);
  require(int64_t(query_start.shape(0)) == sequences + 1, "query_start must have one number more than context_lens");
  require(int64_t(block_tables.shape(0)) == sequences, "block_tables must have a row for each sequence");
  return {tokens.data(),       int64_t(tokens.shape(0)), query_start.data(),
          context_lens.data(), block_tables.data(),      sequences,
          int64_t(block_tables.shape(1)), logit_rows.data(), int64_t(logit_rows.shape(0)), nullptr};
}

void step_logits(Model& model, Ints tokens, Ints query_start, Ints context_lens, Array<const int32_t, 2> block_tables,
                 Ints logit_rows, bool exact, int threads, Array<float, 2> out) {
  const Step step = step_of(tokens, query_start, context_lens, block_tables, logit_rows);
  require(int64_t(out.shape(0)) == step.row_count && int64_t(out.shape(1)) == model.shape.vocab_size,
          "out does not fit the rows");
  checked(threads);
  nb::gil_scoped_release release;
  model.logits(step, {exact, threads}, out.data());
}

// States of an earlier stage, where there are any.
void continue_from(Step& step, const Model& model, const std::optional<Array<const float, 2>>& states) {
  if (!states) return;
  require(int64_t(states->shape(0)) == step.token_count && int64_t(states->shape(1)) == model.shape.hidden_size,
          "states do not fit the tokens");
  step.states = states->data();
}

void step_hidden(Model& model, Ints tokens, Ints query_start, Ints context_lens, Array<const int32_t, 2> block_tables,
                 Ints logit_rows, bool exact, int threads, Array<float, 2> out,
                 std::optional<Array<const float, 2>> states) {
  Step step = step_of(tokens, query_start, context_lens, block_tables, logit_rows);
  require(int64_t(out.shape(0)) == step.row_count && int64_t(out.shape(1)) == model.shape.hidden_size,
          "out does not fit the rows");
  continue_from(step, model, states);
  checked(threads);
  nb::gil_scoped_release release;
  model.hidden(step, {exact, threads}, out.data());
}

void step_best(Model& model, Ints tokens, Ints query_start, Ints context_lens, Array<const int32_t, 2> block_tables,
               Ints logit_rows, bool exact, int threads, Array<int32_t, 1> out, Array<float, 1> values,
               std::optional<Array<const float, 2>> states) {
  Step step = step_of(tokens, query_start, context_lens, block_tables, logit_rows);
  require(int64_t(out.shape(0)) == step.row_count && int64_t(values.shape(0)) == step.row_count,
          "out does not fit the rows");
  continue_from(step, model, states);
  checked(threads);
  nb::gil_scoped_release release;
  model.best(step, {exact, threads}, out.data(), values.data());
}

void head_logits(Model& model, Array<const float, 2> states, bool exact, int threads, Array<float, 2> out) {
  require(int64_t(states.shape(1)) == model.shape.hidden_size, "states do not fit the model");
  require(out.shape(0) == states.shape(0) && int64_t(out.shape(1)) == model.shape.vocab_size,
          "out does not fit the rows");
  checked(threads);
  nb::gil_scoped_release release;
  model.head(states.data(), states.shape(0), {exact, threads}, out.data());
}

// A token for each row of logits; -1 where they are not finite.
void sample_rows(Array<const float, 2> logits, Array<const double, 1> temperatures, Array<const int64_t, 1> top_ks,
                 Array<const double, 1> top_ps, Array<const double, 1> min_ps, Array<const uint64_t, 1> seeds,
                 Array<const int64_t, 1> positions, int threads, Array<int64_t, 1> out) {
  const size_t rows = logits.shape(0);
  const int64_t vocab_size = logits.shape(1);
  require(vocab_size > 0, "there are no tokens to draw");
  for (const size_t length : {temperatures.shape(0), top_ks.shape(0), top_ps.shape(0), min_ps.shape(0), seeds.shape(0),
                              positions.shape(0), out.shape(0)}) {
    require(length == rows, "every row needs its params and its place in out");
  }
  for (size_t row = 0; row < rows; ++row) {
    require(temperatures.data()[row] >= 0 && top_ks.data()[row] >= 0, "temperature and top_k must not be negative");
    require(top_ps.data()[row] > 0 && min_ps.data()[row] >= 0, "top_p must be above 0, and min_p not negative");
  }
  checked(threads);
  nb::gil_scoped_release release;
  Team::instance().run(std::min(threads, int(std::min<size_t>(rows, 1024))), Work::few_tokens, [&](Rank& rank) {
    static thread_local Drawer drawer;
    rank.share(rows, 1, false, [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) {
        out.data()[row] = drawer.draw(logits.data() + row * vocab_size, vocab_size,
                                      {temperatures.data()[row], top_ks.data()[row], top_ps.data()[row],
                                       min_ps.data()[row], seeds.data()[row], positions.data()[row]});
      }
    });
  });
}

}  // namespace

void bind_engine(nb::module_& m) {
  bind_attention(m);
  nb::class_<Arena>(m, "Arena").def(nb::init<>()).def_prop_ro("bytes", &Arena::bytes);
  nb::class_<IntegerPart>(m, "IntegerPart")
      .def(
          "__init__",
          [](IntegerPart* self, Array<const int32_t, 2> packed, Array<const float, 2> scale,
             std::optional<Array<const int8_t, 2>> zero, int bits) {
            new (self) IntegerPart{std::move(packed), std::move(scale), std::move(zero), bits};
          },
          nb::arg("packed").noconvert(), nb::arg("scale").noconvert(), nb::arg("zero").noconvert().none(),
          nb::arg("bits"));
  nb::class_<SharedSum>(m, "SharedSum")
      .def(nb::new_([](int file, int rank, int ranks, double timeout) {
             return std::make_shared<SharedSum>(file, rank, ranks, timeout);
           }),
           nb::arg("file"), nb::arg("rank"), nb::arg("ranks"), nb::arg("timeout"))
      .def_static("bytes", &SharedSum::bytes, nb::arg("ranks"))
      .def("__call__",
           [](SharedSum& sum, Array<float, 1> data) {
             nb::gil_scoped_release release;
             sum(data.data(), int64_t(data.shape(0)));
           },
           nb::arg("data").noconvert());
  nb::class_<PackedMatrix>(m, "Matrix")
      .def_prop_ro("rows", [](const PackedMatrix& w) { return w.matrix.rows; })
      .def_prop_ro("columns", [](const PackedMatrix& w) { return w.matrix.columns; })
      .def_prop_ro("bits", [](const PackedMatrix& w) { return bits_of(w.matrix.kind); })
      .def_prop_ro("nbytes",
                   [](const PackedMatrix& w) {
                     const Matrix& m = w.matrix;
                     const int64_t factors = m.row_factor ? m.tiles * TileRows * int64_t(sizeof(float)) : 0;
                     const int64_t tiles = w.tile_start.empty() ? m.tiles * m.tile_bytes : w.tile_start.back();
                     return tiles + factors + int64_t(w.sparse_bytes);
                   })
      .def("keep", keep, nb::arg("rows").noconvert(), nb::arg("columns").noconvert(), nb::arg("values").noconvert())
      .def("after", after, nb::arg("first"))
      .def("linear", linear, nb::arg("x").noconvert(), nb::arg("exact"), nb::arg("threads"),
           nb::arg("y").noconvert())
      .def("take", rows_of, nb::arg("rows").noconvert(), nb::arg("out").noconvert());
  const auto arena = nb::arg("arena");
  m.def("pack_integer", packed_integer, arena, nb::arg("parts"), nb::arg("columns"), nb::arg("interleave"),
        nb::arg("threads"));
  m.def("pack_codebook", packed_codebook, arena, nb::arg("parts"), nb::arg("factors"), nb::arg("levels").noconvert(),
        nb::arg("columns"), nb::arg("interleave"), nb::arg("threads"));
  m.def("pack_e4m3", packed_e4m3, arena, nb::arg("parts").noconvert(), nb::arg("factors"), nb::arg("interleave"),
        nb::arg("threads"));
  m.def("pack_bf16", packed_dense<uint16_t>, arena, nb::arg("parts").noconvert(), nb::arg("interleave"),
        nb::arg("threads"));
  m.def("pack_f32", packed_dense<float>, arena, nb::arg("parts").noconvert(), nb::arg("interleave"),
        nb::arg("threads"));
  m.def("squeeze", squeezed, arena, nb::arg("whole"), nb::arg("threads"));
  m.def("squeezing_pays", squeezing_pays);
  m.def("norm", norm_rows, nb::arg("kind"), nb::arg("x").noconvert(), nb::arg("weight").noconvert(),
        nb::arg("bias").noconvert().none(), nb::arg("eps"), nb::arg("y").noconvert());
  m.def("gate", gate_rows, nb::arg("activation"), nb::arg("g").noconvert(), nb::arg("u").noconvert(),
        nb::arg("y").noconvert());
  m.def("peak_products", peak_products, nb::arg("integer"), nb::arg("rounds"));
  m.def("team_threads", [] { return Team::instance().last_threads(); });

  const auto exact = nb::arg("exact"), threads = nb::arg("threads");
  const auto tokens = nb::arg("tokens").noconvert(), query_start = nb::arg("query_start").noconvert();
  const auto context_lens = nb::arg("context_lens").noconvert();
  const auto tables = nb::arg("block_tables").noconvert();
  const auto rows = nb::arg("logit_rows").noconvert(), out = nb::arg("out").noconvert();
  nb::class_<Model>(m, "Model")
      .def(nb::new_(&make_model), nb::arg("hidden_size"), nb::arg("vocab_size"), nb::arg("head_dim"),
           nb::arg("max_positions"), nb::arg("norm_eps"), nb::arg("norm"), nb::arg("activation"),
           nb::arg("inverse_frequencies"), nb::arg("embedding").none(), nb::arg("head").none(),
           nb::arg("final_norm").noconvert(), nb::arg("final_norm_bias").noconvert().none(), nb::arg("query_scale").none() = nb::none(),
           nb::arg("embed_scale") = 1.0f, nb::arg("parallel") = false, nb::arg("attention_softcap") = 0.0f,
           nb::arg("final_softcap") = 0.0f, nb::arg("positions").noconvert().none() = nb::none(),
           nb::arg("embed_norm").noconvert().none() = nb::none(),
           nb::arg("embed_norm_bias").noconvert().none() = nb::none())
      .def("add_layer", add_layer, nb::arg("heads"), nb::arg("kv_heads"), nb::arg("ffn_width"),
           nb::arg("attention_norm"), nb::arg("attention_norm_bias").none(), nb::arg("ffn_norm"),
           nb::arg("ffn_norm_bias").none(), nb::arg("qkv"), nb::arg("qkv_bias"), nb::arg("output"),
           nb::arg("output_bias").none(), nb::arg("gate_up"), nb::arg("gate_up_bias"), nb::arg("down"),
           nb::arg("down_bias").none(), nb::arg("gated") = true, nb::arg("window") = 0, nb::arg("rope") = 0,
           nb::arg("slopes").none() = nb::none(), nb::arg("q_norm").none() = nb::none(),
           nb::arg("k_norm").none() = nb::none(), nb::arg("attention_post_norm").none() = nb::none(),
           nb::arg("ffn_post_norm").none() = nb::none())
      .def("allocate",
           [](Model& model, int64_t blocks, const std::string& kind) { model.allocate(blocks, kv_kind(kind)); },
           nb::arg("blocks"), nb::arg("kind"))
      .def("touch", &Model::touch, nb::arg("threads"), nb::call_guard<nb::gil_scoped_release>())
      .def("phase_seconds",
           [](Model& model) {
             const std::vector<double> seconds = model.phase_seconds();
             nb::dict found;
             for (int i = 0; i < Model::Phase::count; ++i) found[Model::phase_names[i]] = seconds[i];
             return found;
           })
      .def_prop_ro("blocks", &Model::blocks)
      .def_prop_ro("block_bytes", &Model::block_bytes)
      .def("logits", step_logits, tokens, query_start, context_lens, tables, rows, exact, threads, out)
      .def("hidden", step_hidden, tokens, query_start, context_lens, tables, rows, exact, threads, out,
           nb::arg("states").noconvert().none() = nb::none())
      .def("share_with", share_with, nb::arg("sum"), nb::arg("leads"))
      .def("best", step_best, tokens, query_start, context_lens, tables, rows, exact, threads, out,
           nb::arg("values").noconvert(), nb::arg("states").noconvert().none() = nb::none())
      .def("head", head_logits, nb::arg("states").noconvert(), exact, threads, out);
  m.def("sample_rows", sample_rows, nb::arg("logits").noconvert(), nb::arg("temperatures").noconvert(),
        nb::arg("top_ks").noconvert(), nb::arg("top_ps").noconvert(), nb::arg("min_ps").noconvert(),
        nb::arg("seeds").noconvert(), nb::arg("positions").noconvert(), threads, out);
}

}  // namespace gossamer
