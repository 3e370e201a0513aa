// What every CUDA kernel is written with. No torch in this file, and no launch: nvcc compiles it, and so does a C++ compiler after
// tests/cuda_twin.h, which says what __global__ and its kin mean on a CPU.
#pragma once

#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

#include <cstdint>

namespace knife {

// Neighbouring values that are read and written at once.
template <typename S, int width>
struct alignas(sizeof(S) * width) Pack {
  S value[width];
};

template <int width, typename S>
__device__ inline Pack<S, width> load(const S* data) {
  return *reinterpret_cast<const Pack<S, width>*>(data);
}

template <typename S, int width>
__device__ inline void store(S* data, const Pack<S, width>& pack) {
  *reinterpret_cast<Pack<S, width>*>(data) = pack;
}

}  // namespace knife
