// int8 的 w_kv_b 的行：r 个码，再是每 block 个一个 float16 的 scale。写在 Vector 之上；各编译单元先包含自己的 simd_*.h 与 half.h。
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "prefetch.h"

namespace {

// 一行之后的第 b 个 scale。
inline float weight_scale(const int8_t* scales, int64_t b) {
    uint16_t half;
    std::memcpy(&half, scales + 2 * b, sizeof half);
    return float_of_f16(half);
}

void widen_weights(const int8_t* src, int64_t rows, int64_t r, int64_t block, float* dst, int64_t dst_stride) {
    constexpr int L = Vector::kLanes;
    constexpr int64_t kAhead = 2048;
    const int64_t stride = dsx::weight_row(r, block);
    for (int64_t row = 0; row < rows; ++row) {
        const int8_t* codes = src + row * stride;
        float* to = dst + row * dst_stride;
        for (int64_t begin = 0; begin < r; begin += block) {
            const Vector scale = splat(weight_scale(codes + r, begin / block));
            prefetch(reinterpret_cast<const char*>(codes + begin) + kAhead);
            for (int64_t i = begin; i < begin + block; i += L) {
                store(to + i, mul(scale, load_i8(codes + i)));
            }
        }
        for (int64_t i = r; i < dst_stride; ++i) {
            to[i] = 0;
        }
    }
}

// R 行 a 的第 t 个数乘 N 行权重（从第 t 行起），加到 c 上；first 为真则从零起。
template <int R, int N>
inline void add_weight_rows(const float* a, int64_t lda, const int8_t* w, int64_t r, int64_t block, bool first, float* c,
    int64_t ldc) {
    constexpr int L = Vector::kLanes;
    constexpr int64_t kAhead = 4096;
    const int64_t stride = dsx::weight_row(r, block);
    for (int64_t begin = 0; begin < r; begin += block) {
        Vector scaled[N][R];
        for (int n = 0; n < N; ++n) {
            const float scale = weight_scale(w + n * stride + r, begin / block);
            prefetch(ahead(w + n * stride + begin, kAhead));
            for (int i = 0; i < R; ++i) {
                scaled[n][i] = splat(a[i * lda + n] * scale);
            }
        }
        for (int64_t column = begin; column < begin + block; column += L) {
            Vector sums[R];
            for (int i = 0; i < R; ++i) {
                sums[i] = first ? splat(0) : load(c + i * ldc + column);
            }
            for (int n = 0; n < N; ++n) {
                const Vector codes = load_i8(w + n * stride + column);
                for (int i = 0; i < R; ++i) {
                    sums[i] = fma(scaled[n][i], codes, sums[i]);
                }
            }
            for (int i = 0; i < R; ++i) {
                store(c + i * ldc + column, sums[i]);
            }
        }
    }
}

template <int R>
void multiply_few(const float* a, int64_t lda, const int8_t* w, int64_t k, int64_t r, int64_t block, float* c, int64_t ldc) {
    const int64_t stride = dsx::weight_row(r, block);
    int64_t t = 0;
    for (; t + 4 <= k; t += 4) {
        add_weight_rows<R, 4>(a + t, lda, w + t * stride, r, block, t == 0, c, ldc);
    }
    for (; t < k; ++t) {
        add_weight_rows<R, 1>(a + t, lda, w + t * stride, r, block, t == 0, c, ldc);
    }
}

void multiply_weights(const float* a, int64_t lda, int64_t m, const int8_t* w, int64_t k, int64_t r, int64_t block, float* c,
    int64_t ldc) {
    switch (m) {
    case 1: multiply_few<1>(a, lda, w, k, r, block, c, ldc); return;
    case 2: multiply_few<2>(a, lda, w, k, r, block, c, ldc); return;
    default: multiply_few<3>(a, lda, w, k, r, block, c, ldc);
    }
    static_assert(dsx::kFewRows == 3);
}

// R 行 a 与 N 行权重的点积。
template <int R, int N>
inline void dot_weight_rows(const float* a, int64_t lda, const int8_t* w, int64_t r, int64_t block, float* c, int64_t ldc) {
    constexpr int L = Vector::kLanes;
    constexpr int64_t kAhead = 4096;
    const int64_t stride = dsx::weight_row(r, block);
    Vector total[R][N];
    for (int i = 0; i < R; ++i) {
        for (int n = 0; n < N; ++n) {
            total[i][n] = splat(0);
        }
    }
    for (int64_t begin = 0; begin < r; begin += block) {
        for (int n = 0; n < N; ++n) {
            const int8_t* row = w + n * stride;
            const Vector scale = splat(weight_scale(row + r, begin / block));
            prefetch(ahead(row + begin, kAhead));
            Vector sums[R];
            for (int i = 0; i < R; ++i) {
                sums[i] = splat(0);
            }
            for (int64_t column = begin; column < begin + block; column += L) {
                const Vector codes = load_i8(row + column);
                for (int i = 0; i < R; ++i) {
                    sums[i] = fma(codes, load(a + i * lda + column), sums[i]);
                }
            }
            for (int i = 0; i < R; ++i) {
                total[i][n] = fma(sums[i], scale, total[i][n]);
            }
        }
    }
    for (int i = 0; i < R; ++i) {
        if constexpr (N == 4) {
            sum4(total[i], c + i * ldc);
        } else {
            c[i * ldc] = horizontal_sum(total[i][0]);
        }
    }
}

template <int R>
void dot_few(const float* a, int64_t lda, const int8_t* w, int64_t n, int64_t r, int64_t block, float* c, int64_t ldc) {
    const int64_t stride = dsx::weight_row(r, block);
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        dot_weight_rows<R, 4>(a, lda, w + j * stride, r, block, c + j, ldc);
    }
    for (; j < n; ++j) {
        dot_weight_rows<R, 1>(a, lda, w + j * stride, r, block, c + j, ldc);
    }
}

void multiply_weights_transposed(const float* a, int64_t lda, int64_t m, const int8_t* w, int64_t n, int64_t r, int64_t block,
    float* c, int64_t ldc) {
    switch (m) {
    case 1: dot_few<1>(a, lda, w, n, r, block, c, ldc); return;
    case 2: dot_few<2>(a, lda, w, n, r, block, c, ldc); return;
    default: dot_few<3>(a, lda, w, n, r, block, c, ldc);
    }
}

}  // namespace
