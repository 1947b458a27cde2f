#include "launch.cuh"

NN_PASSES(float16_passes, __half)
