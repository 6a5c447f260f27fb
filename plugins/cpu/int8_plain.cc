// 基线：任何平台。
#include "int8_simd_plain.h"

#include "int8_dots.h"
#include "int8_gemm.h"

namespace dsx {
const Int8Kernels kPlainInt8{"plain", kColumnTile, quantize, multiply_int8, swiglu, rectified_dots};
}
