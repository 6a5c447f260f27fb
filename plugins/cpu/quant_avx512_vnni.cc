// 在 AVX-512 之上加 -mavx512vnni；只在支持它们的机器上被调用。
#include "quant_simd_avx512_vnni.h"

#include "quant_gemm.h"

namespace dsx {
const QuantKernels kAvx512VnniInt8 = kernels_named<Int8>("avx512_vnni");
const QuantKernels kAvx512VnniInt4 = kernels_named<Int4>("avx512_vnni");
}  // namespace dsx
