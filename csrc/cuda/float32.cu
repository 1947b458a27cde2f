#include "launch.cuh"

NN_PASSES(float32_passes, float)
