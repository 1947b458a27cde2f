#include "kernels.cuh"

NN_PASSES(float32_passes, float)
