// AVX2：8 路 int32。
#pragma once

#include "simd_avx2.h"

namespace {

constexpr int kTileVectors = 1;

struct Ints {
    __m256i v;
};
struct Bytes {
    __m256i v;
};
struct Acts {
    __m256i v;
};
// 先减了零点的码：maddubs 要一个无符号的，所以把符号移到激活上。
struct SignedCodes {
    __m256i value, magnitude;
};
struct UnsignedCodes {
    __m256i v;
};

// maddubs 的一对积相加会饱和到 int16：|w| <= 128、|a| <= 127 时是 32512，不会；无符号的码到 255 就会，所以先减零点。
struct Int8 {
    static constexpr int kBits = 8, kVectors = 1;
    static constexpr int32_t kZeroPoint = 128, kFolded = 0;
    using Codes = SignedCodes;

    static inline void unpack(Bytes raw, Bytes (&out)[kVectors]) { out[0] = raw; }
    static inline Codes codes(Bytes raw) {
        const __m256i value = _mm256_xor_si256(raw.v, _mm256_set1_epi8(static_cast<char>(0x80)));
        return {value, _mm256_abs_epi8(value)};
    }
};
// 无符号的码至多 15，直接当 maddubs 的左边；零点乘激活之和，从累加器的起点里减去。低 4 位的在前一个向量，高 4 位的在后一个。
struct Int4 {
    static constexpr int kBits = 4, kVectors = 2;
    static constexpr int32_t kZeroPoint = 8, kFolded = kZeroPoint;
    using Codes = UnsignedCodes;

    static inline void unpack(Bytes raw, Bytes (&out)[kVectors]) {
        const __m256i low = _mm256_set1_epi8(15);
        out[0] = {_mm256_and_si256(raw.v, low)};
        out[1] = {_mm256_and_si256(_mm256_srli_epi16(raw.v, 4), low)};
    }
    static inline Codes codes(Bytes raw) { return {raw.v}; }
};

inline Bytes load_bytes(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline Ints splat_ints(int32_t x) { return {_mm256_set1_epi32(x)}; }
// 一个向量里 kShare 块，各占相邻的几路。
template <int kShare>
inline Ints first_lanes(const int32_t* x) {
    static_assert(kShare <= 2);
    const __m256i first = _mm256_zextsi128_si256(_mm_cvtsi32_si128(x[0]));
    return {kShare == 1 ? first : _mm256_inserti128_si256(first, _mm_cvtsi32_si128(x[kShare - 1]), 1)};
}
template <int kShare>
inline Vector spread(const float* x) {
    static_assert(kShare <= 2);
    return {_mm256_set_m128(_mm_set1_ps(x[kShare - 1]), _mm_set1_ps(x[0]))};
}
template <int kShare>
inline Vector spread_f16(const uint16_t* x) {
    static_assert(kShare <= 2);
    const __m128i first = _mm_set1_epi16(static_cast<int16_t>(x[0]));
    const __m128i last = _mm_set1_epi16(static_cast<int16_t>(x[kShare - 1]));
    return {_mm256_cvtph_ps(_mm_unpacklo_epi64(first, last))};
}
inline float widen_f16(uint16_t x) { return _cvtsh_ss(x); }
inline Acts load_acts(const int8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline Acts splat_acts(const int8_t* p) {
    int32_t four;
    __builtin_memcpy(&four, p, sizeof four);
    return {_mm256_set1_epi32(four)};
}
inline Ints add_pairs(Ints acc, __m256i pairs) {
    return {_mm256_add_epi32(acc.v, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))};
}
inline Ints dot(Ints acc, SignedCodes w, Acts a) {
    return add_pairs(acc, _mm256_maddubs_epi16(w.magnitude, _mm256_sign_epi8(a.v, w.value)));
}
inline Ints dot(Ints acc, UnsignedCodes w, Acts a) { return add_pairs(acc, _mm256_maddubs_epi16(w.v, a.v)); }
// 一对积至多 3810，两个相加还在 int16 里。
inline Ints dot(Ints acc, const UnsignedCodes (&w)[2], const Acts (&a)[2]) {
    return add_pairs(acc, _mm256_add_epi16(_mm256_maddubs_epi16(w[0].v, a[0].v), _mm256_maddubs_epi16(w[1].v, a[1].v)));
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
inline void transpose(const Bytes (&rows)[8], uint8_t* out, int64_t stride) {
    __m256i b[8];
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm256_unpacklo_epi32(rows[2 * i].v, rows[2 * i + 1].v);
        b[4 + i] = _mm256_unpackhi_epi32(rows[2 * i].v, rows[2 * i + 1].v);
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
