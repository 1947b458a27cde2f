// Annotations shared by every header of core/.
#pragma once

// core/ is compiled by host compilers and by nvcc. Everything lives in an unnamed namespace inside
// `normnorm`, because the same header is compiled several times into one library with different instruction
// sets: a shared inline function would let the linker keep the AVX-512 copy for a machine that has none.
#if defined(__CUDACC__)
#define NN_HD __host__ __device__ __forceinline__
#else
#define NN_HD inline __attribute__((always_inline))
#endif
