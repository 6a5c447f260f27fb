// AVX-VNNI：8 路 int32，VEX 编码的 vpdpbusd 一条指令乘加 32 对 (uint8, int8)；Alder Lake 起没有 AVX-512 的客户端核有它。
#pragma once

#include "quant_simd_256.h"

namespace {

// vpdpbusd 的权重是无符号的：零点乘激活之和，从累加器的起点里减去。
struct Int8 {
    static constexpr int kBits = 8, kVectors = 1;
    static constexpr int32_t kZeroPoint = 128, kFolded = kZeroPoint;
    using Codes = Bytes;

    static inline void unpack(Bytes raw, Bytes (&out)[kVectors]) { out[0] = raw; }
    static inline Codes codes(Bytes raw) { return raw; }
};
struct Int4 {
    static constexpr int kBits = 4, kVectors = 2;
    static constexpr int32_t kZeroPoint = 8, kFolded = kZeroPoint;
    using Codes = Bytes;

    static inline void unpack(Bytes raw, Bytes (&out)[kVectors]) { split_nibbles(raw, out); }
    static inline Codes codes(Bytes raw) { return raw; }
};

// 没有前缀时汇编器取 EVEX 编码，那要 AVX-512。写成汇编的另一个理由见 quant_simd_avx512_vnni.h。
inline Ints dot(Ints acc, Bytes w, Acts a) {
    asm("%{vex%} vpdpbusd %2, %1, %0" : "+v"(acc.v) : "v"(w.v), "v"(a.v));
    return acc;
}
inline Ints dot(Ints acc, const Bytes (&w)[2], const Acts (&a)[2]) { return dot(dot(acc, w[0], a[0]), w[1], a[1]); }
inline Bytes stored_bytes(Bytes raw) { return flip_sign(raw); }
inline Int8::Codes stored_codes(Bytes stored) { return stored; }

}  // namespace
