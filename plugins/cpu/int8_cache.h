// int8 缓存的一行：布局、取值范围与舍入见 deepseek_export/ops/int8_cache.py，有限的输入编出来的字节与它逐位相同。
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr float kLatentCodes = 127, kRopeCodes = 127 * 256;
constexpr float kLargestFactor = 127;
constexpr int kLeastExponent = -100, kLargestExponent = 100;

// 2^e，e 限制在可用的范围里：任何字节都还原成有限的数。
inline float power_of_two(int e) {
    e = e < kLeastExponent ? kLeastExponent : e > kLargestExponent ? kLargestExponent : e;
    const uint32_t bits = static_cast<uint32_t>(e + 127) << 23;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float scale_of(const int8_t* bytes) { return static_cast<float>(bytes[0]) * power_of_two(bytes[1]); }

// NaN 得 -most：转成整数要有定义。
inline float limited(float x, float most) { return !(x > -most) ? -most : x > most ? most : x; }

// 一段数的 scale，写成 (k, e) 两个字节。
inline float write_scale(const float* x, int64_t count, float codes, int8_t* bytes) {
    float top = 0;
    for (int64_t i = 0; i < count; ++i) {
        top = std::fabs(x[i]) > top ? std::fabs(x[i]) : top;
    }
    const float step = top / codes;
    int e = kLeastExponent;
    while (e < kLargestExponent && step > kLargestFactor * power_of_two(e)) {
        ++e;
    }
    const float factor = std::ceil(step / power_of_two(e));
    bytes[0] = static_cast<int8_t>(factor < 1 ? 1 : limited(factor, kLargestFactor));
    bytes[1] = static_cast<int8_t>(e);
    return scale_of(bytes);
}

inline void encode_row(const float* latent, int64_t r, const float* rope, int64_t dr, int8_t* row) {
    int8_t *high = row + r, *low = high + dr, *scales = low + dr;
    const float latent_scale = write_scale(latent, r, kLatentCodes, scales);
    for (int64_t i = 0; i < r; ++i) {
        row[i] = static_cast<int8_t>(std::nearbyint(limited(latent[i] / latent_scale, kLatentCodes)));
    }
    const float rope_scale = write_scale(rope, dr, kRopeCodes, scales + 2);
    for (int64_t i = 0; i < dr; ++i) {
        const float code = std::nearbyint(limited(rope[i] / rope_scale, kRopeCodes));
        const float upper = std::floor((code + 128) / 256);
        high[i] = static_cast<int8_t>(upper);
        low[i] = static_cast<int8_t>(code - 256 * upper);
    }
}

}  // namespace
