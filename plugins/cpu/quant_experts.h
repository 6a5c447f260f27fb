// dsx::Int8Experts、dsx::Int4Experts、dsx::Int4AffineExperts 的分工与调度，与指令集、与 ONNX Runtime 都无关；位数由 kernel 定。语义见
// deepseek_export/ops/quant_experts.py。
#pragma once

#include <cstdint>

#include "parallel.h"
#include "quant_kernels.h"

namespace dsx {

struct QuantExperts {
    int64_t N, D, I, E, k, block;  // D、I 是 block 的倍数
    const float* x;                  // [N, D]
    const float* log_weights;        // [N, E]
    const uint8_t* gate_up;          // [E, 2I, D*bits/8]，gate、up 的行交错
    const uint16_t* gate_up_scales;  // [E, 2I, D/block] float16
    const uint8_t* down;             // [E, D, I*bits/8]
    const uint16_t* down_scales;     // [E, D, I/block] float16
    const uint8_t* gate_up_zeros;    // [E, 2I, zero_row(D/block)]；没有就是对称的
    const uint8_t* down_zeros;       // [E, D, zero_row(I/block)]
    float* y;                        // [N, D]
};

void run(const QuantExperts& op, const QuantKernels& kernels, const Parallel& parallel);

}  // namespace dsx
