// What one instruction set offers to the engine: a table of operators on packed weights, activations and the paged
// KV cache. ops.inc writes them once; each ops_<isa>.cpp fills one table. No operator allocates, and none checks.
#pragma once

#include <cstdint>

namespace gossamer {

constexpr int TileRows = 16;      // rows of a weight that are stored together
constexpr int BlockColumns = 32;  // columns that share one scale of the activations
constexpr int PageTokens = 16;    // tokens of a page of the KV cache
constexpr int ChunkTokens = 128;  // tokens of context whose scores are held at once
constexpr int MaxQueryRows = 48;  // rows (query tokens times heads of a group) of one attention call

enum class Kind : uint8_t { f32, bf16, i8, i4, i3, i2 };
enum class ScaleKind : uint8_t { bf16, f16, f32 };
enum class KvKind : uint8_t { f32, bf16, i8 };
enum class Activation : uint8_t { silu, gelu, gelu_tanh };
enum class NormKind : uint8_t { rms, layer };

// A weight [rows, columns] in tiles of 16 rows, the last one filled up with zeros. A tile of an integer kind is a run
// of groups of columns: a line of 64 bytes (or 128) with the scales of the next group, or of as many as fit, 16 to each
// (and 16 zero points, as stored codes); then their blocks of 32 columns. A block is registers of 64 bytes, 16 rows by
// 4 bytes. With v = 0..7 for columns 4v..4v+3:
//   i8  register v
//   i4  register v % 4, the low nibble for v < 4
//   i2  register v % 2, bits 2 * (v / 2) and the next
//   i3  the two registers of i2, and one whose bit v is the code's third
// Codes are stored without sign, code + 2^(bits - 1). bf16 stores 16 rows by 2 columns, f32 16 rows by 1.
struct Matrix {
  Kind kind;
  ScaleKind scale_kind;
  bool asymmetric;
  int64_t rows, columns;
  int64_t tiles, blocks;    // blocks of 32 columns, the last filled up with zeros
  int64_t group_blocks;     // blocks that share a scale
  int64_t tile_bytes;
  const uint8_t* data;
};

inline int bits_of(Kind kind) {
  switch (kind) {
    case Kind::i8: return 8;
    case Kind::i4: return 4;
    case Kind::i3: return 3;
    case Kind::i2: return 2;
    case Kind::bf16: return 16;
    default: return 32;
  }
}
inline bool is_integer(Kind kind) { return kind >= Kind::i8; }
inline int64_t block_bytes(Kind kind) { return 64 * bits_of(kind); }
inline int64_t scale_bytes(ScaleKind kind) { return TileRows * (kind == ScaleKind::f32 ? 4 : 2); }
inline int64_t group_bytes(const Matrix& m) { return scale_bytes(m.scale_kind) + (m.asymmetric ? TileRows : 0); }
inline int64_t line_bytes(const Matrix& m) { return is_integer(m.kind) ? (group_bytes(m) + 63) / 64 * 64 : 0; }
inline int64_t groups_per_line(const Matrix& m) { return group_bytes(m) <= 32 ? 2 : 1; }
inline int64_t groups_of(const Matrix& m) { return m.blocks / m.group_blocks; }
// Where in a tile the scales of a group are, and a block.
inline int64_t scale_offset(const Matrix& m, int64_t group) {
  const int64_t per_line = groups_per_line(m), line = group / per_line;
  return line * (line_bytes(m) + per_line * m.group_blocks * block_bytes(m.kind)) + group % per_line * group_bytes(m);
}
inline int64_t block_offset(const Matrix& m, int64_t block) {
  const int64_t lines = is_integer(m.kind) ? block / m.group_blocks / groups_per_line(m) + 1 : 0;
  return lines * line_bytes(m) + block * block_bytes(m.kind);
}

// Activations of some tokens: floats, and for integer weights their 8-bit form by blocks of 32 columns.
struct Acts {
  const float* x;        // [tokens, stride]; columns up to 32 * blocks are there and zero past the last
  int64_t stride;
  const int8_t* q;       // [tokens, 32 * blocks]
  const float* scale;    // [tokens, blocks]; `span` blocks after each other have the same
  const int32_t* sums;   // [tokens, blocks] sum of a block's codes times sum_factor of the weight
  int64_t blocks, tokens;
  int span;  // 1 or 2
};

struct Epilogue {
  enum What : uint8_t { store, accumulate, gate, best } what;
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
struct Attend {
  const float* q;         // [tokens, q_stride], `group` heads from q on; rotated, times log2(e) / sqrt(head_dim)
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
};
inline int64_t scratch_floats(int64_t head_dim) {
  return MaxQueryRows * (ChunkTokens + 2 * head_dim + 4);
}

// Bytes of a page of one head: keys [head_dim, 16], values [16, head_dim], and for i8 16 scales of each.
inline int64_t kv_element_bytes(KvKind kind) { return kind == KvKind::f32 ? 4 : kind == KvKind::bf16 ? 2 : 1; }
inline int64_t page_bytes(KvKind kind, int64_t head_dim) {
  const int64_t scales = kind == KvKind::i8 ? 2 * PageTokens * 4 : 0;
  return 2 * PageTokens * head_dim * kv_element_bytes(kind) + scales;
}

struct Ops {
  const char* name;

  // y = x W^T for tiles begin..end (gate: begin and end are even). `exact`: floats times dequantized weights.
  void (*matmul)(const Matrix&, const Acts&, bool exact, int64_t begin, int64_t end, const Epilogue&);
  // q, scale and sums (times `factor`) of one token; x is 32 * blocks floats, and `span` divides blocks.
  void (*quantize)(const float* x, int64_t blocks, int span, int32_t factor, int8_t* q, float* scale, int32_t* sums);
  // y = norm(x) * weight + bias over `columns`; weight, bias (or null) and x are padded to 32 with zeros.
  void (*norm)(NormKind, const float* x, const float* weight, const float* bias, int64_t columns, float eps, float* y);
  // Rotates the halves of one head in place: cosine and sine [head_dim / 2].
  void (*rotate)(float* head, const float* cosine, const float* sine, int64_t head_dim, float scale);
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
inline int32_t sum_factor(const Matrix& m) { return is_integer(m.kind) ? -(1 << (bits_of(m.kind) - 1)) : 0; }

// Blocks of activations that share a scale. Two halve what is not a product; codes of up to 4 bits are so coarse that
// the rounding of activations, twice as large in the mean, is still far below their own.
inline int span_of(const Matrix& m) {
  return is_integer(m.kind) && m.kind != Kind::i8 && m.group_blocks % 2 == 0 ? 2 : 1;
}

extern const Ops portable_ops;
#ifdef GOSSAMER_X86
extern const Ops avx2_ops;
extern const Ops avx512_ops;
#endif

}  // namespace gossamer
