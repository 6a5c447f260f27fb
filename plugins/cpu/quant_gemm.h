// int8、int4 权重的矩阵乘，写在 Vector、Ints、Bytes、Acts 与格式 Int8、Int4 之上；各指令集的编译单元先包含自己的 quant_simd_*.h，
// 再包含本文件。全部在匿名命名空间里：带不同编译选项的同名函数不能被链接器合并成一份。
//
// 权重不重排，就是 MatMulNBits 的布局：加载只是映射，一步只顺着读一遍。int4 一字节里是相邻的两个权重，读出一个向量、拆成低 4 位与高 4 位，
// 得到的是一段权重里的偶数个与奇数个；激活在量化时按同样的次序排好，所以权重不必再洗牌。
#pragma once

#include <cstdint>
#include <cstring>

#include "prefetch.h"
#include "quant_rows.h"
#include "swiglu.h"

namespace {

using dsx::QuantizedWeights;

// 一次读出的权重里有几块；一块要读几次。两个总有一个是 1。
template <typename F, int kBlock>
constexpr int kShare = kValues<F> > kBlock ? kValues<F> / kBlock : 1;
template <typename F, int kBlock>
constexpr int kReads = kBlock > kValues<F> ? kBlock / kValues<F> : 1;
// 少于这么多行时直接读权重的行；否则先把一组列重排成“一路一列”，省掉横向求和，各行共用。
constexpr int64_t kPackRows = 4;

// 两个平面的整数和，合成以 scale 为单位的值。
inline Vector join_planes(const Ints (&acc)[kPlanes]) {
    return fma(to_float(acc[1]), splat(1 / dsx::kLowSteps), to_float(acc[0]));
}

template <typename F>
inline Ints dot_values(Ints acc, const typename F::Codes (&w)[F::kVectors], const int8_t* a) {
    Acts x[F::kVectors];
    for (int v = 0; v < F::kVectors; ++v) {
        x[v] = load_acts(a + v * kBytes);
    }
    if constexpr (F::kVectors == 1) {
        return dot(acc, w[0], x[0]);
    } else {
        return dot(acc, w, x);
    }
}

template <typename F>
inline void load_weights(const uint8_t* p, typename F::Codes (&out)[F::kVectors]) {
    Bytes parts[F::kVectors];
    F::unpack(load_bytes(p), parts);
    for (int v = 0; v < F::kVectors; ++v) {
        out[v] = F::codes(parts[v]);
    }
}

// 权重里要读的位置：第一行，与行距（以元素计）。
struct Cursor {
    const uint8_t* codes;
    int64_t code_stride;
    const uint16_t* scales;
    int64_t scale_stride;
};

// R 行激活从第 b 块起的 kShare 块对 J 行权重，加到 sums 上。
template <typename F, int R, int J, int kBlock>
inline void direct_step(const QuantizedRows& a, int64_t b, const Cursor& w, Vector (&sums)[R][J]) {
    Ints acc[R][J][kPlanes];
    for (int i = 0; i < R; ++i) {
        for (int p = 0; p < kPlanes; ++p) {
            const Ints start = first_lanes<kShare<F, kBlock>>(a.starts + i * a.start_stride() + p * a.scale_stride() + b);
            for (int j = 0; j < J; ++j) {
                acc[i][j][p] = start;
            }
        }
    }
    constexpr int64_t kAhead = 8192;
    const int64_t done = (J - 1) * b * kBlock * F::kBits / 8;  // 其余各行已经读过的
    for (int v = 0; v < kReads<F, kBlock>; ++v) {
        const int8_t* x = a.codes + b * kBlock + v * kValues<F>;
        for (int j = 0; j < J; ++j) {
            // 权重多半在内存里：一边算一边把 kAhead 字节之后的取进 L1。J 行连着，取的次序顺着地址走，而不是跟着 J 行交错：
            // 硬件的预取因此认得出来。
            const uint8_t* codes = w.codes + j * w.code_stride + v * kBytes;
            prefetch<3>(ahead(w.codes, kAhead + done + (v * J + j) * kBytes));
            typename F::Codes row[F::kVectors];
            load_weights<F>(codes, row);
            for (int i = 0; i < R; ++i) {
                for (int p = 0; p < kPlanes; ++p) {
                    acc[i][j][p] = dot_values<F>(acc[i][j][p], row, x + i * a.code_stride() + p * a.plane_stride());
                }
            }
        }
    }
    Vector scales[J];
    for (int j = 0; j < J; ++j) {
        scales[j] = spread_f16<kShare<F, kBlock>>(w.scales + j * w.scale_stride);
    }
    for (int i = 0; i < R; ++i) {
        const Vector mine = spread<kShare<F, kBlock>>(a.scales + i * a.scale_stride() + b);
        for (int j = 0; j < J; ++j) {
            sums[i][j] = fma(join_planes(acc[i][j]), mul(mine, scales[j]), sums[i][j]);
        }
    }
}

// R 行激活对 J 行权重，逐向量走过 K。
template <typename F, int R, int J, int kBlock>
inline void direct_block(const QuantizedRows& a, const QuantizedWeights& w, int64_t column, float* y, int64_t ldy) {
    constexpr int64_t block_bytes = kBlock * F::kBits / 8;
    constexpr int share = kShare<F, kBlock>;
    const int64_t row_bytes = a.blocks * block_bytes;
    Vector sums[R][J];
    for (int i = 0; i < R; ++i) {
        for (int j = 0; j < J; ++j) {
            sums[i][j] = splat(0);
        }
    }
    Cursor at{w.codes + column * row_bytes, row_bytes, w.scales + column * a.blocks, a.blocks};
    int64_t b = 0;
    for (; b + share <= a.blocks; b += share) {
        direct_step<F, R, J, kBlock>(a, b, at, sums);
        at.codes += share * block_bytes;
        at.scales += share;
    }
    if (b < a.blocks) {
        // 最后不满一个向量的几块：补零再算。
        alignas(64) uint8_t codes[J][kBytes] = {};
        uint16_t scales[J][share] = {};
        for (int j = 0; j < J; ++j) {
            std::memcpy(codes[j], at.codes + j * at.code_stride, static_cast<size_t>((a.blocks - b) * block_bytes));
            std::memcpy(scales[j], at.scales + j * at.scale_stride, static_cast<size_t>(a.blocks - b) * sizeof(uint16_t));
        }
        direct_step<F, R, J, kBlock>(a, b, {codes[0], kBytes, scales[0], share}, sums);
    }
    for (int i = 0; i < R; ++i) {
        if constexpr (J == 4) {
            sum4(sums[i], y + i * ldy + column);
        } else {
            y[i * ldy + column] = horizontal_sum(sums[i][0]);
        }
    }
}

template <typename F, int R, int kBlock>
void direct_columns(const QuantizedRows& a, const QuantizedWeights& w, float* y, int64_t ldy) {
    int64_t column = 0;
    for (; column + 4 <= w.columns; column += 4) {
        direct_block<F, R, 4, kBlock>(a, w, column, y, ldy);
    }
    for (; column < w.columns; ++column) {
        direct_block<F, R, 1, kBlock>(a, w, column, y, ldy);
    }
}

template <typename F, int R>
void direct(const QuantizedRows& a, const QuantizedWeights& w, float* y, int64_t ldy) {
    switch (a.block) {
    case 32: direct_columns<F, R, 32>(a, w, y, ldy); return;
    case 64: direct_columns<F, R, 64>(a, w, y, ldy); return;
    default: direct_columns<F, R, 128>(a, w, y, ldy);
    }
}

// kLanes 列的 scale 展宽，重排成 [blocks, kColumnTile] 里的 kLanes 列：一个 float 是一组 4 字节，借码的转置。
inline void pack_scales(const uint16_t* const (&rows)[kLanes], int64_t blocks, float* to) {
    int64_t b = 0;
    for (; b + kLanes <= blocks; b += kLanes) {
        Bytes lines[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            alignas(64) float wide[kLanes];
            store(wide, load_f16(rows[i] + b));
            lines[i] = load_bytes(reinterpret_cast<const uint8_t*>(wide));
        }
        transpose(lines, reinterpret_cast<uint8_t*>(to + b * kColumnTile), kColumnTile * static_cast<int64_t>(sizeof(float)));
    }
    for (; b < blocks; ++b) {
        for (int i = 0; i < kLanes; ++i) {
            to[b * kColumnTile + i] = widen_f16(rows[i][b]);
        }
    }
}

// kColumnTile 列重排成 [K/4, kColumnTile, 4]，一列之内的次序同激活的码；不足的列重复最后一列，结果不写出去。kSigned：码是有符号的，加上零点。
template <typename F, bool kSigned>
void pack(const Cursor& w, int64_t last, int64_t column, int64_t blocks, int64_t width, uint8_t* codes, float* scales) {
    constexpr int64_t stride = 4 * kColumnTile;
    const int64_t row_bytes = width * F::kBits / 8;
    for (int group = 0; group < kTileVectors; ++group) {
        const uint8_t* rows[kLanes];
        const uint16_t* row_scales[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            const int64_t wanted = column + group * kLanes + i, source = wanted < last ? wanted : last;
            rows[i] = w.codes + source * w.code_stride;
            row_scales[i] = w.scales + source * w.scale_stride;
        }
        pack_scales(row_scales, blocks, scales + group * kLanes);
        uint8_t* to = codes + group * kBytes;
        const auto put = [&](Bytes (&raw)[kLanes]) {
            if constexpr (kSigned) {
                for (Bytes& one : raw) {
                    one = flip_sign(one);
                }
            }
            transpose(raw, to, stride);
            if constexpr (F::kVectors == 2) {
                // 拆成低 4 位与高 4 位是逐字节的，重排之后再拆，只重排一次。
                for (int q = 0; q < kLanes; ++q, to += stride) {
                    Bytes parts[F::kVectors];
                    F::unpack(load_bytes(to), parts);
                    store_bytes(to, parts[0]);
                    store_bytes(to + kLanes * stride, parts[1]);
                }
            }
            to += kLanes * stride;
        };
        int64_t t = 0;
        for (; t + kBytes <= row_bytes; t += kBytes) {
            Bytes raw[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                raw[i] = load_bytes(rows[i] + t);
            }
            put(raw);
        }
        if (t < row_bytes) {
            Bytes raw[kLanes];
            for (int i = 0; i < kLanes; ++i) {
                alignas(64) uint8_t rest[kBytes] = {};
                std::memcpy(rest, rows[i] + t, static_cast<size_t>(row_bytes - t));
                raw[i] = load_bytes(rest);
            }
            put(raw);
        }
    }
}

// 一边算一边把下一组列的权重取进 L2，分摊到各步里：读内存的时间因此藏在计算后面。
class Fetch {
public:
    // 从 w 的开头起的 kColumnTile 列，steps 步取完。
    Fetch(const Cursor& w, int64_t steps)
        : codes_(w.codes), bytes_(kColumnTile * w.code_stride),
          per_step_(((bytes_ + kLine - 1) / kLine + steps - 1) / steps * kLine) {
        const int64_t scale_bytes = kColumnTile * w.scale_stride * static_cast<int64_t>(sizeof(uint16_t));
        for (int64_t i = 0; i < scale_bytes; i += kLine) {
            prefetch(ahead(w.scales, i));
        }
    }

    void step() {
        const int64_t end = at_ + per_step_ < bytes_ ? at_ + per_step_ : bytes_;
        for (; at_ < end; at_ += kLine) {
            prefetch(ahead(codes_, at_));
        }
    }

private:
    static constexpr int64_t kLine = 64;
    const uint8_t* codes_;
    int64_t bytes_, per_step_, at_ = 0;
};

// 一块的码分成几段：一次读出的权重比一块多时，偶数个与奇数个不相邻。
template <typename F>
struct Segments {
    explicit Segments(int64_t block) : split(F::kVectors == 2 && block < kValues<F>), block(block) {}
    int64_t count() const { return split ? 2 : 1; }
    int64_t length() const { return split ? block / 2 : block; }
    int64_t begin(int64_t b, int64_t segment) const {
        if (!split) {
            return b * block;
        }
        constexpr int64_t whole = kValues<F>;
        return b * block / whole * whole + b * block % whole / 2 + segment * whole / 2;
    }

    bool split;
    int64_t block;
};

// R 行激活对重排好的 kColumnTile 列：一路一列，激活每 4 个一组广播。kBlock 是 0 时块多大运行时才知道。
template <typename F, int R, int kBlock>
inline void packed_block(const QuantizedRows& a, const uint8_t* codes, const float* scales, Fetch& fetch, float* out) {
    const int64_t stride = a.code_stride(), plane = a.plane_stride();
    const Segments<F> segments(kBlock != 0 ? kBlock : a.block);
    for (int i = 0; i < R * kTileVectors; ++i) {
        store(out + i * kLanes, splat(0));
    }
    for (int64_t b = 0; b < a.blocks; ++b) {
        fetch.step();
        Ints acc[R][kTileVectors][kPlanes];
        for (int i = 0; i < R; ++i) {
            for (int p = 0; p < kPlanes; ++p) {
                const Ints start = splat_ints(a.starts[i * a.start_stride() + p * a.scale_stride() + b]);
                for (int j = 0; j < kTileVectors; ++j) {
                    acc[i][j][p] = start;
                }
            }
        }
        for (int64_t s = 0; s < segments.count(); ++s) {
            const int64_t begin = segments.begin(b, s), end = begin + segments.length();
#if defined(__GNUC__)
#pragma GCC unroll 8
#endif
            for (int64_t t = begin; t < end; t += 4) {
                typename F::Codes row[kTileVectors];
                for (int j = 0; j < kTileVectors; ++j) {
                    row[j] = F::codes(load_bytes(codes + t * kColumnTile + j * kBytes));
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

// 从第 row 行起每次 R 行，做到不够 R 行为止。
template <typename F, int R, int kBlock>
inline int64_t packed_rows(const QuantizedRows& a, int64_t row, const uint8_t* codes, const float* scales, Fetch& fetch,
    int64_t columns, float* y, int64_t ldy) {
    alignas(64) float out[R * kColumnTile];
    for (; row + R <= a.rows; row += R) {
        packed_block<F, R, kBlock>(a.from(row, R), codes, scales, fetch, out);
        for (int i = 0; i < R; ++i) {
            float* const to = y + (row + i) * ldy;
            if (columns == kColumnTile) {
                std::memcpy(to, out + i * kColumnTile, kColumnTile * sizeof(float));  // 大小是常数的快得多
            } else {
                std::memcpy(to, out + i * kColumnTile, static_cast<size_t>(columns) * sizeof(float));
            }
        }
    }
    return row;
}

// 不足 kTileRows 的余下几行一次做完。
template <typename F, int R>
inline void packed_rest(const QuantizedRows& a, int64_t row, const uint8_t* codes, const float* scales, Fetch& fetch,
    int64_t columns, float* y, int64_t ldy) {
    if constexpr (R > 0) {
        row = packed_rows<F, R, 0>(a, row, codes, scales, fetch, columns, y, ldy);
        packed_rest<F, R - 1>(a, row, codes, scales, fetch, columns, y, ldy);
    }
}

template <typename F, bool kSigned>
void multiply_packed(
    const QuantizedRows& a, const Cursor& w, int64_t total, int64_t next, float* y, int64_t ldy, uint8_t* scratch) {
    const int64_t width = a.blocks * a.block, steps = (a.rows + kTileRows - 1) / kTileRows * a.blocks;
    float* scales = reinterpret_cast<float*>(scratch);
    uint8_t* codes = scratch + kColumnTile * a.blocks * static_cast<int64_t>(sizeof(float));
    for (int64_t column = 0; column < total; column += kColumnTile) {
        const int64_t left = total - column, columns = left < kColumnTile ? left : kColumnTile;
        pack<F, kSigned>(w, total - 1, column, a.blocks, width, codes, scales);
        const int64_t then = left > kColumnTile ? column + kColumnTile : next;
        Fetch fetch({w.codes + then * w.code_stride, w.code_stride, w.scales + then * w.scale_stride, w.scale_stride}, steps);
        const int64_t row = a.block == 32
                                ? packed_rows<F, kTileRows, 32>(a, 0, codes, scales, fetch, columns, y + column, ldy)
                                : packed_rows<F, kTileRows, 0>(a, 0, codes, scales, fetch, columns, y + column, ldy);
        packed_rest<F, kTileRows - 1>(a, row, codes, scales, fetch, columns, y + column, ldy);
    }
}

template <typename F>
void multiply(const QuantizedRows& a, const QuantizedWeights& w, float* y, int64_t ldy, uint8_t* scratch) {
    switch (a.rows) {
    case 0: return;
    case 1: direct<F, 1>(a, w, y, ldy); return;
    case 2: direct<F, 2>(a, w, y, ldy); return;
    case 3: direct<F, 3>(a, w, y, ldy); return;
    default: break;
    }
    static_assert(kPackRows == 4);
    const Cursor at{w.codes, a.blocks * a.block * F::kBits / 8, w.scales, a.blocks};
    multiply_packed<F, false>(a, at, w.columns, w.next != 0 ? w.next : w.columns, y, ldy, scratch);
}

// w_kv_b 的若干行：一行是有符号的码，再是各块的 scale。
void expand(const QuantizedRows& a, const int8_t* weights, int64_t columns, float* y, int64_t ldy, uint8_t* scratch) {
    const int64_t width = a.blocks * a.block, stride = dsx::weight_row(width, a.block);
    const Cursor at{reinterpret_cast<const uint8_t*>(weights), stride, reinterpret_cast<const uint16_t*>(weights + width),
        stride / static_cast<int64_t>(sizeof(uint16_t))};
    multiply_packed<Int8, true>(a, at, columns, columns, y, ldy, scratch);
}

}  // namespace
