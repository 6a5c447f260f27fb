#include "mla_shape.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "int8_cache.h"

namespace dsx {
namespace {

using namespace mla;

// absorb 一次处理几行 query（batch 里合计）：工作区因此有上限，与 prompt 的长度无关。
constexpr int64_t kSlabRows = 4096;
// naive 一次处理一个头的几个 token；每一批要把缓存重新展开一次。
constexpr int64_t kSlabTokens = 4096;
// 解码时沿缓存切成几段，每段至少几个 key：任务够多，各线程才分得匀；段数只由形状决定，结果因此与线程数无关。
constexpr int64_t kTasks = 32;
constexpr int64_t kShortestSplit = 128;
// 稀疏的注意力一次收集几行；收集来的一块与 attend 的工作区一起留在 L2。
constexpr int64_t kGatherRows = 2 * kTile;
static_assert(kGatherRows % kInt8Tile == 0);

void copy_cache(const Shape& s) {
    if (s.kv_cache == s.kv_cache_out) {
        return;
    }
    constexpr int64_t kRows = 1024;
    const int64_t rows = s.B * s.T;
    s.parallel((rows + kRows - 1) / kRows, [&](int64_t task) {
        const int64_t begin = task * kRows, count = std::min(kRows, rows - begin);
        std::memcpy(at(s.kv_cache_out, s.cache_dtype, begin * s.stride), at(s.kv_cache, s.cache_dtype, begin * s.stride),
            static_cast<size_t>(count * s.stride * bytes_of(s.cache_dtype)));
    });
}

// 把 [count, columns] 从计算 dtype 转成缓存 dtype，写进行距为 s.stride 的缓存。
void convert_rows(const Shape& s, const void* source, int64_t count, int64_t columns, void* target) {
    for (int64_t i = 0; i < count; ++i) {
        const void* from = at(source, s.dtype, i * columns);
        void* to = at(target, s.cache_dtype, i * s.stride);
        if (s.dtype == s.cache_dtype) {
            std::memcpy(to, from, static_cast<size_t>(columns * bytes_of(s.dtype)));
            continue;
        }
        float* row = task_scratch.need(columns);
        s.widen_row(from, columns, row, columns);
        narrow(row, columns, s.cache_dtype, to);
    }
}

void encode_rows(const Shape& s, const void* c_kv, const void* k_pe, int64_t count, int8_t* target) {
    float* latent = task_scratch.need(s.r_pad + padded(s.dr));
    float* rope = latent + s.r_pad;
    for (int64_t i = 0; i < count; ++i) {
        s.widen_row(at(c_kv, s.dtype, i * s.r), s.r, latent, s.r);
        s.widen_row(at(k_pe, s.dtype, i * s.dr), s.dr, rope, s.dr);
        encode_row(latent, s.r, rope, s.dr, target + i * s.stride);
    }
}

void write_cache(const Shape& s) {
    constexpr int64_t kRows = 64;
    const int64_t per_sequence = (s.S + kRows - 1) / kRows;
    s.parallel(s.B * per_sequence, [&](int64_t task) {
        const int64_t b = task / per_sequence, first = task % per_sequence * kRows, count = std::min(kRows, s.S - first);
        void* target = at(s.kv_cache_out, s.cache_dtype, (b * s.T + s.past_lens[b] + first) * s.stride);
        const void* c_kv = at(s.c_kv, s.dtype, (b * s.S + first) * s.r);
        const void* k_pe = at(s.k_pe, s.dtype, (b * s.S + first) * s.dr);
        if (s.cache_dtype == Dtype::kInt8) {
            encode_rows(s, c_kv, k_pe, count, static_cast<int8_t*>(target));
            return;
        }
        convert_rows(s, c_kv, count, s.r, target);
        convert_rows(s, k_pe, count, s.dr, at(target, s.cache_dtype, s.r));
    });
}

// 缓存的一段对一块 query；结果留在工作区，由 finish 合并。
struct Split {
    int64_t b, row, rows, begin, end;
};

// absorb：第 first 个 token 起的 count 个。行按 (token, 头) 排，同一 token 的头相邻，一块之内看得见的范围几乎相同。
// 稀疏时各 token 看的行不同，一块不跨 token；key 的下标是选中的第几个。
class AbsorbSlab {
public:
    AbsorbSlab(const Shape& shape, int64_t first, int64_t count)
        : s(shape), first_(first), count_(count), rows_(count * s.H), unit_(s.indices ? s.H : rows_),
          unit_blocks_((unit_ + kBlockRows - 1) / kBlockRows), blocks_(rows_ / unit_ * unit_blocks_) {}

    void run() {
        plan();
        const int64_t partials = static_cast<int64_t>(splits_.size()) * kBlockRows;
        Carver carver(call_scratch.need(s.B * rows_ * s.width_pad + partials * (s.r_pad + 2) + 4 * kPad));
        q_ = carver.take(s.B * rows_ * s.width_pad);
        acc_ = carver.take(partials * s.r_pad);
        max_ = carver.take(partials);
        sum_ = carver.take(partials);
        s.parallel(s.H, [this](int64_t h) { absorb(h); });
        s.parallel(static_cast<int64_t>(splits_.size()), [this](int64_t i) { attend(i); });
        s.parallel(s.H, [this](int64_t h) { finish(h); });
    }

private:
    void plan() {
        starts_.clear();
        splits_.clear();
        for (int64_t b = 0; b < s.B; ++b) {
            for (int64_t block = 0; block < blocks_; ++block) {
                const int64_t skipped = block % unit_blocks_ * kBlockRows;
                const int64_t row = block / unit_blocks_ * unit_ + skipped, rows = std::min(kBlockRows, unit_ - skipped);
                const int64_t length = s.indices ? s.counts[b * s.S + first_ + row / s.H]
                                                 : s.past_lens[b] + first_ + (row + rows - 1) / s.H + 1;
                const int64_t most = std::max<int64_t>(1, kTasks / (s.B * blocks_));
                const int64_t parts = std::min(most, (length + kShortestSplit - 1) / kShortestSplit);
                const int64_t step = ((length + parts - 1) / parts + kTile - 1) / kTile * kTile;
                starts_.push_back(splits_.size());
                for (int64_t begin = 0; begin < length; begin += step) {
                    splits_.push_back({b, row, rows, begin, std::min(begin + step, length)});
                }
            }
        }
        starts_.push_back(splits_.size());
    }

    // q = scale · [q_nope W_UK, q_pe]
    void absorb(int64_t h) {
        const int64_t rows = s.B * count_, stride = s.H * s.width_pad;
        const int64_t dn_pad = padded(s.dn);
        Carver carver(task_scratch.need(rows * dn_pad + s.dn * s.r_pad + 2 * kPad));
        float* q_nope = carver.take(rows * dn_pad);
        float* const wide = carver.take(s.dn * s.r_pad);
        for (int64_t i = 0; i < rows; ++i) {
            s.widen_row(at(s.q_nope, s.dtype, input_row(i, h) * s.dn), s.dn, q_nope + i * dn_pad, dn_pad);
        }
        float* q = q_ + h * s.width_pad;
        if (s.multiplies_int8(rows)) {
            s.kernels.multiply_weights(q_nope, dn_pad, rows, s.int8_weight(h, false), q, stride, wide);
        } else {
            s.kernels.multiply(q_nope, dn_pad, s.weight(h, false, wide), s.r_pad, rows, s.r_pad, s.dn, q, stride);
        }
        for (int64_t i = 0; i < rows; ++i) {
            float* row = q + i * stride;
            s.widen_row(at(s.q_pe, s.dtype, input_row(i, h) * s.dr), s.dr, row + s.r, s.width_pad - s.r);
            std::transform(row, row + s.width, row, [this](float x) { return x * s.scale; });
        }
    }

    void attend(int64_t index) {
        const Split& split = splits_[static_cast<size_t>(index)];
        float* acc = acc_ + index * kBlockRows * s.r_pad;
        float* max = max_ + index * kBlockRows;
        float* sum = sum_ + index * kBlockRows;
        start_rows(split.rows, s.r_pad, acc, max, sum);
        if (s.indices) {
            attend_chosen(split, acc, max, sum);
            return;
        }
        const void* keys = s.cache_row(split.b, split.begin);
        const Block block{q_ + (split.b * rows_ + split.row) * s.width_pad, split.rows, keys, keys, s.cache_dtype, s.stride,
            s.stride, s.width, s.r, split.begin, split.end, s.past_lens[split.b] + first_, split.row, s.H, acc, max, sum};
        s.attend(block, task_scratch.need(s.scratch()));
    }

    // 选中的行收集成连着的一段，再照普通的算；每一行都看得见整段，所以不区分 token。
    void attend_chosen(const Split& split, float* acc, float* max, float* sum) const {
        const int64_t token = split.b * s.S + first_ + split.row / s.H, row_bytes = s.stride * bytes_of(s.cache_dtype);
        Carver carver(task_scratch.need(s.scratch() + (kGatherRows * row_bytes + 3) / 4 + 2 * kPad));
        float* scratch = carver.take(s.scratch());
        char* rows = reinterpret_cast<char*>(carver.take((kGatherRows * row_bytes + 3) / 4));
        const int32_t* chosen = s.indices + token * s.slots;
        for (int64_t t = split.begin; t < split.end; t += kGatherRows) {
            const int64_t end = std::min(t + kGatherRows, split.end);
            for (int64_t i = t; i < end; ++i) {
                std::memcpy(rows + (i - t) * row_bytes, s.cache_row(split.b, chosen[i]), static_cast<size_t>(row_bytes));
            }
            s.attend({q_ + (split.b * rows_ + split.row) * s.width_pad, split.rows, rows, rows, s.cache_dtype, s.stride, s.stride,
                         s.width, s.r, t, end, split.end - 1, 0, split.rows, acc, max, sum},
                scratch);
        }
    }

    // o = (各段按各自的最大值合并) W_UVᵀ
    void finish(int64_t h) {
        const int64_t rows = s.B * count_, dv_pad = padded(s.dv);
        Carver carver(task_scratch.need(rows * (s.r_pad + dv_pad) + s.dv * s.r_pad + 3 * kPad));
        float* context = carver.take(rows * s.r_pad);
        float* out = carver.take(rows * dv_pad);
        float* const wide = carver.take(s.dv * s.r_pad);
        for (int64_t i = 0; i < rows; ++i) {
            merge(i / count_, i % count_ * s.H + h, context + i * s.r_pad);
        }
        if (s.multiplies_int8(rows)) {
            s.kernels.multiply_transposed_weights(context, s.r_pad, rows, s.int8_weight(h, true), out, dv_pad, wide);
        } else {
            const float* w_uv = s.weight(h, true, wide);
            s.kernels.multiply_transposed(context, s.r_pad, w_uv, s.r_pad, rows, s.dv, s.r_pad, out, dv_pad);
        }
        for (int64_t i = 0; i < rows; ++i) {
            narrow(out + i * dv_pad, s.dv, s.dtype, at(s.o, s.dtype, input_row(i, h) * s.dv));
        }
    }

    void merge(int64_t b, int64_t row, float* context) const {
        const size_t block = static_cast<size_t>(b * blocks_ + row / unit_ * unit_blocks_ + row % unit_ / kBlockRows);
        const size_t begin = starts_[block], end = starts_[block + 1];
        const auto slot = [&](size_t i) { return static_cast<int64_t>(i) * kBlockRows + row % unit_ % kBlockRows; };
        float top = kNegInf, total = 0;
        for (size_t i = begin; i < end; ++i) {
            top = std::max(top, max_[slot(i)]);
        }
        float weights[kTasks];
        for (size_t i = begin; i < end; ++i) {
            weights[i - begin] = std::exp(max_[slot(i)] - top);
            total += weights[i - begin] * sum_[slot(i)];
        }
        std::transform(weights, weights + (end - begin), weights, [total](float x) { return x / total; });
        s.kernels.multiply(weights, kTasks, acc_ + slot(begin) * s.r_pad, kBlockRows * s.r_pad, 1, s.r_pad,
            static_cast<int64_t>(end - begin), context, s.r_pad);
    }

    // 这一批的第 i 行（先 batch 后 token）、第 h 个头，在 [B, S, H] 里的下标。
    int64_t input_row(int64_t i, int64_t h) const { return (i / count_ * s.S + first_ + i % count_) * s.H + h; }

    const Shape& s;
    int64_t first_, count_, rows_;
    int64_t unit_, unit_blocks_, blocks_;  // 几行一组，一组、一共几块；一块不跨组
    float *q_ = nullptr, *acc_ = nullptr, *max_ = nullptr, *sum_ = nullptr;
    inline static thread_local std::vector<Split> kept_splits_;
    inline static thread_local std::vector<size_t> kept_starts_;
    std::vector<Split>& splits_ = kept_splits_;
    std::vector<size_t>& starts_ = kept_starts_;
};

// 两种形式各要多少次乘加（每头，整个 batch），与 ops/mla_attention.py 的 auto 同一个代价模型，只是按实际长度算。
bool prefers_naive(const MlaAttention& op) {
    const int64_t expand = op.r * (op.dn + op.dv);
    int64_t naive = 0, absorb = 0;
    for (int64_t b = 0; b < op.B; ++b) {
        const int64_t length = op.past_lens[b] + op.S;
        naive += length * expand + op.S * length * (op.dn + op.dr + op.dv);
        absorb += op.S * expand + op.S * length * (2 * op.r + op.dr);
    }
    return naive < absorb;
}

// 名额够看得见的全部：选中的就是它们，不必收集。
bool chosen_is_everything(const MlaAttention& op) {
    int64_t longest = 0;
    for (int64_t b = 0; b < op.B; ++b) {
        longest = std::max(longest, op.past_lens[b] + op.S);
    }
    return longest <= op.slots;
}

}  // namespace

void run(const MlaAttention& given, Form form, const Kernels& kernels, const QuantKernels& int8, const Parallel& parallel) {
    MlaAttention op = given;
    if (op.indices && chosen_is_everything(op)) {
        op.indices = nullptr;
    }
    const Shape s(op, kernels, int8, parallel);
    copy_cache(s);
    if (s.B == 0 || s.S == 0 || s.H == 0) {
        return;
    }
    write_cache(s);
    const bool naive = !op.indices && (form == Form::kNaive || (form == Form::kAuto && prefers_naive(op)));
    const int64_t slab = naive ? kSlabTokens : std::max<int64_t>(1, kSlabRows / (s.B * s.H));
    for (int64_t first = 0; first < s.S; first += slab) {
        const int64_t count = std::min(slab, s.S - first);
        if (naive) {
            attend_naive(s, first, count);
        } else {
            AbsorbSlab(s, first, count).run();
        }
    }
}

}  // namespace dsx
