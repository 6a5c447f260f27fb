// bfloat16 的 key、value（latent 缓存，或展开之后舍入的）直接相乘的注意力：一条指令乘加相邻的一对 bfloat16，累加成 float32。写在 Pairs 之上；编译单元先给出 Pairs、
// load_pairs、splat_pair、dot_pairs、dot_splat、narrow、store_pairs、interleave_rows 与两个块的大小，再包含本文件。
//
// 分数一路一行 query（kLanes 行一组）：key 的一对广播给各路，所以不必横向求和，softmax 也逐路做。一格 key 的 value 一次交错几列，
// 趁还在 L1 里就给所有的行用掉。
#pragma once

#include "attend.h"

namespace {

constexpr int64_t kPairValues = 2 * Vector::kLanes;  // 一个向量里的 bfloat16
constexpr int kMixVectors = 2;
constexpr int64_t kMixColumns = kMixVectors * Vector::kLanes;
constexpr int64_t kScoreKeys = 4 * kScoreFours;
static_assert(dsx::kBf16Pad % kPairValues == 0 && dsx::kBf16Pad % kMixColumns == 0);
static_assert(kTile % kScoreKeys == 0 && kBlockRows % Vector::kLanes == 0 && Vector::kLanes % kMixRowsBf16 == 0);

// kLanes 行 query → [width / 2, kLanes] 对；不足的行补零。
inline void pack_queries(const float* q, int64_t rows, int64_t width, uint16_t* to) {
    constexpr int L = Vector::kLanes;
    alignas(64) uint16_t line[kPairValues];
    for (int64_t t = 0; t < width; t += kPairValues) {
        Vector lines[L];
        for (int i = 0; i < L; ++i) {
            lines[i] = splat(0);
            if (i < rows) {
                narrow(q + i * width + t, kPairValues, line);
                lines[i] = load(reinterpret_cast<const float*>(line));
            }
        }
        transpose(lines, reinterpret_cast<float*>(to + t * L), L);
    }
}

// 一组 query 对 G·K 个 key：scores[key, kLanes]。每一步顺手从 ahead 取一行 cache line 进 L2。
// 写明要展开：累加器否则留在内存里（GCC 12）。
template <int G, int K>
inline void score_keys(
    const uint16_t* q, const uint16_t* keys, int64_t stride, int64_t width, const uint16_t* ahead, float* scores) {
    constexpr int L = Vector::kLanes;
    Vector acc[G * K];
    const uint16_t* from[G];
#pragma GCC unroll 4
    for (int g = 0; g < G; ++g) {
        from[g] = keys + g * K * stride;
    }
#pragma GCC unroll 16
    for (int j = 0; j < G * K; ++j) {
        acc[j] = splat(0);
    }
    for (int64_t t = 0; t < width; t += 2) {
        prefetch(ahead + G * K * t);
        const Pairs rows = load_pairs(q + t * L);
#pragma GCC unroll 16
        for (int j = 0; j < G * K; ++j) {
            acc[j] = dot_splat(acc[j], rows, from[j / K] + j % K * stride);
        }
#pragma GCC unroll 4
        for (int g = 0; g < G; ++g) {
            from[g] += 2;
        }
    }
#pragma GCC unroll 16
    for (int j = 0; j < G * K; ++j) {
        store(scores + j * L, acc[j]);
    }
}

// p 是 [key / 2, kLanes] 对概率，从要的那一行起；pairs 是 [key / 2, kMixColumns] 对 value。
template <int M>
inline void mix_block_bf16(
    const uint16_t* p, const uint16_t* pairs, int64_t count, const float* alpha, float* c, int64_t ldc) {
    constexpr int L = Vector::kLanes;
    Vector acc[M][kMixVectors];
    for (int i = 0; i < M; ++i) {
        for (int j = 0; j < kMixVectors; ++j) {
            acc[i][j] = mul(splat(alpha[i]), load(c + i * ldc + j * L));
        }
    }
    for (int64_t t = 0; t < count; t += 2) {
        Pairs row[kMixVectors];
        for (int j = 0; j < kMixVectors; ++j) {
            row[j] = load_pairs(pairs + t * kMixColumns + j * kPairValues);
        }
        for (int i = 0; i < M; ++i) {
            const Pairs x = splat_pair(p + t * L + 2 * i);
            for (int j = 0; j < kMixVectors; ++j) {
                acc[i][j] = dot_pairs(acc[i][j], x, row[j]);
            }
        }
    }
    for (int i = 0; i < M; ++i) {
        for (int j = 0; j < kMixVectors; ++j) {
            store(c + i * ldc + j * L, acc[i][j]);
        }
    }
}

// 一次 attend 用的内存，与它的几步。
class Bf16Attention {
public:
    static bool suits(const Block& block) {
        return block.dtype == Dtype::kBfloat16 && block.width % kPairValues == 0 && block.value_width % kMixColumns == 0;
    }

    Bf16Attention(const Block& block, float* scratch) : block_(block), running_(block, scratch) {
        scores_ = scratch + Running::kFloats;
        q_ = reinterpret_cast<uint16_t*>(scores_ + kTile * kGroup);
        p_ = q_ + kBlockRows * block.width;
        pairs_ = p_ + kBlockRows * kTile;
    }

    void run() {
        for (int64_t i = 0; i < block_.rows; i += kGroup) {
            pack_queries(block_.q + i * block_.width, block_.rows - i, block_.width, q_ + i * block_.width);
        }
        for (int64_t t = block_.begin; t < block_.end; t += kTile) {
            const int64_t count = block_.end - t < kTile ? block_.end - t : kTile;
            keys_ = static_cast<const uint16_t*>(block_.keys) + (t - block_.begin) * block_.key_stride;
            values_ = static_cast<const uint16_t*>(block_.values) + (t - block_.begin) * block_.value_stride;
            for (int64_t i = 0; i < block_.rows; i += kGroup) {
                score(i, t, count);
                uint16_t* p = p_ + i * kTile;
                soften_lanes(block_, running_, i, t, count, scores_,
                    [p](int64_t key, Vector a, Vector b) { store_pairs(a, b, p + key * kGroup); });
            }
            mix(count);
        }
        running_.finish(block_);
    }

private:
    static constexpr int64_t kGroup = Vector::kLanes;

    void score(int64_t i, int64_t t, int64_t count) {
        const int64_t stride = block_.key_stride, width = block_.width;
        const uint16_t* q = q_ + i * width;
        int64_t j = 0;
        for (; j + kScoreKeys <= count; j += kScoreKeys) {
            const uint16_t* keys = keys_ + j * stride;
            // 往后两组；没有了，或者不是头一遍看这一格，就再取这一组自己。
            const bool more = i == 0 && t + j + 3 * kScoreKeys <= block_.end;
            score_keys<kScoreFours, 4>(q, keys, stride, width, more ? keys + 2 * kScoreKeys * stride : keys, scores_ + j * kGroup);
        }
        for (; j + 4 <= count; j += 4) {
            score_keys<1, 4>(q, keys_ + j * stride, stride, width, keys_ + j * stride, scores_ + j * kGroup);
        }
        for (; j < count; ++j) {
            score_keys<1, 1>(q, keys_ + j * stride, stride, width, keys_ + j * stride, scores_ + j * kGroup);
        }
    }

    void mix(int64_t count) {
        const int64_t width = block_.value_width, stride = block_.value_stride;
        for (int64_t column = 0; column < width; column += kMixColumns) {
            // 相邻两个 key 逐个交错：一次吃掉两个。count 是奇数时最后一个与 0 配对。
            for (int64_t j = 0; j < count; j += 2) {
                const uint16_t* first = values_ + j * stride + column;
                interleave_rows(first, j + 1 < count ? first + stride : nullptr, kMixColumns, pairs_ + j * kMixColumns);
            }
            float* acc = block_.acc + column;
            int64_t i = 0;
            for (; i + kMixRowsBf16 <= block_.rows; i += kMixRowsBf16) {
                mix_block_bf16<kMixRowsBf16>(probabilities(i), pairs_, count, running_.alpha + i, acc + i * width, width);
            }
            for (; i < block_.rows; ++i) {
                mix_block_bf16<1>(probabilities(i), pairs_, count, running_.alpha + i, acc + i * width, width);
            }
        }
    }

    // 第 i 行的概率：所在的组，组里的第几路。
    const uint16_t* probabilities(int64_t i) const { return p_ + i / kGroup * kGroup * kTile + 2 * (i % kGroup); }

    const Block& block_;
    Running running_;
    float* scores_;
    uint16_t *q_, *p_, *pairs_;
    const uint16_t *keys_ = nullptr, *values_ = nullptr;
};

void attend_bf16(const Block& block, float* scratch) {
    if (Bf16Attention::suits(block)) {
        Bf16Attention(block, scratch).run();
    } else {
        attend(block, scratch);
    }
}

}  // namespace
