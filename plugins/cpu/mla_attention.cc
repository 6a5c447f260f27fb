#include "mla_attention.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <vector>

#include "half.h"
#include "int8_cache.h"
#include "scratch.h"

namespace dsx {
namespace {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();

// absorb 一次处理几行 query（batch 里合计）：工作区因此有上限，与 prompt 的长度无关。
constexpr int64_t kSlabRows = 4096;
// naive 一次处理一个头的几个 token；每一批要把缓存重新展开一次。
constexpr int64_t kSlabTokens = 4096;
// naive 一次展开几个 key。
constexpr int64_t kExpandTile = 256;
// 解码时沿缓存切成几段，每段至少几个 key：任务够多，各线程才分得匀；段数只由形状决定，结果因此与线程数无关。
constexpr int64_t kTasks = 32;
constexpr int64_t kShortestSplit = 128;
// 稀疏的注意力一次收集几行；收集来的一块与 attend 的工作区一起留在 L2。
constexpr int64_t kGatherRows = 2 * kTile;
static_assert(kGatherRows % kInt8Tile == 0);

thread_local Scratch call_scratch;  // 发起调用的线程：各阶段之间传递的结果
thread_local Scratch task_scratch;  // 执行任务的线程；可能是同一个，所以另有一块

const void* at(const void* base, Dtype dtype, int64_t i) { return static_cast<const char*>(base) + i * bytes_of(dtype); }
void* at(void* base, Dtype dtype, int64_t i) { return static_cast<char*>(base) + i * bytes_of(dtype); }

void narrow(const float* src, int64_t count, Dtype dtype, void* dst) {
    switch (dtype) {
    case Dtype::kFloat32: std::memcpy(dst, src, static_cast<size_t>(count) * sizeof(float)); return;
    case Dtype::kFloat16: std::transform(src, src + count, static_cast<uint16_t*>(dst), f16_of_float); return;
    case Dtype::kBfloat16: std::transform(src, src + count, static_cast<uint16_t*>(dst), bf16_of_float); return;
    case Dtype::kInt8: return;  // 整行一起编码，见 encode_rows
    }
}

// 一个任务里依次切出来的几块 float32。
class Carver {
public:
    explicit Carver(float* base) : next_(base) {}
    float* take(int64_t floats) {
        float* taken = next_;
        next_ += padded(floats);
        return taken;
    }

private:
    float* next_;
};

// 每个形状量只在这里算一次。
struct Shape : MlaAttention {
    Shape(const MlaAttention& op, const Kernels& k, const QuantKernels& q, const Parallel& p)
        : MlaAttention(op), kernels(k), int8(q), parallel(p), width(r + dr), width_pad(padded(width)), r_pad(padded(r)), stride(cache_width(cache_dtype, r, dr)) {}

    const Kernels& kernels;
    const QuantKernels& int8;
    const Parallel& parallel;
    int64_t width, width_pad, r_pad;
    int64_t stride;  // 缓存的行距，以元素计

    const void* cache_row(int64_t b, int64_t t) const { return at(kv_cache_out, cache_dtype, (b * T + t) * stride); }

    // 一块 query 对缓存的行（或收集来的行）：int8 的不展宽，直接做整数点积。
    void attend(const Block& block, float* scratch) const {
        (cache_dtype == Dtype::kInt8 ? int8.attend : kernels.attend)(block, scratch);
    }
    int64_t scratch() const { return cache_dtype == Dtype::kInt8 ? int8_attend_scratch(width, r) : attend_scratch(width); }

    // 计算 dtype 的一行 → float32，补零到 dst_width。
    void widen_row(const void* source, int64_t count, float* dst, int64_t dst_width) const {
        kernels.widen(dtype, source, count, 1, count, dst, dst_width, dst_width);
    }

    // 第 h 个头的 W_UK（dn 行）或紧随其后的 W_UV（dv 行），[rows, r_pad] 的 float32；能原样用就不复制。
    const float* weight(int64_t h, bool up_value, float* scratch) const {
        const int64_t rows = up_value ? dv : dn;
        const int64_t first = h * (dn + dv) + (up_value ? dn : 0);
        if (weight_dtype == Dtype::kInt8) {
            const auto* packed = static_cast<const int8_t*>(w_kv_b) + first * weight_row(r, weight_block);
            kernels.widen_weights(packed, rows, r, weight_block, scratch, r_pad);
            return scratch;
        }
        const void* source = at(w_kv_b, weight_dtype, first * r);
        if (weight_dtype == Dtype::kFloat32 && r == r_pad) {
            return static_cast<const float*>(source);
        }
        kernels.widen(weight_dtype, source, r, rows, r, scratch, r_pad, r_pad);
        return scratch;
    }
};

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

void start_rows(int64_t rows, int64_t value_width, float* acc, float* max, float* sum) {
    std::fill(acc, acc + rows * value_width, 0.0f);
    std::fill(max, max + rows, kNegInf);
    std::fill(sum, sum + rows, 0.0f);
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
        const float* w_uk = s.weight(h, false, carver.take(s.dn * s.r_pad));
        for (int64_t i = 0; i < rows; ++i) {
            s.widen_row(at(s.q_nope, s.dtype, input_row(i, h) * s.dn), s.dn, q_nope + i * dn_pad, dn_pad);
        }
        float* q = q_ + h * s.width_pad;
        s.kernels.multiply(q_nope, dn_pad, w_uk, s.r_pad, rows, s.r_pad, s.dn, q, stride);
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
        const float* w_uv = s.weight(h, true, carver.take(s.dv * s.r_pad));
        for (int64_t i = 0; i < rows; ++i) {
            merge(i / count_, i % count_ * s.H + h, context + i * s.r_pad);
        }
        s.kernels.multiply_transposed(context, s.r_pad, w_uv, s.r_pad, rows, s.dv, s.r_pad, out, dv_pad);
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
        std::fill(context, context + s.r_pad, 0.0f);
        for (size_t i = begin; i < end; ++i) {
            const float weight = std::exp(max_[slot(i)] - top);
            const float* acc = acc_ + slot(i) * s.r_pad;
            total += weight * sum_[slot(i)];
            for (int64_t j = 0; j < s.r; ++j) {
                context[j] += weight * acc[j];
            }
        }
        for (int64_t j = 0; j < s.r; ++j) {
            context[j] /= total;
        }
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

// naive：一个头的 count 个 token；缓存一格一格展开成 K、V，每格给所有 query 用一遍。
void attend_head(const Shape& s, int64_t b, int64_t h, int64_t first, int64_t count) {
    const int64_t qk = s.dn + s.dr, qk_pad = padded(qk), dv_pad = padded(s.dv);
    const int64_t weights = (s.dn + s.dv) * s.r_pad;
    Carver carver(task_scratch.need(count * (qk_pad + dv_pad + 2) + weights + kExpandTile * (s.r_pad + qk_pad + dv_pad) +
                                    attend_scratch(qk + s.dv) + 9 * kPad));
    float* q = carver.take(count * qk_pad);
    float* acc = carver.take(count * dv_pad);
    float* max = carver.take(count);
    float* sum = carver.take(count);
    float* spare = carver.take(weights);
    const float* w_uk = s.weight(h, false, spare);
    const float* w_uv = s.weight(h, true, spare + s.dn * s.r_pad);
    float* latent = carver.take(kExpandTile * s.r_pad);
    float* k = carver.take(kExpandTile * qk_pad);
    float* v = carver.take(kExpandTile * dv_pad);
    float* scratch = carver.take(attend_scratch(qk + s.dv));
    for (int64_t i = 0; i < count; ++i) {
        const int64_t row = (b * s.S + first + i) * s.H + h;
        float* to = q + i * qk_pad;
        s.widen_row(at(s.q_nope, s.dtype, row * s.dn), s.dn, to, s.dn);
        s.widen_row(at(s.q_pe, s.dtype, row * s.dr), s.dr, to + s.dn, qk_pad - s.dn);
        std::transform(to, to + qk, to, [&](float x) { return x * s.scale; });
    }
    start_rows(count, dv_pad, acc, max, sum);
    std::fill(v, v + kExpandTile * dv_pad, 0.0f);
    const int64_t length = s.past_lens[b] + first + count;
    for (int64_t t = 0; t < length; t += kExpandTile) {
        const int64_t n = std::min(kExpandTile, length - t);
        const void* source = s.cache_row(b, t);
        const float* rows = static_cast<const float*>(source);
        int64_t stride = s.stride;
        if (s.cache_dtype != Dtype::kFloat32 || s.r != s.r_pad) {
            rows = latent;
            stride = s.r_pad;
        }
        if (s.cache_dtype == Dtype::kInt8) {
            s.kernels.unpack(static_cast<const int8_t*>(source), n, s.r, s.dr, latent, s.r_pad, s.r_pad, k + s.dn,
                qk_pad - s.dn, qk_pad);
        } else {
            if (rows == latent) {
                s.kernels.widen(s.cache_dtype, source, s.stride, n, s.r, latent, s.r_pad, s.r_pad);
            }
            s.kernels.widen(
                s.cache_dtype, at(source, s.cache_dtype, s.r), s.stride, n, s.dr, k + s.dn, qk_pad - s.dn, qk_pad);
        }
        s.kernels.multiply_transposed(rows, stride, w_uk, s.r_pad, n, s.dn, s.r_pad, k, qk_pad);
        s.kernels.multiply_transposed(rows, stride, w_uv, s.r_pad, n, s.dv, s.r_pad, v, dv_pad);
        for (int64_t row = 0; row < count; row += kBlockRows) {
            const int64_t block_rows = std::min(kBlockRows, count - row);
            const int64_t end = std::min(t + n, s.past_lens[b] + first + row + block_rows);
            if (end > t) {
                s.kernels.attend({q + row * qk_pad, block_rows, k, v, Dtype::kFloat32, qk_pad, dv_pad, qk_pad, dv_pad, t,
                                     end, s.past_lens[b] + first, row, 1, acc + row * dv_pad, max + row, sum + row},
                    scratch);
            }
        }
    }
    for (int64_t i = 0; i < count; ++i) {
        float* row = acc + i * dv_pad;
        std::transform(row, row + s.dv, row, [&](float x) { return x / sum[i]; });
        narrow(row, s.dv, s.dtype, at(s.o, s.dtype, ((b * s.S + first + i) * s.H + h) * s.dv));
    }
}

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
            s.parallel(s.B * s.H, [&](int64_t i) { attend_head(s, i / s.H, i % s.H, first, count); });
        } else {
            AbsorbSlab(s, first, count).run();
        }
    }
}

}  // namespace dsx
