// AArch64 的 NEON，armv8-a 的机器都有：一对 128 位寄存器当 8 路，寄存器个数因此与 AVX2 的一样多。
#pragma once

#include <arm_neon.h>

#include <cstdint>

namespace {

struct Vector {
    static constexpr int kLanes = 8;
    float32x4_t lo, hi;
};

inline Vector splat(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline Vector load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
inline float32x4_t widen4_f16(uint16x4_t x) { return vcvt_f32_f16(vreinterpret_f16_u16(x)); }
inline Vector load_f16(const uint16_t* p) { return {widen4_f16(vld1_u16(p)), widen4_f16(vld1_u16(p + 4))}; }
inline Vector load_bf16(const uint16_t* p) {
    const uint16x8_t x = vld1q_u16(p);
    const uint32x4_t lo = vshlq_n_u32(vmovl_u16(vget_low_u16(x)), 16), hi = vshlq_n_u32(vmovl_high_u16(x), 16);
    return {vreinterpretq_f32_u32(lo), vreinterpretq_f32_u32(hi)};
}
inline Vector load_i8(const int8_t* p) {
    const int16x8_t x = vmovl_s8(vld1_s8(p));
    return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(x))), vcvtq_f32_s32(vmovl_high_s16(x))};
}
inline void store(float* p, Vector a) {
    vst1q_f32(p, a.lo);
    vst1q_f32(p + 4, a.hi);
}
inline Vector add(Vector a, Vector b) { return {vaddq_f32(a.lo, b.lo), vaddq_f32(a.hi, b.hi)}; }
inline Vector sub(Vector a, Vector b) { return {vsubq_f32(a.lo, b.lo), vsubq_f32(a.hi, b.hi)}; }
inline Vector mul(Vector a, Vector b) { return {vmulq_f32(a.lo, b.lo), vmulq_f32(a.hi, b.hi)}; }
inline Vector max(Vector a, Vector b) { return {vmaxq_f32(a.lo, b.lo), vmaxq_f32(a.hi, b.hi)}; }
inline Vector fma(Vector a, Vector b, Vector c) { return {vfmaq_f32(c.lo, a.lo, b.lo), vfmaq_f32(c.hi, a.hi, b.hi)}; }

// x <= 0。2^n · e^r，|r| <= ln2/2，多项式取自 Cephes expf；小于 -87.3 的（含 -inf）得 0，NaN 仍是 NaN。
inline float32x4_t exp4(float32x4_t a) {
    const float32x4_t floor = vdupq_n_f32(-87.3f);
    const float32x4_t x = vmaxq_f32(a, floor);
    const float32x4_t n = vrndnq_f32(vmulq_f32(x, vdupq_n_f32(1.44269504f)));
    float32x4_t r = vfmsq_f32(x, n, vdupq_n_f32(0.693359375f));
    r = vfmsq_f32(r, n, vdupq_n_f32(-2.12194440e-4f));
    float32x4_t y = vdupq_n_f32(1.9875691500e-4f);
    constexpr float rest[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
    for (const float c : rest) {
        y = vfmaq_f32(vdupq_n_f32(c), y, r);
    }
    y = vaddq_f32(vfmaq_f32(r, y, vmulq_f32(r, r)), vdupq_n_f32(1.0f));
    const int32x4_t power = vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23);
    y = vmulq_f32(y, vreinterpretq_f32_s32(power));
    return vreinterpretq_f32_u32(vbicq_u32(vreinterpretq_u32_f32(y), vcltq_f32(a, floor)));
}
inline Vector exp(Vector a) { return {exp4(a.lo), exp4(a.hi)}; }

inline float horizontal_sum(Vector a) { return vaddvq_f32(vaddq_f32(a.lo, a.hi)); }
inline float horizontal_max(Vector a) { return vmaxvq_f32(vmaxq_f32(a.lo, a.hi)); }
// out[i] = a[i] 各路之和。
inline void sum4(const Vector (&a)[4], float* out) {
    const float32x4_t first = vpaddq_f32(vaddq_f32(a[0].lo, a[0].hi), vaddq_f32(a[1].lo, a[1].hi));
    const float32x4_t last = vpaddq_f32(vaddq_f32(a[2].lo, a[2].hi), vaddq_f32(a[3].lo, a[3].hi));
    vst1q_f32(out, vpaddq_f32(first, last));
}

// 四行各 4 个字：out[q] 是各行的第 q 个。
inline void transpose4(uint32x4_t a, uint32x4_t b, uint32x4_t c, uint32x4_t d, uint32x4_t (&out)[4]) {
    const uint64x2_t even[2] = {vreinterpretq_u64_u32(vtrn1q_u32(a, b)), vreinterpretq_u64_u32(vtrn1q_u32(c, d))};
    const uint64x2_t odd[2] = {vreinterpretq_u64_u32(vtrn2q_u32(a, b)), vreinterpretq_u64_u32(vtrn2q_u32(c, d))};
    out[0] = vreinterpretq_u32_u64(vtrn1q_u64(even[0], even[1]));
    out[1] = vreinterpretq_u32_u64(vtrn1q_u64(odd[0], odd[1]));
    out[2] = vreinterpretq_u32_u64(vtrn2q_u64(even[0], even[1]));
    out[3] = vreinterpretq_u32_u64(vtrn2q_u64(odd[0], odd[1]));
}
// 8 行各 8 个 32 位的字：第 q 个字的一列写在 out + q * stride，stride 以字节计。
inline void transpose_words(const uint32x4_t (&rows)[8][2], void* out, int64_t stride) {
    uint8_t* const to = static_cast<uint8_t*>(out);
    for (int half = 0; half < 2; ++half) {
        for (int part = 0; part < 2; ++part) {
            const auto* r = rows + 4 * half;
            uint32x4_t columns[4];
            transpose4(r[0][part], r[1][part], r[2][part], r[3][part], columns);
            for (int q = 0; q < 4; ++q) {
                vst1q_u8(to + (4 * part + q) * stride + 16 * half, vreinterpretq_u8_u32(columns[q]));
            }
        }
    }
}
inline void transpose(const Vector (&rows)[8], float* out, int64_t stride) {
    uint32x4_t words[8][2];
    for (int i = 0; i < 8; ++i) {
        words[i][0] = vreinterpretq_u32_f32(rows[i].lo);
        words[i][1] = vreinterpretq_u32_f32(rows[i].hi);
    }
    transpose_words(words, out, stride * static_cast<int64_t>(sizeof(float)));
}

}  // namespace
