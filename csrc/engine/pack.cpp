#include "pack.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <numeric>

#include "../codes.hpp"
#include "../threads.hpp"
#include "pack_tiles.hpp"
#include "small_floats.hpp"

namespace gossamer {
namespace {

constexpr size_t huge_page = size_t(2) << 20;
constexpr size_t chunk_size = size_t(32) << 20;

// The smallest kind of number that all scales are.
ScaleKind scale_kind(const std::vector<Part>& parts) {
  auto all = [&](auto fits) {
    return std::all_of(parts.begin(), parts.end(), [&](const Part& part) {
      return std::all_of(part.scale, part.scale + part.rows * part.groups, fits);
    });
  };
  uint8_t byte;
  uint16_t half;
  if (all([&](float v) { return to_e8m0(v, byte); })) return ScaleKind::e8m0;
  if (all([&](float v) { return to_e4m3(v, byte); })) return ScaleKind::e4m3;
  if (all(is_bf16)) return ScaleKind::bf16;
  return all([&](float v) { return to_f16(v, half); }) ? ScaleKind::f16 : ScaleKind::f32;
}

}  // namespace

Matrix shape_of(const std::vector<Part>& parts, int64_t columns, bool interleave) {
  Matrix m{};
  for (const Part& part : parts) m.rows += part.rows;
  m.columns = columns;
  m.blocks = (columns + BlockColumns - 1) / BlockColumns;
  m.tiles = interleave ? 2 * ((parts[0].rows + TileRows - 1) / TileRows) : (m.rows + TileRows - 1) / TileRows;
  m.group_blocks = m.blocks;
  return m;
}

bool set_groups(const std::vector<Part>& parts, Matrix& m) {
  for (const Part& part : parts) {
    m.asymmetric = m.asymmetric || part.zero;
    if (part.groups == 1) continue;
    if (m.columns % part.groups || m.columns / part.groups % BlockColumns) return false;
    m.group_blocks = std::gcd(m.group_blocks, m.columns / part.groups / BlockColumns);
  }
  return true;
}

namespace {

// One block of 16 rows by 32 stored codes [16, stride].
void pack_block(Kind kind, const uint8_t* codes, int64_t stride, uint8_t* out) {
  for (int r = 0; r < TileRows; ++r) {
    uint32_t word[8];
    std::memcpy(word, codes + r * stride, sizeof word);
    auto put = [&](int reg, uint32_t value) { std::memcpy(out + 64 * reg + 4 * r, &value, 4); };
    if (kind == Kind::i8) {
      for (int v = 0; v < 8; ++v) put(v, word[v]);
    } else if (bits_of(kind) >= 4) {
      uint32_t fifth = 0, upper[2] = {};
      for (int v = 0; v < 8; ++v) {
        fifth |= ((word[v] >> 4) & 0x01010101u) << v;
        upper[v % 2] |= ((word[v] >> 4) & 0x03030303u) << (v / 2 * 2);
        word[v] &= 0x0F0F0F0Fu;
      }
      for (int v = 0; v < 4; ++v) put(v, word[v] | word[v + 4] << 4);
      if (kind == Kind::i5) put(4, fifth);
      if (kind == Kind::i6)
        for (int v = 0; v < 2; ++v) put(4 + v, upper[v]);
    } else {
      uint32_t third = 0;
      for (int v = 0; v < 8; ++v) {
        third |= ((word[v] >> 2) & 0x01010101u) << v;
        word[v] &= 0x03030303u;
      }
      for (int v = 0; v < 2; ++v) put(v, word[v] | word[v + 2] << 2 | word[v + 4] << 4 | word[v + 6] << 6);
      if (kind == Kind::i3) put(2, third);
    }
  }
}

void pack_scale(const Matrix& m, uint8_t* out, int row, float scale, int zero) {
  if (m.scale_kind == ScaleKind::f32) {
    std::memcpy(out + 4 * row, &scale, 4);
  } else if (m.scale_kind == ScaleKind::e8m0) {
    to_e8m0(scale, out[row]);
  } else if (m.scale_kind == ScaleKind::e4m3) {
    to_e4m3(scale, out[row]);
  } else {
    uint16_t h = bf16_of(scale);
    if (m.scale_kind == ScaleKind::f16) to_f16(scale, h);
    std::memcpy(out + 2 * row, &h, 2);
  }
  if (m.asymmetric) out[scale_bytes(m.scale_kind) + row] = uint8_t(zero);
}

void pack_coded_tile(const Matrix& m, const Rows& rows, int64_t tile, std::vector<uint8_t>& codes,
                       std::vector<int8_t>& row_codes, uint8_t* out) {
  const int64_t stride = m.blocks * BlockColumns;
  const int middle = 1 << (bits_of(m.kind) - 1);
  std::memset(codes.data(), middle, codes.size());
  for (int r = 0; r < TileRows; ++r) {
    int64_t local;
    const Part* part = rows.at(tile, r, local);
    if (!part) continue;
    unpack_codes(part->words + local * words_for(m.columns, part->bits), row_codes.data(), 1, m.columns, part->bits);
    for (int64_t c = 0; c < m.columns; ++c) codes[r * stride + c] = uint8_t(row_codes[c] + middle);
    if (m.halves) {
      for (int64_t half = 0; half < part->groups; ++half)
        pack_scale(m, out + scale_offset(m, half / 2) + half % 2 * scale_bytes(m.scale_kind), r,
                   part->scale[local * part->groups + half], 0);
      continue;
    }
    for (int64_t group = 0; group < m.blocks / m.group_blocks; ++group) {
      const int64_t at = local * part->groups + group * part->groups * m.group_blocks / m.blocks;
      pack_scale(m, out + scale_offset(m, group), r, part->scale[at], middle + (part->zero ? part->zero[at] : 0));
    }
  }
  for (int64_t b = 0; b < m.blocks; ++b)
    pack_block(m.kind, codes.data() + b * BlockColumns, stride, out + block_offset(m, b));
}

void pack_dense_tile(const Matrix& m, const Rows& rows, int64_t tile, uint8_t* out) {
  for (int r = 0; r < TileRows; ++r) {
    int64_t local;
    const Part* part = rows.at(tile, r, local);
    if (!part) continue;
    for (int64_t c = 0; c < m.columns; ++c) {
      if (m.kind == Kind::bf16) {
        std::memcpy(out + c / 2 * 64 + 4 * r + c % 2 * 2, part->bf16 + local * m.columns + c, 2);
      } else {
        const int64_t at = local * m.columns + c;
        const float value = part->f32 ? part->f32[at] : bf16_value(part->bf16[at]);
        std::memcpy(out + c * 64 + 4 * r, &value, 4);
      }
    }
  }
}

}  // namespace

Arena::~Arena() {
  for (const Chunk& chunk : chunks_) munmap(chunk.data, chunk.size);
}

uint8_t* Arena::allocate(size_t bytes) {
  bytes = (bytes + 63) / 64 * 64;
  const std::scoped_lock lock(mutex_);
  if (chunks_.empty() || chunks_.back().size - chunks_.back().used < bytes) {
    const size_t size = std::max(chunk_size, (bytes + huge_page - 1) / huge_page * huge_page) + huge_page;
    void* data = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data == MAP_FAILED) throw std::bad_alloc();
    madvise(data, size, MADV_HUGEPAGE);
    const size_t skip = (huge_page - reinterpret_cast<uintptr_t>(data) % huge_page) % huge_page;
    chunks_.push_back({static_cast<uint8_t*>(data), size, skip});
  }
  Chunk& chunk = chunks_.back();
  uint8_t* found = chunk.data + chunk.used;
  chunk.used += bytes;
  used_ += bytes;
  return found;
}

bool pack_integer(const std::vector<Part>& parts, int64_t columns, bool interleave, int threads, PackedMatrix& packed) {
  Matrix m = shape_of(parts, columns, interleave);
  if (!set_groups(parts, m)) return false;
  constexpr Kind kinds[] = {Kind::i2, Kind::i3, Kind::i4, Kind::i5, Kind::i6, Kind::i8, Kind::i8};
  int bits = 2;
  for (const Part& part : parts) bits = std::max(bits, part.bits);
  m.kind = kinds[bits - 2];
  pack_coded(parts, interleave, threads, m, packed);
  return true;
}

void pack_coded(const std::vector<Part>& parts, bool interleave, int threads, Matrix m, PackedMatrix& packed) {
  m.scale_kind = scale_kind(parts);
  m.tile_bytes = block_offset(m, m.blocks - 1) + block_bytes(m.kind);
  uint8_t* data = packed.arena->allocate(m.tiles * m.tile_bytes);
  m.data = data;
  packed.matrix = m;
  packed.turns = interleave ? parts[0].rows : 0;
  const Rows rows{parts, interleave};
  parallel_for(m.tiles, threads, [&](int64_t begin, int64_t end, int) {
    std::vector<uint8_t> codes(TileRows * m.blocks * BlockColumns);
    std::vector<int8_t> row_codes(m.columns);
    for (int64_t tile = begin; tile < end; ++tile)
      pack_coded_tile(m, rows, tile, codes, row_codes, data + tile * m.tile_bytes);
  });
}

void pack_dense(const std::vector<Part>& parts, int64_t columns, bool interleave, int threads, PackedMatrix& packed) {
  Matrix m = shape_of(parts, columns, interleave);
  m.kind = std::all_of(parts.begin(), parts.end(), [](const Part& p) { return p.bf16; }) ? Kind::bf16 : Kind::f32;
  m.tile_bytes = m.blocks * block_bytes(m.kind);
  uint8_t* data = packed.arena->allocate(m.tiles * m.tile_bytes);
  m.data = data;
  packed.matrix = m;
  packed.turns = interleave ? parts[0].rows : 0;
  const Rows rows{parts, interleave};
  parallel_for(m.tiles, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t tile = begin; tile < end; ++tile) pack_dense_tile(m, rows, tile, data + tile * m.tile_bytes);
  });
}

namespace {

float stored_scale(ScaleKind kind, const uint8_t* at, int64_t row) {
  if (kind == ScaleKind::e8m0) return e8m0_value(at[row]);
  if (kind == ScaleKind::e4m3) return e4m3_value(at[row]);
  uint16_t h;
  float scale;
  if (kind == ScaleKind::f32) {
    std::memcpy(&scale, at + 4 * row, 4);
    return scale;
  }
  std::memcpy(&h, at + 2 * row, 2);
  return kind == ScaleKind::bf16 ? bf16_value(h) : f16_value(h);
}

// The code of column 4v + i of a block, from the byte i of a row on.
int stored_code(Kind kind, const uint8_t* at, int v) {
  const int bits = bits_of(kind);
  if (bits == 8) return at[64 * v];
  if (bits >= 4) {
    const int low = (at[64 * (v % 4)] >> (v / 4 * 4)) & 15;
    if (bits == 5) return low | ((at[256] >> v) & 1) << 4;
    if (bits == 6) return low | ((at[256 + 64 * (v % 2)] >> (v / 2 * 2)) & 3) << 4;
    return low;
  }
  const int low = (at[64 * (v % 2)] >> (v / 2 * 2)) & 3;
  return kind == Kind::i3 ? low | ((at[128] >> v) & 1) << 2 : low;
}

}  // namespace

void row_floats(const Matrix& m, int64_t row, float* out) {
  const uint8_t* tile = m.data + row / TileRows * m.tile_bytes;
  const int64_t r = row % TileRows, padded = m.blocks * BlockColumns;
  if (m.kind == Kind::f32) {
    for (int64_t c = 0; c < padded; ++c) std::memcpy(out + c, tile + c * 64 + 4 * r, 4);
    return;
  }
  if (m.kind == Kind::bf16) {
    for (int64_t c = 0; c < padded; ++c) {
      uint16_t h;
      std::memcpy(&h, tile + c / 2 * 64 + 4 * r + c % 2 * 2, 2);
      out[c] = bf16_value(h);
    }
    return;
  }
  const float factor = m.row_factor ? m.row_factor[row] : 1.0f;
  if (m.kind == Kind::e4m3) {
    for (int64_t c = 0; c < padded; ++c) out[c] = e4m3_value(tile[c / 4 * 64 + 4 * r + c % 4]) * factor;
    return;
  }
  const int middle = 1 << (bits_of(m.kind) - 1);
  for (int64_t b = 0; b < m.blocks; ++b) {
    const uint8_t* after = tile + scale_offset(m, b / m.group_blocks);
    const int zero = m.asymmetric ? after[scale_bytes(m.scale_kind) + r] : middle;
    for (int c = 0; c < BlockColumns; ++c) {
      if (m.halves && c == BlockColumns / 2) after += scale_bytes(m.scale_kind);
      const int code = stored_code(m.kind, tile + block_offset(m, b) + 4 * r + c % 4, c / 4);
      const float number = is_codebook(m.kind) ? m.steps[code] : float(code - zero);
      out[b * BlockColumns + c] = number * stored_scale(m.scale_kind, after, r) * factor;
    }
  }
  for (int64_t c = m.columns; c < padded; ++c) out[c] = 0.0f;
  if (!m.sparse_start) return;
  for (int64_t slot = m.sparse_start[row / TileRows]; slot < m.sparse_start[row / TileRows + 1]; ++slot)
    out[m.sparse_columns[slot * TileRows + r]] += m.sparse_values[slot * TileRows + r];
}

}  // namespace gossamer
