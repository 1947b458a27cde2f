// Execution plans: where a group stays between the rounds, by its size, and how many threads process it.
//
//   group fits in                              tier       thread group                              device memory
//   registers of one block                     kBlock     one block, of as many warps as needed     1 read, 1 write
//   registers + shared memory of half a        kBlock     one block of half the threads             1 read, 1 write
//     multiprocessor
//   the same of a cluster, up to 8 blocks      kCluster   a cluster of such blocks (sm_90 on)       1 read, 1 write
//   the same of many co-operating blocks       kGrid      a share of a cooperative launch's blocks  1 read, 1 write
//   none of these                              kStreaming many blocks, a launch for each round      up to 5 reads, 1 write
//
// The backward pass keeps a group in one block or streams, which reads two tensors twice: where several blocks shared a
// group, they waited longer for one another (benchmarks/NOTES.md).
//
// Two blocks share a multiprocessor, so that one computes while the other waits for memory or at a barrier. Where there
// are too few groups to fill the device, a group is spread over more blocks than it needs.
#pragma once

#include <string>

#include "params.h"

namespace normnorm {
namespace cuda {

struct Plan {
  Tier tier = Tier::kStreaming;
  int threads = 512;           // of a block
  int blocks = 1;              // of a thread group
  int thread_groups = 1;       // running at the same time
  int shared_chunks = 0;       // chunks a thread keeps in shared memory
  bool sums_elements = false;  // sums the gradients of a weight per element in shared memory
  size_t shared = 0;           // bytes of dynamic shared memory
};

// One kernel launch.
struct Launch {
  unsigned grid = 1, threads = 32;  // blocks; threads of a block
  size_t shared = 0;                // bytes of dynamic shared memory
  int cluster = 1;                  // blocks of a cluster
  bool cooperative = false;
  void* stream = nullptr;
};

// What one pass keeps of a group.
struct Demand {
  int64_t groups = 0, chunks = 0;  // chunks of a group
  int chunk_bytes = 0;             // of one chunk, as kept
  int register_chunks = 0;         // of a thread; half where gradients are summed by element
  int largest_block = 0;           // the most threads for which the kernel has registers
  int static_shared = 0;           // bytes of the kernel's static shared memory
  int sum_bytes = 0;               // a chunk's, of the gradients of a weight per element; 0 where there are none
  bool one_block = false;          // there are no kernels for several blocks a group
};

// Most threads of a block; more would spill. Fused backward kernels load a third tensor and lack one or two registers
// with twelve warps. Their limit is eight: a multiprocessor's four partitions have register files of their own, so that
// nine to twelve warps leave a thread the same number.
constexpr int kForwardBlock = 512, kBackwardBlock = 384, kFusedBackwardBlock = 256;
constexpr int kLargestBlock = 512, kLargestCluster = 8;
constexpr int kBlocksPerMultiprocessor = 2;  // where blocks wait for one another
constexpr int kThreadChunks = 8;             // chunks a thread of a block; fewer warps wait at each barrier
constexpr int kMostGridBlocks = 40;          // a group that needs more of a cooperative launch is streamed
constexpr int kGridMargin = 3;               // multiprocessors that a cooperative launch leaves to other streams

inline Plan with_blocks(const Demand& d, Tier tier, int threads, int blocks, bool sums_elements = false) {
  Plan p;
  p.tier = tier;
  p.threads = threads;
  p.blocks = blocks;
  p.sums_elements = sums_elements;
  const int64_t each = ceil_div(d.chunks, int64_t(threads) * blocks);  // chunks of a thread
  const int in_registers = sums_elements ? d.register_chunks / 2 : d.register_chunks;
  p.shared_chunks = each > in_registers ? int(each - in_registers) : 0;
  p.shared =
      size_t(threads) * (size_t(p.shared_chunks) * d.chunk_bytes + (sums_elements ? size_t(each) * d.sum_bytes : 0));
  return p;
}

// Bytes of static shared memory. Demand has those of a block that exchanges sums with the others of its thread group; a
// block alone in it needs 1 / kLargestCluster of them.
inline int static_shared(const Demand& d, Tier tier) {
  return tier == Tier::kBlock ? d.static_shared / kLargestCluster : d.static_shared;
}
// How many blocks of a plan a multiprocessor has shared memory for.
inline int64_t count_fitting(const Demand& d, const Device& device, const Plan& p) {
  const int64_t bytes = int64_t(p.shared) + static_shared(d, p.tier);
  return bytes > device.shared_bytes ? 0 : device.multiprocessor_shared / (bytes + 1024);
}

// Threads of a block for `each` chunks a thread, in whole warps; at most d.largest_block.
inline int block_threads(const Demand& d, int each) {
  const int64_t warps = ceil_div(d.chunks, 32 * each);
  return int(warps * 32 < d.largest_block ? warps * 32 : d.largest_block);
}

// The smallest number of blocks that fits, doubling from `least` up to `most`; 0 where none does.
inline int fitting_blocks(const Demand& d, const Device& device, int threads, int least, int most) {
  for (int blocks = least; blocks <= most; blocks *= 2)
    if (count_fitting(d, device, with_blocks(d, blocks == 1 ? Tier::kBlock : Tier::kCluster, threads, blocks)) >=
        kBlocksPerMultiprocessor)
      return blocks;
  return 0;
}

// The most blocks of a cooperative launch.
inline int cooperative_blocks(const Device& device) {
  const int multiprocessors = device.multiprocessors - kGridMargin;
  return device.cooperative && multiprocessors > 0 ? multiprocessors * kBlocksPerMultiprocessor : 0;
}
// The blocks of a cooperative launch, divided into thread groups. The smallest number of blocks that holds a group
// determines the number of turns. As few thread groups as need no more turns share all blocks; none has more blocks than
// have a chunk for every thread, because every block reads the sums of all others.
inline Plan grid_plan(const Demand& d, const Device& device, int threads) {
  const int all = cooperative_blocks(device);
  for (int blocks = 1; blocks <= all && blocks <= kMostGridBlocks; ++blocks) {
    if (count_fitting(d, device, with_blocks(d, Tier::kGrid, threads, blocks)) < kBlocksPerMultiprocessor) continue;
    const int64_t turns = ceil_div(d.groups, all / blocks), thread_groups = ceil_div(d.groups, turns);
    const int64_t busy = ceil_div(d.chunks, threads);
    Plan p = with_blocks(d, Tier::kGrid, threads, int(all / thread_groups < busy ? all / thread_groups : busy));
    p.thread_groups = int(thread_groups);
    return p;
  }
  return Plan();
}

// A block that sums the gradients of a weight per element too: the smallest size that maximizes the resident threads of
// a multiprocessor. Streaming where these are fewer than half of those that registers allow: a separate kernel then sums
// the gradients.
inline Plan summing_plan(const Demand& d, const Device& device) {
  Plan best;
  int64_t most = d.largest_block / 2;
  for (int threads = 32; threads <= d.largest_block; threads += 32) {
    const Plan p = with_blocks(d, Tier::kBlock, threads, 1, true);
    const int64_t by_shared = count_fitting(d, device, p), by_registers = d.largest_block / threads;
    const int64_t running = threads * (by_shared < by_registers ? by_shared : by_registers);
    if (running > most) most = running, best = p;
  }
  return best;
}

inline Plan resident_plan(const Demand& d, const Device& device) {
  const int whole = block_threads(d, d.register_chunks), few = block_threads(d, kThreadChunks);
  const int half = whole < d.largest_block / 2 ? whole : d.largest_block / 64 * 32;
  if (d.sum_bytes > 0)
    if (const Plan p = summing_plan(d, device); p.tier == Tier::kBlock) return p;
  // too few groups to fill the device: more blocks a group than it needs
  const bool clusters = device.clusters && !d.one_block;
  int least = 1;
  while (clusters && least < kLargestCluster && d.groups * least <= device.multiprocessors &&
         d.chunks >= int64_t(half) * least * 2)
    least *= 2;
  if (const Plan p = with_blocks(d, Tier::kBlock, few, 1);
      least == 1 && few <= half && count_fitting(d, device, p) >= kBlocksPerMultiprocessor * half / few)
    return p;
  if (least == 1 && d.chunks <= int64_t(whole) * d.register_chunks) return with_blocks(d, Tier::kBlock, whole, 1);
  if (const int blocks = fitting_blocks(d, device, half, least, clusters ? kLargestCluster : 1))
    return with_blocks(d, blocks == 1 ? Tier::kBlock : Tier::kCluster, half, blocks);
  if (d.one_block) return Plan();
  const Plan alone = with_blocks(d, Tier::kBlock, d.largest_block, 1);  // on a multiprocessor
  if (!clusters && count_fitting(d, device, alone) > 0) return alone;
  return grid_plan(d, device, half);
}

inline Plan choose_plan(const Demand& d, const Device& device, const Override& force) {
  Plan p;
  if (force.tier == Tier::kAuto) {
    p = resident_plan(d, device);
  } else {
    const int threads = force.threads ? force.threads : block_threads(d, d.register_chunks);
    const int blocks = force.blocks ? force.blocks : 1;
    p = with_blocks(d, force.tier, threads, blocks, d.sum_bytes > 0 && force.tier == Tier::kBlock);
    if (p.sums_elements && count_fitting(d, device, p) == 0) p = with_blocks(d, force.tier, threads, blocks);
  }
  if (force.thread_groups) p.thread_groups = force.thread_groups;
  if (p.thread_groups > d.groups) p.thread_groups = int(d.groups);
  return p;
}

// Of tiles in the columns layout: co-operating blocks or streaming.
inline Plan choose_tile_plan(const Demand& d, const Device& device, int threads, const Override& force) {
  Plan p;
  if (force.tier == Tier::kGrid) {
    p = with_blocks(d, Tier::kGrid, threads, force.blocks ? force.blocks : 1);
    p.thread_groups = cooperative_blocks(device) / p.blocks;
  } else if (force.tier == Tier::kAuto) {
    p = grid_plan(d, device, threads);
  }
  if (p.tier != Tier::kGrid) return p;
  if (force.thread_groups) p.thread_groups = force.thread_groups;
  if (p.thread_groups > d.groups) p.thread_groups = int(d.groups);
  if (p.thread_groups < 1) p.thread_groups = 1;
  return p;
}

// Divides a workspace among its parts, each aligned to 16 bytes; with a null base it only counts.
class Workspace {
 public:
  explicit Workspace(void* base) : base_(static_cast<char*>(base)) {}
  template <class U>
  U* take(int64_t count) {
    const size_t at = used_;
    used_ += (size_t(count) * sizeof(U) + 15) / 16 * 16;
    return base_ ? reinterpret_cast<U*>(base_ + at) : nullptr;
  }
  size_t used() const { return used_; }

 private:
  char* base_;
  size_t used_ = 0;
};

// Empty, or a sentence that says what of a geometry exceeds the kernels' 32-bit counters. Offsets in memory have 64 bits
// everywhere.
inline std::string refusal(const Geometry& g) {
  constexpr int64_t kMost = (int64_t(1) << 31) - 1;
  const auto too_many = [](int64_t n, const char* of) {
    return "got " + std::to_string(n) + " " + of + ", wanted at most 2147483647";
  };
  if (g.groups() > kMost) return too_many(g.groups(), "groups");
  if (g.columns) {
    if (g.outer * g.inner * g.length > kMost) return too_many(g.outer * g.inner * g.length, "columns");
    // a thread computes the index of a row up to four strides of the launch ahead
    if (g.runs > kMost / 2) return "got " + std::to_string(g.runs) + " rows, wanted at most 1073741823";
    return "";
  }
  // a chunk has at least four elements; a run that begins anywhere takes one more chunk
  const int64_t per_run = g.length / 4 + 2;
  if (per_run > kMost / g.runs) return too_many(per_run * g.runs, "chunks of four elements in a group");
  if (g.groups() > kMost / g.runs) return too_many(g.groups() * g.runs, "runs");
  return "";
}

// The passes of one storage type, each compiled in its own file.
struct Passes {
  Plan (*plan)(const Problem&, bool backward, const Device&);
  size_t (*workspace)(const Problem&, bool backward, const Device&);
  int (*forward)(const Problem&, const Device&, void* stream);
  int (*backward)(const Problem&, const Device&, void* stream);
};

const Passes& float32_passes();
const Passes& float64_passes();
const Passes& bfloat16_passes();
const Passes& float16_passes();

inline const Passes& passes_for(Storage storage) {
  switch (storage) {
    case Storage::kFloat64: return float64_passes();
    case Storage::kBFloat16: return bfloat16_passes();
    case Storage::kFloat16: return float16_passes();
    default: return float32_passes();
  }
}

}  // namespace cuda
}  // namespace normnorm
