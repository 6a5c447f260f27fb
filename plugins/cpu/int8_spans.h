// int8 缓存上的注意力共用的部分：左边的几行拆成段与平面，缓存的一行有哪几段、各是什么 scale。在 int8_planes*.h 之后包含。
#pragma once

#include <cstdint>
#include <cstring>

#include "int8_cache.h"
#include "quant_rows.h"

namespace {

using dsx::Block;
using dsx::kBlockRows;
using dsx::kInt8Part;
using dsx::kInt8Tile;

constexpr int64_t kQuads = kInt8Tile / 4;
static_assert(kBytes % kPairStep == 0 && kQuads % (kPairStep / 4) == 0);
static_assert(kInt8Part % kBytes == 0 && kInt8Tile % kColumnTile == 0);

inline int64_t padded_bytes(int64_t n) { return (n + kBytes - 1) / kBytes * kBytes; }

// 左边的几行：每行拆成几段，每段 kInt8Part 个（最后一段可以少），各有一个 scale。
struct Pairs {
    int8_t* planes;   // 一段的两个平面紧挨着
    float* scales;    // [rows, parts]
    int32_t* starts;  // [rows, parts, 2]，折叠了右边的零点
    int64_t stride;   // 一行的字节数
    int64_t parts;    // 一行几段

    Pairs row(int64_t i) const { return {planes + i * stride, scales + i * parts, starts + 2 * i * parts, stride, parts}; }
    // 第 p 段，前面各段补齐之后一共 before 个。
    Pairs part(int64_t p, int64_t before) const { return {planes + 2 * before, scales + p, starts + 2 * p, stride, parts}; }
};

// 一段 count 个数拆成两个平面，补零到 room。不是有限的数使 scale 成为 NaN：结果也是，不会变成看似正常的数。
inline void split_part(const float* x, int64_t count, int64_t room, const Pairs& to) {
    quantize_block<Int8>(x, count, room, to.planes, to.planes + room, to.scales, to.starts, 1);
    float poison = 0;
    Vector bad = splat(0);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        bad = add(bad, sub(load(x + i), load(x + i)));
    }
    for (; i < count; ++i) {
        poison += x[i] - x[i];
    }
    *to.scales += poison + horizontal_sum(bad);
    arrange_pairs(to.planes, room);
}

// count 个数逐段拆开；从第 first 段起，前面补齐之后一共 before 个。
inline void split_span(const float* x, int64_t count, int64_t first, int64_t before, const Pairs& to) {
    for (int64_t begin = 0; begin < count; begin += kInt8Part) {
        const int64_t left = count - begin, n = left < kInt8Part ? left : kInt8Part;
        split_part(x + begin, n, padded_bytes(n), to.part(first + begin / kInt8Part, before + begin));
    }
}

// 行里的一段字节，至多 kBytes 个，不足的补零，成为右边要的样子。
inline Bytes load_span(const int8_t* from, int64_t left) {
    if (left >= kBytes) {
        return stored_bytes(load_bytes(reinterpret_cast<const uint8_t*>(from)));
    }
    alignas(64) uint8_t rest[kBytes] = {};
    std::memcpy(rest, from, static_cast<size_t>(left));
    return stored_bytes(load_bytes(rest));
}

// 一行在重排之后的布局：latent、旋转部分的高字节、低字节，各补齐到 kBytes 的倍数。
struct Spans {
    Spans(int64_t r, int64_t dr) : r(r), dr(dr), latent(padded_bytes(r)), rope(padded_bytes(dr)) {}
    int64_t width() const { return latent + 2 * rope; }
    int64_t latent_parts() const { return (latent + kInt8Part - 1) / kInt8Part; }
    int64_t parts() const { return latent_parts() + (rope + kInt8Part - 1) / kInt8Part; }

    int64_t r, dr, latent, rope;
};

// 一格里各 key 的 scale：latent、旋转部分的高字节（乘了 256）、低字节。
struct KeyScales {
    void read(const int8_t* rows, int64_t stride, int64_t count, const Spans& spans) {
        for (int64_t j = 0; j < kInt8Tile; ++j) {
            const int8_t* at = rows + (j < count ? j : count - 1) * stride + spans.r + 2 * spans.dr;
            latent[j] = scale_of(at);
            low[j] = scale_of(at + kScaleBytes);
            high[j] = 256 * low[j];
        }
    }

    float *latent, *high, *low;  // 各 kInt8Tile 个
};

}  // namespace
