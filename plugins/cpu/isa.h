// 这台机器能跑哪些指令集、用哪一个。
#pragma once

#include <string>
#include <vector>

#include "kernels.h"
#include "quant_kernels.h"

namespace dsx {

// 能跑的函数表，最快的在前；至少有 plain。
const std::vector<const Kernels*>& available_kernels();

// 名字对应的函数表；空串取最快的。名字不认识、或这台机器跑不了时抛 std::invalid_argument，说明能用哪些。
const Kernels& choose_kernels(const std::string& name);

// 环境变量 DSX_CPU_ISA 指定的，没有设就是最快的。
const Kernels& requested_kernels();

// 与之配套的 bits 位权重的矩阵乘（8 或 4）：AVX-512 的机器没有 VNNI 时用 AVX2 的。
const QuantKernels& requested_quant_kernels(int64_t bits);

}  // namespace dsx
