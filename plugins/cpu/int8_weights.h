// int8 的 w_kv_b：一行是 r 个码，再是每 block 个一个 float16 的 scale。展宽成 float32，或者边读边展宽边乘；写在 Vector 之上，
// 编译单元先包含自己的 simd_*.h 与 half.h。两种走法的每一步运算相同，结果因此逐位相同。
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "prefetch.h"

namespace {

using dsx::Int8Rows;

inline const int8_t* weight_row_at(const Int8Rows& w, int64_t i) { return w.codes + i * dsx::weight_row(w.r, w.block); }

inline float weight_scale(const int8_t* row, int64_t r, int64_t b) {
    uint16_t half;
    std::memcpy(&half, row + r + 2 * b, sizeof half);
    return float_of_f16(half);
}

void widen_weights(const Int8Rows& w, float* dst, int64_t dst_stride) {
    constexpr int L = Vector::kLanes;
    constexpr int64_t kAhead = 2048;
    for (int64_t row = 0; row < w.rows; ++row) {
        const int8_t* codes = weight_row_at(w, row);
        float* to = dst + row * dst_stride;
        for (int64_t begin = 0; begin < w.r; begin += w.block) {
            const Vector scale = splat(weight_scale(codes, w.r, begin / w.block));
            prefetch(reinterpret_cast<const char*>(codes + begin) + kAhead);
            for (int64_t i = begin; i < begin + w.block; i += L) {
                store(to + i, mul(scale, load_i8(codes + i)));
            }
        }
        for (int64_t i = w.r; i < dst_stride; ++i) {
            to[i] = 0;
        }
    }
}

// 头一次用到第 row 行：scale 展宽到 scales[r / block]，后面的 kAhead 字节取进 L2（多半在内存里）。
inline void open_row(const Int8Rows& w, int64_t row, float* scales) {
    constexpr int L = Vector::kLanes;
    constexpr int64_t kAhead = 4096, kLine = 64;
    const int64_t blocks = w.r / w.block;
    const int8_t* codes = weight_row_at(w, row);
    for (int64_t at = 0; at < w.r; at += kLine) {
        prefetch(ahead(codes, kAhead + at));
    }
    int64_t b = 0;
    for (; b + L <= blocks; b += L) {
        uint16_t halves[L];
        std::memcpy(halves, codes + w.r + 2 * b, sizeof halves);
        store(scales + b, load_f16(halves));
    }
    for (; b < blocks; ++b) {
        scales[b] = weight_scale(codes, w.r, b);
    }
}

// 一段 w：从第 begin 行起的 count 行；fresh 为真则它们的 scale 还没有展宽。
struct WeightSpan {
    int64_t begin, count;
    bool fresh;
};
// 一段几行：各列走完再走下一段，取下一段的时间因此藏在计算后面。
constexpr int64_t kSpanRows = 16;

// M 行乘一段里从第 column 列起的 N 个向量的列；不是头一段就接着 c 累加。
template <int M, int N>
inline void multiply_weight_columns(const float* a, int64_t lda, const Int8Rows& w, const WeightSpan& span, float* scales,
    int64_t column, float* c, int64_t ldc) {
    constexpr int L = Vector::kLanes;
    const int64_t blocks = w.r / w.block;
    Vector acc[M][N];
    for (int i = 0; i < M; ++i) {
        for (int j = 0; j < N; ++j) {
            acc[i][j] = span.begin == 0 ? splat(0) : load(c + i * ldc + column + j * L);
        }
    }
    int64_t which[N];  // 各个向量在哪一块
    for (int j = 0; j < N; ++j) {
        which[j] = (column + j * L) / w.block;
    }
    for (int64_t t = span.begin; t < span.begin + span.count; ++t) {
        const int8_t* codes = weight_row_at(w, t);
        if (span.fresh) {
            open_row(w, t, scales + t * blocks);
        }
        for (int j = 0; j < N; ++j) {
            const Vector y = mul(splat(scales[t * blocks + which[j]]), load_i8(codes + column + j * L));
            for (int i = 0; i < M; ++i) {
                acc[i][j] = fma(splat(a[i * lda + t]), y, acc[i][j]);
            }
        }
    }
    for (int i = 0; i < M; ++i) {
        for (int j = 0; j < N; ++j) {
            store(c + i * ldc + column + j * L, acc[i][j]);
        }
    }
}

template <int M>
inline void multiply_weight_rows(
    const float* a, int64_t lda, const Int8Rows& w, WeightSpan span, float* scales, float* c, int64_t ldc) {
    constexpr int N = 4;
    int64_t column = 0;
    for (; column + N * Vector::kLanes <= w.r; column += N * Vector::kLanes) {
        multiply_weight_columns<M, N>(a, lda, w, span, scales, column, c, ldc);
        span.fresh = false;
    }
    for (; column < w.r; column += Vector::kLanes) {
        multiply_weight_columns<M, 1>(a, lda, w, span, scales, column, c, ldc);
        span.fresh = false;
    }
}

void multiply_weights(const float* a, int64_t lda, int64_t m, const Int8Rows& w, float* c, int64_t ldc, float* scales) {
    for (int64_t begin = 0; begin < w.rows; begin += kSpanRows) {
        const int64_t count = w.rows - begin < kSpanRows ? w.rows - begin : kSpanRows;
        int64_t i = 0;
        for (; i + 4 <= m; i += 4) {
            multiply_weight_rows<4>(a + i * lda, lda, w, {begin, count, i == 0}, scales, c + i * ldc, ldc);
        }
        for (; i < m; ++i) {
            multiply_weight_rows<1>(a + i * lda, lda, w, {begin, count, i == 0}, scales, c + i * ldc, ldc);
        }
    }
}

// M 行对从第 row 行起的 N 行权重的点积；scales 是这 N 行的。
template <int M, int N>
inline void dot_weights(
    const float* a, int64_t lda, const Int8Rows& w, const float* scales, int64_t row, float* c, int64_t ldc) {
    static_assert(N == 1 || N == 4);
    constexpr int L = Vector::kLanes;
    const int64_t blocks = w.r / w.block;
    Vector acc[M][N];
    for (int i = 0; i < M; ++i) {
        for (int j = 0; j < N; ++j) {
            acc[i][j] = splat(0);
        }
    }
    for (int64_t b = 0; b < blocks; ++b) {
        Vector scale[N];
        for (int j = 0; j < N; ++j) {
            scale[j] = splat(scales[j * blocks + b]);
        }
        for (int64_t t = b * w.block; t < (b + 1) * w.block; t += L) {
            Vector x[M];
            for (int i = 0; i < M; ++i) {
                x[i] = load(a + i * lda + t);
            }
            for (int j = 0; j < N; ++j) {
                const Vector y = mul(scale[j], load_i8(weight_row_at(w, row + j) + t));
                for (int i = 0; i < M; ++i) {
                    acc[i][j] = fma(x[i], y, acc[i][j]);
                }
            }
        }
    }
    for (int i = 0; i < M; ++i) {
        if constexpr (N == 4) {
            sum4(acc[i], c + i * ldc + row);
        } else {
            c[i * ldc + row] = horizontal_sum(acc[i][0]);
        }
    }
}

template <int N>
inline void dot_weight_columns(
    const float* a, int64_t lda, int64_t m, const Int8Rows& w, float* scales, int64_t row, float* c, int64_t ldc) {
    constexpr int M = Vector::kLanes == 16 ? 4 : 2;
    for (int j = 0; j < N; ++j) {
        open_row(w, row + j, scales + j * (w.r / w.block));
    }
    int64_t i = 0;
    for (; i + M <= m; i += M) {
        dot_weights<M, N>(a + i * lda, lda, w, scales, row, c + i * ldc, ldc);
    }
    for (; i < m; ++i) {
        dot_weights<1, N>(a + i * lda, lda, w, scales, row, c + i * ldc, ldc);
    }
}

void multiply_transposed_weights(
    const float* a, int64_t lda, int64_t m, const Int8Rows& w, float* c, int64_t ldc, float* scales) {
    int64_t row = 0;
    for (; row + 4 <= w.rows; row += 4) {
        dot_weight_columns<4>(a, lda, m, w, scales, row, c, ldc);
    }
    for (; row < w.rows; ++row) {
        dot_weight_columns<1>(a, lda, m, w, scales, row, c, ldc);
    }
}

}  // namespace
