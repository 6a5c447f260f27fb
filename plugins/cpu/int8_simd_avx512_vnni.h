// AVX-512 VNNI：16 路 int32，vpdpbusd 一条指令乘加 64 对 (uint8, int8)。
#pragma once

#include "simd_avx512.h"

// 块 32 只有半个向量：int8_gemm.h 把两块合在一个向量里。
#define DSX_INT8_HALF

namespace {

constexpr int kTileVectors = 2;
// vpdpbusd 的权重是无符号的：零点乘激活之和，从累加器的起点里减去。
constexpr bool kFoldZeroPoint = true;

struct Ints {
    __m512i v;
};
struct Codes {
    __m512i v;
};
struct Acts {
    __m512i v;
};

inline Ints splat_ints(int32_t x) { return {_mm512_set1_epi32(x)}; }
// 第 0 路是 x，其余是 0；两块合在一个向量里时，后一块的在第 8 路。
inline Ints first_lane(int32_t x) { return {_mm512_zextsi128_si512(_mm_cvtsi32_si128(x))}; }
inline Ints first_lanes(int32_t a, int32_t b) {
    return {_mm512_inserti64x4(first_lane(a).v, _mm256_zextsi128_si256(_mm_cvtsi32_si128(b)), 1)};
}
inline Codes load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Codes load_half_codes(const uint8_t* p) {
    return {_mm512_zextsi256_si512(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Acts load_acts(const int8_t* p) { return {_mm512_loadu_si512(p)}; }
inline Acts splat_acts(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return {_mm512_set1_epi32(four)};
}
inline Ints dot(Ints acc, Codes w, Acts a) { return {_mm512_dpbusd_epi32(acc.v, w.v, a.v)}; }
inline Vector to_float(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
inline Vector nearest(Vector a) { return {_mm512_roundscale_ps(a.v, 0)}; }
// 前 8 路是 a，后 8 路是 b。
inline Vector halves(float a, float b) { return {_mm512_mask_mov_ps(_mm512_set1_ps(a), 0xFF00, _mm512_set1_ps(b))}; }
inline void store_int8(int8_t* p, Vector a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtsepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
inline Vector divide(Vector a, Vector b) { return {_mm512_div_ps(a.v, b.v)}; }

// 16 行各 64 字节：out 的第 q 个向量是各行的第 q 组 4 字节。
inline void transpose_vectors(__m512i (&a)[16], uint8_t* out, int64_t stride) {
    __m512i b[16];
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(a[i], a[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(a[i], a[i + 1]);
    }
    // a[4i + j]：第 4i..4i+3 行，每 128 位里的第 j 组。
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    for (int j = 0; j < 4; ++j) {
        const __m512i low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44), high = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xEE);
        const __m512i low2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44);
        const __m512i high2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xEE);
        _mm512_storeu_si512(out + j * stride, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_storeu_si512(out + (4 + j) * stride, _mm512_shuffle_i32x4(low, low2, 0xDD));
        _mm512_storeu_si512(out + (8 + j) * stride, _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_storeu_si512(out + (12 + j) * stride, _mm512_shuffle_i32x4(high, high2, 0xDD));
    }
}
inline void transpose(const uint8_t* const (&rows)[16], uint8_t* out, int64_t stride) {
    __m512i a[16];
    for (int i = 0; i < 16; ++i) {
        a[i] = _mm512_loadu_si512(rows[i]);
    }
    transpose_vectors(a, out, stride);
}
// 各行只有 32 字节，out 的后 8 个向量是 0。
inline void transpose_half(const uint8_t* const (&rows)[16], uint8_t* out, int64_t stride) {
    __m512i a[16];
    for (int i = 0; i < 16; ++i) {
        a[i] = load_half_codes(rows[i]).v;
    }
    transpose_vectors(a, out, stride);
}

}  // namespace
