// dsx::LightningIndexer 的分工与调度，与指令集、与 ONNX Runtime 都无关。语义见 deepseek_export/ops/lightning_indexer.py。
#pragma once

#include <cstdint>

#include "kernels.h"
#include "parallel.h"
#include "quant_kernels.h"

namespace dsx {

struct LightningIndexer {
    int64_t B, S, H, di, T, topk;
    Dtype dtype;               // q、k
    Dtype cache_dtype;         // 两个缓存；int8 的一行见 deepseek_export/ops/int8_index.py
    const void* q;             // [B, S, H, di]；都不必排名时可以没有
    const float* w;            // [B, S, H]，同上
    const void* k;             // [B, S, di]
    const void* index_cache;   // [B, 1, T, index_width(cache_dtype, di)]
    const int64_t* past_lens;  // [B]，已核对 0 <= past_lens[b] <= T - S
    int32_t* indices;          // [B, S, topk]
    int32_t* counts;           // [B, S]
    void* index_cache_out;     // 与 index_cache 相同时原地写，否则先复制

    // 第 b 个序列的第 token 个 query 在 [B, S] 里的下标。
    int64_t query_row(int64_t b, int64_t token) const { return b * S + token; }
};

// 索引缓存一行的元素数。
constexpr int64_t index_width(Dtype dtype, int64_t di) { return dtype == Dtype::kInt8 ? di + 3 : di; }

void run(const LightningIndexer& op, const Kernels& kernels, const QuantKernels& int8, const Parallel& parallel);

}  // namespace dsx
