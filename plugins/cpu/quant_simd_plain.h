// 8 路 int32，每路 4 个 int8 的点积；普通循环。
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "quant_kernels.h"
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
// int4 的权重：码至多 15，当有符号的用；零点乘激活之和，从累加器的起点里减去。低 4 位的在前一个向量，高 4 位的在后一个。
struct Int4 {
    static constexpr int kBits = 4, kVectors = 2;
    static constexpr int32_t kZeroPoint = 8, kFolded = kZeroPoint;
    using Codes = ::Codes;

    static inline void unpack(const Bytes& raw, Bytes (&out)[kVectors]) {
        for (int i = 0; i < 4 * Vector::kLanes; ++i) {
            out[0].v[i] = raw.v[i] & 15;
            out[1].v[i] = raw.v[i] >> 4;
        }
    }
    static inline Codes codes(const Bytes& raw) {
        Codes out;
        std::memcpy(out.v, raw.v, sizeof out.v);
        return out;
    }
};

inline Bytes load_bytes(const uint8_t* p) {
    Bytes out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
}
inline void store_bytes(uint8_t* p, const Bytes& a) { std::memcpy(p, a.v, sizeof a.v); }
// 4 个字节里的 8 个 4 位数，低位在前。
inline Vector load_nibbles(const uint8_t* p) {
    return each([&](int i) { return static_cast<float>(p[i / 2] >> 4 * (i % 2) & 15); });
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
// 两个向量的字节，就地：偶数个在前，奇数个在后。
inline void split_pairs(int8_t* p) {
    int8_t from[8 * Vector::kLanes];
    std::memcpy(from, p, sizeof from);
    for (int i = 0; i < 4 * Vector::kLanes; ++i) {
        p[i] = from[2 * i];
        p[4 * Vector::kLanes + i] = from[2 * i + 1];
    }
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
// out[i] = a[i] 各路的最大值。
inline void max4(const Vector (&a)[4], float* out) {
    for (int i = 0; i < 4; ++i) {
        out[i] = horizontal_max(a[i]);
    }
}
inline int32_t sum_codes(const int8_t* codes, int64_t count) {
    int32_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        sum += codes[i];
    }
    return sum;
}
// 两个向量连起来，偶数个与奇数个。
struct Halves {
    Vector even, odd;
};
inline Halves deinterleave(const Vector& a, const Vector& b) {
    constexpr int half = Vector::kLanes / 2;
    const auto pick = [&](int i, int odd) { return i < half ? a.v[2 * i + odd] : b.v[2 * (i - half) + odd]; };
    return {each([&](int i) { return pick(i, 0); }), each([&](int i) { return pick(i, 1); })};
}
// 符号位是 1 的取前一个，否则取后一个。
inline Vector choose_by_sign(const Vector& sign, const Vector& negative, const Vector& other) {
    return each([&](int i) { return std::signbit(sign.v[i]) ? negative.v[i] : other.v[i]; });
}
// 8 行各 32 字节：out 的第 q 个向量是各行的第 q 组 4 字节。
inline void transpose(const Bytes (&rows)[Vector::kLanes], uint8_t* out, int64_t stride) {
    for (int q = 0; q < Vector::kLanes; ++q) {
        for (int i = 0; i < Vector::kLanes; ++i) {
            std::memcpy(out + q * stride + 4 * i, rows[i].v + 4 * q, 4);
        }
    }
}

// 有符号的字节加 128 成为无符号的（Int8 的零点），或反过来。
inline Bytes flip_sign(Bytes raw) {
    for (uint8_t& byte : raw.v) {
        byte = static_cast<uint8_t>(byte ^ 0x80);
    }
    return raw;
}
inline Bytes stored_bytes(const Bytes& raw) { return raw; }
// 4 行各 32 字节：out 的第 k 个向量是第 8k..8k+7 列，一路一列，4 行的字节相邻。
inline void weave(const Bytes (&rows)[4], uint8_t* out, int64_t stride) {
    for (int i = 0; i < 4 * Vector::kLanes; ++i) {
        for (int row = 0; row < 4; ++row) {
            out[i / Vector::kLanes * stride + i % Vector::kLanes * 4 + row] = rows[row].v[i];
        }
    }
}

// 约 15 位对 int8：没有整数点积的指令可用，两个平面合成一个整数（254 · 高 + 低）存成 float 来乘，编译器才向量化得好；乘积仍是精确的整数，
// 相加只差 float32 的舍入。
struct PairCodes {
    Vector v[4];
};
struct PairActs {
    int16_t v[4];
};
using PairSums = Vector;

constexpr int64_t kPairStep = 4;

inline PairCodes load_pair_codes(const uint8_t* stored) {
    int32_t words[Vector::kLanes];
    std::memcpy(words, stored, sizeof words);
    PairCodes out;
    for (int k = 0; k < 4; ++k) {
        for (int i = 0; i < Vector::kLanes; ++i) {
            out.v[k].v[i] = static_cast<float>(static_cast<int32_t>(static_cast<uint32_t>(words[i]) << (24 - 8 * k)) >> 24);
        }
    }
    return out;
}
inline void arrange_pairs(int8_t* planes, int64_t count) {
    int16_t joined[dsx::kInt8Part];
    for (int64_t i = 0; i < count; ++i) {
        joined[i] = static_cast<int16_t>(static_cast<int>(dsx::kLowSteps) * planes[i] + planes[count + i]);
    }
    std::memcpy(planes, joined, static_cast<size_t>(2 * count));
}
inline PairActs splat_pair(const int8_t* planes, int64_t, int64_t t) {
    PairActs out;
    std::memcpy(out.v, planes + 2 * t, sizeof out.v);
    return out;
}
inline PairSums pair_start(const int32_t*) { return splat(0); }
inline PairSums pair_dot(PairSums acc, const PairCodes& w, const PairActs& a) {
    for (int k = 0; k < 4; ++k) {
        acc = fma(splat(a.v[k]), w.v[k], acc);
    }
    return acc;
}
inline Vector join(const PairSums& acc) { return mul(acc, splat(1 / dsx::kLowSteps)); }

}  // namespace
