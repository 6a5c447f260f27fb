// 激活逐块拆成两个 int8 平面，写在 Vector 与格式 Int8、Int4 之上；各指令集的编译单元先包含自己的 quant_simd_*.h。
#pragma once

#include <cstdint>
#include <cstring>

#include "quant_kernels.h"

namespace {

using dsx::kPlanes;
using dsx::QuantizedRows;

constexpr int kLanes = Vector::kLanes;
constexpr int kBytes = 4 * kLanes;  // 一个向量的字节
constexpr int kColumnTile = kTileVectors * kLanes;
// 一次算几行：每行每个向量两个平面各占一个累加器，AVX-512 时是 16 个；再多并不更快。
constexpr int kTileRows = 4;
// 一次读出几个权重。
template <typename F>
constexpr int64_t kValues = F::kVectors * kBytes;

// 一段激活的码换成权重读出来的次序：偶数个在前，奇数个在后。
template <typename F>
inline void order_like_weights(int8_t* codes, int64_t count) {
    if constexpr (F::kVectors == 2) {
        for (int64_t t = 0; t < count; t += kValues<F>) {
            split_pairs(codes + t);
        }
    }
}

// 一块：两个平面的码，scale，两个平面累加的起点。x 之后到 end 不满一块的补零。
template <typename F>
void quantize_block(const float* x, int64_t count, int64_t block, int8_t* high, int8_t* low, float* scale, int32_t* starts,
    int64_t start_step) {
    Vector top = splat(0);
    int64_t i = 0;
    for (; i + kLanes <= count; i += kLanes) {
        const Vector v = load(x + i);
        top = max(top, max(v, sub(splat(0), v)));
    }
    float largest = horizontal_max(top);
    for (; i < count; ++i) {
        const float magnitude = x[i] < 0 ? -x[i] : x[i];
        largest = magnitude > largest ? magnitude : largest;
    }
    const float inverse = largest > 0 ? 127.0f / largest : 0;
    *scale = largest / 127.0f;
    const auto store_codes = [&](int64_t at, Vector v) {
        const Vector scaled = mul(v, splat(inverse)), upper = nearest(scaled);
        store_int8(high + at, upper);
        store_int8(low + at, mul(sub(scaled, upper), splat(dsx::kLowSteps)));
    };
    for (i = 0; i + kLanes <= count; i += kLanes) {
        store_codes(i, load(x + i));
    }
    if (i < count) {
        float rest[kLanes] = {};
        for (int64_t j = i; j < count; ++j) {
            rest[j - i] = x[j];
        }
        store_codes(i, load(rest));
        i += kLanes;
    }
    for (; i < block; ++i) {
        high[i] = low[i] = 0;
    }
    int32_t sums[kPlanes] = {};
    if constexpr (F::kFolded != 0) {
        sums[0] = sum_codes(high, block);
        sums[1] = sum_codes(low, block);
    }
    for (int p = 0; p < kPlanes; ++p) {
        starts[p * start_step] = -F::kFolded * sums[p];
    }
}

// 一块里最大的绝对值，还分在各路里。
inline Vector largest_lanes(const float* x, int64_t block) {
    Vector top = splat(0);
    for (int64_t i = 0; i < block; i += kLanes) {
        const Vector v = load(x + i);
        top = max(top, max(v, sub(splat(0), v)));
    }
    return top;
}

// 一行里相邻的 count 个整块，至多 kLanes 个，从第 b 块起：同 quantize_block，最大值、除法与码之和几块一起算。
template <typename F>
void quantize_blocks(const float* x, int64_t count, const QuantizedRows& to, int64_t b) {
    constexpr int64_t kTogether = 4;
    const int64_t block = to.block, plane = to.plane_stride(), stride = to.scale_stride();
    float largest[kLanes] = {}, scales[kLanes], inverses[kLanes];
    for (int64_t j = 0; j < count; j += kTogether) {
        Vector tops[kTogether];
        for (int64_t k = 0; k < kTogether; ++k) {
            tops[k] = j + k < count ? largest_lanes(x + (j + k) * block, block) : splat(0);
        }
        max4(tops, largest + j);
    }
    store(scales, divide(load(largest), splat(127)));
    store(inverses, divide(splat(127), load(largest)));
    for (int64_t j = 0; j < count; ++j) {
        const Vector inverse = splat(largest[j] > 0 ? inverses[j] : 0);
        int8_t* const high = to.codes + (b + j) * block;
        for (int64_t i = 0; i < block; i += kLanes) {
            const Vector scaled = mul(load(x + j * block + i), inverse), upper = nearest(scaled);
            store_int8(high + i, upper);
            store_int8(high + plane + i, mul(sub(scaled, upper), splat(dsx::kLowSteps)));
        }
        to.scales[b + j] = scales[j];
    }
    for (int p = 0; p < kPlanes; ++p) {
        for (int64_t j = 0; j < count; ++j) {
            int32_t sum = 0;
            if constexpr (F::kFolded != 0) {
                sum = sum_codes(to.codes + p * plane + (b + j) * block, block);
            }
            to.starts[p * stride + b + j] = -F::kFolded * sum;
        }
    }
}

template <typename F>
void quantize(const float* x, int64_t x_stride, int64_t width, const QuantizedRows& rows) {
    const int64_t total = rows.plane_stride(), count = rows.blocks * rows.block, stride = rows.scale_stride();
    const int64_t whole = width / rows.block;
    for (int64_t i = 0; i < rows.rows; ++i) {
        const QuantizedRows to = rows.from(i, 1);
        for (int64_t b = 0; b < whole; b += kLanes) {
            quantize_blocks<F>(x + i * x_stride + b * to.block, whole - b < kLanes ? whole - b : kLanes, to, b);
        }
        for (int64_t b = whole; b < to.blocks; ++b) {
            const int64_t begin = b * to.block, left = width - begin;
            quantize_block<F>(x + i * x_stride + begin, left < to.block ? left : to.block, to.block, to.codes + begin,
                to.codes + total + begin, to.scales + b, to.starts + b, stride);
        }
        for (int64_t b = to.blocks; b < stride; ++b) {
            to.scales[b] = 0;
            to.starts[b] = to.starts[stride + b] = 0;
        }
        for (int p = 0; p < kPlanes; ++p) {
            std::memset(to.codes + p * total + count, 0, static_cast<size_t>(total - count));
            order_like_weights<F>(to.codes + p * total, total);
        }
    }
}

}  // namespace
