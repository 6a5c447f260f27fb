// 用 -mavx2 -mfma -mf16c 编译；只在支持它们的机器上被调用。
#include "quant_simd_avx2.h"

#include "int8_attend.h"
#include "int8_dots.h"
#include "quant_gemm.h"
#include "quant_zeros.h"

namespace dsx {
const QuantKernels kAvx2Int8{"avx2", Int8::kBits, kColumnTile, quantize<Int8>, multiply<Int8>, swiglu, rectified_dots, expand,
    attend_int8};
const QuantKernels kAvx2Int4{"avx2", Int4::kBits, kColumnTile, quantize<Int4>, multiply_with_zeros<multiply<Int4>>, swiglu, rectified_dots, expand,
    attend_int8};
}  // namespace dsx
