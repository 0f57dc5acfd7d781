// Weights that are no integers: codes of 16 levels, 8-bit floats, and weights kept beside the rest.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "../threads.hpp"
#include "pack_tiles.hpp"

namespace gossamer {
namespace {

constexpr int small_steps = 15, large_steps = 127;  // of the largest level, in c4s and in c4
// Mean square by which levels that lie anywhere miss the nearest of 127 steps, in units of the largest.
constexpr double chance = 1.0 / (12.0 * large_steps * large_steps);

// How many steps the largest level has, so that all are as near to whole numbers of steps as can be. Up to 15 will do if
// they are as near as 127 would have them by chance.
int most_steps(const float* levels, float largest) {
  int best = 1;
  double least = INFINITY;
  for (int most = 1; most <= large_steps; ++most) {
    double error = 0.0;
    for (int i = 0; i < 16; ++i) {
      const double steps = double(levels[i]) / double(largest) * most;
      error += (steps - std::round(steps)) * (steps - std::round(steps)) / (16.0 * most * most);
    }
    if (error < least) {
      least = error;
      best = most;
    }
    if (most == small_steps && least <= chance) break;
  }
  return best;
}

// Kind, steps and table of a codebook; returns what a step is.
float set_levels(const float* levels, Matrix& m) {
  float largest = 0.0f;
  for (int i = 0; i < 16; ++i) largest = std::max(largest, std::fabs(levels[i]));
  const int most = largest > 0.0f ? most_steps(levels, largest) : 1;
  const float step = largest > 0.0f ? largest / float(most) : 1.0f;
  m.kind = most <= small_steps ? Kind::c4s : Kind::c4;
  for (int i = 0; i < 16; ++i) {
    m.steps[i] = levels[i] / step;
    m.table[i] = uint8_t(int(std::lround(m.steps[i])) + middle_of(m.kind));
  }
  return step;
}

// What the products of each row are multiplied by: `step`, times the row's own factor.
const float* row_factors(const std::vector<Part>& parts, bool interleave, float step, const Matrix& m, Arena& arena) {
  float* factors = reinterpret_cast<float*>(arena.allocate(m.tiles * TileRows * sizeof(float)));
  const Rows rows{parts, interleave};
  for (int64_t row = 0; row < m.tiles * TileRows; ++row) {
    int64_t local;
    const Part* part = rows.at(row / TileRows, int(row % TileRows), local);
    if (part) factors[row] = part->factor ? step * part->factor[local] : step;
  }
  return factors;
}

}  // namespace

bool pack_codebook(const std::vector<Part>& parts, const float* levels, int64_t columns, bool interleave, int threads,
                   PackedMatrix& packed) {
  Matrix m = shape_of(parts, columns, interleave);
  m.halves = std::all_of(parts.begin(), parts.end(),
                         [&](const Part& p) { return p.groups > 1 && p.groups * BlockColumns == 2 * columns; });
  if (m.halves)
    m.group_blocks = 1;
  else if (!set_groups(parts, m))
    return false;
  m.row_factor = row_factors(parts, interleave, set_levels(levels, m), m, *packed.arena);
  pack_coded(parts, interleave, threads, m, packed);
  return true;
}

void pack_e4m3(const std::vector<Part>& parts, int64_t columns, bool interleave, int threads, PackedMatrix& packed) {
  Matrix m = shape_of(parts, columns, interleave);
  m.kind = Kind::e4m3;
  m.tile_bytes = m.blocks * block_bytes(m.kind);
  m.row_factor = row_factors(parts, interleave, 1.0f, m, *packed.arena);
  uint8_t* data = packed.arena->allocate(m.tiles * m.tile_bytes);
  m.data = data;
  packed.matrix = m;
  packed.turns = interleave ? parts[0].rows : 0;
  const Rows rows{parts, interleave};
  parallel_for(m.tiles, threads, [&](int64_t begin, int64_t end, int) {
    for (int64_t tile = begin; tile < end; ++tile)
      for (int r = 0; r < TileRows; ++r) {
        int64_t local;
        const Part* part = rows.at(tile, r, local);
        if (!part) continue;
        uint8_t* out = data + tile * m.tile_bytes + 4 * r;
        for (int64_t c = 0; c < columns; ++c) out[c / 4 * 64 + c % 4] = part->e4m3[local * columns + c];
      }
  });
}

void keep_beside(PackedMatrix& packed, int64_t count, const int32_t* rows, const int32_t* columns,
                 const float* values) {
  Matrix& m = packed.matrix;
  auto place = [&](int64_t row) {
    if (!packed.turns) return row;
    const int64_t local = row % packed.turns;
    return (local / TileRows * 2 + row / packed.turns) * TileRows + local % TileRows;
  };
  std::vector<int32_t> used(m.tiles * TileRows);
  for (int64_t i = 0; i < count; ++i) ++used[place(rows[i])];
  int32_t* start = reinterpret_cast<int32_t*>(packed.arena->allocate((m.tiles + 1) * sizeof(int32_t)));
  for (int64_t tile = 0; tile < m.tiles; ++tile) {
    const int32_t* first = used.data() + tile * TileRows;
    start[tile + 1] = start[tile] + *std::max_element(first, first + TileRows);
  }
  const int64_t places = int64_t(start[m.tiles]) * TileRows;
  uint16_t* at = reinterpret_cast<uint16_t*>(packed.arena->allocate(places * sizeof(uint16_t)));
  float* weights = reinterpret_cast<float*>(packed.arena->allocate(places * sizeof(float)));
  std::fill(used.begin(), used.end(), 0);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t row = place(rows[i]);
    const int64_t slot = (start[row / TileRows] + used[row]++) * TileRows + row % TileRows;
    at[slot] = uint16_t(columns[i]);
    weights[slot] = values[i];
  }
  packed.sparse_bytes = places * (sizeof(uint16_t) + sizeof(float)) + (m.tiles + 1) * sizeof(int32_t);
  m.sparse_columns = at;
  m.sparse_values = weights;
  m.sparse_start = start;
}

}  // namespace gossamer
