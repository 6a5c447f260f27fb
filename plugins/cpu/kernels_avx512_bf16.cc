// 在 AVX-512 之上：bfloat16 的 latent 缓存直接用 VDPBF16PS 相乘（乘数是 bfloat16，float32 累加），不先展宽。
#include "simd_avx512.h"

#include "half.h"

#include "attend.h"

namespace {

// 16 个 key、8 行 × 2 个向量：16 个累加器盖得住乘加的延迟，加上操作数放得进 32 个寄存器。
constexpr int kScoreFours = 4, kMixRowsBf16 = 8;

struct Pairs {
    __m512bh v;
};

inline Pairs load_pairs(const uint16_t* p) {
    const __m512i raw = _mm512_loadu_si512(p);
    Pairs out;
    std::memcpy(&out.v, &raw, sizeof out.v);
    return out;
}
inline Pairs splat_pair(const uint16_t* p) {
    int32_t pair;
    std::memcpy(&pair, p, sizeof pair);
    const __m512i raw = _mm512_set1_epi32(pair);
    Pairs out;
    std::memcpy(&out.v, &raw, sizeof out.v);
    return out;
}
// 不用 _mm512_dpbf16_ps：GCC 12 给它的累加器每步多一次寄存器拷贝。
inline Vector dot_pairs(Vector acc, Pairs a, Pairs b) {
    asm("vdpbf16ps %2, %1, %0" : "+v"(acc.v) : "v"(a.v), "v"(b.v));
    return acc;
}
// 一对广播给各路，不另占一条指令。
inline Vector dot_splat(Vector acc, Pairs a, const uint16_t* pair) {
    struct Pair {
        uint16_t of[2];
    };
    asm("vdpbf16ps %2%{1to16%}, %1, %0" : "+v"(acc.v) : "v"(a.v), "m"(*reinterpret_cast<const Pair*>(pair)));
    return acc;
}

void narrow(const float* src, int64_t count, uint16_t* dst) {
    for (int64_t i = 0; i < count; i += 16) {
        const __m256bh packed = _mm512_cvtneps_pbh(_mm512_loadu_ps(src + i));
        std::memcpy(dst + i, &packed, sizeof packed);
    }
}

// to[2i]、to[2i + 1] 是 a[i]、b[i]。
inline void store_pairs(Vector a, Vector b, uint16_t* to) {
    const __m512bh packed = _mm512_cvtne2ps_pbh(b.v, a.v);
    __m512i raw;
    std::memcpy(&raw, &packed, sizeof raw);
    const __m512i lane = _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i order = _mm512_or_si512(_mm512_or_si512(lane, _mm512_slli_epi32(lane, 16)), _mm512_set1_epi32(16 << 16));
    _mm512_storeu_si512(to, _mm512_permutexvar_epi16(order, raw));
}

// to[2j]、to[2j + 1] 是两行的第 j 个；second 为空时与 0 配对。
inline void interleave_rows(const uint16_t* first, const uint16_t* second, int64_t width, uint16_t* to) {
    alignas(64) uint16_t order[2][32];
    for (int i = 0; i < 32; ++i) {
        order[0][i] = static_cast<uint16_t>(i / 2 + (i % 2) * 32);
        order[1][i] = static_cast<uint16_t>(i / 2 + (i % 2) * 32 + 16);
    }
    const __m512i low = _mm512_load_si512(order[0]), high = _mm512_load_si512(order[1]);
    for (int64_t j = 0; j < width; j += 32) {
        const __m512i a = _mm512_loadu_si512(first + j);
        const __m512i b = second != nullptr ? _mm512_loadu_si512(second + j) : _mm512_setzero_si512();
        _mm512_storeu_si512(to + 2 * j, _mm512_permutex2var_epi16(a, low, b));
        _mm512_storeu_si512(to + 2 * j + 32, _mm512_permutex2var_epi16(a, high, b));
    }
}

}  // namespace

#include "attend_bf16.h"

namespace dsx {
const Kernels kAvx512Bf16Kernels{"avx512_bf16", widen, unpack, widen_weights, multiply, multiply_transposed, multiply_weights,
    multiply_transposed_weights, rectify, narrow, attend_bf16};
}
