// AVX2 + FMA + F16C：8 路。
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Vector {
    static constexpr int kLanes = 8;
    __m256 v;
};

inline Vector splat(float x) { return {_mm256_set1_ps(x)}; }
inline Vector load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vector load_f16(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))};
}
inline Vector load_bf16(const uint16_t* p) {
    const __m256i wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return {_mm256_castsi256_ps(_mm256_slli_epi32(wide, 16))};
}
inline Vector load_i8(const int8_t* p) {
    return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))))};
}
inline void store(float* p, Vector a) { _mm256_storeu_ps(p, a.v); }
inline Vector add(Vector a, Vector b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vector sub(Vector a, Vector b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vector mul(Vector a, Vector b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vector max(Vector a, Vector b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vector fma(Vector a, Vector b, Vector c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }

// x <= 0。2^n · e^r，|r| <= ln2/2，多项式取自 Cephes expf；小于 -87.3 的（含 -inf）得 0。
inline Vector exp(Vector a) {
    const __m256 floor = _mm256_set1_ps(-87.3f);
    const __m256 x = _mm256_max_ps(floor, a.v);  // 次序有讲究：NaN 得后一个，仍是 NaN
    const __m256 n = _mm256_round_ps(
        _mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);
    r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
    __m256 y = _mm256_set1_ps(1.9875691500e-4f);
    constexpr float rest[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    for (const float c : rest) {
        y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(c));
    }
    y = _mm256_add_ps(_mm256_fmadd_ps(y, _mm256_mul_ps(r, r), r), _mm256_set1_ps(1.0f));
    const __m256i power = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
    y = _mm256_mul_ps(y, _mm256_castsi256_ps(power));
    return {_mm256_andnot_ps(_mm256_cmp_ps(a.v, floor, _CMP_LT_OQ), y)};
}

inline float horizontal_sum(Vector a) {
    const __m128 half = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 pair = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(pair, _mm_movehdup_ps(pair)));
}
inline float horizontal_max(Vector a) {
    const __m128 half = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
    const __m128 pair = _mm_max_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_max_ss(pair, _mm_movehdup_ps(pair)));
}
// out[i] = a[i] 各路之和。
inline void sum4(const Vector (&a)[4], float* out) {
    const __m256 sums = _mm256_hadd_ps(_mm256_hadd_ps(a[0].v, a[1].v), _mm256_hadd_ps(a[2].v, a[3].v));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(sums), _mm256_extractf128_ps(sums, 1)));
}

// 8 行各 8 个 32 位的字：第 q 个字的一列写在 out + q * stride，stride 以字节计。
inline void transpose_words(const __m256i (&rows)[8], void* out, int64_t stride) {
    __m256i b[8];
    for (int i = 0; i < 4; ++i) {
        b[i] = _mm256_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        b[4 + i] = _mm256_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    // b[0..3]：每 128 位的第 0、1 组；b[4..7]：第 2、3 组。
    char* const to = static_cast<char*>(out);
    for (int half = 0; half < 2; ++half) {
        const __m256i* c = b + 4 * half;
        const __m256i d[4] = {_mm256_unpacklo_epi64(c[0], c[1]), _mm256_unpackhi_epi64(c[0], c[1]),
            _mm256_unpacklo_epi64(c[2], c[3]), _mm256_unpackhi_epi64(c[2], c[3])};
        for (int i = 0; i < 2; ++i) {
            const int q = 2 * half + i;
            const __m256i low = _mm256_permute2x128_si256(d[i], d[2 + i], 0x20);
            const __m256i high = _mm256_permute2x128_si256(d[i], d[2 + i], 0x31);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + q * stride), low);
            _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + (q + 4) * stride), high);
        }
    }
}
inline void transpose(const Vector (&rows)[8], float* out, int64_t stride) {
    __m256i words[8];
    for (int i = 0; i < 8; ++i) {
        words[i] = _mm256_castps_si256(rows[i].v);
    }
    transpose_words(words, out, stride * static_cast<int64_t>(sizeof(float)));
}

}  // namespace
