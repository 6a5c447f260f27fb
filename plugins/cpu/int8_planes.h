// 约 15 位的左边对 int8 的右边，左边是两个 int8 平面（x = 高 + 低 / 254），各做一遍整数点积；写在 Int8、Ints、Bytes、Acts 之上。
// 没有 int8 点积指令的、一条指令乘两行的指令集各换一种写法，名字相同（见 quant_simd_avx2.h、int8_planes_i8mm.h）。
#pragma once

#include <cstdint>

#include "quant_kernels.h"

namespace {

// 一次几个码。
constexpr int64_t kPairStep = 4;

using PairCodes = Int8::Codes;
struct PairActs {
    Acts high, low;
};
struct PairSums {
    Ints high, low;
};

inline PairCodes load_pair_codes(const uint8_t* stored) { return stored_codes(load_bytes(stored)); }
// 两个平面紧挨着，各 count 个；从第 t 个起的 4 个。
inline PairActs splat_pair(const int8_t* planes, int64_t count, int64_t t) {
    return {splat_acts(planes + t), splat_acts(planes + count + t)};
}
inline PairSums pair_start(const int32_t* starts) { return {splat_ints(starts[0]), splat_ints(starts[1])}; }
inline PairSums pair_dot(const PairSums& acc, const PairCodes& w, const PairActs& a) {
    return {dot(acc.high, w, a.high), dot(acc.low, w, a.low)};
}
inline Vector join(const PairSums& acc) { return fma(to_float(acc.low), splat(1 / dsx::kLowSteps), to_float(acc.high)); }
inline void arrange_pairs(int8_t*, int64_t) {}

}  // namespace
