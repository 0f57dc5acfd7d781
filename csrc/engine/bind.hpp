// Registers the engine's classes and functions with the extension module.
#pragma once

#include <nanobind/nanobind.h>

#include <string>

#include "ops.hpp"

namespace gossamer {

void bind_engine(nanobind::module_& m);
void bind_attention(nanobind::module_& m);
KvKind kv_kind(const std::string& name);  // throws nanobind::value_error

}  // namespace gossamer
