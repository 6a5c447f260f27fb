// 在线 softmax 的一格，写在 Vector 之上；各编译单元先包含自己的 simd_*.h。一路一个 key 的是 soften，一路一行 query 的是 soften_lanes。
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

// 一路一行的写法里在线 softmax 的状态：行数补齐到整组，补的行从头算起，不写回。
struct Running {
    static constexpr int64_t kFloats = 3 * dsx::kBlockRows;

    Running(const dsx::Block& block, float* memory)
        : top(memory), sum(top + dsx::kBlockRows), alpha(sum + dsx::kBlockRows) {
        for (int64_t i = 0; i < dsx::kBlockRows; ++i) {
            top[i] = i < block.rows ? block.max[i] : kNegInf;
            sum[i] = i < block.rows ? block.sum[i] : 0;
        }
    }
    void finish(const dsx::Block& block) const {
        for (int64_t i = 0; i < block.rows; ++i) {
            block.max[i] = top[i];
            block.sum[i] = sum[i];
        }
    }

    float *top, *sum, *alpha;  // 各 kBlockRows 个
};

// 第 first 行起的一组对一格 key，scores[key, kLanes]：看不见的成为 -inf。room 不小于 count，多出的都看不见。
inline void hide(const dsx::Block& block, int64_t first, int64_t begin, int64_t count, int64_t room, float* scores) {
    constexpr int L = Vector::kLanes;
    int64_t seen[L], least = count;
    for (int i = 0; i < L; ++i) {
        const int64_t visible = block.last_visible + (block.first_row + first + i) / block.rows_per_token + 1 - begin;
        seen[i] = visible < 0 ? 0 : visible > count ? count : visible;
        least = seen[i] < least ? seen[i] : least;
    }
    for (int64_t j = least; j < room; ++j) {
        for (int i = 0; i < L; ++i) {
            if (j >= seen[i]) {
                scores[j * L + i] = kNegInf;
            }
        }
    }
}

// 一组的一格：更新状态，概率（没有除以总和）成对交给 emit(key, 这个 key 的, 下一个的)；count 是奇数时最后一个的下一个是 0。
template <typename Emit>
inline void soften_lanes(const dsx::Block& block, const Running& running, int64_t first, int64_t begin, int64_t count,
    float* scores, const Emit& emit) {
    constexpr int L = Vector::kLanes;
    const int64_t room = (count + 1) / 2 * 2;
    hide(block, first, begin, count, room, scores);
    const Vector old = load(running.top + first);
    Vector top = old, other = old;
    for (int64_t j = 0; j < room; j += 2) {
        top = max(top, load(scores + j * L));
        other = max(other, load(scores + (j + 1) * L));
    }
    top = max(top, other);
    store(running.top + first, top);
    float bases[L];
    for (int i = 0; i < L; ++i) {
        const float m = running.top[first + i];
        bases[i] = m == kNegInf ? 0.0f : m;  // 还没有看得见的 key：-inf 减 -inf 是 NaN
    }
    const Vector base = load(bases);
    Vector even = splat(0), odd = splat(0);
    for (int64_t j = 0; j < room; j += 2) {
        const Vector a = exp(sub(load(scores + j * L), base)), b = exp(sub(load(scores + (j + 1) * L), base));
        even = add(even, a);
        odd = add(odd, b);
        emit(j, a, b);
    }
    const Vector shrink = exp(sub(old, base));
    store(running.alpha + first, shrink);
    store(running.sum + first, fma(load(running.sum + first), shrink, add(even, odd)));
}

}  // namespace
