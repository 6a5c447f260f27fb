// 用 -march=armv8.2-a+dotprod+i8mm 编译；只在支持它们的机器上被调用。
#include "quant_simd_neon.h"
#include "int8_planes_i8mm.h"

#include "int8_attend.h"
#include "quant_zeros.h"

namespace dsx {
const QuantKernels kNeonI8mmInt8{
    "neon_i8mm", Int8::kBits, kLanes, quantize<Int8>, multiply_eights<Int8>, swiglu, rectified_eights,
    expand_eights, attend_int8};
const QuantKernels kNeonI8mmInt4{
    "neon_i8mm", Int4::kBits, kLanes, quantize<Int4>, multiply_with_zeros<multiply_eights<Int4>>, swiglu, rectified_eights,
    expand_eights, attend_int8};
}  // namespace dsx
