// int8 权重的矩阵乘里与指令集有关的部分。每个指令集一个编译单元（int8_<指令集>.cc），各自填一张函数表。
#pragma once

#include <cstdint>

namespace dsx {

constexpr int64_t kInt8Pad = 64;  // 量化后的激活每行补零到它的倍数：最宽的一次读取
constexpr int32_t kZeroPoint = 128;
// 激活拆成两个 int8 平面：x = (high + low / 254) * scale，scale = 块里最大的绝对值 / 127。余数 x / scale - high 在 ±0.5 之内，
// 所以 low 也在 ±127 之内；误差是 scale / 508，约 15 位。只留 high 就是普通的 int8 激活，每个算子多约 6e-3 的相对误差。
constexpr int kPlanes = 2;
constexpr float kLowSteps = 254;

// 逐块量化的激活。
struct QuantizedRows {
    int64_t rows;
    int64_t blocks;   // 每行几块
    int64_t block;    // 32、64 或 128
    int8_t* codes;    // [rows, kPlanes, plane_stride()]，块之外的列是 0
    float* scales;    // [rows, blocks + 1]，最后一个是 0：成对读取时的伴
    int32_t* starts;  // [rows, blocks, kPlanes]：整数累加器的起点，折叠了权重的零点

    int64_t plane_stride() const { return (blocks * block + kInt8Pad - 1) / kInt8Pad * kInt8Pad; }
    int64_t code_stride() const { return kPlanes * plane_stride(); }
    int64_t scale_stride() const { return blocks + 1; }
    int64_t start_stride() const { return kPlanes * blocks; }
    QuantizedRows from(int64_t row, int64_t count) const {
        return {count, blocks, block, codes + row * code_stride(), scales + row * scale_stride(),
            starts + row * start_stride()};
    }
};

// 权重的若干行：值是 (code - 128) * scale。
struct Int8Weights {
    const uint8_t* codes;  // [columns, blocks * block]
    const float* scales;   // [columns, blocks]
    int64_t columns;       // 输出的列数
};

struct Int8Kernels {
    const char* name;
    int64_t group;  // 切分列时取它的倍数：一列怎么算只由它在第几列决定，与切法无关
    // x[rows, width] → rows，行距 x_stride；width 到 blocks * block 之间补零。
    void (*quantize)(const float* x, int64_t x_stride, int64_t width, const QuantizedRows& rows);
    // y[rows, columns] = 激活 · 权重ᵀ，行距 ldy。scratch 至少 int8_scratch(blocks, block) 字节，64 字节对齐。
    void (*multiply)(const QuantizedRows& rows, const Int8Weights& weights, float* y, int64_t ldy, uint8_t* scratch);
    // y[i] = silu(x[2i]) * x[2i + 1]。
    void (*swiglu)(const float* x, int64_t count, float* y);
    // out[rows, kTile] = max(q · key, 0)：q [rows, width] 是 int8，keys [kTile, width] 是加了 kZeroPoint 的码，width 是 kInt8Pad 的
    // 倍数，补的列是 0（key 是 kZeroPoint）。starts[i] = -kZeroPoint * Σ q[i]。packed 有 kTile * width 字节，64 字节对齐。
    void (*rectified_dots)(const int8_t* q, const int32_t* starts, int64_t rows, const uint8_t* keys, int64_t width,
        float* out, uint8_t* packed);
};

constexpr int64_t kMaxColumnTile = 32;

// 一组列重排之后的码与 scale。
constexpr int64_t int8_scratch(int64_t blocks, int64_t block) {
    return kMaxColumnTile * (blocks * block + kInt8Pad) + kMaxColumnTile * blocks * static_cast<int64_t>(sizeof(float));
}

extern const Int8Kernels kPlainInt8;
#if defined(__x86_64__)
extern const Int8Kernels kAvx2Int8;
extern const Int8Kernels kAvx512VnniInt8;
#endif

}  // namespace dsx
