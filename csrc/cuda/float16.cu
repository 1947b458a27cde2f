#include "kernels.cuh"

NN_PASSES(float16_passes, __half)
