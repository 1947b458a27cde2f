// The CPU kernels for one instruction set. This file is compiled once for each; NN_KERNEL_TABLE is the name of the
// function that returns the table.
#include "columns_backward.h"
#include "columns_forward.h"
#include "projected.h"
#include "rows_backward.h"
#include "rows_forward.h"

namespace normnorm {
namespace {

template <class T>
void forward_computed(const cpu::Problem& p) {
  if (p.geometry.columns)
    ColumnForward<T>(p).run();
  else
    RowForward<T>(p).run();
}

template <class T>
void backward_computed(const cpu::Problem& p) {
  if (p.geometry.columns)
    ColumnBackward<T>(p).run();
  else
    RowBackward<T>(p).run();
}

// float64 spends its time in the C library's logarithm and exponential, which do not depend on these instruction sets:
// its kernels are compiled once, in the generic table.
#if defined(NN_GENERIC)
void forward(const cpu::Problem& p) {
  if (p.storage == Storage::kFloat64)
    forward_computed<double>(p);
  else
    forward_computed<float>(p);
}
void backward(const cpu::Problem& p) {
  if (p.storage == Storage::kFloat64)
    backward_computed<double>(p);
  else
    backward_computed<float>(p);
}
double projected_error(const cpu::Projections& p) {
  return p.storage == Storage::kFloat64 ? ProjectedSum<double>(p).run() : ProjectedSum<float>(p).run();
}
#else
void forward(const cpu::Problem& p) {
  if (p.storage == Storage::kFloat64)
    cpu::generic_kernels()->forward(p);
  else
    forward_computed<float>(p);
}
void backward(const cpu::Problem& p) {
  if (p.storage == Storage::kFloat64)
    cpu::generic_kernels()->backward(p);
  else
    backward_computed<float>(p);
}
double projected_error(const cpu::Projections& p) {
  if (p.storage == Storage::kFloat64) return cpu::generic_kernels()->projected_error(p);
  return ProjectedSum<float>(p).run();
}
#endif

}  // namespace

const cpu::Kernels* cpu::NN_KERNEL_TABLE() {
  static const Kernels table = {NN_ISA_NAME, forward, backward, projected_error};
  return &table;
}

}  // namespace normnorm
