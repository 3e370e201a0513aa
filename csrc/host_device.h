// KNIFE_FN marks what C++ and CUDA both compile.
#pragma once

#ifdef __CUDACC__
#define KNIFE_FN __host__ __device__ inline
#else
#define KNIFE_FN inline
#endif
