#include "launch.cuh"

NN_PASSES(float64_passes, double)
