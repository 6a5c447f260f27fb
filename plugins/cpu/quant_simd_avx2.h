// AVX2：8 路 int32，maddubs 乘成 int16 再两两相加。
#pragma once

#include "quant_simd_256.h"

namespace {

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
// 无符号的码至多 15，直接当 maddubs 的左边；零点乘激活之和，从累加器的起点里减去。
struct Int4 {
    static constexpr int kBits = 4, kVectors = 2;
    static constexpr int32_t kZeroPoint = 8, kFolded = kZeroPoint;
    using Codes = UnsignedCodes;

    static inline void unpack(Bytes raw, Bytes (&out)[kVectors]) { split_nibbles(raw, out); }
    static inline Codes codes(Bytes raw) { return {raw.v}; }
};

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
inline Bytes stored_bytes(Bytes raw) { return raw; }
// 约 15 位对 int8：没有 int8 的点积指令时，两个平面合成一个 int16（254 · 高 + 低），一条 vpmaddwd 就乘完，比两遍 maddubs 快一倍。
struct PairCodes {
    __m256i even, odd;
};
struct PairActs {
    __m256i even, odd;
};
struct PairSums {
    __m256i v;
};

constexpr int64_t kPairStep = 4;

inline PairCodes load_pair_codes(const uint8_t* from) {
    const Bytes stored = load_bytes(from);
    return {_mm256_srai_epi16(_mm256_slli_epi16(stored.v, 8), 8), _mm256_srai_epi16(stored.v, 8)};
}
// 每 4 个数占 8 个字节：偶数个在前，奇数个在后。
inline void arrange_pairs(int8_t* planes, int64_t count) {
    int16_t joined[dsx::kInt8Part];
    for (int64_t i = 0; i < count; ++i) {
        joined[i] = static_cast<int16_t>(static_cast<int>(dsx::kLowSteps) * planes[i] + planes[count + i]);
    }
    for (int64_t i = 0; i < count; i += 4) {
        const int16_t four[] = {joined[i], joined[i + 2], joined[i + 1], joined[i + 3]};
        __builtin_memcpy(planes + 2 * i, four, sizeof four);
    }
}
inline PairActs splat_pair(const int8_t* planes, int64_t, int64_t t) {
    int32_t two[2];
    __builtin_memcpy(two, planes + 2 * t, sizeof two);
    return {_mm256_set1_epi32(two[0]), _mm256_set1_epi32(two[1])};
}
inline PairSums pair_start(const int32_t*) { return {_mm256_setzero_si256()}; }
inline PairSums pair_dot(PairSums acc, PairCodes w, PairActs a) {
    const __m256i even = _mm256_madd_epi16(w.even, a.even), odd = _mm256_madd_epi16(w.odd, a.odd);
    return {_mm256_add_epi32(_mm256_add_epi32(acc.v, even), odd)};
}
inline Vector join(PairSums acc) { return mul(to_float(Ints{acc.v}), splat(1 / dsx::kLowSteps)); }

}  // namespace
