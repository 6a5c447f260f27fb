// naive 形式：缓存逐头展开成 K、V，再做普通的注意力。
#include <algorithm>
#include <vector>

#include "mla_shape.h"
#include "quant_linear.h"

namespace dsx::mla {
namespace {

// 一次展开几个 key。
constexpr int64_t kExpandTile = 256;
// 各序列一共至多这么多行时，latent 拆好的两个平面整段留着，各头共用；再长就逐格现拆，工作区因此有上限。
constexpr int64_t kSharedRows = 16384;

// 缓存的一格的 latent，float32；缓存本来就是 float32 的不复制。旋转部分展宽到 rope（行距 rope_stride，补零到 rope_width）。
struct Tile {
    const float* rows;
    int64_t stride;
};
Tile widen_tile(const Shape& s, int64_t b, int64_t t, int64_t count, float* latent, float* rope, int64_t rope_width,
    int64_t rope_stride) {
    const void* source = s.cache_row(b, t);
    if (s.cache_dtype == Dtype::kInt8) {
        s.kernels.unpack(
            static_cast<const int8_t*>(source), count, s.r, s.dr, latent, s.r_pad, s.r_pad, rope, rope_width, rope_stride);
        return {latent, s.r_pad};
    }
    s.kernels.widen(s.cache_dtype, at(source, s.cache_dtype, s.r), s.stride, count, s.dr, rope, rope_width, rope_stride);
    if (s.cache_dtype == Dtype::kFloat32 && s.r == s.r_pad) {
        return {static_cast<const float*>(source), s.stride};
    }
    s.kernels.widen(s.cache_dtype, source, s.stride, count, s.r, latent, s.r_pad, s.r_pad);
    return {latent, s.r_pad};
}

int64_t split_floats(const Shape& s, int64_t rows) { return padded(quantized_floats(rows, s.r / s.weight_block, s.weight_block)); }

// w_kv_b 是 int8 时，展开是整数点积：latent 照 w_kv_b 的块拆成两个 int8 平面。这里是整段缓存拆好的，各头共用。
class Latents {
public:
    // 每个序列的前 past_lens + tokens 行。
    Latents(const Shape& shape, int64_t tokens) : s(shape) {
        for (int64_t b = 0; b < s.B; ++b) {
            first_.push_back(total_);
            total_ += s.past_lens[b] + tokens;
        }
        first_.push_back(total_);
    }
    bool worth_keeping() const { return s.weight_dtype == Dtype::kInt8 && total_ <= kSharedRows; }

    void split() {
        const int64_t width = padded(s.dr);
        Carver carver(call_scratch.need(split_floats(s, total_) + padded(total_ * width)));
        rows_ = carve_rows(carver.take(split_floats(s, total_)), total_, s.r / s.weight_block, s.weight_block);
        rope_ = carver.take(total_ * width);
        const int64_t tiles = (total_ + kExpandTile - 1) / kExpandTile;
        s.parallel(s.B * tiles, [&](int64_t task) {
            const int64_t b = task / tiles, t = task % tiles * kExpandTile;
            const int64_t n = std::min(kExpandTile, first_[b + 1] - first_[b] - t), row = first_[b] + t;
            if (n > 0) {
                float* const latent = task_scratch.need(kExpandTile * s.r_pad);
                const Tile tile = widen_tile(s, b, t, n, latent, rope_ + row * width, width, width);
                s.int8.quantize(tile.rows, tile.stride, s.r, rows_.from(row, n));
            }
        });
    }

    QuantizedRows rows(int64_t b, int64_t t, int64_t count) const { return rows_.from(first_[b] + t, count); }
    const float* rope(int64_t b, int64_t t) const { return rope_ + (first_[b] + t) * padded(s.dr); }

private:
    const Shape& s;
    std::vector<int64_t> first_;
    int64_t total_ = 0;
    QuantizedRows rows_{};
    float* rope_ = nullptr;
};

// 把缓存的一格展开成一个头的 K [count, k_stride]、V [count, v_stride]。
class Expander {
public:
    static int64_t floats(const Shape& s) {
        if (s.weight_dtype != Dtype::kInt8) {
            return (s.dn + s.dv) * s.r_pad + kExpandTile * s.r_pad;
        }
        return kExpandTile * s.r_pad + split_floats(s, kExpandTile) + multiply_scratch(s.r / s.weight_block, s.weight_block) / 4;
    }
    Expander(const Shape& shape, const Latents* kept, int64_t batch, int64_t head, float* memory)
        : s(shape), kept_(kept), b(batch), h(head), latent_(memory), spare_(memory + kExpandTile * s.r_pad) {
        if (s.weight_dtype != Dtype::kInt8) {
            w_uk_ = s.weight(h, false, spare_);
            w_uv_ = s.weight(h, true, spare_ + s.dn * s.r_pad);
        }
    }

    void run(int64_t t, int64_t count, float* k, int64_t k_stride, float* v, int64_t v_stride) const {
        if (kept_ != nullptr) {
            for (int64_t i = 0; i < count; ++i) {
                std::copy_n(kept_->rope(b, t + i), s.dr, k + i * k_stride + s.dn);
            }
            multiply(kept_->rows(b, t, count), k, k_stride, v, v_stride);
            return;
        }
        const Tile tile = widen_tile(s, b, t, count, latent_, k + s.dn, k_stride - s.dn, k_stride);
        if (s.weight_dtype == Dtype::kInt8) {
            const QuantizedRows rows = carve_rows(spare_, count, s.r / s.weight_block, s.weight_block);
            s.int8.quantize(tile.rows, tile.stride, s.r, rows);
            multiply(rows, k, k_stride, v, v_stride);
            return;
        }
        s.kernels.multiply_transposed(tile.rows, tile.stride, w_uk_, s.r_pad, count, s.dn, s.r_pad, k, k_stride);
        s.kernels.multiply_transposed(tile.rows, tile.stride, w_uv_, s.r_pad, count, s.dv, s.r_pad, v, v_stride);
    }

private:
    void multiply(const QuantizedRows& rows, float* k, int64_t k_stride, float* v, int64_t v_stride) const {
        const int64_t row_bytes = weight_row(s.r, s.weight_block);
        const auto* w_uk = static_cast<const int8_t*>(s.w_kv_b) + h * (s.dn + s.dv) * row_bytes;
        auto* scratch = reinterpret_cast<uint8_t*>(spare_ + split_floats(s, kExpandTile));
        s.int8.expand(rows, w_uk, s.dn, k, k_stride, scratch);
        s.int8.expand(rows, w_uk + s.dn * row_bytes, s.dv, v, v_stride, scratch);
    }

    const Shape& s;
    const Latents* kept_;
    int64_t b, h;
    float *latent_, *spare_;
    const float *w_uk_ = nullptr, *w_uv_ = nullptr;
};

// 展开的一格，写成注意力要读的 dtype：缓存是 bfloat16 而指令集直接乘它时，K、V 舍入到 bfloat16（CPU-1），各块 query 共用。
class Expanded {
public:
    static int64_t floats(const Shape& s) { return kExpandTile * (padded(s.dn + s.dr) + padded(s.dv)) * 3 / 2; }
    Expanded(const Shape& shape, float* memory)
        : s(shape), k_width(padded(s.dn + s.dr)), v_width(padded(s.dv)), k(memory), v(k + kExpandTile * k_width),
          narrow_k_(reinterpret_cast<uint16_t*>(v + kExpandTile * v_width)), narrow_v_(narrow_k_ + kExpandTile * k_width),
          narrow_(s.cache_dtype == Dtype::kBfloat16 && s.kernels.narrow != nullptr && k_width % kBf16Pad == 0 &&
                  v_width % kBf16Pad == 0) {
        std::fill(k, k + kExpandTile * (k_width + v_width), 0.0f);
    }

    void finish(int64_t count) const {
        if (narrow_) {
            s.kernels.narrow(k, count * k_width, narrow_k_);
            s.kernels.narrow(v, count * v_width, narrow_v_);
        }
    }
    Dtype dtype() const { return narrow_ ? Dtype::kBfloat16 : Dtype::kFloat32; }
    const void* keys() const { return narrow_ ? static_cast<const void*>(narrow_k_) : k; }
    const void* values() const { return narrow_ ? static_cast<const void*>(narrow_v_) : v; }

    const Shape& s;
    const int64_t k_width, v_width;
    float *const k, *const v;

private:
    uint16_t *const narrow_k_, *const narrow_v_;
    const bool narrow_;
};

// 一个头的 count 个 token；缓存一格一格展开成 K、V，每格给所有 query 用一遍。
void attend_head(const Shape& s, const Latents* kept, int64_t b, int64_t h, int64_t first, int64_t count) {
    const int64_t qk = s.dn + s.dr, qk_pad = padded(qk), dv_pad = padded(s.dv);
    Carver carver(task_scratch.need(count * (qk_pad + dv_pad + 2) + Expander::floats(s) + Expanded::floats(s) +
                                    attend_scratch(qk + s.dv) + 9 * kPad));
    float* q = carver.take(count * qk_pad);
    float* acc = carver.take(count * dv_pad);
    float* max = carver.take(count);
    float* sum = carver.take(count);
    const Expander expander(s, kept, b, h, carver.take(Expander::floats(s)));
    const Expanded tile(s, carver.take(Expanded::floats(s)));
    float* scratch = carver.take(attend_scratch(qk + s.dv));
    for (int64_t i = 0; i < count; ++i) {
        const int64_t row = (b * s.S + first + i) * s.H + h;
        float* to = q + i * qk_pad;
        s.widen_row(at(s.q_nope, s.dtype, row * s.dn), s.dn, to, s.dn);
        s.widen_row(at(s.q_pe, s.dtype, row * s.dr), s.dr, to + s.dn, qk_pad - s.dn);
        std::transform(to, to + qk, to, [&](float x) { return x * s.scale; });
    }
    start_rows(count, dv_pad, acc, max, sum);
    const int64_t length = s.past_lens[b] + first + count;
    for (int64_t t = 0; t < length; t += kExpandTile) {
        const int64_t n = std::min(kExpandTile, length - t);
        expander.run(t, n, tile.k, qk_pad, tile.v, dv_pad);
        tile.finish(n);
        for (int64_t row = 0; row < count; row += kBlockRows) {
            const int64_t block_rows = std::min(kBlockRows, count - row);
            const int64_t end = std::min(t + n, s.past_lens[b] + first + row + block_rows);
            if (end > t) {
                s.kernels.attend({q + row * qk_pad, block_rows, tile.keys(), tile.values(), tile.dtype(), qk_pad, dv_pad, qk_pad,
                                     dv_pad, t, end, s.past_lens[b] + first, row, 1, acc + row * dv_pad, max + row, sum + row},
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

}  // namespace

void attend_naive(const Shape& s, int64_t first, int64_t count) {
    Latents latents(s, first + count);
    const bool keep = latents.worth_keeping();
    if (keep) {
        latents.split();
    }
    s.parallel(s.B * s.H, [&](int64_t i) { attend_head(s, keep ? &latents : nullptr, i / s.H, i % s.H, first, count); });
}

}  // namespace dsx::mla
