#include "launch.cuh"

NN_PASSES(bfloat16_passes, __nv_bfloat16)
