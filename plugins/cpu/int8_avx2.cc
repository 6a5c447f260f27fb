// 用 -mavx2 -mfma -mf16c 编译；只在支持它们的机器上被调用。
#include "int8_simd_avx2.h"

#include "int8_dots.h"
#include "int8_gemm.h"

namespace dsx {
const Int8Kernels kAvx2Int8{"avx2", kColumnTile, quantize, multiply_int8, swiglu, rectified_dots};
}
