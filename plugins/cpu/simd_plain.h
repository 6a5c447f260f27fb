// 没有专门的指令集时的 8 路向量：普通循环，由编译器按目标平台的基线向量化。
#pragma once

#include <cmath>
#include <cstdint>

#include "half.h"

namespace {

struct Vector {
    static constexpr int kLanes = 8;
    float v[kLanes];
};

template <typename F>
inline Vector each(F&& f) {
    Vector out;
    for (int i = 0; i < Vector::kLanes; ++i) {
        out.v[i] = f(i);
    }
    return out;
}

inline Vector splat(float x) {
    return each([&](int) { return x; });
}
inline Vector load(const float* p) {
    return each([&](int i) { return p[i]; });
}
inline Vector load_f16(const uint16_t* p) {
    return each([&](int i) { return float_of_f16(p[i]); });
}
inline Vector load_bf16(const uint16_t* p) {
    return each([&](int i) { return float_of_bf16(p[i]); });
}
inline Vector load_i8(const int8_t* p) {
    return each([&](int i) { return static_cast<float>(p[i]); });
}
inline void store(float* p, const Vector& a) {
    for (int i = 0; i < Vector::kLanes; ++i) {
        p[i] = a.v[i];
    }
}
inline Vector add(const Vector& a, const Vector& b) {
    return each([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vector sub(const Vector& a, const Vector& b) {
    return each([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vector mul(const Vector& a, const Vector& b) {
    return each([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vector max(const Vector& a, const Vector& b) {
    return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vector fma(const Vector& a, const Vector& b, const Vector& c) {
    return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vector exp(const Vector& a) {
    return each([&](int i) { return std::exp(a.v[i]); });
}
inline float horizontal_sum(const Vector& a) {
    return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
inline float horizontal_max(const Vector& a) {
    float m = a.v[0];
    for (int i = 1; i < Vector::kLanes; ++i) {
        m = a.v[i] > m ? a.v[i] : m;
    }
    return m;
}
// out[i] = a[i] 各路之和。
inline void sum4(const Vector (&a)[4], float* out) {
    for (int i = 0; i < 4; ++i) {
        out[i] = horizontal_sum(a[i]);
    }
}

// 8 行：第 q 个的一列写在 out + q * stride。
inline void transpose(const Vector (&rows)[Vector::kLanes], float* out, int64_t stride) {
    for (int q = 0; q < Vector::kLanes; ++q) {
        for (int i = 0; i < Vector::kLanes; ++i) {
            out[q * stride + i] = rows[i].v[q];
        }
    }
}

}  // namespace
