// silu(gate) · up，写在 Vector 与 deinterleave、choose_by_sign 之上；各指令集的编译单元先包含自己的 quant_simd_*.h。
#pragma once

#include <cstdint>
#include <cstring>

namespace {

// 相邻的一对是 gate 与 up：silu(g) = g / (1 + e^-g)，exp 只用于不大于 0 的数：e = e^-|g|，g < 0 时分子是 e，否则是 1。
inline Vector swiglu_pairs(const float* x) {
    const Halves pair = deinterleave(load(x), load(x + Vector::kLanes));
    const Vector g = pair.even, e = exp(sub(splat(0), max(g, sub(splat(0), g))));
    const Vector sigmoid = divide(choose_by_sign(g, e, splat(1)), add(splat(1), e));
    return mul(mul(g, sigmoid), pair.odd);
}

void swiglu(const float* x, int64_t count, float* y) {
    int64_t i = 0;
    for (; i + Vector::kLanes <= count; i += Vector::kLanes) {
        store(y + i, swiglu_pairs(x + 2 * i));
    }
    if (i < count) {
        float in[2 * Vector::kLanes] = {}, out[Vector::kLanes];
        std::memcpy(in, x + 2 * i, static_cast<size_t>(2 * (count - i)) * sizeof(float));
        store(out, swiglu_pairs(in));
        std::memcpy(y + i, out, static_cast<size_t>(count - i) * sizeof(float));
    }
}

}  // namespace
