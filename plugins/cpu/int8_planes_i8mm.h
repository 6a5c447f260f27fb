// 约 15 位对 int8 的 SMMLA 写法，名字同 int8_planes.h：左边的两个平面是它的两行，右边的两路是它的两列，一次 8 个码。
// key 的组数是奇数时多读一组没有写过的，它乘的概率是 0。
#pragma once

#include "quant_eights.h"

namespace {

constexpr int64_t kPairStep = kEight;

struct PairCodes {
    int8x16_t two[kColumnPairs];
};
struct PairActs {
    int8x16_t planes;
};
struct PairSums {
    int32x4_t two[kColumnPairs];
};

// 相邻两个向量各是每路 4 个码：凑成每路 8 个。
inline int8x16_t join_fours(uint8x16_t first, uint8x16_t second, bool high) {
    const uint32x4_t a = vreinterpretq_u32_u8(first), b = vreinterpretq_u32_u8(second);
    return vreinterpretq_s8_u32(high ? vzip2q_u32(a, b) : vzip1q_u32(a, b));
}
inline PairCodes load_pair_codes(const uint8_t* stored) {
    const Bytes first = load_bytes(stored), second = load_bytes(stored + kBytes);
    return {{join_fours(first.lo, second.lo, false), join_fours(first.lo, second.lo, true),
        join_fours(first.hi, second.hi, false), join_fours(first.hi, second.hi, true)}};
}
inline PairActs splat_pair(const int8_t* planes, int64_t count, int64_t t) {
    return {vcombine_s8(vld1_s8(planes + t), vld1_s8(planes + count + t))};
}
inline PairSums pair_start(const int32_t* starts) {
    const int32x4_t start = start_of(starts[0], starts[1]);
    return {{start, start, start, start}};
}
inline PairSums pair_dot(PairSums acc, const PairCodes& w, PairActs a) {
    for (int j = 0; j < kColumnPairs; ++j) {
        acc.two[j] = vmmlaq_s32(acc.two[j], a.planes, w.two[j]);
    }
    return acc;
}
inline Vector join(const PairSums& acc) {
    Ints planes[kPlanes];
    split_rows(acc.two, planes);
    return join_planes(planes);
}
inline void arrange_pairs(int8_t*, int64_t) {}

}  // namespace
