// int8 的索引 key 打分，写在 quant_simd_*.h 的 Int8、Ints、Acts 之上；在它之后包含。
// 点积是整数，怎么分块、用哪个指令集都一样；出来的 float 也精确（宽度不超过 1040 时小于 2^24）。
#pragma once

#include "kernels.h"
#include "quant_gemm.h"

namespace {

// 一次算几行 query：累加器连同一组 key 都放在寄存器里。
constexpr int kDotRows = 8 / (3 - kTileVectors);

// R 行 query 对 J 个向量的 key；packed 是“一路一个 key”的码。
template <int R, int J>
inline void dots_block(const int8_t* q, const int32_t* starts, const uint8_t* packed, int64_t width, float* out) {
    const int64_t groups = width / 4;
    Ints acc[R][J];
    for (int i = 0; i < R; ++i) {
        for (int j = 0; j < J; ++j) {
            acc[i][j] = splat_ints(Int8::kFolded != 0 ? starts[i] : 0);
        }
    }
    for (int64_t g = 0; g < groups; ++g) {
        Int8::Codes keys[J];
        for (int j = 0; j < J; ++j) {
            keys[j] = Int8::codes(load_bytes(packed + (j * groups + g) * kBytes));
        }
        for (int i = 0; i < R; ++i) {
            const Acts four = splat_acts(q + i * width + 4 * g);
            for (int j = 0; j < J; ++j) {
                acc[i][j] = dot(acc[i][j], keys[j], four);
            }
        }
    }
    for (int i = 0; i < R; ++i) {
        for (int j = 0; j < J; ++j) {
            store(out + i * dsx::kTile + j * kLanes, max(to_float(acc[i][j]), splat(0)));
        }
    }
}

void rectified_dots(const int8_t* q, const int32_t* starts, int64_t rows, const uint8_t* keys, int64_t width, float* out,
    uint8_t* packed) {
    for (int64_t j = 0; j < dsx::kTile; j += kLanes) {
        for (int64_t at = 0; at < width; at += kBytes) {
            Bytes lines[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                lines[i] = load_bytes(keys + (j + i) * width + at);
            }
            transpose(lines, packed + j * width + at * kLanes, kBytes);
        }
    }
    for (int64_t j = 0; j < dsx::kTile; j += kColumnTile) {
        const uint8_t* part = packed + j * width;
        int64_t i = 0;
        for (; i + kDotRows <= rows; i += kDotRows) {
            dots_block<kDotRows, kTileVectors>(q + i * width, starts + i, part, width, out + i * dsx::kTile + j);
        }
        for (; i < rows; ++i) {
            dots_block<1, kTileVectors>(q + i * width, starts + i, part, width, out + i * dsx::kTile + j);
        }
    }
}

}  // namespace
