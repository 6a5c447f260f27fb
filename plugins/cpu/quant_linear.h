// dsx::Int8Linear、dsx::Int4Linear、dsx::Int4AffineLinear 的分工与调度，与指令集、与 ONNX Runtime 都无关；位数由 kernel 定。
#pragma once

#include <cstdint>

#include "parallel.h"
#include "quant_kernels.h"
#include "scratch.h"

namespace dsx {

struct QuantLinear {
    int64_t M, K, N, block;
    const float* x;          // [M, K]
    const uint8_t* codes;    // [N, ceil(K/block), block*bits/8]
    const uint16_t* scales;  // [N, ceil(K/block)] float16
    const uint8_t* zeros;    // [N, zero_row(ceil(K/block))]；没有就是对称的
    float* y;                // [M, N]
};

void run(const QuantLinear& op, const QuantKernels& kernels, const Parallel& parallel);

// 下面几个与专家的算子共用。

// 量化 x[count, width]，结果放在 scratch 里；行多时分给各线程。
QuantizedRows quantize_rows(const float* x, int64_t count, int64_t width, int64_t block, const QuantKernels& kernels,
    const Parallel& parallel, Scratch& scratch);

// 一行 row_bytes 字节的权重，一个任务分几列：每个任务至少读这么多权重；只由形状决定。
int64_t columns_per_task(int64_t columns, int64_t row_bytes, int64_t multiple);

// 几行 [blocks * block] 的激活要多少个 float 的内存，以及从那块内存里切出来。
int64_t quantized_floats(int64_t rows, int64_t blocks, int64_t block);
QuantizedRows carve_rows(float* memory, int64_t rows, int64_t blocks, int64_t block);

}  // namespace dsx
