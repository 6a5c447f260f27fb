// 256 位向量的共用部分：8 路 int32；AVX2 与 AVX-VNNI 只差怎么乘，见 quant_simd_avx2.h、quant_simd_avx_vnni.h。
#pragma once

#include "quant_kernels.h"
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

inline Bytes load_bytes(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline void store_bytes(uint8_t* p, Bytes a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
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
// 两个向量的字节，就地：偶数个在前，奇数个在后。
inline void split_pairs(int8_t* p) {
    auto* const to = reinterpret_cast<__m256i*>(p);
    const __m256i a = _mm256_loadu_si256(to), b = _mm256_loadu_si256(to + 1), low = _mm256_set1_epi16(255);
    // packus 在每 128 位里各自打包，再把中间两段换回来。
    const __m256i even = _mm256_packus_epi16(_mm256_and_si256(a, low), _mm256_and_si256(b, low));
    const __m256i odd = _mm256_packus_epi16(_mm256_srli_epi16(a, 8), _mm256_srli_epi16(b, 8));
    _mm256_storeu_si256(to, _mm256_permute4x64_epi64(even, 0xD8));
    _mm256_storeu_si256(to + 1, _mm256_permute4x64_epi64(odd, 0xD8));
}
// 一字节两个 4 位数，低 4 位的在前一个向量，高 4 位的在后一个。
inline void split_nibbles(Bytes raw, Bytes (&out)[2]) {
    const __m256i low = _mm256_set1_epi8(15);
    out[0] = {_mm256_and_si256(raw.v, low)};
    out[1] = {_mm256_and_si256(_mm256_srli_epi16(raw.v, 4), low)};
}
// 4 个字节里的 8 个 4 位数，低位在前。
inline Vector load_nibbles(const uint8_t* p) {
    int32_t eight;
    __builtin_memcpy(&eight, p, sizeof eight);
    const __m256i shifts = _mm256_set_epi32(28, 24, 20, 16, 12, 8, 4, 0);
    const __m256i each = _mm256_srlv_epi32(_mm256_set1_epi32(eight), shifts);
    return {_mm256_cvtepi32_ps(_mm256_and_si256(each, _mm256_set1_epi32(15)))};
}
inline Vector to_float(Ints a) { return {_mm256_cvtepi32_ps(a.v)}; }
inline Vector nearest(Vector a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline void store_int8(int8_t* p, Vector a) {
    const __m256i wide = _mm256_cvtps_epi32(a.v);
    const __m128i half = _mm_packs_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1));
    _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(half, half));
}
inline Vector divide(Vector a, Vector b) { return {_mm256_div_ps(a.v, b.v)}; }

// out[i] = a[i] 各路的最大值。
inline void max4(const Vector (&a)[4], float* out) {
    const __m256 x = _mm256_max_ps(_mm256_unpacklo_ps(a[0].v, a[1].v), _mm256_unpackhi_ps(a[0].v, a[1].v));
    const __m256 y = _mm256_max_ps(_mm256_unpacklo_ps(a[2].v, a[3].v), _mm256_unpackhi_ps(a[2].v, a[3].v));
    const __m256 low = _mm256_castpd_ps(_mm256_unpacklo_pd(_mm256_castps_pd(x), _mm256_castps_pd(y)));
    const __m256 high = _mm256_castpd_ps(_mm256_unpackhi_pd(_mm256_castps_pd(x), _mm256_castps_pd(y)));
    const __m256 tops = _mm256_max_ps(low, high);
    _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(tops), _mm256_extractf128_ps(tops, 1)));
}
// count 个码之和；count 是 32 的倍数。
inline int32_t sum_codes(const int8_t* codes, int64_t count) {
    __m256i sums = _mm256_setzero_si256();
    for (int64_t i = 0; i < count; i += 32) {
        const __m256i four = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + i));
        const __m256i pairs = _mm256_maddubs_epi16(_mm256_set1_epi8(1), four);
        sums = _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
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
    // shuffle 在每 128 位里各自挑，再把中间两段换回来。
    const __m256d even = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0x88));
    const __m256d odd = _mm256_castps_pd(_mm256_shuffle_ps(a.v, b.v, 0xDD));
    return {{_mm256_castpd_ps(_mm256_permute4x64_pd(even, 0xD8))}, {_mm256_castpd_ps(_mm256_permute4x64_pd(odd, 0xD8))}};
}
// 符号位是 1 的取前一个，否则取后一个。
inline Vector choose_by_sign(Vector sign, Vector negative, Vector other) {
    return {_mm256_blendv_ps(other.v, negative.v, sign.v)};
}

// 8 行各 32 字节：out 的第 q 个向量是各行的第 q 组 4 字节。
inline void transpose(const Bytes (&rows)[8], uint8_t* out, int64_t stride) {
    __m256i words[8];
    for (int i = 0; i < 8; ++i) {
        words[i] = rows[i].v;
    }
    transpose_words(words, out, stride);
}

// 有符号的字节加 128 成为无符号的（Int8 的零点），或反过来。
inline Bytes flip_sign(Bytes raw) { return {_mm256_xor_si256(raw.v, _mm256_set1_epi8(static_cast<char>(0x80)))}; }
// 4 行各 32 字节：out 的第 k 个向量是第 8k..8k+7 列，一路一列，4 行的字节相邻。
inline void weave(const Bytes (&rows)[4], uint8_t* out, int64_t stride) {
    // 先把第 8k + 4i 列起的 4 个字节挪到第 i 段的第 k 组，段内的交错就得到最后的次序。
    const __m256i order = _mm256_set_epi32(7, 5, 3, 1, 6, 4, 2, 0);
    __m256i a[4];
    for (int i = 0; i < 4; ++i) {
        a[i] = _mm256_permutevar8x32_epi32(rows[i].v, order);
    }
    const __m256i low[2] = {_mm256_unpacklo_epi8(a[0], a[1]), _mm256_unpacklo_epi8(a[2], a[3])};
    const __m256i high[2] = {_mm256_unpackhi_epi8(a[0], a[1]), _mm256_unpackhi_epi8(a[2], a[3])};
    const __m256i out4[4] = {_mm256_unpacklo_epi16(low[0], low[1]), _mm256_unpackhi_epi16(low[0], low[1]),
        _mm256_unpacklo_epi16(high[0], high[1]), _mm256_unpackhi_epi16(high[0], high[1])};
    for (int i = 0; i < 4; ++i) {
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + i * stride), out4[i]);
    }
}

}  // namespace
