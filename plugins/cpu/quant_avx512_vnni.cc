// 在 AVX-512 之上加 -mavx512vnni；只在支持它们的机器上被调用。
#include "quant_simd_avx512_vnni.h"
#include "int8_planes.h"

#include "int8_dots.h"
#include "int8_lanes.h"
#include "quant_gemm.h"
#include "quant_zeros.h"

namespace dsx {
const QuantKernels kAvx512VnniInt8{"avx512_vnni", Int8::kBits, kColumnTile, quantize<Int8>, multiply<Int8>, swiglu, rectified_dots, expand,
    attend_int8};
const QuantKernels kAvx512VnniInt4{"avx512_vnni", Int4::kBits, kColumnTile, quantize<Int4>, multiply_with_zeros<multiply<Int4>>, swiglu, rectified_dots, expand,
    attend_int8};
}  // namespace dsx
