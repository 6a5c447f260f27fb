// float16 / bfloat16 与 float32 的逐个转换，舍入到最近、平局取偶，与 IEEE 754 逐位相同。
#pragma once

#include <cstdint>
#include <cstring>

namespace {

inline float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    return bits;
}

inline float float_of_bf16(uint16_t value) { return float_of_bits(static_cast<uint32_t>(value) << 16); }

inline uint16_t bf16_of_float(float value) {
    const uint32_t bits = bits_of_float(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) {
        return static_cast<uint16_t>((bits >> 16) | 0x40u);  // NaN 截断后仍要是 NaN
    }
    return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

inline float float_of_f16(uint16_t value) {
    const uint32_t sign = static_cast<uint32_t>(value & 0x8000u) << 16, rest = value & 0x7fffu;
    if (rest >= 0x7c00u) {
        return float_of_bits(sign | 0x7f800000u | (rest << 13));  // Inf、NaN
    }
    if (rest < 0x0400u) {
        const float magnitude = static_cast<float>(rest) * 0x1p-24f;  // 非规格化数
        return float_of_bits(sign | bits_of_float(magnitude));
    }
    return float_of_bits(sign | ((rest << 13) + (112u << 23)));
}

inline uint16_t f16_of_float(float value) {
    const uint32_t bits = bits_of_float(value), sign = (bits >> 16) & 0x8000u, rest = bits & 0x7fffffffu;
    if (rest > 0x7f800000u) {
        return static_cast<uint16_t>(sign | 0x7e00u);
    }
    if (rest >= 0x477ff000u) {
        return static_cast<uint16_t>(sign | 0x7c00u);  // 舍入之后超出 65504
    }
    if (rest < 0x38800000u) {
        // 非规格化数：加上 0.5 使尾数的最低位正好是 2^-24，由浮点加法来舍入。
        const uint32_t shifted = bits_of_float(float_of_bits(rest) + 0.5f) - bits_of_float(0.5f);
        return static_cast<uint16_t>(sign | shifted);
    }
    return static_cast<uint16_t>(sign | ((rest - (112u << 23) + 0xfffu + ((rest >> 13) & 1u)) >> 13));
}

}  // namespace
