// int8 权重的矩阵乘，写在 Vector、Ints、Codes、Acts 之上；各指令集的编译单元先包含自己的 int8_simd_*.h，再包含本文件。
// 全部在匿名命名空间里：带不同编译选项的同名函数不能被链接器合并成一份。
#pragma once

#include <cstdint>
#include <cstring>

#include "int8_kernels.h"
#include "prefetch.h"

namespace {

using dsx::Int8Weights;
using dsx::kPlanes;
using dsx::QuantizedRows;

constexpr int kLanes = Vector::kLanes;
constexpr int kBytes = 4 * kLanes;  // 一个向量的 int8
constexpr int kColumnTile = kTileVectors * kLanes;
// 一次算几行：每行每个向量两个平面各占一个累加器，AVX-512 时是 16 个；再多就放不下寄存器了（6 行慢三成）。
constexpr int kTileRows = 4;
// 少于这么多行时直接读权重的行；否则先把一组列重排成“一路一列”，省掉横向求和，各行共用。
constexpr int64_t kPackRows = 4;

void quantize_row(const float* x, int64_t width, const QuantizedRows& to) {
    const int64_t total = to.plane_stride();
    int8_t* const low = to.codes + total;
    for (int64_t b = 0; b < to.blocks; ++b) {
        const int64_t begin = b * to.block, end = begin + to.block < width ? begin + to.block : width;
        Vector top = splat(0);
        int64_t i = begin;
        for (; i + kLanes <= end; i += kLanes) {
            const Vector v = load(x + i);
            top = max(top, max(v, sub(splat(0), v)));
        }
        float largest = horizontal_max(top);
        for (; i < end; ++i) {
            const float magnitude = x[i] < 0 ? -x[i] : x[i];
            largest = magnitude > largest ? magnitude : largest;
        }
        const float inverse = largest > 0 ? 127.0f / largest : 0;
        to.scales[b] = largest / 127.0f;
        const auto store_codes = [&](int64_t at, Vector v) {
            const Vector scaled = mul(v, splat(inverse)), high = nearest(scaled);
            store_int8(to.codes + at, high);
            store_int8(low + at, mul(sub(scaled, high), splat(dsx::kLowSteps)));
        };
        for (i = begin; i + kLanes <= end; i += kLanes) {
            store_codes(i, load(x + i));
        }
        if (i < end) {
            float rest[kLanes] = {};
            for (int64_t j = i; j < end; ++j) {
                rest[j - i] = x[j];
            }
            store_codes(i, load(rest));
            i += kLanes;
        }
        for (; i < begin + to.block; ++i) {
            to.codes[i] = low[i] = 0;
        }
        for (int p = 0; p < kPlanes; ++p) {
            int32_t sum = 0;
            if constexpr (kFoldZeroPoint) {
                for (i = begin; i < begin + to.block; ++i) {
                    sum += to.codes[p * total + i];
                }
            }
            to.starts[b * kPlanes + p] = -dsx::kZeroPoint * sum;
        }
    }
    to.scales[to.blocks] = 0;
    for (int64_t i = to.blocks * to.block; i < total; ++i) {
        to.codes[i] = low[i] = 0;
    }
}

void quantize(const float* x, int64_t x_stride, int64_t width, const QuantizedRows& rows) {
    for (int64_t i = 0; i < rows.rows; ++i) {
        quantize_row(x + i * x_stride, width, rows.from(i, 1));
    }
}

// 两个平面的整数和，合成以 scale 为单位的值。
inline Vector join_planes(const Ints (&acc)[kPlanes]) {
    return fma(to_float(acc[1]), splat(1 / dsx::kLowSteps), to_float(acc[0]));
}

// R 行激活对 J 行权重，逐向量走过 K。权重多半在内存里：一边算一边把下一组的同一位置取进 L1，再往后两组的取进 L2
// （一行激活时读权重比只取一组、取进 L2 快 5–10 %）。
template <int R, int J>
inline void direct_block(const QuantizedRows& a, const Int8Weights& w, int64_t column, float* y, int64_t ldy) {
    const int64_t width = a.blocks * a.block;
    const uint8_t* codes = w.codes + column * width;
    const float* scales = w.scales + column * a.blocks;
    Vector sums[R][J];
    for (int i = 0; i < R; ++i) {
        for (int j = 0; j < J; ++j) {
            sums[i][j] = splat(0);
        }
    }
    const auto step = [&](int64_t t, int64_t vectors, auto load_weights, auto scale_of, auto start_of) {
        Ints acc[R][J][kPlanes];
        for (int i = 0; i < R; ++i) {
            for (int p = 0; p < kPlanes; ++p) {
                const Ints start = start_of(a.starts + i * a.start_stride() + p);
                for (int j = 0; j < J; ++j) {
                    acc[i][j][p] = start;
                }
            }
        }
        for (int64_t v = 0; v < vectors; ++v) {
            const int64_t at = t + v * kBytes;
            Codes row[J];
            for (int j = 0; j < J; ++j) {
                prefetch<3>(codes + (J + j) * width + at);
                prefetch(codes + (3 * J + j) * width + at);
                row[j] = load_weights(codes + j * width + at);
            }
            for (int i = 0; i < R; ++i) {
                for (int p = 0; p < kPlanes; ++p) {
                    const Acts x = load_acts(a.codes + i * a.code_stride() + p * a.plane_stride() + at);
                    for (int j = 0; j < J; ++j) {
                        acc[i][j][p] = dot(acc[i][j][p], row[j], x);
                    }
                }
            }
        }
        for (int i = 0; i < R; ++i) {
            const Vector mine = scale_of(a.scales + i * a.scale_stride());
            for (int j = 0; j < J; ++j) {
                const Vector scale = mul(mine, scale_of(scales + j * a.blocks));
                sums[i][j] = fma(join_planes(acc[i][j]), scale, sums[i][j]);
            }
        }
    };
    int64_t b = 0;
#ifdef DSX_INT8_HALF
    if (a.block < kBytes) {
        for (; b + 2 <= a.blocks; b += 2) {
            step(b * a.block, 1, load_codes, [b](const float* s) { return halves(s[b], s[b + 1]); },
                [b](const int32_t* s) { return first_lanes(s[b * kPlanes], s[(b + 1) * kPlanes]); });
        }
        if (b < a.blocks) {
            step(b * a.block, 1, load_half_codes, [b](const float* s) { return halves(s[b], 0); },
                [b](const int32_t* s) { return first_lanes(s[b * kPlanes], 0); });
        }
        b = a.blocks;
    }
#endif
    for (; b < a.blocks; ++b) {
        step(b * a.block, a.block / kBytes, load_codes, [b](const float* s) { return splat(s[b]); },
            [b](const int32_t* s) { return first_lane(s[b * kPlanes]); });
    }
    for (int i = 0; i < R; ++i) {
        if constexpr (J == 4) {
            sum4(sums[i], y + i * ldy + column);
        } else {
            y[i * ldy + column] = horizontal_sum(sums[i][0]);
        }
    }
}

template <int R>
void direct(const QuantizedRows& a, const Int8Weights& w, float* y, int64_t ldy) {
    int64_t column = 0;
    for (; column + 4 <= w.columns; column += 4) {
        direct_block<R, 4>(a, w, column, y, ldy);
    }
    for (; column < w.columns; ++column) {
        direct_block<R, 1>(a, w, column, y, ldy);
    }
}

// kColumnTile 列重排成 [K/4, kColumnTile, 4]；不足的列重复最后一列，结果不写出去。
void pack(const Int8Weights& w, int64_t column, int64_t blocks, int64_t width, uint8_t* codes, float* scales) {
    constexpr int64_t stride = 4 * kColumnTile;
    for (int group = 0; group < kTileVectors; ++group) {
        const uint8_t* rows[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            const int64_t wanted = column + group * kLanes + i, last = w.columns - 1;
            const int64_t source = wanted < last ? wanted : last;
            rows[i] = w.codes + source * width;
            for (int64_t b = 0; b < blocks; ++b) {
                scales[b * kColumnTile + group * kLanes + i] = w.scales[source * blocks + b];
            }
        }
        uint8_t* to = codes + group * kBytes;
        int64_t t = 0;
        for (; t + kBytes <= width; t += kBytes) {
            transpose(rows, to + t / 4 * stride, stride);
            for (int i = 0; i < kLanes; ++i) {
                prefetch(rows[i] + kColumnTile * width);
                rows[i] += kBytes;
            }
        }
#ifdef DSX_INT8_HALF
        if (t < width) {
            transpose_half(rows, to + t / 4 * stride, stride);
        }
#endif
    }
}

// R 行激活对重排好的 kColumnTile 列：一路一列，激活每 4 个一组广播。
template <int R>
inline void packed_block(const QuantizedRows& a, const uint8_t* codes, const float* scales, float* out) {
    const int64_t stride = a.code_stride(), plane = a.plane_stride();
    for (int i = 0; i < R * kTileVectors; ++i) {
        store(out + i * kLanes, splat(0));
    }
    for (int64_t b = 0; b < a.blocks; ++b) {
        Ints acc[R][kTileVectors][kPlanes];
        for (int i = 0; i < R; ++i) {
            for (int p = 0; p < kPlanes; ++p) {
                const Ints start = splat_ints(a.starts[i * a.start_stride() + b * kPlanes + p]);
                for (int j = 0; j < kTileVectors; ++j) {
                    acc[i][j][p] = start;
                }
            }
        }
        for (int64_t t = b * a.block; t < (b + 1) * a.block; t += 4) {
            Codes row[kTileVectors];
            for (int j = 0; j < kTileVectors; ++j) {
                row[j] = load_codes(codes + t * kColumnTile + j * kBytes);
            }
            for (int i = 0; i < R; ++i) {
                for (int p = 0; p < kPlanes; ++p) {
                    const Acts x = splat_acts(a.codes + i * stride + p * plane + t);
                    for (int j = 0; j < kTileVectors; ++j) {
                        acc[i][j][p] = dot(acc[i][j][p], row[j], x);
                    }
                }
            }
        }
        for (int i = 0; i < R; ++i) {
            const Vector mine = splat(a.scales[i * a.scale_stride() + b]);
            for (int j = 0; j < kTileVectors; ++j) {
                float* to = out + (i * kTileVectors + j) * kLanes;
                const Vector scale = mul(mine, load(scales + b * kColumnTile + j * kLanes));
                store(to, fma(join_planes(acc[i][j]), scale, load(to)));
            }
        }
    }
}

template <int R>
inline int64_t packed_rows(const QuantizedRows& a, int64_t row, const uint8_t* codes, const float* scales,
    int64_t columns, float* y, int64_t ldy) {
    alignas(64) float out[R * kColumnTile];
    for (; row + R <= a.rows; row += R) {
        packed_block<R>(a.from(row, R), codes, scales, out);
        for (int i = 0; i < R; ++i) {
            std::memcpy(y + (row + i) * ldy, out + i * kColumnTile, static_cast<size_t>(columns) * sizeof(float));
        }
    }
    return row;
}

void multiply_packed(const QuantizedRows& a, const Int8Weights& w, float* y, int64_t ldy, uint8_t* scratch) {
    const int64_t width = a.blocks * a.block;
    float* scales = reinterpret_cast<float*>(scratch);
    uint8_t* codes = scratch + kColumnTile * a.blocks * static_cast<int64_t>(sizeof(float));
    for (int64_t column = 0; column < w.columns; column += kColumnTile) {
        const int64_t left = w.columns - column, columns = left < kColumnTile ? left : kColumnTile;
        pack(w, column, a.blocks, width, codes, scales);
        const int64_t row = packed_rows<kTileRows>(a, 0, codes, scales, columns, y + column, ldy);
        packed_rows<1>(a, row, codes, scales, columns, y + column, ldy);
    }
}

void multiply_int8(const QuantizedRows& a, const Int8Weights& w, float* y, int64_t ldy, uint8_t* scratch) {
    switch (a.rows) {
    case 0: return;
    case 1: direct<1>(a, w, y, ldy); return;
    case 2: direct<2>(a, w, y, ldy); return;
    case 3: direct<3>(a, w, y, ldy); return;
    default: static_assert(kPackRows == 4); multiply_packed(a, w, y, ldy, scratch);
    }
}

void swiglu(const float* x, int64_t count, float* y) {
    for (int64_t i = 0; i < count; i += kLanes) {
        const int64_t n = count - i < kLanes ? count - i : kLanes;
        float gate[kLanes] = {}, up[kLanes] = {}, out[kLanes];
        for (int64_t j = 0; j < n; ++j) {
            gate[j] = x[2 * (i + j)];
            up[j] = x[2 * (i + j) + 1];
        }
        // exp 只用于不大于 0 的数：silu(g) = g / (1 + e^-g) = g·e^min(g,0) / (1 + e^-|g|)。
        const Vector g = load(gate), negative = sub(splat(0), max(g, sub(splat(0), g)));
        const Vector numerator = exp(sub(splat(0), max(sub(splat(0), g), splat(0))));
        const Vector sigmoid = divide(numerator, add(splat(1), exp(negative)));
        store(out, mul(mul(g, sigmoid), load(up)));
        for (int64_t j = 0; j < n; ++j) {
            y[i + j] = out[j];
        }
    }
}

}  // namespace
