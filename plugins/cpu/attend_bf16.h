// bfloat16 的 latent 缓存直接相乘的注意力：一条指令乘加相邻的一对 bfloat16，累加成 float32。写在 Pairs 之上；编译单元先给出 Pairs、
// load_pairs、splat_pair、dot_pairs、narrow、interleave_rows 与两个块的大小，再包含本文件。
#pragma once

#include "attend.h"

namespace {

constexpr int64_t kPairValues = 2 * Vector::kLanes;  // 一个向量里的 bfloat16
constexpr int kMixVectors = 2;
constexpr int64_t kMixColumns = kMixVectors * Vector::kLanes;

// ahead 不是 0 时顺手把每行之后那么多字节处取进 L2。
template <int M, int N>
inline void dot_block_bf16(
    const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb, int64_t k, int64_t ahead_bytes, float* c) {
    Vector acc[M][N];
    for (int i = 0; i < M; ++i) {
        for (int j = 0; j < N; ++j) {
            acc[i][j] = splat(0);
        }
    }
    for (int64_t t = 0; t < k; t += kPairValues) {
        Pairs rows[M];
        for (int i = 0; i < M; ++i) {
            rows[i] = load_pairs(a + i * lda + t);
        }
        for (int j = 0; j < N; ++j) {
            if (ahead_bytes != 0) {
                prefetch(ahead(b + j * ldb + t, ahead_bytes));
            }
            const Pairs y = load_pairs(b + j * ldb + t);
            for (int i = 0; i < M; ++i) {
                acc[i][j] = dot_pairs(acc[i][j], rows[i], y);
            }
        }
    }
    for (int i = 0; i < M; ++i) {
        if constexpr (N == 4) {
            sum4(acc[i], c + i * kTile);
        } else {
            c[i * kTile] = horizontal_sum(acc[i][0]);
        }
    }
}

template <int N>
inline void dot_rows_bf16(const uint16_t* q, const uint16_t* keys, const Block& block, float* scores) {
    // 一个 key 第一次用到时它后面第几个 key 正在路上；只在第一组行取。
    constexpr int64_t kAheadKeys = 8;
    const int64_t width = block.width, bytes = kAheadKeys * block.key_stride * static_cast<int64_t>(sizeof *keys);
    int64_t i = 0;
    for (; i + kDotRowsBf16 <= block.rows; i += kDotRowsBf16) {
        dot_block_bf16<kDotRowsBf16, N>(
            q + i * width, width, keys, block.key_stride, width, i == 0 ? bytes : 0, scores + i * kTile);
    }
    for (; i < block.rows; ++i) {
        dot_block_bf16<1, N>(q + i * width, width, keys, block.key_stride, width, 0, scores + i * kTile);
    }
}

// kMixColumns 列里相邻两行逐个交错：一次吃掉两个 key。count 是奇数时最后一行与 0 配对。一片只有几 KiB，马上用掉，留在 L1。
inline void interleave(const uint16_t* values, int64_t stride, int64_t count, uint16_t* pairs) {
    for (int64_t t = 0; t < count; t += 2) {
        const uint16_t* first = values + t * stride;
        interleave_rows(first, t + 1 < count ? first + stride : nullptr, kMixColumns, pairs + t * kMixColumns);
    }
}

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
            const Pairs x = splat_pair(p + i * kTile + t);
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

void attend_bf16(const Block& block, float* scratch) {
    const bool latent = block.keys == block.values;
    if (block.dtype != Dtype::kBfloat16 || !latent || block.width % kPairValues != 0 || block.value_width % kMixColumns != 0) {
        attend(block, scratch);
        return;
    }
    float* scores = scratch;
    float* alpha = scores + kBlockRows * kTile;
    uint16_t* q = reinterpret_cast<uint16_t*>(alpha + kBlockRows);
    uint16_t* p = q + kBlockRows * block.width;
    uint16_t* pairs = p + kBlockRows * kTile;
    narrow(block.q, block.rows * block.width, q);
    for (int64_t t = block.begin; t < block.end; t += kTile) {
        const int64_t count = block.end - t < kTile ? block.end - t : kTile;
        const uint16_t* keys = static_cast<const uint16_t*>(block.keys) + (t - block.begin) * block.key_stride;
        int64_t j = 0;
        for (; j + 4 <= count; j += 4) {
            dot_rows_bf16<4>(q, keys + j * block.key_stride, block, scores + j);
        }
        for (; j < count; ++j) {
            dot_rows_bf16<1>(q, keys + j * block.key_stride, block, scores + j);
        }
        soften(block, t, count, kTile, scores, alpha);
        narrow(scores, block.rows * kTile, p);
        for (int64_t column = 0; column < block.value_width; column += kMixColumns) {
            interleave(keys + column, block.key_stride, count, pairs);
            float* acc = block.acc + column;
            int64_t i = 0;
            for (; i + kMixRowsBf16 <= block.rows; i += kMixRowsBf16) {
                mix_block_bf16<kMixRowsBf16>(
                    p + i * kTile, pairs, count, alpha + i, acc + i * block.value_width, block.value_width);
            }
            for (; i < block.rows; ++i) {
                mix_block_bf16<1>(
                    p + i * kTile, pairs, count, alpha + i, acc + i * block.value_width, block.value_width);
            }
        }
    }
}

}  // namespace
