// 8 路 int32，每路 4 个 int8 的点积；普通循环。
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "simd_plain.h"

namespace {

constexpr int kTileVectors = 1;

struct Ints {
    int32_t v[Vector::kLanes];
};
struct Bytes {
    uint8_t v[4 * Vector::kLanes];
};
struct Codes {
    int8_t v[4 * Vector::kLanes];
};
using Acts = Codes;

// int8 的权重：码减去零点就是 int8。
struct Int8 {
    static constexpr int kBits = 8, kVectors = 1;
    static constexpr int32_t kZeroPoint = 128, kFolded = 0;
    using Codes = ::Codes;

    static inline void unpack(const Bytes& raw, Bytes (&out)[kVectors]) { out[0] = raw; }
    static inline Codes codes(const Bytes& raw) {
        Codes out;
        for (int i = 0; i < 4 * Vector::kLanes; ++i) {
            out.v[i] = static_cast<int8_t>(raw.v[i] - kZeroPoint);
        }
        return out;
    }
};
// int4 的权重：低 4 位的在前一个向量，高 4 位的在后一个。
struct Int4 {
    static constexpr int kBits = 4, kVectors = 2;
    static constexpr int32_t kZeroPoint = 8, kFolded = 0;
    using Codes = ::Codes;

    static inline void unpack(const Bytes& raw, Bytes (&out)[kVectors]) {
        for (int i = 0; i < 4 * Vector::kLanes; ++i) {
            out[0].v[i] = raw.v[i] & 15;
            out[1].v[i] = raw.v[i] >> 4;
        }
    }
    static inline Codes codes(const Bytes& raw) {
        Codes out;
        for (int i = 0; i < 4 * Vector::kLanes; ++i) {
            out.v[i] = static_cast<int8_t>(raw.v[i] - kZeroPoint);
        }
        return out;
    }
};

inline Bytes load_bytes(const uint8_t* p) {
    Bytes out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
}
inline Ints splat_ints(int32_t x) {
    Ints out;
    std::fill_n(out.v, Vector::kLanes, x);
    return out;
}
// 一个向量里 kShare 块，各占相邻的几路。
template <int kShare>
inline Ints first_lanes(const int32_t* x) {
    Ints out = splat_ints(0);
    for (int i = 0; i < kShare; ++i) {
        out.v[i * Vector::kLanes / kShare] = x[i];
    }
    return out;
}
template <int kShare>
inline Vector spread(const float* x) {
    return each([&](int i) { return x[i * kShare / Vector::kLanes]; });
}
template <int kShare>
inline Vector spread_f16(const uint16_t* x) {
    float wide[kShare];
    for (int i = 0; i < kShare; ++i) {
        wide[i] = float_of_f16(x[i]);
    }
    return spread<kShare>(wide);
}
inline float widen_f16(uint16_t x) { return float_of_f16(x); }
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
inline Ints dot(const Ints& acc, const Codes (&w)[2], const Acts (&a)[2]) { return dot(dot(acc, w[0], a[0]), w[1], a[1]); }
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
inline void transpose(const Bytes (&rows)[Vector::kLanes], uint8_t* out, int64_t stride) {
    for (int q = 0; q < Vector::kLanes; ++q) {
        for (int i = 0; i < Vector::kLanes; ++i) {
            std::memcpy(out + q * stride + 4 * i, rows[i].v + 4 * q, 4);
        }
    }
}

}  // namespace
