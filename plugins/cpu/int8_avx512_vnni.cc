// 在 AVX-512 之上加 -mavx512vnni；只在支持它们的机器上被调用。
#include "int8_simd_avx512_vnni.h"

#include "int8_dots.h"
#include "int8_gemm.h"

namespace dsx {
const Int8Kernels kAvx512VnniInt8{"avx512_vnni", kColumnTile, quantize, multiply_int8, swiglu, rectified_dots};
}
