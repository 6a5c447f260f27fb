// 在线 softmax 的一格，写在 Vector 之上；各编译单元先包含自己的 simd_*.h。
#pragma once

#include <cstdint>
#include <limits>

#include "kernels.h"

namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// 一格分数（行距 tile）→ 概率（没有除以总和），就地；更新各行的 max、sum，写出旧累加器要乘的 alpha。看不见的 key 得 0。
inline void soften(const dsx::Block& block, int64_t begin, int64_t count, int64_t tile, float* scores, float* alpha) {
    constexpr int L = Vector::kLanes;
    for (int64_t i = 0; i < block.rows; ++i) {
        float* row = scores + i * tile;
        int64_t visible = block.last_visible + (block.first_row + i) / block.rows_per_token + 1 - begin;
        visible = visible < 0 ? 0 : visible > count ? count : visible;
        for (int64_t j = visible; j < tile; ++j) {
            row[j] = kNegInf;
        }
        Vector top = splat(block.max[i]);
        for (int64_t j = 0; j < tile; j += L) {
            top = max(top, load(row + j));
        }
        const float m = horizontal_max(top);
        const float base = m == kNegInf ? 0.0f : m;  // 还没有看得见的 key：-inf 减 -inf 是 NaN
        Vector total = splat(0);
        for (int64_t j = 0; j < tile; j += L) {
            const Vector p = exp(sub(load(row + j), splat(base)));
            store(row + j, p);
            total = add(total, p);
        }
        Vector shrink = exp(splat(block.max[i] - base));
        float lanes[L];
        store(lanes, shrink);
        alpha[i] = lanes[0];
        block.max[i] = m;
        block.sum[i] = block.sum[i] * alpha[i] + horizontal_sum(total);
    }
}

}  // namespace
