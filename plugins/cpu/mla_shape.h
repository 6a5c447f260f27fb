// dsx::MlaAttention 的两种形式共用的部分：由形状得出的量、工作区、dtype 的转换。
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>

#include "half.h"
#include "mla_attention.h"
#include "scratch.h"

namespace dsx::mla {

constexpr float kNegInf = -std::numeric_limits<float>::infinity();

inline thread_local Scratch call_scratch;  // 发起调用的线程：各阶段之间传递的结果
inline thread_local Scratch task_scratch;  // 执行任务的线程；可能是同一个，所以另有一块

inline const void* at(const void* base, Dtype dtype, int64_t i) { return static_cast<const char*>(base) + i * bytes_of(dtype); }
inline void* at(void* base, Dtype dtype, int64_t i) { return static_cast<char*>(base) + i * bytes_of(dtype); }

namespace {

inline void narrow(const float* src, int64_t count, Dtype dtype, void* dst) {
    switch (dtype) {
    case Dtype::kFloat32: std::memcpy(dst, src, static_cast<size_t>(count) * sizeof(float)); return;
    case Dtype::kFloat16: std::transform(src, src + count, static_cast<uint16_t*>(dst), f16_of_float); return;
    case Dtype::kBfloat16: std::transform(src, src + count, static_cast<uint16_t*>(dst), bf16_of_float); return;
    case Dtype::kInt8: return;  // 整行一起编码，见 encode_rows
    }
}

}  // namespace

// 行数至多是它时，int8 的 w_kv_b 边读边乘；再多就先展宽一遍，各行共用。
constexpr int64_t kFewRows = 8;

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

    // 第 h 个头的 W_UK（dn 行）或紧随其后的 W_UV（dv 行）里的第一行是第几行，一共几行。
    int64_t weight_first(int64_t h, bool up_value) const { return h * (dn + dv) + (up_value ? dn : 0); }
    int64_t weight_rows(bool up_value) const { return up_value ? dv : dn; }
    // 同上，int8 的。
    Int8Rows int8_weight(int64_t h, bool up_value) const {
        const auto* codes = static_cast<const int8_t*>(w_kv_b) + weight_first(h, up_value) * weight_row(r, weight_block);
        return {codes, weight_rows(up_value), r, weight_block};
    }
    // 乘它的行这么少时，边读边展宽，不先写一份。
    bool multiplies_int8(int64_t count) const { return weight_dtype == Dtype::kInt8 && count <= kFewRows; }

    // 第 h 个头的 W_UK 或 W_UV，[rows, r_pad] 的 float32；能原样用就不复制。
    const float* weight(int64_t h, bool up_value, float* scratch) const {
        const int64_t rows = weight_rows(up_value), first = weight_first(h, up_value);
        if (weight_dtype == Dtype::kInt8) {
            kernels.widen_weights(int8_weight(h, up_value), scratch, r_pad);
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

inline void start_rows(int64_t rows, int64_t value_width, float* acc, float* max, float* sum) {
    std::fill(acc, acc + rows * value_width, 0.0f);
    std::fill(max, max + rows, kNegInf);
    std::fill(sum, sum + rows, 0.0f);
}

// naive：每个序列的第 first 个 token 起的 count 个，逐头展开缓存。
void attend_naive(const Shape& s, int64_t first, int64_t count);

}  // namespace dsx::mla
