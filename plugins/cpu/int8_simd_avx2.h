// AVX2：8 路 int32。
#pragma once

#include "simd_avx2.h"

namespace {

constexpr int kTileVectors = 1;
constexpr bool kFoldZeroPoint = false;

struct Ints {
    __m256i v;
};
// maddubs 的一对积相加会饱和到 int16：|w| <= 128、|a| <= 127 时是 32512，不会。所以先减零点，再把符号移到激活上。
struct Codes {
    __m256i value, magnitude;
};
struct Acts {
    __m256i v;
};

inline Ints splat_ints(int32_t x) { return {_mm256_set1_epi32(x)}; }
inline Ints first_lane(int32_t x) { return {_mm256_zextsi128_si256(_mm_cvtsi32_si128(x))}; }
inline Codes load_codes(const uint8_t* p) {
    const __m256i raw = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i value = _mm256_xor_si256(raw, _mm256_set1_epi8(static_cast<char>(0x80)));
    return {value, _mm256_abs_epi8(value)};
}
inline Acts load_acts(const int8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline Acts splat_acts(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return {_mm256_set1_epi32(four)};
}
inline Ints dot(Ints acc, Codes w, Acts a) {
    const __m256i pairs = _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(a.v, w.value));
    return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
inline Vector to_float(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline Vector nearest(Vector a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline void store_int8(int8_t* p, Vector a) {
    const __m256i wide = _mm256_cvtps_epi32(a.v);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(half, half));
}
inline Vector divide(Vector a, Vector b) { return {_mm256_div_ps(a.v, b.v)}; }

// 8 行各 32 字节：out 的第 q 个向量是各行的第 q 组 4 字节。
inline void transpose(const uint8_t* const (&rows)[8], uint8_t* out, int64_t stride) {
    __m256i a[8], b[8];
    for (int i = 0; i < 8; ++i) {
        a[i] = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows[i]));
    }
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm256_unpacklo_epi32(a[2 * i], a[2 * i + 1]);
        b[4 + i] = _mm256_unpackhi_epi32(a[2 * i], a[2 * i + 1]);
    }
    // b[0..3]：每 128 位的第 0、1 组；b[4..7]：第 2、3 组。
    for (int half = 0; half < 2; ++half) {
        const __m256i* c = b + 4 * half;
        const __m256i d[4] = {_mm256_unpacklo_epi64(c[0], c[1]), _mm256_unpackhi_epi64(c[0], c[1]),
            _mm256_unpacklo_epi64(c[2], c[3]), _mm256_unpackhi_epi64(c[2], c[3])};
        for (int i = 0; i < 2; ++i) {
            const int q = 2 * half + i;
            const __m256i low = _mm256_permute2x128_si256(d[i], d[2 + i], 0x20);
            const __m256i high = _mm256_permute2x128_si256(d[i], d[2 + i], 0x31);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + q * stride), low);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + (q + 4) * stride), high);
        }
    }
}

}  // namespace
