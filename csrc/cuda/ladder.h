// The residency ladder: where a group lives while its rounds are taken, by its size, and how many threads serve it.
//
//   group fits in                              rung       team                                      device memory
//   registers of one block                     kBlock     one block, of as many warps as needed     1 read, 1 write
//   registers + shared memory of half a        kBlock     one block of half the threads             1 read, 1 write
//     multiprocessor
//   the same of a cluster, up to 8 blocks      kCluster   a cluster of such blocks (sm_90 on)       1 read, 1 write
//   the same of many co-operating blocks       kGrid      a share of a cooperative launch's blocks  1 read, 1 write
//   no such place                              kStreaming many blocks, a launch a round             4-5 reads, 1 write
//
// Two blocks share a multiprocessor, so that one computes while the other waits for memory or at a barrier. Groups are
// spread over more blocks than they need where there are too few groups to fill the device.
#pragma once

#include "problem.h"

namespace normnorm {
namespace cuda {

struct Plan {
  Rung rung = Rung::kStreaming;
  int threads = 512;      // of a block
  int blocks = 1;         // of a team
  int teams = 1;          // at work at the same time
  int shared_chunks = 0;  // of a thread
};

// What one pass wants to keep of a group.
struct Demand {
  int64_t groups = 0, chunks = 0;  // chunks of a group
  int chunk_bytes = 0;             // of one chunk, as it is kept
  int register_chunks = 0;         // of a thread
  int team_register_chunks = 0;    // the same where blocks work together: their groups live mostly in shared memory
  int largest_block = 0;           // threads for which there are registers: of the kernel that will run
  int static_shared = 0;           // bytes of the kernel's own buffers
  bool sums_elements = false;      // in registers alone, the gradients of a weight an element can be summed as well
};

// With more threads their registers would spill. Where a third tensor is on its way beside the backward pass's two, twelve
// warps are a register or two short; the next number is eight, for registers are dealt out to quarters of a multiprocessor.
constexpr int kForwardBlock = 512, kBackwardBlock = 384, kJoinedBackwardBlock = 256;
constexpr int kLargestBlock = 512, kLargestCluster = 8;
constexpr int kBlocksAtOnce = 2;  // of a multiprocessor, where blocks wait for one another
constexpr int kGridMargin = 3;    // multiprocessors left to other streams' kernels in a cooperative launch

// Chunks that a thread must keep in shared memory.
inline int shared_chunks(const Demand& d, Rung rung, int threads, int blocks) {
  const int64_t each = ceil_div(d.chunks, int64_t(threads) * blocks);
  const int in_registers = rung == Rung::kBlock ? d.register_chunks : d.team_register_chunks;
  return each > in_registers ? int(each - in_registers) : 0;
}
// Where `at_once` blocks are to share a multiprocessor.
inline bool fits(const Demand& d, const Device& device, Rung rung, int threads, int blocks, int at_once) {
  const int64_t bytes = int64_t(shared_chunks(d, rung, threads, blocks)) * d.chunk_bytes * threads;
  const int64_t share = device.multiprocessor_shared / at_once - 1024;
  return bytes <= (share < device.shared_bytes ? share : device.shared_bytes) - d.static_shared;
}

inline int block_threads(const Demand& d) {
  const int64_t warps = ceil_div(d.chunks, 32 * d.register_chunks);
  return int(warps * 32 < d.largest_block ? warps * 32 : d.largest_block);
}

inline Plan with_blocks(const Demand& d, Rung rung, int threads, int blocks) {
  Plan p;
  p.rung = rung;
  p.threads = threads;
  p.blocks = blocks;
  p.shared_chunks = shared_chunks(d, rung, threads, blocks);
  return p;
}

// The number of blocks from `least` on that fits, by doubling up to `most`; 0 where none does.
inline int fitting_blocks(const Demand& d, const Device& device, int threads, int least, int most) {
  for (int blocks = least; blocks <= most; blocks *= 2)
    if (fits(d, device, blocks == 1 ? Rung::kBlock : Rung::kCluster, threads, blocks, kBlocksAtOnce)) return blocks;
  return 0;
}

// Blocks of a cooperative launch, and the same dealt out to teams of at least `blocks`: as few teams as take no more turns,
// and all blocks in use that have a chunk for each thread, for every block's sums are read by all others.
inline int grid_blocks(const Device& device) {
  const int multiprocessors = device.multiprocessors - kGridMargin;
  return device.cooperative && multiprocessors > 0 ? multiprocessors * kBlocksAtOnce : 0;
}
inline Plan grid_plan(const Demand& d, const Device& device, int threads) {
  const int all = grid_blocks(device);
  for (int blocks = 1; blocks <= all; ++blocks) {
    if (!fits(d, device, Rung::kGrid, threads, blocks, kBlocksAtOnce)) continue;
    const int64_t turns = ceil_div(d.groups, all / blocks), teams = ceil_div(d.groups, turns);
    const int64_t busy = ceil_div(d.chunks, threads);
    Plan p = with_blocks(d, Rung::kGrid, threads, int(all / teams < busy ? all / teams : busy));
    p.teams = int(teams);
    return p;
  }
  return Plan();
}

inline Plan resident_plan(const Demand& d, const Device& device) {
  const int whole = block_threads(d), half = whole < d.largest_block / 2 ? whole : d.largest_block / 64 * 32;
  const bool in_registers = d.chunks <= int64_t(whole) * d.register_chunks;
  if (d.sums_elements && in_registers) return with_blocks(d, Rung::kBlock, whole, 1);
  if (d.sums_elements && device.clusters)
    for (int blocks = 2; blocks <= kLargestCluster; blocks *= 2) {
      if (d.chunks > int64_t(whole) * blocks * d.register_chunks) continue;
      Plan p = with_blocks(d, Rung::kCluster, whole, blocks);
      p.shared_chunks = 0;  // the kernel that sums elements keeps as much in registers as a block does
      return p;
    }
  // too few groups for the device: more blocks a group than it needs
  int least = 1;
  while (device.clusters && least < kLargestCluster && d.groups * least <= device.multiprocessors &&
         d.chunks >= int64_t(half) * least * 2)
    least *= 2;
  if (least == 1 && in_registers) return with_blocks(d, Rung::kBlock, whole, 1);
  if (const int blocks = fitting_blocks(d, device, half, least, device.clusters ? kLargestCluster : 1))
    return with_blocks(d, blocks == 1 ? Rung::kBlock : Rung::kCluster, half, blocks);
  if (!device.clusters && fits(d, device, Rung::kBlock, d.largest_block, 1, 1))
    return with_blocks(d, Rung::kBlock, d.largest_block, 1);
  return grid_plan(d, device, half);
}

// How many teams a rung without a fixed number of them runs: enough to fill the device several times over, no more
// than there are groups.
inline int team_count(const Demand& d, const Device& device, int threads, int blocks) {
  const int64_t at_once = int64_t(device.multiprocessors) * ceil_div(d.largest_block, threads) / blocks;
  const int64_t wanted = d.sums_elements ? at_once : at_once * 16;  // each team's parameter sums take memory
  const int64_t teams = d.groups < wanted ? d.groups : wanted;
  return int(teams < 1 ? 1 : teams);
}

inline Plan choose_plan(const Demand& d, const Device& device, const Override& force) {
  Plan p;
  if (force.rung == Rung::kAuto) {
    p = resident_plan(d, device);
  } else {
    const int threads = force.threads ? force.threads : block_threads(d);
    p = with_blocks(d, force.rung, threads, force.blocks ? force.blocks : 1);
  }
  if (p.rung == Rung::kBlock || p.rung == Rung::kCluster) p.teams = team_count(d, device, p.threads, p.blocks);
  if (force.teams) p.teams = force.teams;
  if (p.teams > d.groups) p.teams = int(d.groups);
  return p;
}

// Tiles of a columns walk: co-operating blocks or streaming.
inline Plan choose_tile_plan(const Demand& d, const Device& device, int threads, const Override& force) {
  Plan p;
  if (force.rung == Rung::kGrid) {
    p = with_blocks(d, Rung::kGrid, threads, force.blocks ? force.blocks : 1);
    p.teams = grid_blocks(device) / p.blocks;
  } else if (force.rung == Rung::kAuto) {
    p = grid_plan(d, device, threads);
  }
  if (p.rung != Rung::kGrid) return p;
  if (force.teams) p.teams = force.teams;
  if (p.teams > d.groups) p.teams = int(d.groups);
  if (p.teams < 1) p.teams = 1;
  return p;
}

}  // namespace cuda
}  // namespace normnorm
