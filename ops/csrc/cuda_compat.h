// The one CUDA header of a .cu file. nvcc compiles the file for the GPU; g++ compiles it for the CPU, where tests run it:
//   nvcc -arch=sm_90 -std=c++17 -fmad=false file.cu
//   g++ -x c++ -std=c++17 -ffp-contract=off -Wno-unknown-pragmas -DLOADSTONE_CUDA_ON_CPU file.cu
// -fmad=false and -ffp-contract=off keep multiplications and additions apart, so that both round alike.
//
// Besides the names of CUDA (the end of cuda_on_cpu.h lists those that exist on the CPU) both sides have:
//   LAUNCH(kernel, grid, block, shared_bytes, stream, arguments...);
//       kernel<<<grid, block, shared_bytes, stream>>>(arguments...). A template with commas stands in parentheses:
//       LAUNCH((kernel<1, 2>), ...).
//   DYNAMIC_SHARED(type, name);
//       In a kernel: `type* const name` points to the launch's shared_bytes of shared memory, aligned to 16 bytes. It is the
//       only form of shared memory: one buffer, which the kernel divides itself.
//   int last_launch_error();
//       cudaGetLastError(): 0 for success. Always 0 on the CPU, where a launch that fails aborts.
//   const OnDevice guard(device);
//       Makes the device current until the end of the scope; nothing on the CPU.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>

#if defined(LOADSTONE_CUDA_ON_CPU)

#include "cuda_on_cpu.h"

#else

#include <cuda_runtime.h>

// A kernel gets more than 48 KiB of shared memory only after asking for it; a refusal shows in last_launch_error().
#define LAUNCH(kernel, grid, block, shared_bytes, stream, ...)                                                   \
  do {                                                                                                           \
    const size_t launch_shared_bytes = (shared_bytes);                                                           \
    if (launch_shared_bytes > 48 * 1024)                                                                         \
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, (int)launch_shared_bytes);       \
    kernel<<<(grid), (block), launch_shared_bytes, (stream)>>>(__VA_ARGS__);                                     \
  } while (0)

// Always the same bytes under the same name: `extern __shared__` arrays of two types but one name do not compile.
#define DYNAMIC_SHARED(type, name)                                             \
  extern __shared__ __align__(16) unsigned char loadstone_dynamic_shared[];    \
  type* const name = reinterpret_cast<type*>(loadstone_dynamic_shared)

inline int last_launch_error() { return static_cast<int>(cudaGetLastError()); }

class OnDevice {
 public:
  explicit OnDevice(int device) : device_(device), before_(device) {
    cudaGetDevice(&before_);
    if (before_ != device_) cudaSetDevice(device_);
  }
  ~OnDevice() {
    if (before_ != device_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int device_, before_;
};

#endif
