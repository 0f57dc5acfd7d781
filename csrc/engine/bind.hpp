// Registers the engine's classes with the extension module.
#pragma once

#include <nanobind/nanobind.h>

namespace gossamer {
void bind_engine(nanobind::module_& m);
}
