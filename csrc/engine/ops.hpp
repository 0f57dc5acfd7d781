// What one instruction set offers to the engine: a table of operators on packed weights, activations and the paged
// KV cache. ops.inc writes them once; each ops_<isa>.cpp fills one table. No operator allocates, and none checks.
#pragma once

#include <cstdint>

namespace gossamer {

constexpr int TileRows = 16;      // rows of a weight that are stored together
constexpr int BlockColumns = 32;  // columns that share one scale of the activations
constexpr int PageTokens = 16;    // tokens of a page of the KV cache
constexpr int ChunkTokens = 128;  // tokens of context whose scores are held at once
constexpr int MaxHeadDim = 1024;
constexpr float E4M3Factor = 0x1p120f;  // between an 8-bit float and the float32 with its bits at the top
constexpr int KvGroup = 64;       // columns of a head that share a scale in a cache of 4-bit codes
constexpr int ValueRun = 32;      // columns of a value that are packed together there
constexpr int MaxQueryRows = 48;  // rows (query tokens times heads of a group) of one attention call

// What a product of several tokens keeps in registers: sums of so many tokens by vectors of rows.
struct RegisterTile {
  int tokens, vectors;
};

enum class Kind : uint8_t { f32, bf16, e4m3, i8, i6, i5, i4, i3, i2, c4, c4s };
enum class ScaleKind : uint8_t { bf16, f16, f32, e4m3, e8m0 };
enum class KvKind : uint8_t { f32, bf16, i8, i4 };
enum class Activation : uint8_t { silu, gelu, gelu_tanh, relu };
enum class NormKind : uint8_t { rms, layer };

// A weight [rows, columns] in tiles of 16 rows, the last one filled up with zeros. A tile of a coded kind is a run
// of groups of columns: a line of 64 bytes (or 128) with the scales of the next group, or of as many as fit, 16 to each
// (and 16 zero points, as stored codes); then their blocks of 32 columns. A block is registers of 64 bytes, 16 rows by
// 4 bytes. With v = 0..7 for columns 4v..4v+3:
//   i8  register v
//   i4  register v % 4, the low nibble for v < 4
//   i2  register v % 2, bits 2 * (v / 2) and the next
//   i3  the two registers of i2, and one whose bit v is the code's third
//   i5  the four registers of i4, and one whose bit v is the code's fifth
//   i6  the four registers of i4, and two like those of i2 with the upper bits
//   c4, c4s  as i4; a code is the number of one of 16 levels (NF4, FP4: arXiv 2305.14314; E2M1: OCP MX 1.0)
// Codes of integers are stored without sign, code + 2^(bits - 1). bf16 stores 16 rows by 2 columns, f32 16 rows by 1,
// e4m3 16 rows by 4 bytes.
//
// A level stands for `steps[code]` times the row's factor. Products with 8-bit activations take the nearest whole
// number of steps: up to 127 of them for c4, and exactly for c4s, whose levels are no more than 15 steps.
struct Matrix {
  Kind kind;
  ScaleKind scale_kind;
  bool asymmetric;
  bool halves;              // c4, c4s: scales of 16 columns, two to a block, one after the other
  int64_t rows, columns;
  int64_t tiles, blocks;    // blocks of 32 columns, the last filled up with zeros
  int64_t group_blocks;     // blocks that share a scale
  int64_t tile_bytes;
  const uint8_t* data;
  const float* row_factor;  // [16 * tiles] what a row's products are multiplied by at the end, or null
  float steps[16];          // c4, c4s
  uint8_t table[16];        // the same as whole numbers, plus middle_of
  // Weights beside the rest, in tiles of 16 rows as long as the longest of them (sliced ELLPACK, arXiv 1307.6209).
  const int32_t* sparse_start;     // [tiles + 1] slots before each tile, or null: there are none
  const uint16_t* sparse_columns;  // [slots, 16]
  const float* sparse_values;      // [slots, 16]
};

inline int bits_of(Kind kind) {
  switch (kind) {
    case Kind::i8: return 8;
    case Kind::e4m3: return 8;
    case Kind::i6: return 6;
    case Kind::i5: return 5;
    case Kind::i4: return 4;
    case Kind::c4: return 4;
    case Kind::c4s: return 4;
    case Kind::i3: return 3;
    case Kind::i2: return 2;
    case Kind::bf16: return 16;
    default: return 32;
  }
}
// Codes with scales by groups of columns, which can meet 8-bit activations.
inline bool is_coded(Kind kind) { return kind >= Kind::i8; }
inline bool is_codebook(Kind kind) { return kind >= Kind::c4; }
// What is added to a code, so that it has no sign.
inline int middle_of(Kind kind) { return kind == Kind::c4 ? 128 : kind == Kind::c4s ? 16 : 1 << (bits_of(kind) - 1); }
inline int64_t block_bytes(Kind kind) { return 64 * bits_of(kind); }
inline int64_t scale_bytes(ScaleKind kind) {
  return TileRows * (kind == ScaleKind::f32 ? 4 : kind == ScaleKind::e4m3 || kind == ScaleKind::e8m0 ? 1 : 2);
}
inline int64_t group_bytes(const Matrix& m) {
  return scale_bytes(m.scale_kind) * (m.halves ? 2 : 1) + (m.asymmetric ? TileRows : 0);
}
inline int64_t line_bytes(const Matrix& m) { return is_coded(m.kind) ? (group_bytes(m) + 63) / 64 * 64 : 0; }
inline int64_t groups_per_line(const Matrix& m) { return group_bytes(m) <= 64 ? 64 / group_bytes(m) : 1; }
inline int64_t groups_of(const Matrix& m) { return m.blocks / m.group_blocks; }
// Where in a tile the scales of a group are, and a block.
inline int64_t scale_offset(const Matrix& m, int64_t group) {
  const int64_t per_line = groups_per_line(m), line = group / per_line;
  return line * (line_bytes(m) + per_line * m.group_blocks * block_bytes(m.kind)) + group % per_line * group_bytes(m);
}
inline int64_t block_offset(const Matrix& m, int64_t block) {
  const int64_t lines = is_coded(m.kind) ? block / m.group_blocks / groups_per_line(m) + 1 : 0;
  return lines * line_bytes(m) + block * block_bytes(m.kind);
}

// Activations of some tokens: floats, and for integer weights their 8-bit form by blocks of 32 columns.
struct Acts {
  const float* x;        // [tokens, stride]; columns up to 32 * blocks are there and zero past the last
  int64_t stride;
  const int8_t* q;       // [tokens, 32 * blocks]
  const float* scale;    // [tokens, blocks]; `span` blocks after each other have the same
  const int32_t* sums;   // [tokens, 2 * blocks] sum of a block's codes times sum_factor of the weight, in the first half
                         // of a row; with `halves` of each half of a block, in all of it
  int64_t blocks, tokens;
  int span;  // 1 or 2
};

struct Epilogue {
  enum What : uint8_t { store, accumulate, gate, best, activate } what;
  float* y;             // [tokens, stride] at the matrix' first row; gate: tiles are gate, up, gate, up, ...
  int64_t stride;
  const float* bias;    // [16 * tiles] or null
  Activation activation;
  float* best_value;    // best: [tokens] largest result so far, and where
  int32_t* best_index;
  float* poison;        // best: [tokens, 16] stays 0 while all results are finite
  int64_t rows;         // results past so many rows do not exist (gate: all rows of the tiles do)
};

// Rows of queries that share one key-value head of one sequence.
// Pages of a chunk of context that will be looked at soon, and are asked for until then.
struct Coming {
  const uint8_t* page[ChunkTokens / PageTokens];
  int count;
};

struct Attend {
  const float* q;         // [tokens, q_stride], `group` heads from q on; rotated, times log2(e) and the scale of scores
  int64_t q_stride;
  int tokens, group;
  int64_t head_dim;
  KvKind kind;
  const uint8_t* pages;   // of this layer and head
  int64_t block_stride;   // bytes from a block's page to the next block's
  const int32_t* table;   // block numbers of the sequence
  int64_t position;       // of the first query token
  int64_t begin, end;     // context to look at: from a multiple of 16 on
  float* partial;         // [tokens * group, head_dim + 2] unnormalized sum, maximum, sum of weights
  float* scratch;         // scratch_floats(head_dim)
  int64_t window;         // tokens that a token sees, itself included; 0: all before it
  float softcap;          // bound of scores times log2(e); 0: none
  const float* slopes;    // [group] ALiBi, times log2(e); null: none
  Coming after;           // what the same thread attends to next
};
// The pages of the chunk from `start` on, of a context of `end` tokens. Static: a file that is compiled for one
// instruction set must not have its copy run by another.
static inline Coming chunk_pages(const uint8_t* pages, int64_t block_stride, const int32_t* table, int64_t start,
                                 int64_t end) {
  Coming chunk;
  if (end > start + ChunkTokens) end = start + ChunkTokens;
  chunk.count = int((end - start + PageTokens - 1) / PageTokens);
  for (int n = 0; n < chunk.count; ++n) chunk.page[n] = pages + table[start / PageTokens + n] * block_stride;
  return chunk;
}
inline int64_t scratch_floats(int64_t head_dim) {
  return MaxQueryRows * (ChunkTokens + 2 * head_dim + 4);
}

// A page of one head: keys of its 16 tokens, values, then scales. Keys are [head_dim, 16] and values [16, head_dim], so
// that one register takes the scores of 16 tokens, or the columns of one value.
//   i8  codes from -127 to 127; then float32 [2, 16]: a scale for each key, and for each value
//   i4  codes from 0 to 15. A byte of the keys holds columns d and d + 1 (d even) of one token, low nibble first, so
//       that no two tokens share a byte; a byte of the values, columns 32j + b and 32j + 16 + b. Then for each group of
//       64 columns bfloat16 [4, 16]: scales of the keys, their least values, and the same of the values
inline int64_t kv_groups(int64_t head_dim) { return (head_dim + KvGroup - 1) / KvGroup; }
inline int64_t key_column_bytes(KvKind kind) {  // 16 tokens of one column, in the mean
  return PageTokens * (kind == KvKind::f32 ? 4 : kind == KvKind::bf16 ? 2 : 1) / (kind == KvKind::i4 ? 2 : 1);
}
inline int64_t value_row_bytes(KvKind kind, int64_t head_dim) {  // one token
  if (kind == KvKind::i4) return (head_dim + ValueRun - 1) / ValueRun * (ValueRun / 2);
  return head_dim * (kind == KvKind::f32 ? 4 : kind == KvKind::bf16 ? 2 : 1);
}
inline int64_t values_offset(KvKind kind, int64_t head_dim) { return key_column_bytes(kind) * head_dim; }
inline int64_t scales_offset(KvKind kind, int64_t head_dim) {
  return values_offset(kind, head_dim) + PageTokens * value_row_bytes(kind, head_dim);
}
inline int64_t page_bytes(KvKind kind, int64_t head_dim) {
  const int64_t i8 = kind == KvKind::i8 ? 2 * PageTokens * 4 : 0;
  const int64_t i4 = kind == KvKind::i4 ? kv_groups(head_dim) * 4 * PageTokens * 2 : 0;
  return scales_offset(kind, head_dim) + i8 + i4;
}

struct Ops {
  const char* name;

  // y = x W^T for tiles begin..end (gate: begin and end are even). `exact`: floats times dequantized weights.
  void (*matmul)(const Matrix&, const Acts&, bool exact, int64_t begin, int64_t end, const Epilogue&);
  // q, scale and sums (times `factor`) of one token; x is 32 * blocks floats, and `span` divides blocks.
  void (*quantize)(const float* x, int64_t blocks, int span, int32_t factor, int8_t* q, float* scale, int32_t* sums);
  // y = norm(x) * weight + bias over `columns`; weight, bias (or null) and x are padded to 32 with zeros.
  void (*norm)(NormKind, const float* x, const float* weight, const float* bias, int64_t columns, float eps, float* y);
  // Rotates the halves of the first `width` columns of one head in place: cosine and sine [width / 2].
  void (*rotate)(float* head, const float* cosine, const float* sine, int64_t width, float scale);
  // Stores key and value of one token at `slot` of a page.
  void (*cache)(uint8_t* page, KvKind, int64_t head_dim, int slot, const float* key, const float* value);
  void (*attend)(const Attend&);
  // Partial results of one part of the context onto those of the parts before it.
  void (*merge)(float* into, const float* part, int rows, int64_t head_dim);
  // y = activation(gate) * up.
  void (*gate)(Activation, const float* gate, const float* up, int64_t count, float* y);
  // As many products as the core can do, on registers alone: of bytes (4-bit codes) or of floats. Returns the number.
  int64_t (*peak)(bool integer, int64_t rounds, float* keep);
};

// What the sums of activations are multiplied by for this weight: products of stored codes start from them.
inline int32_t sum_factor(const Matrix& m) { return is_coded(m.kind) ? -middle_of(m.kind) : 0; }

// Sums of 16 codes each: for weights with scales of as many columns.
inline void half_sums(const int8_t* q, int64_t blocks, int32_t factor, int32_t* sums) {
  for (int64_t half = 0; half < 2 * blocks; ++half, q += BlockColumns / 2) {
    int32_t sum = 0;
    for (int i = 0; i < BlockColumns / 2; ++i) sum += q[i];
    sums[half] = factor * sum;
  }
}

// Blocks of activations that share a scale. Two halve what is not a product; codes of up to 4 bits are so coarse that
// the rounding of activations, twice as large in the mean, is still far below their own.
inline int span_of(const Matrix& m) {
  return is_coded(m.kind) && bits_of(m.kind) <= 4 && m.group_blocks % 2 == 0 ? 2 : 1;
}

extern const Ops portable_ops;
#ifdef GOSSAMER_X86
extern const Ops avx2_ops;
extern const Ops avx512_ops;
#endif

}  // namespace gossamer
