// 基线：任何平台。
#include "simd_plain.h"

#include "attend.h"

namespace dsx {
const Kernels kPlainKernels{"plain", widen, unpack, widen_weights, multiply, multiply_transposed, multiply_weights,
    multiply_transposed_weights, rectify, nullptr, attend};
}
