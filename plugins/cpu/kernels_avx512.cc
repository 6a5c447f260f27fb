// 用 -mavx512f -mavx512bw -mavx512dq -mavx512vl 编译；只在支持它们的机器上被调用。
#include "simd_avx512.h"

#include "half.h"

#include "attend.h"

namespace dsx {
const Kernels kAvx512Kernels{"avx512", widen, unpack, widen_weights, multiply, multiply_transposed, multiply_weights,
    multiply_transposed_weights, rectify, nullptr, attend};
}
