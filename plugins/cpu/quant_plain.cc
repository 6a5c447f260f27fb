// 基线：任何平台。
#include "quant_simd_plain.h"

#include "quant_gemm.h"

namespace dsx {
const QuantKernels kPlainInt8 = kernels_named<Int8>("plain");
const QuantKernels kPlainInt4 = kernels_named<Int4>("plain");
}  // namespace dsx
