#include "squeeze.hpp"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <vector>

#include "../isa.hpp"
#include "../threads.hpp"
#include "expand.hpp"

namespace gossamer {
namespace {

constexpr int RegisterBytes = 64;

template <class Number, Number Zero>
void expand(const uint8_t* from, int64_t registers, uint8_t* to) {
  constexpr int count = RegisterBytes / sizeof(Number);
  for (; registers; --registers) {
    const uint8_t* bits = from;
    from += count / 8;
    for (int i = 0; i < count; ++i, to += sizeof(Number)) {
      Number number = 0;
      if (bits[i / 8] >> (i % 8) & 1) {
        std::memcpy(&number, from, sizeof number);
        from += sizeof number;
      }
      number ^= Zero;
      std::memcpy(to, &number, sizeof number);
    }
  }
}

// Squeezes one tile; returns the bytes that it takes. Without `to` they are only counted.
template <class Number, Number Zero>
int64_t squeeze_tile(const uint8_t* tile, int64_t bytes, uint8_t* to) {
  constexpr int count = RegisterBytes / sizeof(Number);
  int64_t used = 0;
  for (const uint8_t* end = tile + bytes; tile != end;) {
    uint8_t* bits = to ? to + used : nullptr;
    used += count / 8;
    for (int i = 0; i < count; ++i, tile += sizeof(Number)) {
      Number number;
      std::memcpy(&number, tile, sizeof number);
      number ^= Zero;
      if (!number) continue;
      if (to) {
        bits[i / 8] |= uint8_t(1 << i % 8);
        std::memcpy(to + used, &number, sizeof number);
      }
      used += sizeof number;
    }
  }
  return used;
}

const Expanders& expanders() {
#ifdef GOSSAMER_X86
  static const bool vbmi2 = __builtin_cpu_supports("avx512vbmi2");
  if (&engine_ops() == &avx512_ops && vbmi2) return avx512_expanders;
  if (&engine_ops() != &portable_ops) return avx2_expanders;
#endif
  return portable_expanders;
}

}  // namespace

const Expanders portable_expanders = {expand<uint8_t, 128>, expand<uint16_t, 0>};

bool squeezing_pays() {
#ifdef GOSSAMER_X86
  return &expanders() == &avx512_expanders;
#else
  return false;
#endif
}

bool can_squeeze(const PackedMatrix& packed) {
  const Matrix& m = packed.matrix;
  const bool kind = m.kind == Kind::bf16 || (m.kind == Kind::i8 && !m.asymmetric);
  return kind && !m.row_factor && !m.sparse_start && !packed.first && packed.tile_start.empty();
}

void squeeze(const PackedMatrix& whole, int threads, PackedMatrix& squeezed) {
  const Matrix& m = whole.matrix;
  const auto tile = m.kind == Kind::bf16 ? squeeze_tile<uint16_t, 0> : squeeze_tile<uint8_t, 128>;
  std::vector<int64_t> start(m.tiles + 1);
  parallel_for(m.tiles, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) start[t + 1] = tile(m.data + t * m.tile_bytes, m.tile_bytes, nullptr);
  });
  std::partial_sum(start.begin(), start.end(), start.begin());
  uint8_t* data = squeezed.arena->allocate(start.back() + SqueezedPadding);
  parallel_for(m.tiles, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t t = begin; t < end; ++t) tile(m.data + t * m.tile_bytes, m.tile_bytes, data + start[t]);
  });
  squeezed.matrix = m;
  squeezed.matrix.data = data;
  squeezed.turns = whole.turns;
  squeezed.tile_start = std::move(start);
}

void multiply(const Ops& ops, const PackedMatrix& packed, const Acts& acts, bool exact, int64_t begin, int64_t end,
              const Epilogue& e) {
  const Matrix& m = packed.matrix;
  if (packed.tile_start.empty()) return ops.matmul(m, acts, exact, begin, end, e);
  const Expand fill = m.kind == Kind::bf16 ? expanders().words : expanders().bytes;
  thread_local std::vector<uint8_t> room;
  room.resize(std::max<size_t>(room.size(), 2 * m.tile_bytes + RegisterBytes));
  uint8_t* image = room.data() + RegisterBytes - reinterpret_cast<uintptr_t>(room.data()) % RegisterBytes;
  // One token passes by a tile once: it should not fall out of the nearest cache. gate takes pairs.
  const int64_t step = acts.tokens == 1 && e.what != Epilogue::gate ? 1 : 2;
  Matrix filled = m;
  for (int64_t tile = begin; tile < end; tile += step) {
    const int64_t until = std::min(tile + step, end);
    for (int64_t t = tile; t < until; ++t)
      fill(m.data + packed.tile_start[t], m.tile_bytes / RegisterBytes, image + (t - tile) * m.tile_bytes);
    filled.data = image - tile * m.tile_bytes;  // so that tiles keep their numbers
    ops.matmul(filled, acts, exact, tile, until, e);
  }
}

}  // namespace gossamer
