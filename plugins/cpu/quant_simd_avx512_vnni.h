// AVX-512 VNNI：16 路 int32，vpdpbusd 一条指令乘加 64 对 (uint8, int8)。
#pragma once

#include "simd_avx512.h"

namespace {

constexpr int kTileVectors = 2;

struct Ints {
    __m512i v;
};
struct Bytes {
    __m512i v;
};
struct Acts {
    __m512i v;
};

// vpdpbusd 的权重是无符号的：零点乘激活之和，从累加器的起点里减去。
struct Int8 {
    static constexpr int kBits = 8, kVectors = 1;
    static constexpr int32_t kZeroPoint = 128, kFolded = kZeroPoint;
    using Codes = Bytes;

    static inline void unpack(Bytes raw, Bytes (&out)[kVectors]) { out[0] = raw; }
    static inline Codes codes(Bytes raw) { return raw; }
};
// 低 4 位的在前一个向量，高 4 位的在后一个。
struct Int4 {
    static constexpr int kBits = 4, kVectors = 2;
    static constexpr int32_t kZeroPoint = 8, kFolded = kZeroPoint;
    using Codes = Bytes;

    static inline void unpack(Bytes raw, Bytes (&out)[kVectors]) {
        const __m512i low = _mm512_set1_epi8(15);
        out[0] = {_mm512_and_si512(raw.v, low)};
        out[1] = {_mm512_and_si512(_mm512_srli_epi16(raw.v, 4), low)};
    }
    static inline Codes codes(Bytes raw) { return raw; }
};

inline Bytes load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_bytes(uint8_t* p, Bytes a) { _mm512_storeu_si512(p, a.v); }
// 8 个字节里的 16 个 4 位数，低位在前。
inline Vector load_nibbles(const uint8_t* p) {
    int32_t eight[2];
    __builtin_memcpy(eight, p, sizeof eight);
    const __m512i words = _mm512_inserti64x4(_mm512_set1_epi32(eight[0]), _mm256_set1_epi32(eight[1]), 1);
    const __m512i shifts = _mm512_set_epi32(28, 24, 20, 16, 12, 8, 4, 0, 28, 24, 20, 16, 12, 8, 4, 0);
    return {_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_srlv_epi32(words, shifts), _mm512_set1_epi32(15)))};
}
inline Ints splat_ints(int32_t x) { return {_mm512_set1_epi32(x)}; }
// 一个向量里 kShare 块，各占相邻的几路。
template <int kShare>
inline Ints first_lanes(const int32_t* x) {
    if constexpr (kShare == 1) {
        return {_mm512_zextsi128_si512(_mm_cvtsi32_si128(x[0]))};
    } else if constexpr (kShare == 2) {
        const __m512i first = _mm512_zextsi128_si512(_mm_cvtsi32_si128(x[0]));
        return {_mm512_inserti64x4(first, _mm256_zextsi128_si256(_mm_cvtsi32_si128(x[1])), 1)};
    } else {
        static_assert(kShare == 4);
        // 各 128 位都是这四个数，第 i 段留第 i 个，再移到段的开头。
        const __m512i four = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(x)));
        const __m512i order = _mm512_set_epi32(0, 0, 0, 3, 0, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 0);
        return {_mm512_maskz_permutexvar_epi32(0x1111, order, four)};
    }
}
template <int kShare>
inline Vector spread(const float* x) {
    if constexpr (kShare == 1) {
        return {_mm512_set1_ps(x[0])};
    } else if constexpr (kShare == 2) {
        return {_mm512_mask_mov_ps(_mm512_set1_ps(x[0]), 0xFF00, _mm512_set1_ps(x[1]))};
    } else {
        static_assert(kShare == 4);
        const __m512i order = _mm512_set_epi32(3, 3, 3, 3, 2, 2, 2, 2, 1, 1, 1, 1, 0, 0, 0, 0);
        return {_mm512_permutexvar_ps(order, _mm512_castps128_ps512(_mm_loadu_ps(x)))};
    }
}
template <int kShare>
inline Vector spread_f16(const uint16_t* x) {
    if constexpr (kShare == 1) {
        return {_mm512_cvtph_ps(_mm256_set1_epi16(static_cast<int16_t>(x[0])))};
    } else if constexpr (kShare == 2) {
        const __m128i first = _mm_set1_epi16(static_cast<int16_t>(x[0])), last = _mm_set1_epi16(static_cast<int16_t>(x[1]));
        return {_mm512_cvtph_ps(_mm256_set_m128i(last, first))};
    } else {
        static_assert(kShare == 4);
        const __m128i four = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(x));
        const __m256i order = _mm256_set_epi8(7, 6, 7, 6, 7, 6, 7, 6, 5, 4, 5, 4, 5, 4, 5, 4, 3, 2, 3, 2, 3, 2, 3, 2, 1, 0, 1, 0,
            1, 0, 1, 0);
        return {_mm512_cvtph_ps(_mm256_shuffle_epi8(_mm256_broadcastq_epi64(four), order))};
    }
}
inline float widen_f16(uint16_t x) { return _cvtsh_ss(x); }
inline Acts load_acts(const int8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Acts splat_acts(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return {_mm512_set1_epi32(four)};
}
// 两个向量的字节，就地：偶数个在前，奇数个在后。
inline void split_pairs(int8_t* p) {
    const __m512i a = _mm512_loadu_si512(p), b = _mm512_loadu_si512(p + 64);
    const __m256i even[2] = {_mm512_cvtepi16_epi8(a), _mm512_cvtepi16_epi8(b)};
    const __m256i odd[2] = {_mm512_cvtepi16_epi8(_mm512_srli_epi16(a, 8)), _mm512_cvtepi16_epi8(_mm512_srli_epi16(b, 8))};
    for (int i = 0; i < 2; ++i) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 32 * i), even[i]);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 64 + 32 * i), odd[i]);
    }
}
// 不用 _mm512_dpbusd_epi32：GCC 12 给它的累加器每步多一次寄存器拷贝，还把几个放到栈上，整个矩阵乘慢三成。
inline Ints dot(Ints acc, Bytes w, Acts a) {
    asm("vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(a.v));
    return acc;
}
inline Ints dot(Ints acc, const Bytes (&w)[2], const Acts (&a)[2]) { return dot(dot(acc, w[0], a[0]), w[1], a[1]); }
inline Ints load_ints(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void store_ints(int32_t* p, Ints a) { _mm512_storeu_si512(p, a.v); }
inline Ints add(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
inline Ints nearest_ints(Vector a) { return {_mm512_cvtps_epi32(a.v)}; }
// 零点折进累加器的起点。
inline Ints fold(Ints sum) { return {_mm512_mullo_epi32(sum.v, _mm512_set1_epi32(-Int8::kFolded))}; }
// 四个向量同一路的低字节相邻。
inline Bytes pack_bytes(const Ints (&x)[4]) {
    const __m512i two = _mm512_mask_blend_epi8(0x2222222222222222, x[0].v, _mm512_slli_epi32(x[1].v, 8));
    const __m512i three = _mm512_mask_blend_epi8(0x4444444444444444, two, _mm512_slli_epi32(x[2].v, 16));
    return {_mm512_mask_blend_epi8(0x8888888888888888, three, _mm512_slli_epi32(x[3].v, 24))};
}
// 4 个字节广播给各路。
inline Bytes splat_bytes(const int8_t* p) { return {splat_acts(p).v}; }
inline Vector to_float(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Vector nearest(Vector a) { return {_mm512_roundscale_ps(a.v, 0)}; }
// 有符号的字节加 128 成为无符号的（Int8 的零点），或反过来。
inline Bytes flip_sign(Bytes raw) { return {_mm512_xor_si512(raw.v, _mm512_set1_epi8(static_cast<char>(0x80)))}; }
inline Bytes stored_bytes(Bytes raw) { return flip_sign(raw); }
inline Int8::Codes stored_codes(Bytes stored) { return stored; }
inline void store_int8(int8_t* p, Vector a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
inline Vector divide(Vector a, Vector b) { return {_mm512_div_ps(a.v, b.v)}; }
// out[i] = a[i] 各路的最大值，做法同 sum4。
inline void max4(const Vector (&a)[4], float* out) {
    const __m512 x = _mm512_max_ps(_mm512_unpacklo_ps(a[0].v, a[1].v), _mm512_unpackhi_ps(a[0].v, a[1].v));
    const __m512 y = _mm512_max_ps(_mm512_unpacklo_ps(a[2].v, a[3].v), _mm512_unpackhi_ps(a[2].v, a[3].v));
    const __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    const __m512 high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    const __m512 tops = _mm512_max_ps(low, high);
    const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(tops), _mm512_extractf32x8_ps(tops, 1));
    _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
// count 个码之和；count 是 32 的倍数。
inline int32_t sum_codes(const int8_t* codes, int64_t count) {
    __m256i sums = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i += 32) {
        sums = _mm256_dpbusd_epi32(sums, _mm256_set1_epi8(1), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i)));
    }
    const __m128i half = _mm_add_epi32(_mm256_castsi256_si128(sums), _mm256_extracti128_si256(sums, 1));
    const __m128i pair = _mm_add_epi32(half, _mm_shuffle_epi32(half, 0x4E));
    return _mm_cvtsi128_si32(_mm_add_epi32(pair, _mm_shuffle_epi32(pair, 0xB1)));
}
// 两个向量连起来，偶数个与奇数个。
struct Halves {
    Vector even, odd;
};
inline Halves deinterleave(Vector a, Vector b) {
    const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
    const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
    return {{_mm512_permutex2var_ps(a.v, even, b.v)}, {_mm512_permutex2var_ps(a.v, odd, b.v)}};
}
// 符号位是 1 的取前一个，否则取后一个。
inline Vector choose_by_sign(Vector sign, Vector negative, Vector other) {
    return {_mm512_mask_mov_ps(other.v, _mm512_movepi32_mask(_mm512_castps_si512(sign.v)), negative.v)};
}

// 16 行各 64 字节：out 的第 q 个向量是各行的第 q 组 4 字节。
inline void transpose(const Bytes (&rows)[16], uint8_t* out, int64_t stride) {
    __m512i words[16];
    for (int i = 0; i < 16; ++i) {
        words[i] = rows[i].v;
    }
    transpose_words(words, out, stride);
}

// 4 行各 64 字节：out 的第 k 个向量是第 16k..16k+15 列，一路一列，4 行的字节相邻。
inline void weave(const Bytes (&rows)[4], uint8_t* out, int64_t stride) {
    // 先把第 16k + 4i 列起的 4 个字节挪到第 i 段的第 k 组，段内的交错就得到最后的次序。
    const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
    __m512i a[4];
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm512_permutexvar_epi32(order, rows[i].v);
    }
    const __m512i low[2] = {_mm512_unpacklo_epi8(a[0], a[1]), _mm512_unpacklo_epi8(a[2], a[3])};
    const __m512i high[2] = {_mm512_unpackhi_epi8(a[0], a[1]), _mm512_unpackhi_epi8(a[2], a[3])};
    _mm512_storeu_si512(out, _mm512_unpacklo_epi16(low[0], low[1]));
    _mm512_storeu_si512(out + stride, _mm512_unpackhi_epi16(low[0], low[1]));
    _mm512_storeu_si512(out + 2 * stride, _mm512_unpacklo_epi16(high[0], high[1]));
    _mm512_storeu_si512(out + 3 * stride, _mm512_unpackhi_epi16(high[0], high[1]));
}

}  // namespace
