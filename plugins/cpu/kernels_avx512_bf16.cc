// 在 AVX-512 之上：bfloat16 的 latent 缓存直接用 VDPBF16PS 相乘（乘数是 bfloat16，float32 累加），不先展宽。
#include "simd_avx512.h"

#include "half.h"

#include "attend.h"

namespace {

inline __m512bh load_bf16_pairs(const uint16_t* p) {
    const __m512i raw = _mm512_loadu_si512(p);
    __m512bh out;
    std::memcpy(&out, &raw, sizeof out);
    return out;
}

inline __m512bh splat_pair(const uint16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    const __m512i raw = _mm512_set1_epi32(pair);
    __m512bh out;
    std::memcpy(&out, &raw, sizeof out);
    return out;
}

void narrow(const float* src, int64_t count, uint16_t* dst) {
    for (int64_t i = 0; i < count; i += 16) {
        const __m256bh packed = _mm512_cvtneps_pbh(_mm512_loadu_ps(src + i));
        std::memcpy(dst + i, &packed, sizeof packed);
    }
}

// 不用 _mm512_dpbf16_ps：GCC 12 给它的累加器每步多一次寄存器拷贝。
inline Vector multiply_add(Vector acc, __m512bh a, __m512bh b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc.v) : "v"(a), "v"(b));
    return acc;
}

template <int M, int N>
inline void dot_block_bf16(const uint16_t* a, int64_t lda, const uint16_t* b, int64_t ldb, int64_t k, float* c) {
    Vector acc[M][N];
    for (int i = 0; i < M; ++i) {
        for (int j = 0; j < N; ++j) {
            acc[i][j] = splat(0);
        }
    }
    for (int64_t t = 0; t < k; t += 32) {
        __m512bh rows[M];
        for (int i = 0; i < M; ++i) {
            rows[i] = load_bf16_pairs(a + i * lda + t);
        }
        for (int j = 0; j < N; ++j) {
            const __m512bh y = load_bf16_pairs(b + j * ldb + t);
            for (int i = 0; i < M; ++i) {
                acc[i][j] = multiply_add(acc[i][j], rows[i], y);
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
    int64_t i = 0;
    for (; i + 4 <= block.rows; i += 4) {
        dot_block_bf16<4, N>(q + i * block.width, block.width, keys, block.key_stride, block.width, scores + i * kTile);
    }
    for (; i < block.rows; ++i) {
        dot_block_bf16<1, N>(q + i * block.width, block.width, keys, block.key_stride, block.width, scores + i * kTile);
    }
}

// 相邻两行逐个交错：VDPBF16PS 一次吃掉两个 key。count 是奇数时最后一行与 0 配对。
void interleave(const uint16_t* values, int64_t stride, int64_t count, int64_t width, uint16_t* pairs) {
    alignas(64) uint16_t order[2][32];
    for (int i = 0; i < 32; ++i) {
        order[0][i] = static_cast<uint16_t>(i / 2 + (i % 2) * 32);
        order[1][i] = static_cast<uint16_t>(i / 2 + (i % 2) * 32 + 16);
    }
    const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
    for (int64_t t = 0; t < count; t += 2) {
        uint16_t* to = pairs + t * width;
        for (int64_t j = 0; j < width; j += 32) {
            const __m512i first = _mm512_loadu_si512(values + t * stride + j);
            const __m512i second =
                t + 1 < count ? _mm512_loadu_si512(values + (t + 1) * stride + j) : _mm512_setzero_si512();
            _mm512_storeu_si512(to + 2 * j, _mm512_permutex2var_epi16(first, low, second));
            _mm512_storeu_si512(to + 2 * j + 32, _mm512_permutex2var_epi16(first, high, second));
        }
    }
}

template <int M, int N>
inline void mix_block_bf16(const uint16_t* p, const uint16_t* pairs, int64_t width, int64_t count, const float* alpha,
    float* c, int64_t ldc) {
    Vector acc[M][N];
    for (int i = 0; i < M; ++i) {
        for (int j = 0; j < N; ++j) {
            acc[i][j] = mul(splat(alpha[i]), load(c + i * ldc + j * 16));
        }
    }
    for (int64_t t = 0; t < count; t += 2) {
        __m512bh row[N];
        for (int j = 0; j < N; ++j) {
            row[j] = load_bf16_pairs(pairs + t * width + j * 32);
        }
        for (int i = 0; i < M; ++i) {
            const __m512bh x = splat_pair(p + i * kTile + t);
            for (int j = 0; j < N; ++j) {
                acc[i][j] = multiply_add(acc[i][j], x, row[j]);
            }
        }
    }
    for (int i = 0; i < M; ++i) {
        for (int j = 0; j < N; ++j) {
            store(c + i * ldc + j * 16, acc[i][j]);
        }
    }
}

void attend_bf16(const Block& block, float* scratch) {
    const bool latent = block.keys == block.values;
    if (block.dtype != Dtype::kBfloat16 || !latent || block.width % 32 != 0 || block.value_width % 32 != 0) {
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
        interleave(keys, block.key_stride, count, block.value_width, pairs);
        for (int64_t column = 0; column < block.value_width; column += 32) {
            const uint16_t* slice = pairs + 2 * column;
            float* acc = block.acc + column;
            int64_t i = 0;
            for (; i + 8 <= block.rows; i += 8) {
                mix_block_bf16<8, 2>(p + i * kTile, slice, block.value_width, count, alpha + i,
                    acc + i * block.value_width, block.value_width);
            }
            for (; i < block.rows; ++i) {
                mix_block_bf16<1, 2>(p + i * kTile, slice, block.value_width, count, alpha + i,
                    acc + i * block.value_width, block.value_width);
            }
        }
    }
}

}  // namespace

namespace dsx {
const Kernels kAvx512Bf16Kernels{"avx512_bf16", widen, unpack, widen_weights, multiply, multiply_transposed, rectify, attend_bf16};
}
