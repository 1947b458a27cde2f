// The rows layout: a group is a few runs of contiguous elements (NCHW channels, rows of a layer norm, ...).
//
// Groups are cut into blocks that fit the first-level cache: pieces of a run or, where runs are short and have the same
// weight and bias, several runs gathered into a buffer.
#pragma once

#include "epilogue.h"
#include "noise.h"
#include "reduce.h"

namespace normnorm {
namespace {

constexpr int64_t kBlock = 2048;       // elements in a block
constexpr int64_t kShortRun = 512;     // shorter runs are gathered
constexpr int64_t kRunInPlace = 128;   // the same in evaluation; gathered runs are not prefetched
constexpr int64_t kScratch = 1 << 18;  // groups up to this size cache intermediate values in a thread's scratch memory
constexpr int64_t kSmallGroup = 1 << 17;  // groups up to this size cache a second value in the backward pass
constexpr int64_t kMaxBundle = 16;     // groups processed together

// Part of a run, or `runs` whole runs, from element `offset` of run `run` on.
struct Block {
  int64_t run, runs, offset, size;
};

// How every group is cut into blocks.
class BlockPlan {
 public:
  BlockPlan(const Geometry& g, bool gather) : runs_(g.runs), length_(g.length) {
    if (gather && g.runs > 1 && g.length < kShortRun) runs_per_block_ = clamped(kBlock / g.length, 1, g.runs);
    pieces_ = ceil_div(g.length, kBlock);
    piece_ = ceil_div(ceil_div(g.length, pieces_), 16) * 16;
    pieces_ = ceil_div(g.length, piece_);
  }

  int64_t blocks() const { return runs_per_block_ > 1 ? ceil_div(runs_, runs_per_block_) : runs_ * pieces_; }

  Block operator[](int64_t b) const {
    if (runs_per_block_ > 1) {
      const int64_t run = b * runs_per_block_, runs = smaller(runs_per_block_, runs_ - run);
      return {run, runs, 0, runs * length_};
    }
    const int64_t offset = b % pieces_ * piece_;
    return {b / pieces_, 1, offset, smaller(piece_, length_ - offset)};
  }

 private:
  int64_t runs_, length_, runs_per_block_ = 1, pieces_ = 1, piece_ = 1;
};

struct GroupIndex {
  int64_t outer, inner, group;
};

// Access to the blocks of a problem in the rows layout.
template <class T>
class RowLayout {
 public:
  using V = VectorOf<T>;

  explicit RowLayout(const cpu::Problem& p)
      : p_(p),
        g_(p.geometry),
        half_(stored_as_half(p.storage)),
        plan_(p.geometry, p.affine == Affine::kPerGroup) {
    noise_ = {p.seed, p.noise.stream, p.noise};
  }

  const BlockPlan& plan() const { return plan_; }
  int64_t group_size() const { return g_.group_size(); }
  // Whether blocks are several runs, in a buffer.
  bool gathers() const { return plan_[0].runs > 1; }
  // Whether evaluation takes such runs one by one, where they are long enough to repay each its constants.
  bool evaluates_runs() const { return gathers() && !half_ && g_.length >= kRunInPlace; }
  GroupIndex index(int64_t group) const { return {group / g_.inner, group % g_.inner, group}; }

  // Whether threads share each group, which few large groups need; otherwise each group stays in one core's cache.
  bool split_groups() const {
    return g_.groups() < 4 * int64_t(p_.pool.threads) && plan_.blocks() >= 2 * int64_t(p_.pool.threads);
  }

  // The number of small groups processed together, so that the end of one's reduction overlaps the start of the next's.
  int64_t bundle() const {
    return split_groups() ? 1 : clamped(kBlock / (group_size() > 0 ? group_size() : 1), 1, kMaxBundle);
  }

  // Whether groups have their cache in scratch memory of bundle() x group_size() elements, which one round alone cannot
  // leave to the next.
  bool scratched() const { return p_.round == Round::kAll && group_size() <= kScratch; }

  // The block's elements in the compute dtype: in place, or copied to `buffer` of kBlock elements. Of long runs those of
  // the next group are prefetched.
  const T* fetch(const Operand& from, const GroupIndex& at, const Block& b, T* buffer) const {
    const int64_t offset = locate(from, at, b);
    if (b.runs == 1 && !half_) return static_cast<const T*>(from.data) + offset;
    const int64_t length = b.runs == 1 ? b.size : g_.length;
    const int64_t size = half_ ? 2 : sizeof(T);
    const char* next = static_cast<const char*>(from.data) + (offset + from.stride.inner) * size;
    if (b.runs > 1 && length >= kRunInPlace)
      for (int64_t r = 0; r < b.runs; ++r, next += from.stride.run * size)
        for (int64_t byte = 0; byte < length * size; byte += 64) __builtin_prefetch(next + byte, 0, 2);
    for (int64_t r = 0; r < b.runs; ++r)
      load_run(p_.storage, from.data, offset + r * from.stride.run, buffer + r * length, length);
    return buffer;
  }
  // Where to write the block in the compute dtype, in place or to `buffer`; store() then copies the buffer.
  T* destination(const Operand& to, const GroupIndex& at, const Block& b, T* buffer) const {
    return b.runs == 1 && !half_ ? static_cast<T*>(to.data) + locate(to, at, b) : buffer;
  }
  void store(const Operand& to, const GroupIndex& at, const Block& b, const T* buffer) const {
    if (b.runs == 1 && !half_) return;
    const int64_t offset = locate(to, at, b), length = b.runs == 1 ? b.size : g_.length;
    for (int64_t r = 0; r < b.runs; ++r)
      store_run(p_.storage, to.data, offset + r * to.stride.run, buffer + r * length, length);
  }

  // sum = input + addend
  void add_addend(const GroupIndex& at, const Block& b) const {
    T u_buffer[kBlock], addend_buffer[kBlock], sum_buffer[kBlock];
    add_row(destination(p_.sum, at, b, sum_buffer), fetch(p_.input, at, b, u_buffer),
            fetch(p_.addend, at, b, addend_buffer), b.size);
    store(p_.sum, at, b, sum_buffer);
  }

  void apply_epilogue(const GroupIndex& at, const Block& b, T* out) const {
    if (!has_epilogue(p_)) return;
    T buffer[kBlock];
    epilogue_row(p_, out, p_.residual.data ? fetch(p_.residual, at, b, buffer) : nullptr, b.size);
  }

  // The block's gradient before the activation.
  const T* fetch_gradient(const GroupIndex& at, const Block& b, T* buffer) const {
    const T* g = fetch(p_.grad_output, at, b, buffer);
    if (!has_activation(p_)) return g;
    T output_buffer[kBlock];
    mask_row(p_.activation, buffer, g, fetch(p_.activated, at, b, output_buffer), b.size);
    return buffer;
  }

  void add_sum_gradient(const GroupIndex& at, const Block& b, T* out) const {
    if (!p_.grad_sum.data) return;
    T buffer[kBlock];
    add_row(out, out, fetch(p_.grad_sum, at, b, buffer), b.size);
  }

  // Whether every block has a cache.
  bool caches(const Operand& to) const {
    return scratched() || (!gathers() && !half_ && to.data);
  }

  // The block's part of the group's cache: in scratch memory, in the tensor that will be written, or null.
  T* cache(const Operand& to, const GroupIndex& at, const Block& b, T* scratch) const {
    if (scratched()) return scratch + b.run * g_.length + b.offset;
    return b.runs == 1 && !half_ && to.data ? static_cast<T*>(to.data) + locate(to, at, b) : nullptr;
  }

  // The block's normals; `buffer` has kBlock + kNoiseSlack elements.
  const T* block_normals(const GroupIndex& at, const Block& b, T* buffer) const {
    const Strides& s = p_.noise.position;
    const int64_t position = at.outer * s.outer + at.inner * s.inner + b.run * s.run + b.offset;
    if (b.runs == 1) return normals(buffer, position, b.size, noise_);
    normals_of_runs(buffer, position, s.run, g_.length, b.runs, noise_);
    return buffer;
  }

  // The weight or bias of a whole block; `missing` where there is none or it varies by element.
  T parameter(const void* values, const GroupIndex& at, const Block& b, T missing) const {
    if (!values || p_.affine == Affine::kPerElement) return missing;
    const int64_t i = p_.affine == Affine::kPerRun ? at.inner * g_.runs + b.run : at.inner;
    return static_cast<const T*>(values)[i];
  }

 private:
  int64_t locate(const Operand& of, const GroupIndex& at, const Block& b) const {
    const Strides& s = of.stride;
    return at.outer * s.outer + at.inner * s.inner + b.run * s.run + b.offset;
  }

  const cpu::Problem& p_;
  const Geometry& g_;
  const bool half_;
  BlockPlan plan_;
  NoiseSource noise_;
};

}  // namespace
}  // namespace normnorm
