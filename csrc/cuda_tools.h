// What every op needs to launch its CUDA kernels.
#pragma once

#include <cuda_runtime.h>

#include "tensors.h"

namespace knife {

inline bool aligned(const Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.const_data_ptr()) % 16 == 0; }

inline void expect_success(cudaError_t error) { expect(error == cudaSuccess, "CUDA says: ", cudaGetErrorString(error), "."); }

inline int processors(int device) {
  int count = 0;
  expect_success(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  return count;
}

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace knife
