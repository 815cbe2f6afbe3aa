#pragma once

#include <pybind11/pybind11.h>

namespace auxk {

void bind_blocks(pybind11::module_& m);

}  // namespace auxk
