// Products of groups of rows, each by a kernel for one matrix. A group that is a large part of the
// work is multiplied by all threads together, one such group after another; of the others every
// thread takes one at a time, with a slot of the workspace of its own.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <string>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "qlora_native/device.h"
#include "qlora_native/error.h"

namespace qlora_native::cpu {
namespace {

/// Groups with less than this part of a thread's share are dealt out whole: what is left to the
/// slowest thread at the end is no longer than one of them.
constexpr int64_t kPartsPerThread = 4;
constexpr int64_t kSlotAlignment = 256;

MatrixView rows_of(const MatrixView& matrix, int64_t first, int64_t last) {
  MatrixView rows = matrix;
  rows.data =
      static_cast<const char*>(matrix.data) + first * matrix.row_stride * size_bytes(matrix.dtype);
  rows.rows = last - first;
  return rows;
}

MutableMatrixView rows_of(const MutableMatrixView& matrix, int64_t first, int64_t last) {
  MutableMatrixView rows = matrix;
  rows.data =
      static_cast<char*>(matrix.data) + first * matrix.row_stride * size_bytes(matrix.dtype);
  rows.rows = last - first;
  return rows;
}

MatmulArgs product_of(const GroupedMatmulArgs& args, int64_t group, int64_t first, int64_t last) {
  MatmulArgs product{
      rows_of(args.x, first, last), args.weights[group], {}, rows_of(args.y, first, last)};
  if (args.bias.data != nullptr) {
    const MatrixView bias = rows_of(args.bias, group, group + 1);
    product.bias = {bias.data, bias.cols, bias.dtype, bias.device};
  }
  return product;
}

MatmulTransposedArgs product_of(const GroupedMatmulTransposedArgs& args, int64_t group,
                                int64_t first, int64_t last) {
  return {rows_of(args.dy, first, last), args.weights[group], rows_of(args.dx, first, last)};
}

const MutableMatrixView& out_of(const GroupedMatmulArgs& args) { return args.y; }
const MutableMatrixView& out_of(const GroupedMatmulTransposedArgs& args) { return args.dx; }

int64_t start_of(const GroupEnds& ends, int64_t group) { return group == 0 ? 0 : ends[group - 1]; }

void clear(const MutableMatrixView& out) {
  for (int64_t row = 0; row < out.rows; ++row) {
    std::memset(rows_of(out, row, row + 1).data, 0,
                static_cast<size_t>(out.cols * size_bytes(out.dtype)));
  }
}

/// How the groups are shared by threads.
template <class Grouped, class Args>
class Cut {
 public:
  Cut(const Grouped& args, ChooseProductFn<Args> choose)
      : args_(args), choose_(choose), threads_(cpu_threads()) {
    const GroupEnds& ends = args.ends;
    rows_ = ends.size == 0 ? 0 : ends[ends.size - 1];
    int64_t shared_bytes = 0;
    for (int64_t group = 0; group < ends.size; ++group) {
      if (is_empty(group)) continue;
      const Args product = product_at(group);
      const ProductKernel<Args> kernel = choose(product);
      if (is_large(group)) {
        if (kernel.workspace_bytes) {
          shared_bytes = std::max(shared_bytes, kernel.workspace_bytes(product));
        }
      } else {
        ++slots_;
        if (kernel.least_workspace_bytes) {
          slot_bytes_ = std::max(slot_bytes_, kernel.least_workspace_bytes(product));
        }
      }
    }
    slots_ = std::min<int64_t>(slots_, threads_);
    slot_bytes_ = (slot_bytes_ + kSlotAlignment - 1) / kSlotAlignment * kSlotAlignment;
    workspace_bytes_ = std::max(shared_bytes, slots_ * slot_bytes_);
  }

  int64_t workspace_bytes() const { return workspace_bytes_; }

  void run(Workspace workspace) const {
    for (int64_t group = 0; group < args_.ends.size; ++group) {
      if (!is_empty(group) && is_large(group)) run_group(group, workspace);
    }
    std::atomic<int64_t> next{0};
    parallel_for(slots_, 1, [&](int64_t slot, int64_t) {
      const Workspace own{static_cast<char*>(workspace.data) + slot * slot_bytes_, slot_bytes_};
      for (;;) {
        const int64_t group = next.fetch_add(1, std::memory_order_relaxed);
        if (group >= args_.ends.size) return;
        if (!is_empty(group) && !is_large(group)) run_group(group, own);
      }
    });
    const MutableMatrixView& out = out_of(args_);
    clear(rows_of(out, rows_, out.rows));
  }

 private:
  int64_t rows_in(int64_t group) const { return args_.ends[group] - start_of(args_.ends, group); }
  bool is_empty(int64_t group) const { return rows_in(group) == 0; }
  bool is_large(int64_t group) const { return rows_in(group) * kPartsPerThread * threads_ > rows_; }
  Args product_at(int64_t group) const {
    return product_of(args_, group, start_of(args_.ends, group), args_.ends[group]);
  }
  void run_group(int64_t group, Workspace workspace) const {
    const Args product = product_at(group);
    choose_(product).run(product, workspace);
  }

  const Grouped& args_;
  ChooseProductFn<Args> choose_;
  int64_t threads_;
  int64_t rows_ = 0;  ///< of all groups
  int64_t slots_ = 0;
  int64_t slot_bytes_ = 0;
  int64_t workspace_bytes_ = 0;
};

template <class Grouped, class Args>
void run_cut(const Grouped& args, Workspace workspace, ChooseProductFn<Args> choose) {
  const Cut<Grouped, Args> cut(args, choose);
  if (workspace.size_bytes < cut.workspace_bytes()) {
    throw InvalidArgument("the workspace of " + std::to_string(workspace.size_bytes) +
                          " bytes is too small for the number of CPU threads, which has changed");
  }
  cut.run(workspace);
}

}  // namespace

int64_t largest_group(const GroupEnds& ends) {
  int64_t largest = 0;
  for (int64_t group = 0; group < ends.size; ++group) {
    largest = std::max(largest, ends[group] - start_of(ends, group));
  }
  return largest;
}

int64_t grouped_workspace_bytes(const GroupedMatmulArgs& args, ChooseProductFn<MatmulArgs> choose) {
  return Cut(args, choose).workspace_bytes();
}

int64_t grouped_workspace_bytes(const GroupedMatmulTransposedArgs& args,
                                ChooseProductFn<MatmulTransposedArgs> choose) {
  return Cut(args, choose).workspace_bytes();
}

void run_grouped(const GroupedMatmulArgs& args, Workspace workspace,
                 ChooseProductFn<MatmulArgs> choose) {
  run_cut(args, workspace, choose);
}

void run_grouped(const GroupedMatmulTransposedArgs& args, Workspace workspace,
                 ChooseProductFn<MatmulTransposedArgs> choose) {
  run_cut(args, workspace, choose);
}

}  // namespace qlora_native::cpu
