// NEON：8 路 int32，每路 4 个 int8 的点积。编译选项有 dotprod 时一条 SDOT，没有时乘成 int16 再两次成对相加。
#pragma once

#include <cstring>

#include "simd_neon.h"

namespace {

constexpr int kTileVectors = 1;

struct Ints {
    int32x4_t lo, hi;
};
struct Bytes {
    uint8x16_t lo, hi;
};
struct Acts {
    int8x16_t lo, hi;
};
struct SignedCodes {
    int8x16_t lo, hi;
};

struct Int8 {
    static constexpr int kBits = 8, kVectors = 1;
    static constexpr int32_t kZeroPoint = 128, kFolded = 0;
    using Codes = SignedCodes;

    static inline void unpack(Bytes raw, Bytes (&out)[kVectors]) { out[0] = raw; }
    static inline Codes codes(Bytes raw) {
        const uint8x16_t sign = vdupq_n_u8(0x80);
        return {vreinterpretq_s8_u8(veorq_u8(raw.lo, sign)), vreinterpretq_s8_u8(veorq_u8(raw.hi, sign))};
    }
};
// 码至多 15，当有符号的用；零点乘激活之和，从累加器的起点里减去。低 4 位的在前一个向量，高 4 位的在后一个。
struct Int4 {
    static constexpr int kBits = 4, kVectors = 2;
    static constexpr int32_t kZeroPoint = 8, kFolded = kZeroPoint;
    using Codes = SignedCodes;

    static inline void unpack(Bytes raw, Bytes (&out)[kVectors]) {
        const uint8x16_t low = vdupq_n_u8(15);
        out[0] = {vandq_u8(raw.lo, low), vandq_u8(raw.hi, low)};
        out[1] = {vshrq_n_u8(raw.lo, 4), vshrq_n_u8(raw.hi, 4)};
    }
    static inline Codes codes(Bytes raw) { return {vreinterpretq_s8_u8(raw.lo), vreinterpretq_s8_u8(raw.hi)}; }
};

inline Bytes load_bytes(const uint8_t* p) { return {vld1q_u8(p), vld1q_u8(p + 16)}; }
inline void store_bytes(uint8_t* p, Bytes a) {
    vst1q_u8(p, a.lo);
    vst1q_u8(p + 16, a.hi);
}
// 4 个字节里的 8 个 4 位数，低位在前。
inline Vector load_nibbles(const uint8_t* p) {
    uint32_t eight;
    std::memcpy(&eight, p, sizeof eight);
    const int32x4_t lo = {0, -4, -8, -12}, hi = {-16, -20, -24, -28};
    const uint32x4_t all = vdupq_n_u32(eight), low = vdupq_n_u32(15);
    return {vcvtq_f32_u32(vandq_u32(vshlq_u32(all, lo), low)), vcvtq_f32_u32(vandq_u32(vshlq_u32(all, hi), low))};
}
inline Ints splat_ints(int32_t x) { return {vdupq_n_s32(x), vdupq_n_s32(x)}; }
// 一个向量里 kShare 块，各占相邻的几路。
template <int kShare>
inline Ints first_lanes(const int32_t* x) {
    static_assert(kShare <= 2);
    const int32x4_t zero = vdupq_n_s32(0);
    return {vsetq_lane_s32(x[0], zero, 0), kShare == 1 ? zero : vsetq_lane_s32(x[kShare - 1], zero, 0)};
}
template <int kShare>
inline Vector spread(const float* x) {
    static_assert(kShare <= 2);
    return {vdupq_n_f32(x[0]), vdupq_n_f32(x[kShare - 1])};
}
template <int kShare>
inline Vector spread_f16(const uint16_t* x) {
    static_assert(kShare <= 2);
    return {widen4_f16(vdup_n_u16(x[0])), widen4_f16(vdup_n_u16(x[kShare - 1]))};
}
inline float widen_f16(uint16_t x) { return vgetq_lane_f32(widen4_f16(vdup_n_u16(x)), 0); }
inline Acts load_acts(const int8_t* p) { return {vld1q_s8(p), vld1q_s8(p + 16)}; }
inline Acts splat_acts(const int8_t* p) {
    int32_t four;
    std::memcpy(&four, p, sizeof four);
    const int8x16_t all = vreinterpretq_s8_s32(vdupq_n_s32(four));
    return {all, all};
}
// 两个向量的字节，就地：偶数个在前，奇数个在后。
inline void split_pairs(int8_t* p) {
    const int8x16x2_t a = vld2q_s8(p), b = vld2q_s8(p + 32);
    for (int odd = 0; odd < 2; ++odd) {
        vst1q_s8(p + 32 * odd, a.val[odd]);
        vst1q_s8(p + 32 * odd + 16, b.val[odd]);
    }
}

#if defined(__ARM_FEATURE_DOTPROD)
inline Ints dot(Ints acc, SignedCodes w, Acts a) { return {vdotq_s32(acc.lo, w.lo, a.lo), vdotq_s32(acc.hi, w.hi, a.hi)}; }
inline Ints dot(Ints acc, const SignedCodes (&w)[2], const Acts (&a)[2]) { return dot(dot(acc, w[0], a[0]), w[1], a[1]); }
#else
// 相邻两个积之和：|w| <= 128、|a| <= 127 时至多 32512，还在 int16 里。
inline int16x8_t pair_sums(int8x16_t w, int8x16_t a) {
    return vpaddq_s16(vmull_s8(vget_low_s8(w), vget_low_s8(a)), vmull_high_s8(w, a));
}
inline Ints dot(Ints acc, SignedCodes w, Acts a) {
    return {vpadalq_s16(acc.lo, pair_sums(w.lo, a.lo)), vpadalq_s16(acc.hi, pair_sums(w.hi, a.hi))};
}
// int4：一对积至多 3810，两个相加还在 int16 里。
inline Ints dot(Ints acc, const SignedCodes (&w)[2], const Acts (&a)[2]) {
    const int16x8_t lo = vaddq_s16(pair_sums(w[0].lo, a[0].lo), pair_sums(w[1].lo, a[1].lo));
    const int16x8_t hi = vaddq_s16(pair_sums(w[0].hi, a[0].hi), pair_sums(w[1].hi, a[1].hi));
    return {vpadalq_s16(acc.lo, lo), vpadalq_s16(acc.hi, hi)};
}
#endif

// 有符号的字节加 128 成为无符号的（Int8 的零点），或反过来。
inline Bytes flip_sign(Bytes raw) {
    const uint8x16_t sign = vdupq_n_u8(0x80);
    return {veorq_u8(raw.lo, sign), veorq_u8(raw.hi, sign)};
}
// 有符号的字节就当码用。
inline Bytes stored_bytes(Bytes raw) { return raw; }
inline Int8::Codes stored_codes(Bytes stored) { return {vreinterpretq_s8_u8(stored.lo), vreinterpretq_s8_u8(stored.hi)}; }

inline Vector to_float(Ints a) { return {vcvtq_f32_s32(a.lo), vcvtq_f32_s32(a.hi)}; }
inline Vector nearest(Vector a) { return {vrndnq_f32(a.lo), vrndnq_f32(a.hi)}; }
inline void store_int8(int8_t* p, Vector a) {
    const int16x8_t half = vcombine_s16(vqmovn_s32(vcvtnq_s32_f32(a.lo)), vqmovn_s32(vcvtnq_s32_f32(a.hi)));
    vst1_s8(p, vqmovn_s16(half));
}
inline Vector divide(Vector a, Vector b) { return {vdivq_f32(a.lo, b.lo), vdivq_f32(a.hi, b.hi)}; }
// out[i] = a[i] 各路的最大值。
inline void max4(const Vector (&a)[4], float* out) {
    const float32x4_t first = vpmaxq_f32(vmaxq_f32(a[0].lo, a[0].hi), vmaxq_f32(a[1].lo, a[1].hi));
    const float32x4_t last = vpmaxq_f32(vmaxq_f32(a[2].lo, a[2].hi), vmaxq_f32(a[3].lo, a[3].hi));
    vst1q_f32(out, vpmaxq_f32(first, last));
}
// count 个码之和；count 是 32 的倍数。
inline int32_t sum_codes(const int8_t* codes, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; i += 16) {
        sum += vaddlvq_s8(vld1q_s8(codes + i));
    }
    return sum;
}
// 两个向量连起来，偶数个与奇数个。
struct Halves {
    Vector even, odd;
};
inline Halves deinterleave(Vector a, Vector b) {
    return {{vuzp1q_f32(a.lo, a.hi), vuzp1q_f32(b.lo, b.hi)}, {vuzp2q_f32(a.lo, a.hi), vuzp2q_f32(b.lo, b.hi)}};
}
// 符号位是 1 的取前一个，否则取后一个。
inline float32x4_t choose4(float32x4_t sign, float32x4_t negative, float32x4_t other) {
    return vbslq_f32(vcltzq_s32(vreinterpretq_s32_f32(sign)), negative, other);
}
inline Vector choose_by_sign(Vector sign, Vector negative, Vector other) {
    return {choose4(sign.lo, negative.lo, other.lo), choose4(sign.hi, negative.hi, other.hi)};
}

// 8 行各 32 字节：out 的第 q 个向量是各行的第 q 组 4 字节。
inline void transpose(const Bytes (&rows)[8], uint8_t* out, int64_t stride) {
    uint32x4_t words[8][2];
    for (int i = 0; i < 8; ++i) {
        words[i][0] = vreinterpretq_u32_u8(rows[i].lo);
        words[i][1] = vreinterpretq_u32_u8(rows[i].hi);
    }
    transpose_words(words, out, stride);
}

// 4 行各 32 字节：out 的第 k 个向量是第 8k..8k+7 列，一路一列，4 行的字节相邻。
inline void weave(const Bytes (&rows)[4], uint8_t* out, int64_t stride) {
    for (int half = 0; half < 2; ++half) {
        uint8x8x4_t low, high;
        for (int i = 0; i < 4; ++i) {
            const uint8x16_t row = half == 0 ? rows[i].lo : rows[i].hi;
            low.val[i] = vget_low_u8(row);
            high.val[i] = vget_high_u8(row);
        }
        vst4_u8(out + 2 * half * stride, low);
        vst4_u8(out + (2 * half + 1) * stride, high);
    }
}

}  // namespace
