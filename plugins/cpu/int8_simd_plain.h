// 8 路 int32，每路 4 个 int8 的点积；普通循环。
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd_plain.h"

namespace {

constexpr int kTileVectors = 1;
constexpr bool kFoldZeroPoint = false;

struct Ints {
    int32_t v[Vector::kLanes];
};
struct Codes {
    int8_t v[4 * Vector::kLanes];
};
using Acts = Codes;

inline Ints splat_ints(int32_t x) {
    Ints out;
    std::fill_n(out.v, Vector::kLanes, x);
    return out;
}
inline Ints first_lane(int32_t x) {
    Ints out = splat_ints(0);
    out.v[0] = x;
    return out;
}
inline Codes load_codes(const uint8_t* p) {
    Codes out;
    for (int i = 0; i < 4 * Vector::kLanes; ++i) {
        out.v[i] = static_cast<int8_t>(p[i] - 128);
    }
    return out;
}
inline Acts load_acts(const int8_t* p) {
    Acts out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
}
inline Acts splat_acts(const int8_t* p) {
    Acts out;
    for (int i = 0; i < Vector::kLanes; ++i) {
        std::memcpy(out.v + 4 * i, p, 4);
    }
    return out;
}
inline Ints dot(const Ints& acc, const Codes& w, const Acts& a) {
    Ints out;
    for (int i = 0; i < Vector::kLanes; ++i) {
        int32_t sum = acc.v[i];
        for (int j = 4 * i; j < 4 * i + 4; ++j) {
            sum += w.v[j] * a.v[j];
        }
        out.v[i] = sum;
    }
    return out;
}
inline Vector to_float(const Ints& a) {
    return each([&](int i) { return static_cast<float>(a.v[i]); });
}
inline Vector nearest(const Vector& a) {
    return each([&](int i) { return std::nearbyint(a.v[i]); });
}
inline void store_int8(int8_t* p, const Vector& a) {
    for (int i = 0; i < Vector::kLanes; ++i) {
        p[i] = static_cast<int8_t>(std::nearbyint(a.v[i]));
    }
}
inline Vector divide(const Vector& a, const Vector& b) {
    return each([&](int i) { return a.v[i] / b.v[i]; });
}
// 8 行各 32 字节：out 的第 q 个向量是各行的第 q 组 4 字节。
inline void transpose(const uint8_t* const (&rows)[Vector::kLanes], uint8_t* out, int64_t stride) {
    for (int q = 0; q < Vector::kLanes; ++q) {
        for (int i = 0; i < Vector::kLanes; ++i) {
            std::memcpy(out + q * stride + 4 * i, rows[i] + 4 * q, 4);
        }
    }
}

}  // namespace
