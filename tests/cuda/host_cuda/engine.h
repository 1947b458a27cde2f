// Runs the threads of CUDA blocks on the CPU, and reports deadlocks.
//
// A block is a thread of the operating system. Its CUDA threads are fibres, run one at a time in a given order and switched
// only at barriers and shuffles. Blocks of one cluster, or of a cooperative launch, run concurrently.
#pragma once

#include <vector_types.h>  // NVIDIA's dim3 and uint3

#include <algorithm>
#include <array>
#include <atomic>
#include <cstring>
#include <deque>
#include <functional>
#include <mutex>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "../../../csrc/cuda/params.h"
#include "fibre.h"

namespace host_cuda {

constexpr int kWarp = 32;
constexpr size_t kDynamicShared = 232448;

// How the next launches run, set by the tests.
struct Settings {
  int order = 0;           // of a block's threads: 0 forward, 1 backward, more: shuffles
  bool watch = false;      // whether barrier sites are recorded, and may be left out
  std::string skip;        // a barrier site to be left out, "file:line"
  std::set<std::string> sites;
  std::mutex lock;
  normnorm::cuda::Device device;    // what plans are made for
  int co_resident = 1 << 30;        // blocks that the device is said to run at the same time
  bool refuse_cooperative = false;  // whether cooperative launches fail all the same
  std::vector<std::array<int, 3>> launches;  // blocks, blocks of a cluster, whether cooperative
};
inline Settings& settings() {
  static Settings s;
  return s;
}

// A barrier among threads of one block. A waiting thread waits for the end of its generation.
struct Barrier {
  int members = 0, arrived = 0;
  unsigned generation = 0;
  const char* file = nullptr;  // the site at which the first thread waits
  unsigned line = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slot[2][kWarp] = {};
};

struct Fibre {
  Context context;
  uint3 thread{};
  int lane = 0;
  Warp* warp = nullptr;
  unsigned shuffles = 0;
  const Barrier* waits = nullptr;
  unsigned generation = 0;
  bool done = false;
  std::deque<std::pair<void*, const void*>> copies;  // asynchronous ones; a null pair ends a group
};

// Blocks that run concurrently.
struct Concurrent {
  int size = 1;
  std::atomic<int> arrived{0}, finished{0};
  std::atomic<unsigned> generation{0}, round{0};
  std::atomic<bool> failed{false};
  std::mutex lock;
  std::string message;
  std::vector<char*> mark;                 // the address of each block's thread-local storage
  std::vector<std::atomic<bool>> running;  // whether a block of this round has begun
  std::vector<std::atomic<bool>> met;      // whether it has reached a barrier, or ended
  explicit Concurrent(int n) : size(n), mark(size_t(n)), running(size_t(n)), met(size_t(n)) {}
};

struct Block {
  dim3 block_index, block_dim, grid_dim;
  int rank = 0;
  Concurrent* concurrent = nullptr;
  Barrier barrier, cluster_barrier;
  std::vector<Warp> warps;
  std::vector<Fibre> fibres;
  Fibre* current = nullptr;
  int patience = 100000;  // checks after another block has ended before the wait is hopeless
  Context scheduler;
  const std::function<void()>* body = nullptr;
};

inline thread_local Block* block = nullptr;
inline thread_local char mark[16];  // at the same distance from every __shared__ variable in each thread
alignas(16) inline thread_local unsigned char dynamic_shared[kDynamicShared];

inline void fail(const std::string& message) {
  Concurrent& c = *block->concurrent;
  {
    std::lock_guard<std::mutex> guard(c.lock);
    if (c.message.empty()) c.message = message;
  }
  c.failed = true;
  // never resumed: the launch ends
  for (;;) switch_context(block->current->context, block->scheduler);
}

inline void wait_for(Barrier& b) {
  Fibre& f = *block->current;
  f.generation = b.generation;
  if (++b.arrived >= b.members) {
    b.arrived = 0;
    ++b.generation;
    return;
  }
  f.waits = &b;
  switch_context(f.context, block->scheduler);
  f.waits = nullptr;
}

inline void leave(Barrier& b) {
  if (--b.members > 0 && b.arrived >= b.members) {
    b.arrived = 0;
    ++b.generation;
  }
}

// Called while a barrier among blocks is closed. It stays closed if a block has ended without reaching it; a block that ends
// right after the barrier looks the same for a while, hence the patience.
inline void yield_to_blocks(const char* hopeless) {
  const Concurrent& c = *block->concurrent;
  if (c.failed) fail("");
  if (c.finished > 0 && --block->patience < 0) fail(hopeless);
  std::this_thread::yield();
}

// A barrier among all concurrent blocks, called by one fibre of each.
inline void wait_for_blocks() {
  Concurrent& c = *block->concurrent;
  c.met[size_t(block->rank)] = true;
  const unsigned before = c.generation;
  if (++c.arrived == c.size) {
    c.arrived = 0;
    ++c.generation;
    return;
  }
  while (c.generation == before) yield_to_blocks("a block of the cluster ended while others wait at a cluster barrier");
}

inline void fibre_entry() {
  (*block->body)();
  Fibre& f = *block->current;
  f.done = true;
  leave(f.warp->barrier);
  leave(block->barrier);
  leave(block->cluster_barrier);
  for (;;) switch_context(f.context, block->scheduler);
}

inline std::vector<int> thread_order(int count, int order) {
  std::vector<int> sequence(static_cast<size_t>(count));
  std::iota(sequence.begin(), sequence.end(), 0);
  if (order == 1) std::reverse(sequence.begin(), sequence.end());
  if (order > 1) std::shuffle(sequence.begin(), sequence.end(), std::mt19937(unsigned(order)));
  return sequence;
}

// Runs a block's fibres in turn until all have ended; if none can run, that is a deadlock.
inline void run_block(Block& b, Stacks& stacks, int order) {
  const int count = int(b.block_dim.x);
  b.fibres.assign(size_t(count), Fibre{});
  b.warps.assign(size_t((count + kWarp - 1) / kWarp), Warp{});
  b.barrier = Barrier{count};
  b.cluster_barrier = Barrier{count};
  stacks.forget();
  for (int i = 0; i < count; ++i) {
    Fibre& f = b.fibres[size_t(i)];
    f.thread = {unsigned(i), 0, 0};
    f.lane = i % kWarp;
    f.warp = &b.warps[size_t(i / kWarp)];
    ++f.warp->barrier.members;
    make_context(f.context, stacks.of(size_t(i)), Stacks::usable(size_t(i)), fibre_entry);
  }
  memset(dynamic_shared, 0xff, sizeof dynamic_shared);  // NaN: shared memory is not initialised
  block = &b;
  const std::vector<int> sequence = thread_order(count, order);
  for (int alive = count; alive > 0;) {
    bool progress = false;
    for (int i : sequence) {
      Fibre& f = b.fibres[size_t(i)];
      if (f.done || (f.waits && f.waits->generation == f.generation)) continue;
      progress = true;
      b.current = &f;
      switch_context(b.scheduler, f.context);
      if (b.concurrent->failed) return;
      if (f.done) --alive;
    }
    if (progress) continue;
    std::lock_guard<std::mutex> guard(b.concurrent->lock);
    b.concurrent->message = "deadlock in block " + std::to_string(b.block_index.x) +
                         ": some threads wait at a barrier that the others never reach";
    b.concurrent->failed = true;
    return;
  }
}

// A block begins when the block of the rank below has reached a barrier, so that an access to the shared memory of a block
// that has not begun is always detected.
inline void await_turn(Concurrent& c, int rank) {
  while (rank > 0 && !c.met[size_t(rank - 1)] && !c.failed) std::this_thread::yield();
}

// The blocks of a round end together, so that none overlaps with the next round.
inline void end_round(Concurrent& c, int rank) {
  c.met[size_t(rank)] = true;
  const unsigned round = c.round;
  if (++c.finished == c.size) {
    for (auto& m : c.met) m = false;
    for (auto& r : c.running) r = false;
    c.finished = 0;
    ++c.round;
  }
  while (c.round == round && !c.failed) std::this_thread::yield();
}

inline void run_blocks(Concurrent& c, int rank, unsigned rounds, Block b, int order) {
  Stacks stacks(b.block_dim.x);
  b.rank = rank;
  b.concurrent = &c;
  c.mark[size_t(rank)] = mark;
  for (unsigned k = 0; k < rounds && !c.failed; ++k) {
    b.block_index = dim3(k * unsigned(c.size) + unsigned(rank));
    await_turn(c, rank);
    c.running[size_t(rank)] = true;
    run_block(b, stacks, order);
    end_round(c, rank);
  }
}

// Runs a kernel. concurrent: blocks that run at the same time (a cluster, or the whole grid of a cooperative launch).
inline void run_grid(dim3 grid, dim3 block_dim, int concurrent, const std::function<void()>& body) {
  if (grid.x % unsigned(concurrent)) throw std::invalid_argument("the grid is not a multiple of the cluster's size");
  if (block_dim.x % kWarp) throw std::invalid_argument("blocks must have whole warps");
  Concurrent c(concurrent);
  Block prototype;
  prototype.block_dim = block_dim;
  prototype.grid_dim = grid;
  prototype.body = &body;
  const int order = settings().order;
  std::vector<std::thread> threads;
  for (int rank = 0; rank < concurrent; ++rank)
    threads.emplace_back(run_blocks, std::ref(c), rank, grid.x / unsigned(concurrent), prototype, order);
  for (auto& t : threads) t.join();
  if (c.failed) throw std::runtime_error(c.message);
}

}  // namespace host_cuda
