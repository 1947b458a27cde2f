// What one call of the CUDA kernels is given: device pointers, strides and numbers, already checked. Neither torch nor
// CUDA here: whoever binds the launchers includes this. The geometry is that of the CPU kernels.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "../cpu/problem.h"

namespace normnorm {
namespace cuda {

using cpu::Affine;
using cpu::Geometry;
using cpu::Operand;
using cpu::Storage;
using cpu::Strides;

struct Noise {
  bool on = false;
  bool given_scale = false;       // the statistics already hold s
  const int64_t* seed = nullptr;  // on the device: read by the kernels, so that a replayed graph sees a new one
  double train = 0;               // the factor of s z
  uint32_t stream = 0;
  // Where an element lies in the canonical order of the noise. The walk must follow that order: columns where the noise
  // counts channels_last, rows otherwise; tensors of the other format are copied by the caller.
  Strides position;
};

// A dense parameter, or a parameter's gradient, in the storage type or the compute type; null where there is none.
struct Parameter {
  void* data = nullptr;
  bool in_storage_type = false;
};

// Which rung of the ladder (ladder.h) serves; kAuto asks the table.
enum class Rung : int { kAuto = 0, kBlock, kCluster, kGrid, kStreaming };

// What a test may force; zeros and kAuto leave the choice to the ladder.
struct Override {
  Rung rung = Rung::kAuto;
  int threads = 0, blocks = 0, teams = 0;
};

// What the ladder needs to know of a device.
struct Device {
  int multiprocessors = 132;
  int shared_bytes = 232448;  // that one block may ask for
  bool clusters = true;
  bool cooperative = true;                 // launches
  int multiprocessor_shared = 233472;      // bytes of shared memory, of which each block costs 1024 more than it asks for
  bool present = false;  // the current device: whether blocks run at once is asked of the driver before it is relied on
};

struct Problem : cpu::Joined {
  Storage storage = Storage::kFloat32;
  Geometry geometry;
  Affine affine = Affine::kPerGroup;
  Noise noise;
  double eps = 1e-5, alpha = 1, transform_eps = 0;
  int order = 2;
  bool frozen = false;    // the statistics are given (running ones), not those of the input
  void* stats = nullptr;  // (kStatRows, groups), compute type
  Parameter weight, bias;
  Operand input;
  Operand output;       // forward: the output; backward: the gradient of the input (null data: not wanted)
  Operand grad_output;  // backward only
  Parameter grad_weight, grad_bias;
  void* workspace = nullptr;  // of the size that normnorm_cuda_workspace() tells, aligned to 16 bytes
  Override force;
};

}  // namespace cuda
}  // namespace normnorm
