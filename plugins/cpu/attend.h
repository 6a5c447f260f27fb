// 矩阵乘的小块与一遍过的注意力，写在 Vector 之上；各指令集的编译单元先包含自己的 simd_*.h，再包含本文件。
// 全部在匿名命名空间里：带不同编译选项的同名函数不能被链接器合并成一份。
#pragma once

#include <cstdint>

#include "int8_cache.h"
#include "int8_weights.h"
#include "kernels.h"
#include "prefetch.h"
#include "soften.h"

namespace {

using dsx::Block;
using dsx::Dtype;
using dsx::kBlockRows;
using dsx::kTile;
using dsx::padded;

inline float widen_one(Dtype dtype, const void* src, int64_t i) {
    switch (dtype) {
    case Dtype::kFloat32: return static_cast<const float*>(src)[i];
    case Dtype::kFloat16: return float_of_f16(static_cast<const uint16_t*>(src)[i]);
    case Dtype::kBfloat16: return float_of_bf16(static_cast<const uint16_t*>(src)[i]);
    case Dtype::kInt8: return static_cast<const int8_t*>(src)[i];
    }
    return 0;
}

template <Dtype D>
inline Vector load_as(const void* src, int64_t i) {
    if constexpr (D == Dtype::kFloat32) {
        return load(static_cast<const float*>(src) + i);
    } else if constexpr (D == Dtype::kFloat16) {
        return load_f16(static_cast<const uint16_t*>(src) + i);
    } else if constexpr (D == Dtype::kBfloat16) {
        return load_bf16(static_cast<const uint16_t*>(src) + i);
    } else {
        return load_i8(static_cast<const int8_t*>(src) + i);
    }
}

// 逐行展宽；来源多半在内存里，提前 kAhead 字节去取（硬件的预取不跨页）。
template <Dtype D>
void widen_rows(const void* src, int64_t src_stride, int64_t rows, int64_t width, float* dst, int64_t dst_width,
    int64_t dst_stride) {
    constexpr int L = Vector::kLanes;
    constexpr int64_t kAhead = 2048;
    for (int64_t row = 0; row < rows; ++row) {
        const int64_t from = row * src_stride;
        float* to = dst + row * dst_stride;
        int64_t i = 0;
        for (; i + 2 * L <= width; i += 2 * L) {
            prefetch(static_cast<const char*>(src) + dsx::bytes_of(D) * (from + i) + kAhead);
            store(to + i, load_as<D>(src, from + i));
            store(to + i + L, load_as<D>(src, from + i + L));
        }
        for (; i + L <= width; i += L) {
            store(to + i, load_as<D>(src, from + i));
        }
        for (; i < width; ++i) {
            to[i] = widen_one(D, src, from + i);
        }
        for (; i < dst_width; ++i) {
            to[i] = 0;
        }
    }
}

void widen(Dtype dtype, const void* src, int64_t src_stride, int64_t rows, int64_t width, float* dst, int64_t dst_width,
    int64_t dst_stride) {
    switch (dtype) {
    case Dtype::kFloat32:
        widen_rows<Dtype::kFloat32>(src, src_stride, rows, width, dst, dst_width, dst_stride);
        return;
    case Dtype::kFloat16:
        widen_rows<Dtype::kFloat16>(src, src_stride, rows, width, dst, dst_width, dst_stride);
        return;
    case Dtype::kBfloat16:
        widen_rows<Dtype::kBfloat16>(src, src_stride, rows, width, dst, dst_width, dst_stride);
        return;
    case Dtype::kInt8:
        widen_rows<Dtype::kInt8>(src, src_stride, rows, width, dst, dst_width, dst_stride);
        return;
    }
}

void unpack(const int8_t* src, int64_t rows, int64_t r, int64_t dr, float* latent, int64_t latent_width,
    int64_t latent_stride, float* rope, int64_t rope_width, int64_t rope_stride) {
    constexpr int L = Vector::kLanes;
    constexpr int64_t kAhead = 1024;
    const int64_t stride = dsx::cache_width(Dtype::kInt8, r, dr);
    for (int64_t row = 0; row < rows; ++row) {
        const int8_t *codes = src + row * stride, *high = codes + r, *low = high + dr, *scales = low + dr;
        const float latent_scale = scale_of(scales), rope_scale = scale_of(scales + 3);
        float* to = latent + row * latent_stride;
        int64_t i = 0;
        for (; i + 4 * L <= r; i += 4 * L) {
            prefetch(reinterpret_cast<const char*>(codes + i) + kAhead);
            for (int j = 0; j < 4; ++j) {
                store(to + i + j * L, mul(splat(latent_scale), load_i8(codes + i + j * L)));
            }
        }
        for (; i < r; ++i) {
            to[i] = latent_scale * static_cast<float>(codes[i]);
        }
        for (; i < latent_width; ++i) {
            to[i] = 0;
        }
        to = rope + row * rope_stride;
        for (i = 0; i + L <= dr; i += L) {
            const Vector code = fma(splat(256), load_i8(high + i), load_i8(low + i));
            store(to + i, mul(splat(rope_scale), code));
        }
        for (; i < dr; ++i) {
            to[i] = rope_scale * static_cast<float>(256 * high[i] + low[i]);
        }
        for (; i < rope_width; ++i) {
            to[i] = 0;
        }
    }
}

// M 行乘 N 个向量的小块，累加器全在寄存器里；alpha 不空时先把 c 的各行乘上它再累加。
template <int M, int N>
inline void multiply_block(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, const float* alpha,
    float* c, int64_t ldc) {
    constexpr int L = Vector::kLanes;
    Vector acc[M][N];
    for (int i = 0; i < M; ++i) {
        for (int j = 0; j < N; ++j) {
            acc[i][j] = alpha ? mul(splat(alpha[i]), load(c + i * ldc + j * L)) : splat(0);
        }
    }
    for (int64_t t = 0; t < k; ++t) {
        Vector row[N];
        for (int j = 0; j < N; ++j) {
            row[j] = load(b + t * ldb + j * L);
        }
        for (int i = 0; i < M; ++i) {
            const Vector x = splat(a[i * lda + t]);
            for (int j = 0; j < N; ++j) {
                acc[i][j] = fma(x, row[j], acc[i][j]);
            }
        }
    }
    for (int i = 0; i < M; ++i) {
        for (int j = 0; j < N; ++j) {
            store(c + i * ldc + j * L, acc[i][j]);
        }
    }
}

template <int N>
inline void multiply_columns(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t m, int64_t k,
    const float* alpha, float* c, int64_t ldc) {
    int64_t i = 0;
    for (; i + 4 <= m; i += 4) {
        multiply_block<4, N>(a + i * lda, lda, b, ldb, k, alpha ? alpha + i : nullptr, c + i * ldc, ldc);
    }
    for (; i < m; ++i) {
        multiply_block<1, N>(a + i * lda, lda, b, ldb, k, alpha ? alpha + i : nullptr, c + i * ldc, ldc);
    }
}

// 4 行 × N 个向量要 4N 个累加器：AVX2 只有 16 个寄存器，N 取 2。
constexpr int kColumns = Vector::kLanes == 16 ? 4 : 2;

void accumulate(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t m, int64_t n, int64_t k,
    const float* alpha, float* c, int64_t ldc) {
    constexpr int64_t step = kColumns * Vector::kLanes;
    int64_t j = 0;
    for (; j + step <= n; j += step) {
        multiply_columns<kColumns>(a, lda, b + j, ldb, m, k, alpha, c + j, ldc);
    }
    for (; j < n; j += Vector::kLanes) {
        multiply_columns<1>(a, lda, b + j, ldb, m, k, alpha, c + j, ldc);
    }
}

void multiply(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t m, int64_t n, int64_t k, float* c,
    int64_t ldc) {
    accumulate(a, lda, b, ldb, m, n, k, nullptr, c, ldc);
}

void rectify(float* x, int64_t count) {
    for (int64_t i = 0; i < count; i += Vector::kLanes) {
        store(x + i, max(load(x + i), splat(0)));
    }
}

// M 行对 4 行（或 1 行）的点积。ahead 不空时每一步顺手从那里取一行 cache line 进 L2。
template <int M, int N>
inline void dot_block(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t k, const char* ahead, float* c,
    int64_t ldc) {
    static_assert(N == 1 || N == 4);
    Vector acc[M][N];
    for (int i = 0; i < M; ++i) {
        for (int j = 0; j < N; ++j) {
            acc[i][j] = splat(0);
        }
    }
    for (int64_t t = 0; t < k; t += Vector::kLanes) {
        if (ahead != nullptr) {
            prefetch(ahead + t * 4);
        }
        Vector rows[M];
        for (int i = 0; i < M; ++i) {
            rows[i] = load(a + i * lda + t);
        }
        for (int j = 0; j < N; ++j) {
            const Vector y = load(b + j * ldb + t);
            for (int i = 0; i < M; ++i) {
                acc[i][j] = fma(rows[i], y, acc[i][j]);
            }
        }
    }
    for (int i = 0; i < M; ++i) {
        if constexpr (N == 4) {
            sum4(acc[i], c + i * ldc);
        } else {
            c[i * ldc] = horizontal_sum(acc[i][0]);
        }
    }
}

constexpr int kDotRows = Vector::kLanes == 16 ? 4 : 2;

// ahead、bytes：顺手取进 L2 的一段内存；一次 dot_block 取 4k 字节，取完为止。
template <int N>
inline void dot_columns(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t m, int64_t k,
    const char* ahead, int64_t bytes, float* c, int64_t ldc) {
    int64_t i = 0;
    for (; i + kDotRows <= m; i += kDotRows) {
        const char* next = 4 * i * k / kDotRows < bytes ? ahead + 4 * i * k / kDotRows : nullptr;
        dot_block<kDotRows, N>(a + i * lda, lda, b, ldb, k, next, c + i * ldc, ldc);
    }
    for (; i < m; ++i) {
        dot_block<1, N>(a + i * lda, lda, b, ldb, k, nullptr, c + i * ldc, ldc);
    }
}

void multiply_transposed(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t m, int64_t n, int64_t k,
    float* c, int64_t ldc) {
    int64_t j = 0;
    for (; j + 4 <= n; j += 4) {
        dot_columns<4>(a, lda, b + j * ldb, ldb, m, k, nullptr, 0, c + j, ldc);
    }
    for (; j < n; ++j) {
        dot_columns<1>(a, lda, b + j * ldb, ldb, m, k, nullptr, 0, c + j, ldc);
    }
}

// 这些行按原样就能当 [count, padded(width)] 的 float32 矩阵读：不必复制。
inline bool readable(Dtype dtype, int64_t width) { return dtype == Dtype::kFloat32 && width % dsx::kPad == 0; }

void attend(const Block& block, float* scratch) {
    const int64_t width = padded(block.width), value_width = padded(block.value_width);
    float* key_tile = scratch;
    float* value_tile = key_tile + kTile * width;
    float* scores = value_tile + kTile * width;
    float* alpha = scores + kBlockRows * kTile;
    const bool latent = block.keys == block.values, direct = readable(block.dtype, block.width);
    const int64_t bytes = dsx::bytes_of(block.dtype), key_bytes = block.key_stride * bytes;
    for (int64_t t = block.begin; t < block.end; t += kTile) {
        const int64_t count = block.end - t < kTile ? block.end - t : kTile;
        const int64_t done = t - block.begin, left = block.end - t - count;
        const char* source = static_cast<const char*>(block.keys) + done * key_bytes;
        const float* keys = direct ? reinterpret_cast<const float*>(source) : key_tile;
        const int64_t key_stride = direct ? block.key_stride : width;
        // 四行一组，展宽之后趁还在 L1 里就用掉；一边算一边取下一格的四行，读内存的时间因此藏在计算后面。
        for (int64_t j = 0; j < count; j += 4) {
            const int64_t n = count - j < 4 ? count - j : 4;
            if (!direct) {
                widen(block.dtype, source + j * key_bytes, block.key_stride, n, block.width, key_tile + j * width, width,
                    width);
            }
            const int64_t ahead_bytes = (left - j < n ? left - j : n) * key_bytes;
            const char* ahead = ahead_bytes > 0 ? source + (count + j) * key_bytes : nullptr;
            const float* rows = keys + j * key_stride;
            if (n == 4) {
                dot_columns<4>(
                    block.q, width, rows, key_stride, block.rows, width, ahead, ahead_bytes, scores + j, kTile);
            } else {
                multiply_transposed(block.q, width, rows, key_stride, block.rows, n, width, scores + j, kTile);
            }
        }
        const float* values = keys;
        int64_t value_stride = key_stride;
        if (!latent) {
            const char* rows = static_cast<const char*>(block.values) + done * block.value_stride * bytes;
            values = reinterpret_cast<const float*>(rows);
            value_stride = block.value_stride;
            if (!readable(block.dtype, block.value_width)) {
                widen(block.dtype, rows, block.value_stride, count, block.value_width, value_tile, value_width, value_width);
                values = value_tile;
                value_stride = value_width;
            }
        }
        soften(block, t, count, kTile, scores, alpha);
        accumulate(scores, kTile, values, value_stride, block.rows, value_width, count, alpha, block.acc, value_width);
    }
}

}  // namespace
