// 零点逐块给出的 int4 权重：先按零点 8 乘完，再补上各块的 (8 - 零点) · scale · 块里激活之和。整数的 kernel 因此只有一份。
//
// 块里激活之和不必再算：int4 的累加器从 -8 · 和 起，就在 starts 里。写在 Vector 与 load_nibbles 之上，在 quant_gemm.h 之后包含。
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "quant_gemm.h"

namespace {

// 一次几行激活、几列权重；(kZeroRows + kZeroColumns) 行 float 放得进 multiply_scratch。
constexpr int64_t kZeroRows = 8, kZeroColumns = 4;

// 一行激活各块之和，补零到 padded；是 -kFolded 倍，系数在 zero_steps 里。
inline void block_sums(const QuantizedRows& a, int64_t padded, float* out) {
    const int32_t *high = a.starts, *low = a.starts + a.scale_stride();
    for (int64_t b = 0; b < a.blocks; ++b) {
        out[b] = a.scales[b] * (static_cast<float>(high[b]) + static_cast<float>(low[b]) * (1 / dsx::kLowSteps));
    }
    for (int64_t b = a.blocks; b < padded; ++b) {
        out[b] = 0;
    }
}

inline Vector zero_step(const uint8_t* zeros, const uint16_t* scales) {
    static_assert(Int4::kFolded == Int4::kZeroPoint);
    const Vector off = sub(load_nibbles(zeros), splat(Int4::kZeroPoint));
    return mul(mul(off, splat(1.0f / Int4::kFolded)), load_f16(scales));
}

// 一列各块的零点离 8 多远，乘上 scale；补零到整个向量。
inline void zero_steps(const uint8_t* zeros, const uint16_t* scales, int64_t blocks, float* out) {
    int64_t b = 0;
    for (; b + kLanes <= blocks; b += kLanes) {
        store(out + b, zero_step(zeros + b / 2, scales + b));
    }
    if (b < blocks) {
        uint8_t last[kLanes / 2] = {};
        uint16_t last_scales[kLanes] = {};
        std::memcpy(last, zeros + b / 2, static_cast<size_t>((blocks - b + 1) / 2));
        std::memcpy(last_scales, scales + b, static_cast<size_t>(blocks - b) * sizeof(uint16_t));
        store(out + b, zero_step(last, last_scales));
    }
}

// 一行激活对 J 列。
template <int J>
inline void add_zero_dots(const float* sums, const float* steps, int64_t padded, float* y) {
    Vector acc[J];
    for (int j = 0; j < J; ++j) {
        acc[j] = splat(0);
    }
    for (int64_t b = 0; b < padded; b += kLanes) {
        const Vector mine = load(sums + b);
        for (int j = 0; j < J; ++j) {
            acc[j] = fma(mine, load(steps + j * padded + b), acc[j]);
        }
    }
    float out[J];
    if constexpr (J == kZeroColumns) {
        sum4(acc, out);
    } else {
        out[0] = horizontal_sum(acc[0]);
    }
    for (int j = 0; j < J; ++j) {
        y[j] += out[j];
    }
}

void add_zeros(const QuantizedRows& a, const QuantizedWeights& w, float* y, int64_t ldy, uint8_t* scratch) {
    const int64_t padded = (a.blocks + kLanes - 1) / kLanes * kLanes, zero_bytes = dsx::zero_row(a.blocks);
    float *sums = reinterpret_cast<float*>(scratch), *steps = sums + kZeroRows * padded;
    for (int64_t row = 0; row < a.rows; row += kZeroRows) {
        const int64_t rows = a.rows - row < kZeroRows ? a.rows - row : kZeroRows;
        for (int64_t i = 0; i < rows; ++i) {
            block_sums(a.from(row + i, 1), padded, sums + i * padded);
        }
        const auto add = [&](int64_t column, auto count) {
            for (int64_t j = 0; j < count; ++j) {
                zero_steps(w.zeros + (column + j) * zero_bytes, w.scales + (column + j) * a.blocks, a.blocks, steps + j * padded);
            }
            for (int64_t i = 0; i < rows; ++i) {
                add_zero_dots<count>(sums + i * padded, steps, padded, y + (row + i) * ldy + column);
            }
        };
        int64_t column = 0;
        for (; column + kZeroColumns <= w.columns; column += kZeroColumns) {
            add(column, std::integral_constant<int, kZeroColumns>{});
        }
        for (; column < w.columns; ++column) {
            add(column, std::integral_constant<int, 1>{});
        }
    }
}

template <void (*kMultiply)(const QuantizedRows&, const QuantizedWeights&, float*, int64_t, uint8_t*)>
void multiply_with_zeros(const QuantizedRows& a, const QuantizedWeights& w, float* y, int64_t ldy, uint8_t* scratch) {
    kMultiply(a, w, y, ldy, scratch);
    if (w.zeros != nullptr) {
        add_zeros(a, w, y, ldy, scratch);
    }
}

}  // namespace
