// 用 -mavx2 -mfma -mf16c 编译；只在支持它们的机器上被调用。
#include "simd_avx2.h"

#include "half.h"

#include "attend.h"

namespace dsx {
const Kernels kAvx2Kernels{"avx2", widen, unpack, widen_weights, multiply, multiply_transposed, multiply_weights,
    multiply_transposed_weights, rectify, nullptr, attend};
// 浮点的部分与 avx2 相同，只有名字不同：它配 AVX-VNNI 的整数点积。
const Kernels kAvxVnniKernels{"avx_vnni", widen, unpack, widen_weights, multiply, multiply_transposed, multiply_weights,
    multiply_transposed_weights, rectify, nullptr, attend};
}
