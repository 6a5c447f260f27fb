#include "quant_linear.h"

#include <algorithm>

namespace dsx {
namespace {

constexpr int64_t kTaskBytes = 64 * 1024;
constexpr int64_t kMaxTasks = 128;
// 一个任务至多几行激活：量化之后留在 L2，权重的重排仍分摊得掉。
constexpr int64_t kTaskRows = 128;
// 量化这么多个数以内，不值得分给别的线程。
constexpr int64_t kSerialValues = 64 * 1024;

thread_local Scratch call_scratch;  // 发起调用的线程：量化后的激活
thread_local Scratch task_scratch;  // 执行任务的线程：重排后的权重

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

}  // namespace

int64_t columns_per_task(int64_t columns, int64_t row_bytes, int64_t multiple) {
    const int64_t fewest = divide_up(kTaskBytes, row_bytes), most_tasks = divide_up(columns, kMaxTasks);
    return divide_up(std::max(fewest, most_tasks), multiple) * multiple;
}

int64_t quantized_floats(int64_t rows, int64_t blocks, int64_t block) {
    const QuantizedRows shape{rows, blocks, block, nullptr, nullptr, nullptr};
    return rows * (shape.code_stride() / 4 + shape.scale_stride() + shape.start_stride());
}

QuantizedRows carve_rows(float* memory, int64_t rows, int64_t blocks, int64_t block) {
    QuantizedRows out{rows, blocks, block, reinterpret_cast<int8_t*>(memory), nullptr, nullptr};
    out.scales = memory + rows * out.code_stride() / 4;
    out.starts = reinterpret_cast<int32_t*>(out.scales + rows * out.scale_stride());
    return out;
}

QuantizedRows quantize_rows(const float* x, int64_t count, int64_t width, int64_t block, const QuantKernels& kernels,
    const Parallel& parallel, Scratch& scratch) {
    const int64_t blocks = divide_up(width, block);
    const QuantizedRows rows = carve_rows(scratch.need(quantized_floats(count, blocks, block)), count, blocks, block);
    if (count * width <= kSerialValues) {
        kernels.quantize(x, width, width, rows);
        return rows;
    }
    const int64_t step = std::max<int64_t>(1, kSerialValues / width);
    parallel(divide_up(count, step), [&](int64_t task) {
        const int64_t begin = task * step;
        kernels.quantize(x + begin * width, width, width, rows.from(begin, std::min(step, count - begin)));
    });
    return rows;
}

void run(const QuantLinear& op, const QuantKernels& kernels, const Parallel& parallel) {
    if (op.M == 0) {
        return;
    }
    const QuantizedRows rows = quantize_rows(op.x, op.M, op.K, op.block, kernels, parallel, call_scratch);
    const int64_t row_bytes = kernels.bytes(rows.blocks * rows.block);
    const int64_t step = columns_per_task(op.N, row_bytes, kernels.group);
    const int64_t column_tasks = divide_up(op.N, step), row_tasks = divide_up(op.M, kTaskRows);
    parallel(column_tasks * row_tasks, [&](int64_t task) {
        const int64_t column = task % column_tasks * step, row = task / column_tasks * kTaskRows;
        const QuantizedWeights all{op.codes, op.scales, op.N, op.zeros};
        const QuantizedWeights weights = all.from(column, std::min(step, op.N - column), row_bytes, rows.blocks);
        auto* scratch = reinterpret_cast<uint8_t*>(task_scratch.need(multiply_scratch(rows.blocks, rows.block) / 4));
        kernels.multiply(rows.from(row, std::min(kTaskRows, op.M - row)), weights, op.y + row * op.N + column, op.N, scratch);
    });
}

}  // namespace dsx
