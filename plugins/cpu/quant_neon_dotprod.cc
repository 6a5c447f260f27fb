// 用 -march=armv8.2-a+dotprod 编译；只在支持它的机器上被调用。
#include "quant_simd_neon.h"
#include "int8_planes.h"

#include "int8_attend.h"
#include "int8_dots.h"
#include "quant_gemm.h"
#include "quant_zeros.h"

namespace dsx {
const QuantKernels kNeonDotprodInt8{
    "neon_dotprod", Int8::kBits, kColumnTile, quantize<Int8>, multiply<Int8>, swiglu, rectified_dots, expand,
    attend_int8};
const QuantKernels kNeonDotprodInt4{
    "neon_dotprod", Int4::kBits, kColumnTile, quantize<Int4>, multiply_with_zeros<multiply<Int4>>, swiglu, rectified_dots, expand,
    attend_int8};
}  // namespace dsx
