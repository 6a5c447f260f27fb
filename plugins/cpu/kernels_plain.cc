// 基线：任何平台。
#include "simd_plain.h"

#include "attend.h"

namespace dsx {
const Kernels kPlainKernels{"plain", widen, multiply, multiply_transposed, attend};
}
