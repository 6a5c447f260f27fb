// dsx::MlaAttention 与 dsx::SparseMlaAttention 的分工与调度，与指令集、与 ONNX Runtime 都无关。语义见 deepseek_export/ops/mla_attention.py。
#pragma once

#include <cstdint>

#include "kernels.h"
#include "parallel.h"
#include "quant_kernels.h"

namespace dsx {

struct MlaAttention {
    int64_t B, S, H, dn, dr, dv, r, T;
    float scale;
    Dtype dtype;        // q、c_kv、k_pe、o
    Dtype weight_dtype; // w_kv_b；int8 的一行是码与 scale，见 Int8Rows
    int64_t weight_block; // int8 的 w_kv_b 每几个码一个 scale
    Dtype cache_dtype;  // 两个缓存；int8 的一行见 int8_cache.h
    const void* q_nope;         // [B, S, H, dn]
    const void* q_pe;           // [B, S, H, dr]
    const void* c_kv;           // [B, S, r]
    const void* k_pe;           // [B, S, dr]
    const void* kv_cache;       // [B, 1, T, cache_width(cache_dtype, r, dr)]
    const int64_t* past_lens;   // [B]，已核对 0 <= past_lens[b] <= T - S
    const void* w_kv_b;         // [H*(dn+dv), r]，int8 是 [H*(dn+dv), weight_row(r, weight_block)]
    void* o;                    // [B, S, H, dv]
    void* kv_cache_out;         // 与 kv_cache 相同时原地写，否则先复制
    // 只有 SparseMlaAttention 有：每个 query 看哪些行。没有则 indices 为空。
    const int32_t* indices;     // [B, S, slots]，前 counts 个已核对在 [0, T) 里
    const int32_t* counts;      // [B, S]，已核对 1 <= counts <= slots
    int64_t slots;
};

enum class Form { kAuto, kAbsorb, kNaive };

// int8 的缓存由 int8 直接相乘，别的由 kernels。
void run(const MlaAttention& op, Form form, const Kernels& kernels, const QuantKernels& int8, const Parallel& parallel);

}  // namespace dsx
