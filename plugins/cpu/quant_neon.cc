// armv8-a 的基线就有 NEON。
#include "quant_simd_neon.h"
#include "int8_planes.h"

#include "int8_attend.h"
#include "int8_dots.h"
#include "quant_gemm.h"
#include "quant_zeros.h"

namespace dsx {
const QuantKernels kNeonInt8{"neon", Int8::kBits, kColumnTile, quantize<Int8>, multiply<Int8>, swiglu, rectified_dots, expand,
    attend_int8};
const QuantKernels kNeonInt4{"neon", Int4::kBits, kColumnTile, quantize<Int4>, multiply_with_zeros<multiply<Int4>>, swiglu, rectified_dots, expand,
    attend_int8};
}  // namespace dsx
