// 用 -mavx2 -mfma -mf16c 编译；只在支持它们的机器上被调用。
#include "quant_simd_avx2.h"

#include "quant_gemm.h"

namespace dsx {
const QuantKernels kAvx2Int8 = kernels_named<Int8>("avx2");
const QuantKernels kAvx2Int4 = kernels_named<Int4>("avx2");
}  // namespace dsx
