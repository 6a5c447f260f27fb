// AVX-512 F/BW/DQ/VL：16 路。
#pragma once

#include <immintrin.h>

#include <cstdint>

namespace {

struct Vector {
    static constexpr int kLanes = 16;
    __m512 v;
};

inline Vector splat(float x) { return {_mm512_set1_ps(x)}; }
inline Vector load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vector load_f16(const uint16_t* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))};
}
inline Vector load_bf16(const uint16_t* p) {
    const __m512i wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(wide, 16))};
}
inline Vector load_i8(const int8_t* p) {
    return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))))};
}
inline void store(float* p, Vector a) { _mm512_storeu_ps(p, a.v); }
inline Vector add(Vector a, Vector b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vector sub(Vector a, Vector b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vector mul(Vector a, Vector b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vector max(Vector a, Vector b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vector fma(Vector a, Vector b, Vector c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }

// x <= 0。2^n · e^r，|r| <= ln2/2，多项式取自 Cephes expf；小到下溢的（含 -inf）得 0。
inline Vector exp(Vector a) {
    const __m512 x = _mm512_max_ps(_mm512_set1_ps(-106.0f), a.v);  // 次序有讲究：NaN 得后一个，仍是 NaN
    const __m512 n = _mm512_roundscale_ps(
        _mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
    r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
    __m512 y = _mm512_set1_ps(1.9875691500e-4f);
    constexpr float rest[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    for (const float c : rest) {
        y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
    }
    y = _mm512_add_ps(_mm512_fmadd_ps(y, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    return {_mm512_scalef_ps(y, n)};
}

inline float horizontal_sum(Vector a) { return _mm512_reduce_add_ps(a.v); }
inline float horizontal_max(Vector a) { return _mm512_reduce_max_ps(a.v); }
// out[i] = a[i] 各路之和：先两两交错相加，四个向量归到一个里，再折叠 128 位的四段。
inline void sum4(const Vector (&a)[4], float* out) {
    const __m512 x = _mm512_add_ps(_mm512_unpacklo_ps(a[0].v, a[1].v), _mm512_unpackhi_ps(a[0].v, a[1].v));
    const __m512 y = _mm512_add_ps(_mm512_unpacklo_ps(a[2].v, a[3].v), _mm512_unpackhi_ps(a[2].v, a[3].v));
    const __m512 low = _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    const __m512 high = _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
    const __m512 sums = _mm512_add_ps(low, high);
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(sums), _mm512_extractf32x8_ps(sums, 1));
    _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}

// 16 行各 16 个 32 位的字：第 q 个字的一列写在 out + q * stride，stride 以字节计。
inline void transpose_words(const __m512i (&rows)[16], void* out, int64_t stride) {
    __m512i a[16], b[16];
    for (int i = 0; i < 16; i += 2) {
        b[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
        b[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
    }
    // a[4i + j]：第 4i..4i+3 行，每 128 位里的第 j 组。
    for (int i = 0; i < 16; i += 4) {
        a[i] = _mm512_unpacklo_epi64(b[i], b[i + 2]);
        a[i + 1] = _mm512_unpackhi_epi64(b[i], b[i + 2]);
        a[i + 2] = _mm512_unpacklo_epi64(b[i + 1], b[i + 3]);
        a[i + 3] = _mm512_unpackhi_epi64(b[i + 1], b[i + 3]);
    }
    char* const to = static_cast<char*>(out);
    for (int j = 0; j < 4; ++j) {
        const __m512i low = _mm512_shuffle_i32x4(a[j], a[4 + j], 0x44), high = _mm512_shuffle_i32x4(a[j], a[4 + j], 0xEE);
        const __m512i low2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0x44);
        const __m512i high2 = _mm512_shuffle_i32x4(a[8 + j], a[12 + j], 0xEE);
        _mm512_storeu_si512(to + j * stride, _mm512_shuffle_i32x4(low, low2, 0x88));
        _mm512_storeu_si512(to + (4 + j) * stride, _mm512_shuffle_i32x4(low, low2, 0xDD));
        _mm512_storeu_si512(to + (8 + j) * stride, _mm512_shuffle_i32x4(high, high2, 0x88));
        _mm512_storeu_si512(to + (12 + j) * stride, _mm512_shuffle_i32x4(high, high2, 0xDD));
    }
}
inline void transpose(const Vector (&rows)[16], float* out, int64_t stride) {
    __m512i words[16];
    for (int i = 0; i < 16; ++i) {
        words[i] = _mm512_castps_si512(rows[i].v);
    }
    transpose_words(words, out, stride * static_cast<int64_t>(sizeof(float)));
}

}  // namespace
