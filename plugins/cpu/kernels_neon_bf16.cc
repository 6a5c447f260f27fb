// 在 NEON 之上：bfloat16 的 latent 缓存直接用 BFDOT 相乘，不先展宽。用 -march=armv8.2-a+bf16 编译；只在支持它的机器上被调用。
#include "simd_neon.h"

#include "half.h"

#include "attend.h"

namespace {

// 一个 Vector 占两个寄存器：8 个累加器是 16 个，加上操作数放得进 32 个。
constexpr int kScoreFours = 2, kMixRowsBf16 = 4;

struct Pairs {
    bfloat16x8_t lo, hi;
};

inline bfloat16x8_t load_bfloats(const uint16_t* p) { return vreinterpretq_bf16_u16(vld1q_u16(p)); }
inline Pairs load_pairs(const uint16_t* p) { return {load_bfloats(p), load_bfloats(p + 8)}; }
inline Pairs splat_pair(const uint16_t* p) {
    uint32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    const bfloat16x8_t all = vreinterpretq_bf16_u32(vdupq_n_u32(pair));
    return {all, all};
}
inline Vector dot_pairs(Vector acc, Pairs a, Pairs b) {
    return {vbfdotq_f32(acc.lo, a.lo, b.lo), vbfdotq_f32(acc.hi, a.hi, b.hi)};
}
inline Vector dot_splat(Vector acc, Pairs a, const uint16_t* pair) { return dot_pairs(acc, a, splat_pair(pair)); }

inline uint16x8_t narrow_eight(float32x4_t lo, float32x4_t hi) {
    return vreinterpretq_u16_bf16(vcvtq_high_bf16_f32(vcvtq_low_bf16_f32(lo), hi));
}
void narrow(const float* src, int64_t count, uint16_t* dst) {
    for (int64_t i = 0; i < count; i += 8) {
        vst1q_u16(dst + i, narrow_eight(vld1q_f32(src + i), vld1q_f32(src + i + 4)));
    }
}

// to[2i]、to[2i + 1] 是 a[i]、b[i]。
inline void store_pairs(Vector a, Vector b, uint16_t* to) {
    const uint16x8x2_t both = {{narrow_eight(a.lo, a.hi), narrow_eight(b.lo, b.hi)}};
    vst2q_u16(to, both);
}

// to[2j]、to[2j + 1] 是两行的第 j 个；second 为空时与 0 配对。
inline void interleave_rows(const uint16_t* first, const uint16_t* second, int64_t width, uint16_t* to) {
    for (int64_t j = 0; j < width; j += 8) {
        const uint16x8x2_t rows = {{vld1q_u16(first + j), second != nullptr ? vld1q_u16(second + j) : vdupq_n_u16(0)}};
        vst2q_u16(to + 2 * j, rows);
    }
}

}  // namespace

#include "attend_bf16.h"

namespace dsx {
const Kernels kNeonBf16Kernels{"neon_bf16", widen, unpack, widen_weights, multiply, multiply_transposed, multiply_weights,
    multiply_transposed_weights, rectify, narrow, attend_bf16};
}
