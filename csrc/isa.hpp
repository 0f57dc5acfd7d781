// Which instruction sets this machine has, and the one in use.
#pragma once

#include <string>
#include <vector>

#include "engine/ops.hpp"
#include "kernels.hpp"

namespace gossamer {

// Tables that this machine can run, slowest first; "portable" is always there.
std::vector<const Kernels*> available_kernels();

// The table in use: the fastest, until use_kernels names another. False if this machine has none of that name.
const Kernels& kernels();
bool use_kernels(const std::string& name);

// The engine's operators for the instruction set in use.
const Ops& engine_ops();

}  // namespace gossamer
