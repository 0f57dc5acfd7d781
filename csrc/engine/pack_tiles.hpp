// What the files that pack weights share: which row comes where, and the tiles of codes with their scales.
#pragma once

#include <cstdint>
#include <vector>

#include "pack.hpp"

namespace gossamer {

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

// Rows, columns, tiles and blocks of the combined weight.
Matrix shape_of(const std::vector<Part>&, int64_t columns, bool interleave);
// The smallest groups of any part, and whether some has zero points. False if groups do not fall on blocks.
bool set_groups(const std::vector<Part>&, Matrix&);
// Decides how scales are stored and writes the tiles of a coded kind.
void pack_coded(const std::vector<Part>&, bool interleave, int threads, Matrix, PackedMatrix&);

}  // namespace gossamer
