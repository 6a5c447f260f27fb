// armv8-a 的基线就有 NEON，不要别的编译选项。dotprod、i8mm 只影响整数点积，浮点的一份相同。
#include "simd_neon.h"

#include "half.h"

#include "attend.h"

namespace dsx {
const Kernels kNeonKernels{"neon", widen, unpack, widen_weights, multiply, multiply_transposed, multiply_weights,
    multiply_transposed_weights, rectify, nullptr, attend};
const Kernels kNeonDotprodKernels{"neon_dotprod", widen, unpack, widen_weights, multiply, multiply_transposed, multiply_weights,
    multiply_transposed_weights, rectify, nullptr, attend};
const Kernels kNeonI8mmKernels{"neon_i8mm", widen, unpack, widen_weights, multiply, multiply_transposed, multiply_weights,
    multiply_transposed_weights, rectify, nullptr, attend};
}  // namespace dsx
