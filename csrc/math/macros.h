// The annotation of every function in csrc/math, which host compilers and nvcc compile.
//
// All functions are in an unnamed namespace inside `normnorm`. The headers are compiled once per instruction set into
// one library, and of an inline function with external linkage the linker would keep a single copy, perhaps the AVX-512
// one.
#pragma once

#if defined(__CUDACC__)
#define NN_HD __host__ __device__ __forceinline__
#else
#define NN_HD inline __attribute__((always_inline))
#endif
