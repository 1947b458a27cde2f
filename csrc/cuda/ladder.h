// The residency ladder: where a group lives while its rounds are taken, by its size, and how many threads serve it.
//
//   group fits in                              rung       team                                     device memory
//   registers of one block                     kBlock     one block (32 to 512 threads)            1 read, 1 write
//   registers + shared memory of one block     kBlock     one block of 512 threads                 1 read, 1 write
//   the same of a cluster, up to 8 blocks      kCluster   a cluster (sm_90 on)                     1 read, 1 write
//   the same of many co-operating blocks       kGrid      a share of a cooperative launch's blocks 1 read, 1 write
//   no such place                              kStreaming many blocks, a launch a round            4-5 reads, 1 write
//
// Groups are also spread over more blocks than they need where there are too few groups to fill the device.
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
  int static_shared = 20480;       // bytes that the kernel's own buffers take, with room
  bool one_block = false;          // in one block's registers, parameters' gradients can be summed as well
};

constexpr int kLargestBlock = 512, kLargestCluster = 8;
constexpr int kGridBlock = 384;  // with 512 threads the co-operating blocks' backward pass would spill registers
constexpr int kGridMargin = 3;        // multiprocessors left to other streams' kernels in a cooperative launch

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Chunks that a thread of a team of `threads` must keep in shared memory.
inline int shared_chunks(const Demand& d, int64_t threads) {
  const int64_t each = divide_up(d.chunks, threads);
  return each > d.register_chunks ? int(each - d.register_chunks) : 0;
}
inline bool fits(const Demand& d, const Device& device, int threads, int blocks) {
  const int64_t bytes = int64_t(shared_chunks(d, int64_t(threads) * blocks)) * d.chunk_bytes * threads;
  return bytes <= device.shared_bytes - d.static_shared;
}

inline int block_threads(const Demand& d) {
  const int64_t warps = divide_up(d.chunks, 32 * d.register_chunks);
  return int(warps * 32 < kLargestBlock ? warps * 32 : kLargestBlock);
}

inline Plan with_blocks(const Demand& d, Rung rung, int threads, int blocks) {
  Plan p;
  p.rung = rung;
  p.threads = threads;
  p.blocks = blocks;
  p.shared_chunks = shared_chunks(d, int64_t(threads) * blocks);
  return p;
}

// The number of blocks from `least` on that fits, by doubling up to `most`; 0 where none does.
inline int fitting_blocks(const Demand& d, const Device& device, int threads, int least, int most) {
  for (int blocks = least; blocks <= most; blocks *= 2)
    if (fits(d, device, threads, blocks)) return blocks;
  return 0;
}

inline Plan resident_plan(const Demand& d, const Device& device) {
  const int threads = block_threads(d);
  if (d.one_block && d.chunks <= int64_t(threads) * d.register_chunks) return with_blocks(d, Rung::kBlock, threads, 1);
  // too few groups for the device: more blocks a group than it needs
  int least = 1;
  while (least < kLargestCluster && d.groups * least * 2 <= device.multiprocessors &&
         d.chunks >= int64_t(threads) * least * 2)
    least *= 2;
  const int most = device.clusters ? kLargestCluster : 1;
  if (!device.clusters) least = 1;
  if (const int blocks = fitting_blocks(d, device, threads, least, most))
    return with_blocks(d, blocks == 1 ? Rung::kBlock : Rung::kCluster, threads, blocks);
  const int all = device.multiprocessors - kGridMargin;
  for (int blocks = 2; blocks <= all; ++blocks) {
    if (!fits(d, device, kGridBlock, blocks)) continue;
    Plan p = with_blocks(d, Rung::kGrid, kGridBlock, all / (all / blocks));
    p.teams = all / p.blocks;
    return p;
  }
  return Plan();
}

// How many teams a rung without a fixed number of them runs: enough to fill the device several times over, no more
// than there are groups.
inline int team_count(const Demand& d, const Device& device, int threads, int blocks) {
  const int64_t at_once = int64_t(device.multiprocessors) * (2048 / threads) / blocks;
  const int64_t wanted = d.one_block ? at_once : at_once * 4;
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

// Tiles of a columns walk: co-operating blocks or streaming. Several tiles at work at the same time, where they fit,
// hide each other's barriers.
inline Plan choose_tile_plan(const Demand& d, const Device& device, int threads, const Override& force) {
  Plan p;
  const int all = device.multiprocessors - kGridMargin;
  if (force.rung == Rung::kGrid) {
    p = with_blocks(d, Rung::kGrid, threads, force.blocks ? force.blocks : 1);
  } else if (force.rung == Rung::kAuto) {
    int blocks = 1;
    while (blocks <= all && !fits(d, device, threads, blocks)) ++blocks;
    if (blocks > all) return p;
    const int64_t teams = d.groups < all / blocks ? d.groups : all / blocks;
    p = with_blocks(d, Rung::kGrid, threads, int(all / teams));
  }
  if (p.rung != Rung::kGrid) return p;
  p.teams = force.teams ? force.teams : all / p.blocks;
  if (p.teams > d.groups) p.teams = int(d.groups);
  if (p.teams < 1) p.teams = 1;
  return p;
}

}  // namespace cuda
}  // namespace normnorm
