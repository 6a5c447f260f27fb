#include "quant_experts.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "quant_linear.h"

namespace dsx {
namespace {

// 一个任务一次算几行：激活与结果留在 L2，权重的重排仍分摊得掉。gather 也按它分。
constexpr int64_t kSliceRows = 256;
// 一片结果之后的内存从 64 字节的边界开始。
constexpr int64_t kAlign = 16;

thread_local Scratch token_scratch, gathered_scratch, hidden_scratch, quantized_scratch;  // 发起调用的线程
thread_local Scratch task_scratch;  // 执行任务的线程：重排后的权重、一块结果

// 选中的 (token, 专家) 对，按专家、再按 token 排；一对占一行。
struct Routing {
    std::vector<int64_t> active;   // 有 token 的专家，升序
    std::vector<int64_t> begin;    // 各活动专家的第一行，另加末尾的总行数
    std::vector<int64_t> token;    // 各行的 token
    std::vector<float> weight;     // 各行的路由权重
    std::vector<int64_t> chosen;   // [N, k]，暂存
    std::vector<float> chosen_weight;
};

// 取 log 权重最大的 k 个（并列取小下标），在它们之上做 softmax。
void choose(const float* log_weights, int64_t E, int64_t k, int64_t* experts, float* weights) {
    int64_t count = 0;
    for (int64_t e = 0; e < E; ++e) {
        int64_t at = count;
        while (at > 0 && log_weights[e] > weights[at - 1]) {
            --at;
        }
        if (at == k) {
            continue;
        }
        count = std::min(count + 1, k);
        for (int64_t i = count - 1; i > at; --i) {
            weights[i] = weights[i - 1], experts[i] = experts[i - 1];
        }
        weights[at] = log_weights[e], experts[at] = e;
    }
    const float top = weights[0];
    float sum = 0;
    for (int64_t i = 0; i < k; ++i) {
        weights[i] = std::exp(weights[i] - top);
        sum += weights[i];
    }
    for (int64_t i = 0; i < k; ++i) {
        weights[i] /= sum;
    }
}

void route(const QuantExperts& op, Routing& to) {
    const int64_t rows = op.N * op.k;
    to.chosen.resize(rows), to.chosen_weight.resize(rows), to.token.resize(rows), to.weight.resize(rows);
    to.active.clear(), to.begin.clear();
    std::vector<int64_t> next(op.E, 0);
    for (int64_t i = 0; i < op.N; ++i) {
        choose(op.log_weights + i * op.E, op.E, op.k, &to.chosen[i * op.k], &to.chosen_weight[i * op.k]);
    }
    for (const int64_t expert : to.chosen) {
        ++next[expert];
    }
    int64_t row = 0;
    for (int64_t e = 0; e < op.E; ++e) {
        const int64_t count = next[e];
        next[e] = row;
        if (count > 0) {
            to.active.push_back(e), to.begin.push_back(row);
        }
        row += count;
    }
    to.begin.push_back(row);
    for (int64_t i = 0; i < rows; ++i) {
        const int64_t at = next[to.chosen[i]]++;
        to.token[at] = i / op.k, to.weight[at] = to.chosen_weight[i];
    }
}

// 各行的激活按 routing 的次序排好，一个专家的行因此是连续的。
QuantizedRows gather(const QuantizedRows& tokens, const Routing& routing, const Parallel& parallel) {
    const auto count = static_cast<int64_t>(routing.token.size());
    const int64_t floats = quantized_floats(count, tokens.blocks, tokens.block);
    const QuantizedRows out = carve_rows(gathered_scratch.need(floats), count, tokens.blocks, tokens.block);
    const auto copy = [&](int64_t row) {
        const QuantizedRows from = tokens.from(routing.token[row], 1), to = out.from(row, 1);
        std::memcpy(to.codes, from.codes, static_cast<size_t>(from.code_stride()));
        std::memcpy(to.scales, from.scales, static_cast<size_t>(from.scale_stride()) * sizeof(float));
        std::memcpy(to.starts, from.starts, static_cast<size_t>(from.start_stride()) * sizeof(int32_t));
    };
    parallel((count + kSliceRows - 1) / kSliceRows, [&](int64_t task) {
        for (int64_t row = task * kSliceRows; row < std::min(count, (task + 1) * kSliceRows); ++row) {
            copy(row);
        }
    });
    return out;
}

// 一个专家的几行乘它的几列权重，逐片交给 use(第一行, 行数, 结果)；结果的行距是 weights.columns。
template <typename Use>
void multiply_slices(const QuantizedRows& rows, int64_t begin, int64_t end, const QuantizedWeights& weights,
    const QuantKernels& kernels, Use&& use) {
    const int64_t result = kSliceRows * weights.columns;
    float* y = task_scratch.need(result + kAlign + multiply_scratch(rows.blocks, rows.block) / 4);
    auto* scratch = reinterpret_cast<uint8_t*>(y + (result + kAlign - 1) / kAlign * kAlign);
    for (int64_t row = begin; row < end; row += kSliceRows) {
        const int64_t count = std::min(kSliceRows, end - row);
        kernels.multiply(rows.from(row, count), weights, y, weights.columns, scratch);
        use(row, count, y);
    }
}

}  // namespace

void run(const QuantExperts& op, const QuantKernels& kernels, const Parallel& parallel) {
    if (op.N == 0) {
        return;
    }
    thread_local Routing kept;  // 只增不减，一步里不再分配
    Routing& routing = kept;
    route(op, routing);
    const auto active = static_cast<int64_t>(routing.active.size());
    const QuantizedRows tokens = quantize_rows(op.x, op.N, op.D, op.block, kernels, parallel, token_scratch);
    const QuantizedRows rows = gather(tokens, routing, parallel);
    float* hidden = hidden_scratch.need(rows.rows * op.I);

    const int64_t row_bytes = kernels.bytes(op.D), inner_bytes = kernels.bytes(op.I);
    const int64_t step = columns_per_task(2 * op.I, row_bytes, kernels.group);
    const int64_t chunks = (2 * op.I + step - 1) / step, blocks = op.D / op.block;
    const QuantizedWeights gate_up{op.gate_up, op.gate_up_scales, op.E * 2 * op.I, op.gate_up_zeros};
    const QuantizedWeights down{op.down, op.down_scales, op.E * op.D, op.down_zeros};
    parallel(active * chunks, [&](int64_t task) {
        const int64_t a = task / chunks, column = task % chunks * step;
        const int64_t first = routing.active[a] * 2 * op.I + column;
        const QuantizedWeights weights = gate_up.from(first, std::min(step, 2 * op.I - column), row_bytes, blocks);
        multiply_slices(rows, routing.begin[a], routing.begin[a + 1], weights, kernels,
            [&](int64_t row, int64_t count, const float* y) {
                for (int64_t i = 0; i < count; ++i) {
                    kernels.swiglu(
                        y + i * weights.columns, weights.columns / 2, hidden + (row + i) * op.I + column / 2);
                }
            });
    });

    // 各任务独占 y 的几列，专家的次序固定：结果与线程数无关。
    const QuantizedRows inner =
        quantize_rows(hidden, rows.rows, op.I, op.block, kernels, parallel, quantized_scratch);
    const int64_t out_step = columns_per_task(op.D, inner_bytes * std::min(op.E, op.N * op.k), kernels.group);
    parallel((op.D + out_step - 1) / out_step, [&](int64_t task) {
        const int64_t column = task * out_step, columns = std::min(out_step, op.D - column);
        for (int64_t i = 0; i < op.N; ++i) {
            std::fill_n(op.y + i * op.D + column, columns, 0.0f);
        }
        for (int64_t a = 0; a < active; ++a) {
            const int64_t first = routing.active[a] * op.D + column;
            QuantizedWeights weights = down.from(first, columns, inner_bytes, inner.blocks);
            // 接着读下一个专家的同几列，或（多半由同一个线程）第一个专家的后几列。
            weights.next = a + 1 < active ? (routing.active[a + 1] - routing.active[a]) * op.D
                                          : (routing.active[0] - routing.active[a]) * op.D + columns;
            multiply_slices(inner, routing.begin[a], routing.begin[a + 1], weights, kernels,
                [&](int64_t row, int64_t count, const float* y) {
                    for (int64_t i = 0; i < count; ++i) {
                        const float weight = routing.weight[row + i];
                        float* to = op.y + routing.token[row + i] * op.D + column;
                        for (int64_t j = 0; j < columns; ++j) {
                            to[j] += weight * y[i * columns + j];
                        }
                    }
                });
        }
    });
}

}  // namespace dsx
