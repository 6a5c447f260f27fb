// 在 AVX2 之上加 -mavxvnni；只在支持它们的机器上被调用。
#include "quant_simd_avx_vnni.h"
#include "int8_planes.h"

#include "int8_attend.h"
#include "int8_dots.h"
#include "quant_gemm.h"
#include "quant_zeros.h"

namespace dsx {
const QuantKernels kAvxVnniInt8{"avx_vnni", Int8::kBits, kColumnTile, quantize<Int8>, multiply<Int8>, swiglu, rectified_dots, expand,
    attend_int8};
const QuantKernels kAvxVnniInt4{"avx_vnni", Int4::kBits, kColumnTile, quantize<Int4>, multiply_with_zeros<multiply<Int4>>, swiglu, rectified_dots, expand,
    attend_int8};
}  // namespace dsx
