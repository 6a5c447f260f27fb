// 这台机器能跑哪些指令集、用哪一个。
#pragma once

#include <string>
#include <vector>

#include "kernels.h"
#include "quant_kernels.h"

namespace dsx {

// 能跑的指令集，缺省的那个在最前；至少有 plain。
std::vector<std::string> available_isas();

// 环境变量 DSX_CPU_ISA 指定的，没有设就是第一个。名字不认识、或这台机器跑不了时抛 std::invalid_argument，说明能用哪些。
const Kernels& requested_kernels();

// 与之配套的 bits 位权重的矩阵乘（8 或 4）：AVX-512 的机器没有 VNNI 时用 AVX2 的，neon_bf16 用这台机器最快的。
const QuantKernels& requested_quant_kernels(int64_t bits);

}  // namespace dsx
