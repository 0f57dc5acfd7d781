#include "pack.hpp"

#include <sys/mman.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <new>
#include <numeric>

#include "../codes.hpp"
#include "../threads.hpp"

namespace gossamer {
namespace {

constexpr size_t huge_page = size_t(2) << 20;
constexpr size_t chunk_size = size_t(32) << 20;

float bf16_value(uint16_t h) {
  const uint32_t bits = uint32_t(h) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

uint16_t bf16_of(float value) {  // of a float that is one
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return uint16_t(bits >> 16);
}

bool is_bf16(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return (bits & 0xFFFF) == 0;
}

// The half-precision number equal to a float, if there is one.
bool to_f16(float value, uint16_t& out) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000, fraction = bits & 0x7FFFFF;
  const int exponent = int((bits >> 23) & 255) - 127;
  if ((bits & 0x7FFFFFFF) == 0) return out = uint16_t(sign), true;
  if (exponent > 15 || exponent < -24) return false;
  const int lost = exponent >= -14 ? 13 : 13 + (-14 - exponent);
  const uint32_t whole = fraction | 0x800000;
  if (whole & ((1u << lost) - 1)) return false;
  const uint32_t kept = whole >> lost;
  out = uint16_t(sign | (exponent >= -14 ? (uint32_t(exponent + 15) << 10) | (kept & 0x3FF) : kept));
  return true;
}

float f16_value(uint16_t h) {
  const int exponent = (h >> 10) & 31;
  const float fraction = float(h & 1023);
  const float size = exponent ? std::ldexp(1024.0f + fraction, exponent - 25) : std::ldexp(fraction, -24);
  return h & 0x8000 ? -size : size;
}

ScaleKind scale_kind(const std::vector<Part>& parts) {
  bool bf16 = true, f16 = true;
  for (const Part& part : parts)
    for (int64_t i = 0; i < part.rows * part.groups && (bf16 || f16); ++i) {
      uint16_t unused;
      bf16 = bf16 && is_bf16(part.scale[i]);
      f16 = f16 && to_f16(part.scale[i], unused);
    }
  return bf16 ? ScaleKind::bf16 : f16 ? ScaleKind::f16 : ScaleKind::f32;
}

// Which part's which row is row `row` of tile `tile`; null past the end.
struct Rows {
  const std::vector<Part>& parts;
  bool interleave;

  const Part* at(int64_t tile, int row, int64_t& local) const {
    if (interleave) {
      const Part& part = parts[tile % 2];
      local = tile / 2 * TileRows + row;
      return local < part.rows ? &part : nullptr;
    }
    local = tile * TileRows + row;
    for (const Part& part : parts) {
      if (local < part.rows) return &part;
      local -= part.rows;
    }
    return nullptr;
  }
};

Matrix shape(const std::vector<Part>& parts, int64_t columns, bool interleave) {
  Matrix m{};
  for (const Part& part : parts) m.rows += part.rows;
  m.columns = columns;
  m.blocks = (columns + BlockColumns - 1) / BlockColumns;
  m.tiles = interleave ? 2 * ((parts[0].rows + TileRows - 1) / TileRows) : (m.rows + TileRows - 1) / TileRows;
  m.group_blocks = m.blocks;
  return m;
}

// One block of 16 rows by 32 stored codes [16, stride].
void pack_block(Kind kind, const uint8_t* codes, int64_t stride, uint8_t* out) {
  for (int r = 0; r < TileRows; ++r) {
    uint32_t word[8];
    std::memcpy(word, codes + r * stride, sizeof word);
    auto put = [&](int reg, uint32_t value) { std::memcpy(out + 64 * reg + 4 * r, &value, 4); };
    if (kind == Kind::i8) {
      for (int v = 0; v < 8; ++v) put(v, word[v]);
    } else if (kind == Kind::i4) {
      for (int v = 0; v < 4; ++v) put(v, word[v] | word[v + 4] << 4);
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
  } else {
    uint16_t h = bf16_of(scale);
    if (m.scale_kind == ScaleKind::f16) to_f16(scale, h);
    std::memcpy(out + 2 * row, &h, 2);
  }
  if (m.asymmetric) out[scale_bytes(m.scale_kind) + row] = uint8_t(zero);
}

void pack_integer_tile(const Matrix& m, const Rows& rows, int64_t tile, std::vector<uint8_t>& codes,
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
  Matrix m = shape(parts, columns, interleave);
  int bits = 2;
  for (const Part& part : parts) {
    bits = std::max(bits, part.bits);
    m.asymmetric = m.asymmetric || part.zero;
    if (part.groups == 1) continue;
    if (columns % part.groups || columns / part.groups % BlockColumns) return false;
    m.group_blocks = std::gcd(m.group_blocks, columns / part.groups / BlockColumns);
  }
  m.kind = bits == 2 ? Kind::i2 : bits == 3 ? Kind::i3 : bits == 4 ? Kind::i4 : Kind::i8;
  m.scale_kind = scale_kind(parts);
  m.tile_bytes = block_offset(m, m.blocks - 1) + block_bytes(m.kind);
  uint8_t* data = packed.arena->allocate(m.tiles * m.tile_bytes);
  m.data = data;
  packed.matrix = m;
  const Rows rows{parts, interleave};
  parallel_for(m.tiles, threads, [&](int64_t begin, int64_t end, int) {
    std::vector<uint8_t> codes(TileRows * m.blocks * BlockColumns);
    std::vector<int8_t> row_codes(columns);
    for (int64_t tile = begin; tile < end; ++tile)
      pack_integer_tile(m, rows, tile, codes, row_codes, data + tile * m.tile_bytes);
  });
  return true;
}

void pack_dense(const std::vector<Part>& parts, int64_t columns, bool interleave, int threads, PackedMatrix& packed) {
  Matrix m = shape(parts, columns, interleave);
  m.kind = std::all_of(parts.begin(), parts.end(), [](const Part& p) { return p.bf16; }) ? Kind::bf16 : Kind::f32;
  m.tile_bytes = m.blocks * block_bytes(m.kind);
  uint8_t* data = packed.arena->allocate(m.tiles * m.tile_bytes);
  m.data = data;
  packed.matrix = m;
  const Rows rows{parts, interleave};
  parallel_for(m.tiles, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t tile = begin; tile < end; ++tile) pack_dense_tile(m, rows, tile, data + tile * m.tile_bytes);
  });
}

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
  const int middle = 1 << (bits_of(m.kind) - 1);
  for (int64_t b = 0; b < m.blocks; ++b) {
    const uint8_t* p = tile + block_offset(m, b);
    const uint8_t* after = tile + scale_offset(m, b / m.group_blocks);
    float scale;
    uint16_t h;
    if (m.scale_kind == ScaleKind::f32) {
      std::memcpy(&scale, after + 4 * r, 4);
    } else {
      std::memcpy(&h, after + 2 * r, 2);
      scale = m.scale_kind == ScaleKind::bf16 ? bf16_value(h) : f16_value(h);
    }
    const int zero = m.asymmetric ? after[scale_bytes(m.scale_kind) + r] : middle;
    for (int c = 0; c < BlockColumns; ++c) {
      const int v = c / 4;
      const uint8_t* at = p + 4 * r + c % 4;
      int code;
      if (m.kind == Kind::i8) code = at[64 * v];
      else if (m.kind == Kind::i4) code = (at[64 * (v % 4)] >> (v / 4 * 4)) & 15;
      else code = (at[64 * (v % 2)] >> (v / 2 * 2)) & 3;
      if (m.kind == Kind::i3) code |= ((at[128] >> v) & 1) << 2;
      out[b * BlockColumns + c] = float(code - zero) * scale;
    }
  }
  for (int64_t c = m.columns; c < padded; ++c) out[c] = 0.0f;
}

}  // namespace gossamer
