// 基线：任何平台。
#include "quant_simd_plain.h"

#include "int8_attend.h"
#include "int8_dots.h"
#include "quant_gemm.h"
#include "quant_zeros.h"

namespace dsx {
const QuantKernels kPlainInt8{"plain", Int8::kBits, kColumnTile, quantize<Int8>, multiply<Int8>, swiglu, rectified_dots, expand,
    attend_int8};
const QuantKernels kPlainInt4{"plain", Int4::kBits, kColumnTile, quantize<Int4>, multiply_with_zeros<multiply<Int4>>, swiglu, rectified_dots, expand,
    attend_int8};
}  // namespace dsx
