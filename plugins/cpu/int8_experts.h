// dsx::Int8Experts 的分工与调度，与指令集、与 ONNX Runtime 都无关。语义见 deepseek_export/ops/int8_experts.py。
#pragma once

#include <cstdint>

#include "int8_kernels.h"
#include "parallel.h"

namespace dsx {

struct Int8Experts {
    int64_t N, D, I, E, k, block;  // D、I 是 block 的倍数
    const float* x;                // [N, D]
    const float* log_weights;      // [N, E]
    const uint8_t* gate_up;        // [E, 2I, D]，gate、up 的行交错
    const float* gate_up_scales;   // [E, 2I, D/block]
    const uint8_t* down;           // [E, D, I]
    const float* down_scales;      // [E, D, I/block]
    float* y;                      // [N, D]
};

void run(const Int8Experts& op, const Int8Kernels& kernels, const Parallel& parallel);

}  // namespace dsx
