// int8 缓存的一行：布局、取值范围与舍入见 deepseek_export/ops/int8_cache.py，有限的输入编出来的字节与它逐位相同。
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr float kLatentCodes = 127, kRopeCodes = 127 * 256;
constexpr int kScaleBytes = 3;
constexpr int kLeastExponent = -112, kLargestExponent = 92;

// 2^e，e 限制在可用的范围里：任何字节都还原成有限的数。
inline float power_of_two(int e) {
    e = e < kLeastExponent ? kLeastExponent : e > kLargestExponent ? kLargestExponent : e;
    const uint32_t bits = static_cast<uint32_t>(e + 127) << 23;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

inline float scale_of(const int8_t* bytes) {
    return static_cast<float>(256 * bytes[0] + bytes[1]) * power_of_two(bytes[2]);
}

// NaN 得 -most：转成整数要有定义。
inline float limited(float x, float most) { return !(x > -most) ? -most : x > most ? most : x; }

inline void write_code(float code, int8_t* high, int8_t* low) {
    const float upper = std::floor((code + 128) / 256);
    *high = static_cast<int8_t>(upper);
    *low = static_cast<int8_t>(code - 256 * upper);
}

// 一段数的 scale，写成三个字节。
inline float write_scale(const float* x, int64_t count, float codes, int8_t* bytes) {
    float top = 0;
    for (int64_t i = 0; i < count; ++i) {
        top = std::fabs(x[i]) > top ? std::fabs(x[i]) : top;
    }
    const float step = top / codes;
    int e = kLeastExponent;
    while (e < kLargestExponent && step > kRopeCodes * power_of_two(e)) {
        ++e;
    }
    const float factor = std::ceil(step / power_of_two(e));
    write_code(factor < 1 ? 1 : limited(factor, kRopeCodes), bytes, bytes + 1);
    bytes[2] = static_cast<int8_t>(e);
    return scale_of(bytes);
}

// 一段数的码，一个字节一个；scale 写在 bytes，也返回。
inline float encode_part(const float* x, int64_t count, int8_t* codes, int8_t* bytes) {
    const float scale = write_scale(x, count, kLatentCodes, bytes);
    for (int64_t i = 0; i < count; ++i) {
        codes[i] = static_cast<int8_t>(std::nearbyint(limited(x[i] / scale, kLatentCodes)));
    }
    return scale;
}

inline void encode_row(const float* latent, int64_t r, const float* rope, int64_t dr, int8_t* row) {
    int8_t *high = row + r, *low = high + dr, *scales = low + dr;
    encode_part(latent, r, row, scales);
    const float rope_scale = write_scale(rope, dr, kRopeCodes, scales + 3);
    for (int64_t i = 0; i < dr; ++i) {
        write_code(std::nearbyint(limited(rope[i] / rope_scale, kRopeCodes)), high + i, low + i);
    }
}

}  // namespace
