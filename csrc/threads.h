// How the CPU's kernels share work: parallel_for and get_num_threads, which are torch's. Who compiles kernels without torch, as
// tests/core.cpp does, brings functions of these names.
#pragma once

#ifndef KNIFE_WITHOUT_TORCH
#include <torch/csrc/stable/ops.h>

namespace knife {

using torch::stable::get_num_threads;
using torch::stable::parallel_for;

}  // namespace knife
#endif
