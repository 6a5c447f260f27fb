// SMMLA 的矩阵乘：一条指令把 2 行 × 8 乘 8 × 2 列，累加成 2×2 的 int32。两列是权重的两列；两行是一行激活的两个平面，或两行 query。
// 权重因此每 8 个一组重排。整数和与别的 kernel 相同，合成 float 的次序也相同，所以结果与 neon_dotprod 逐位相同。
// 在 quant_gemm.h 之后包含；少于 kPackRows 行时读权重才是瓶颈，仍用那里的 direct。
#pragma once

#include "kernels.h"
#include "quant_gemm.h"

namespace {

constexpr int64_t kEight = 8;
constexpr int64_t kGroup = kEight * kLanes;  // 一组：8 列，每列 8 个码
constexpr int kColumnPairs = kLanes / 2;

inline void store_eights(SignedCodes codes, int8_t* to) {
    vst1_s8(to, vget_low_s8(codes.lo));
    vst1_s8(to + kGroup, vget_high_s8(codes.lo));
    vst1_s8(to + 2 * kGroup, vget_low_s8(codes.hi));
    vst1_s8(to + 3 * kGroup, vget_high_s8(codes.hi));
}

// 8 列重排成 [K/8, 8 列, 8]，一列之内的次序同激活的码；不足的列重复最后一列，结果不写出去。kSigned：码是有符号的。
template <typename F, bool kSigned>
void pack_eights(const Cursor& w, int64_t last, int64_t column, int64_t blocks, int64_t width, int8_t* codes, float* scales) {
    const int64_t row_bytes = width * F::kBits / 8;
    for (int i = 0; i < kLanes; ++i) {
        const int64_t wanted = column + i, source = wanted < last ? wanted : last;
        const uint8_t* row = w.codes + source * w.code_stride;
        for (int64_t b = 0; b < blocks; ++b) {
            scales[b * kLanes + i] = widen_f16(w.scales[source * w.scale_stride + b]);
        }
        int8_t* to = codes + kEight * i;
        const auto put = [&](const uint8_t* from) {
            const Bytes raw = load_bytes(from);
            Bytes parts[F::kVectors];
            F::unpack(kSigned ? flip_sign(raw) : raw, parts);
            for (int v = 0; v < F::kVectors; ++v) {
                store_eights(F::codes(parts[v]), to);
                to += 4 * kGroup;
            }
        };
        int64_t t = 0;
        for (; t + kBytes <= row_bytes; t += kBytes) {
            prefetch(ahead(row + t, kLanes * w.code_stride));
            put(row + t);
        }
        if (t < row_bytes) {
            alignas(64) uint8_t rest[kBytes] = {};
            std::memcpy(rest, row + t, static_cast<size_t>(row_bytes - t));
            put(rest);
        }
    }
}

// R 对行（first、second 各一行，行距 stride）的第 begin..end 个码对 8 列，加到 acc 上：一个累加器是 2 行 × 2 列。
template <int R>
inline void add_eights(const int8_t* first, const int8_t* second, int64_t stride, const int8_t* columns, int64_t begin,
    int64_t end, int32x4_t (&acc)[R][kColumnPairs]) {
    for (int64_t t = begin; t < end; t += kEight) {
        int8x16_t two[kColumnPairs];
        for (int j = 0; j < kColumnPairs; ++j) {
            two[j] = vld1q_s8(columns + t * kLanes + 16 * j);
        }
        for (int i = 0; i < R; ++i) {
            const int8x16_t rows = vcombine_s8(vld1_s8(first + i * stride + t), vld1_s8(second + i * stride + t));
            for (int j = 0; j < kColumnPairs; ++j) {
                acc[i][j] = vmmlaq_s32(acc[i][j], rows, two[j]);
            }
        }
    }
}

// 第一行、第二行各 8 列的和。
inline void split_rows(const int32x4_t (&acc)[kColumnPairs], Ints (&rows)[2]) {
    int64x2_t wide[kColumnPairs];
    for (int j = 0; j < kColumnPairs; ++j) {
        wide[j] = vreinterpretq_s64_s32(acc[j]);
    }
    rows[0] = {vreinterpretq_s32_s64(vzip1q_s64(wide[0], wide[1])), vreinterpretq_s32_s64(vzip1q_s64(wide[2], wide[3]))};
    rows[1] = {vreinterpretq_s32_s64(vzip2q_s64(wide[0], wide[1])), vreinterpretq_s32_s64(vzip2q_s64(wide[2], wide[3]))};
}

inline int32x4_t start_of(int32_t first, int32_t second) {
    return vcombine_s32(vdup_n_s32(first), vdup_n_s32(second));
}

template <typename F, int R>
inline int64_t eights_rows(const QuantizedRows& all, int64_t row, const int8_t* codes, const float* scales, int64_t columns,
    float* y, int64_t ldy) {
    const Segments<F> segments(all.block);
    for (; row + R <= all.rows; row += R) {
        const QuantizedRows a = all.from(row, R);
        Vector sums[R];
        for (int i = 0; i < R; ++i) {
            sums[i] = splat(0);
        }
        for (int64_t b = 0; b < a.blocks; ++b) {
            int32x4_t acc[R][kColumnPairs];
            for (int i = 0; i < R; ++i) {
                const int32_t* starts = a.starts + i * a.start_stride() + b;
                for (int j = 0; j < kColumnPairs; ++j) {
                    acc[i][j] = start_of(starts[0], starts[a.scale_stride()]);
                }
            }
            for (int64_t s = 0; s < segments.count(); ++s) {
                const int64_t begin = segments.begin(b, s);
                add_eights<R>(a.codes, a.codes + a.plane_stride(), a.code_stride(), codes, begin, begin + segments.length(), acc);
            }
            const Vector theirs = load(scales + b * kLanes);
            for (int i = 0; i < R; ++i) {
                Ints planes[kPlanes];
                split_rows(acc[i], planes);
                const Vector scale = mul(splat(a.scales[i * a.scale_stride() + b]), theirs);
                sums[i] = fma(join_planes(planes), scale, sums[i]);
            }
        }
        for (int i = 0; i < R; ++i) {
            float out[kLanes];
            store(out, sums[i]);
            std::memcpy(y + (row + i) * ldy, out, static_cast<size_t>(columns) * sizeof(float));
        }
    }
    return row;
}

template <typename F, bool kSigned>
void multiply_packed_eights(const QuantizedRows& a, const Cursor& w, int64_t total, float* y, int64_t ldy, uint8_t* scratch) {
    float* scales = reinterpret_cast<float*>(scratch);
    auto* codes = reinterpret_cast<int8_t*>(scales + kLanes * a.blocks);
    for (int64_t column = 0; column < total; column += kLanes) {
        const int64_t left = total - column, columns = left < kLanes ? left : kLanes;
        pack_eights<F, kSigned>(w, total - 1, column, a.blocks, a.blocks * a.block, codes, scales);
        const int64_t row = eights_rows<F, kTileRows>(a, 0, codes, scales, columns, y + column, ldy);
        eights_rows<F, 1>(a, row, codes, scales, columns, y + column, ldy);
    }
}

template <typename F>
void multiply_eights(const QuantizedRows& a, const QuantizedWeights& w, float* y, int64_t ldy, uint8_t* scratch) {
    if (a.rows < kPackRows) {
        multiply<F>(a, w, y, ldy, scratch);
        return;
    }
    const Cursor at{w.codes, a.blocks * a.block * F::kBits / 8, w.scales, a.blocks};
    multiply_packed_eights<F, false>(a, at, w.columns, y, ldy, scratch);
}

// 同 expand。
void expand_eights(const QuantizedRows& a, const int8_t* weights, int64_t columns, float* y, int64_t ldy, uint8_t* scratch) {
    const int64_t width = a.blocks * a.block, stride = dsx::weight_row(width, a.block);
    const Cursor at{reinterpret_cast<const uint8_t*>(weights), stride, reinterpret_cast<const uint16_t*>(weights + width),
        stride / static_cast<int64_t>(sizeof(uint16_t))};
    multiply_packed_eights<Int8, true>(a, at, columns, y, ldy, scratch);
}

// 两行 query 一对；R 对。
template <int R>
inline void rectified_pairs(const int8_t* q, int64_t width, int64_t last, const int8_t* keys, float* out) {
    int32x4_t acc[R][kColumnPairs];
    for (int i = 0; i < R; ++i) {
        for (int j = 0; j < kColumnPairs; ++j) {
            acc[i][j] = vdupq_n_s32(0);
        }
    }
    add_eights<R>(q, q + last * width, 2 * width, keys, 0, width, acc);
    for (int i = 0; i < R; ++i) {
        Ints rows[2];
        split_rows(acc[i], rows);
        for (int64_t k = 0; k <= last; ++k) {
            store(out + (2 * i + k) * dsx::kTile, max(to_float(rows[k]), splat(0)));
        }
    }
}

void rectified_eights(const int8_t* q, const int32_t*, int64_t rows, const uint8_t* keys, int64_t width, float* out,
    uint8_t* packed) {
    auto* codes = reinterpret_cast<int8_t*>(packed);
    for (int64_t j = 0; j < dsx::kTile; j += kLanes) {
        for (int i = 0; i < kLanes; ++i) {
            for (int64_t t = 0; t < width; t += kBytes) {
                store_eights(Int8::codes(load_bytes(keys + (j + i) * width + t)), codes + t * kLanes + kEight * i);
            }
        }
        int64_t row = 0;
        for (; row + 4 <= rows; row += 4) {
            rectified_pairs<2>(q + row * width, width, 1, codes, out + row * dsx::kTile + j);
        }
        for (; row < rows; row += 2) {
            rectified_pairs<1>(q + row * width, width, row + 1 < rows ? 1 : 0, codes, out + row * dsx::kTile + j);
        }
    }
}

}  // namespace
