// int8、int4 权重的矩阵乘里与指令集有关的部分。每个指令集一个编译单元（quant_<指令集>.cc），各自填函数表，一种位数一张。
#pragma once

#include <cstdint>

#include "kernels.h"

namespace dsx {

// 量化后的激活每行补零到它的倍数：一次读取最多涉及这么多个权重（AVX-512 的一个向量装 128 个 int4）。
constexpr int64_t kRowPad = 128;
// int8 的索引 key 补零到它的倍数，它们的零点。
constexpr int64_t kInt8Pad = 64;
constexpr int32_t kZeroPoint = 128;
// 激活拆成两个 int8 平面：x = (high + low / 254) * scale，scale = 块里最大的绝对值 / 127。余数 x / scale - high 在 ±0.5 之内，
// 所以 low 也在 ±127 之内；误差是 scale / 508，约 15 位。只留 high 就是普通的 int8 激活，每个算子多约 6e-3 的相对误差。
constexpr int kPlanes = 2;
constexpr float kLowSteps = 254;

// int8 缓存上的注意力：一格几个 key；左边几个一段，各有一个 scale（32 位的累加器因此放得下）。
constexpr int64_t kInt8Tile = 128;
constexpr int64_t kInt8Part = 256;

// 逐块量化的激活。一行之内码的次序由 kernel 定（int4 的按奇偶分开），与它读出的权重对齐。
struct QuantizedRows {
    int64_t rows;
    int64_t blocks;   // 每行几块
    int64_t block;    // 32、64 或 128
    int8_t* codes;    // [rows, kPlanes, plane_stride()]，块之外的列是 0
    float* scales;    // [rows, scale_stride()]，块之外的是 0
    int32_t* starts;  // [rows, kPlanes, scale_stride()]：整数累加器的起点，折叠了权重的零点；块之外的是 0

    int64_t plane_stride() const { return (blocks * block + kRowPad - 1) / kRowPad * kRowPad; }
    int64_t code_stride() const { return kPlanes * plane_stride(); }
    int64_t scale_stride() const { return (blocks + kMaxShare - 1) / kMaxShare * kMaxShare; }
    int64_t start_stride() const { return kPlanes * scale_stride(); }
    QuantizedRows from(int64_t row, int64_t count) const {
        return {count, blocks, block, codes + row * code_stride(), scales + row * scale_stride(),
            starts + row * start_stride()};
    }

    static constexpr int64_t kMaxShare = 4;  // 一个向量里至多几块
};

// 一行零点的字节数：每块一个 4 位数，两个一字节，低位在前。
constexpr int64_t zero_row(int64_t blocks) { return (blocks + 1) / 2; }

// 权重的若干行：值是 (码 - 零点) * scale，零点是 2^(位数-1)，或逐块给出（只有 int4）；int4 两个一字节，低位在前。
struct QuantizedWeights {
    const uint8_t* codes;    // [columns, blocks * block * bits / 8]
    const uint16_t* scales;  // [columns, blocks] float16
    int64_t columns;         // 输出的列数
    const uint8_t* zeros = nullptr;  // [columns, zero_row(blocks)]；空的就是 2^(位数-1)
    int64_t next = 0;        // 这些之后接着读的离第一列几列，0 是紧接着的；只用来预取

    // 从第 column 列起的 count 列；一列 row_bytes 字节的码，blocks 块。
    QuantizedWeights from(int64_t column, int64_t count, int64_t row_bytes, int64_t blocks) const {
        return {codes + column * row_bytes, scales + column * blocks, count,
            zeros == nullptr ? nullptr : zeros + column * zero_row(blocks), 0};
    }
};

struct QuantKernels {
    const char* name;
    int64_t bits;
    int64_t group;  // 切分列时取它的倍数：一列怎么算只由它在第几列决定，与切法无关
    // x[rows, width] → rows，行距 x_stride；width 到 blocks * block 之间补零。
    void (*quantize)(const float* x, int64_t x_stride, int64_t width, const QuantizedRows& rows);
    // y[rows, columns] = 激活 · 权重ᵀ，行距 ldy。scratch 至少 multiply_scratch(blocks, block) 字节，64 字节对齐。
    void (*multiply)(const QuantizedRows& rows, const QuantizedWeights& weights, float* y, int64_t ldy, uint8_t* scratch);
    // y[i] = silu(x[2i]) * x[2i + 1]。
    void (*swiglu)(const float* x, int64_t count, float* y);
    // out[rows, kTile] = max(q · key, 0)：q [rows, width] 是 int8，keys [kTile, width] 是加了 kZeroPoint 的码，width 是 kInt8Pad 的
    // 倍数，补的列是 0（key 是 kZeroPoint）。starts[i] = -kZeroPoint * Σ q[i]。packed 有 kTile * width 字节，64 字节对齐。与位数无关。
    void (*rectified_dots)(const int8_t* q, const int32_t* starts, int64_t rows, const uint8_t* keys, int64_t width,
        float* out, uint8_t* packed);
    // y[rows, columns] = 激活 · 权重ᵀ，权重是 int8 的 w_kv_b 的若干行（见 Int8Rows），块同激活。scratch 同 multiply。与位数无关。
    void (*expand)(const QuantizedRows& rows, const int8_t* weights, int64_t columns, float* y, int64_t ldy, uint8_t* scratch);
    // 同 Kernels::attend，keys 与 values 是 int8 缓存的行；scratch 至少 int8_attend_scratch(width, value_width) 个 float。与位数无关。
    void (*attend)(const Block& block, float* scratch);

    // 一行 width 个权重的字节数。
    int64_t bytes(int64_t width) const { return width * bits / 8; }
};

constexpr int64_t kMaxColumnTile = 32;

// 一组列重排之后的码与 scale。
constexpr int64_t multiply_scratch(int64_t blocks, int64_t block) {
    return kMaxColumnTile * (blocks * block + kRowPad) + kMaxColumnTile * blocks * static_cast<int64_t>(sizeof(float));
}

// query 与概率的两个平面、重排过的 key 与 value、分数、各个 scale；每块从 64 字节的边界开始。
constexpr int64_t int8_attend_scratch(int64_t width, int64_t value_width) {
    constexpr int64_t kPieces = 16, kLine = 64;
    const int64_t r = (value_width + kInt8Pad - 1) / kInt8Pad * kInt8Pad;
    const int64_t dr = (width - value_width + kInt8Pad - 1) / kInt8Pad * kInt8Pad;
    const int64_t parts = r / kInt8Part + dr / kInt8Part + 2;
    const int64_t rows = kBlockRows * (kPlanes * (r + dr + kInt8Tile) + 12 * (parts + 1) + 4 * (kInt8Tile + 1));
    return (rows + kInt8Tile * (2 * r + 2 * dr + 12) + kPieces * kLine) / 4;
}

extern const QuantKernels kPlainInt8, kPlainInt4;
#if defined(__x86_64__)
extern const QuantKernels kAvx2Int8, kAvx2Int4;
#if defined(DSX_AVX_VNNI)
extern const QuantKernels kAvxVnniInt8, kAvxVnniInt4;
#endif
extern const QuantKernels kAvx512VnniInt8, kAvx512VnniInt4;
#elif defined(__aarch64__)
extern const QuantKernels kNeonInt8, kNeonInt4;
extern const QuantKernels kNeonDotprodInt8, kNeonDotprodInt4;
extern const QuantKernels kNeonI8mmInt8, kNeonI8mmInt4;
#endif

}  // namespace dsx
