// int8 的 latent 缓存上的注意力，写在 Vector、Bytes 与“约 15 位对 int8”的点积（splat_pair、pair_dot、join）之上；各指令集的编译单元
// 先包含自己的 quant_simd_*.h，再包含本文件。
//
// 缓存的行不展宽：query 拆成两个 int8 平面，与行里的码做整数点积，两侧的 scale 最后乘上；旋转部分的高、低字节各算一遍，高的乘 256。
// 概率先乘上各 key 的 scale，再同样拆成两个平面，与同一份码相乘。除了这两次拆分，整数部分没有误差。
#pragma once

#include <cstdint>

#include "int8_spans.h"
#include "prefetch.h"
#include "soften.h"

namespace {

// 一格 key 重排成“一路一个 key”：每 kLanes 个 key 一组，组内每 4 个字节一个向量。不足一组的重复最后一行，结果由 soften 盖掉。
inline void pack_keys(const int8_t* rows, int64_t stride, int64_t count, const Spans& spans, uint8_t* packed) {
    const int64_t begins[] = {0, spans.r, spans.r + spans.dr}, lengths[] = {spans.r, spans.dr, spans.dr};
    for (int64_t first = 0; first < count; first += kLanes) {
        const int8_t* from[kLanes];
        for (int i = 0; i < kLanes; ++i) {
            from[i] = rows + (first + i < count ? first + i : count - 1) * stride;
        }
        uint8_t* to = packed + first * spans.width();
        for (int span = 0; span < 3; ++span) {
            for (int64_t at = 0; at < lengths[span]; at += kBytes) {
                Bytes lines[kLanes];
                for (int i = 0; i < kLanes; ++i) {
                    lines[i] = load_span(from[i] + begins[span] + at, lengths[span] - at);
                }
                transpose(lines, to, kBytes);
                to += kLanes * kBytes;
            }
        }
    }
}

// 一格 value 重排成“一路一列”：每 kLanes 列一组，组内每 4 个 key 一个向量。
inline void weave_values(const int8_t* rows, int64_t stride, int64_t count, const Spans& spans, uint8_t* woven) {
    for (int64_t first = 0; first < count; first += 4) {
        const int8_t* from[4];
        for (int i = 0; i < 4; ++i) {
            from[i] = rows + (first + i < count ? first + i : count - 1) * stride;
        }
        for (int64_t at = 0; at < spans.r; at += kBytes) {
            const Bytes lines[4] = {load_span(from[0] + at, spans.r - at), load_span(from[1] + at, spans.r - at),
                load_span(from[2] + at, spans.r - at), load_span(from[3] + at, spans.r - at)};
            weave(lines, woven + at * kInt8Tile + first * kLanes, kQuads * kBytes);
        }
    }
}

// R 行 query 的一段对 J 个向量的 key，乘上两侧的 scale；first 为真则写，否则加到 out 上。
template <int R, int J>
inline void score_part(const Pairs& q, const uint8_t* keys, int64_t group, int64_t count, const float* key_scales, bool first,
    float* out) {
    PairSums acc[R][J];
    for (int i = 0; i < R; ++i) {
        for (int j = 0; j < J; ++j) {
            acc[i][j] = pair_start(q.row(i).starts);
        }
    }
    for (int64_t t = 0; t < count; t += kPairStep) {
        PairCodes codes[J];
        for (int j = 0; j < J; ++j) {
            codes[j] = load_pair_codes(keys + j * group + t * kLanes);
        }
        for (int i = 0; i < R; ++i) {
            const PairActs x = splat_pair(q.planes + i * q.stride, count, t);
            for (int j = 0; j < J; ++j) {
                acc[i][j] = pair_dot(acc[i][j], codes[j], x);
            }
        }
    }
    for (int i = 0; i < R; ++i) {
        const Vector scale = splat(*q.row(i).scales);
        for (int j = 0; j < J; ++j) {
            float* to = out + i * kInt8Tile + j * kLanes;
            const Vector value = mul(join(acc[i][j]), mul(scale, load(key_scales + j * kLanes)));
            store(to, first ? value : add(load(to), value));
        }
    }
}

// R 行 query 对从第 column 个起的一组 key 的分数。
template <int R>
inline void score_rows(const Pairs& q, const uint8_t* packed, const Spans& spans, const KeyScales& scales, int64_t column,
    float* out) {
    constexpr int J = kTileVectors;
    const int64_t group = kLanes * spans.width(), rope = spans.latent_parts();
    const uint8_t* keys = packed + column * spans.width();
    // 一段字节：query 从哪一段起（前面一共几个），key 从哪里起。
    const auto span = [&](int64_t first, int64_t before, int64_t length, int64_t offset, const float* key_scales) {
        for (int64_t begin = 0; begin < length; begin += kInt8Part) {
            const int64_t left = length - begin, n = left < kInt8Part ? left : kInt8Part;
            score_part<R, J>(q.part(first + begin / kInt8Part, before + begin), keys + (offset + begin) * kLanes, group, n,
                key_scales + column, offset + begin == 0, out + column);
        }
    };
    span(0, 0, spans.latent, 0, scales.latent);
    span(rope, spans.latent, spans.rope, spans.latent, scales.high);
    span(rope, spans.latent, spans.rope, spans.latent + spans.rope, scales.low);
}

// R 行概率对 J 个向量的列：c = alpha · c + scale · (p · value)。
template <int R, int J>
inline void mix_part(const Pairs& p, const uint8_t* values, int64_t quads, const float* alpha, float* c, int64_t ldc) {
    PairSums acc[R][J];
    for (int i = 0; i < R; ++i) {
        for (int j = 0; j < J; ++j) {
            acc[i][j] = pair_start(p.row(i).starts);
        }
    }
    for (int64_t t = 0; t < quads; t += kPairStep / 4) {
        PairCodes codes[J];
        for (int j = 0; j < J; ++j) {
            codes[j] = load_pair_codes(values + (j * kQuads + t) * kBytes);
        }
        for (int i = 0; i < R; ++i) {
            const PairActs x = splat_pair(p.planes + i * p.stride, kInt8Tile, 4 * t);
            for (int j = 0; j < J; ++j) {
                acc[i][j] = pair_dot(acc[i][j], codes[j], x);
            }
        }
    }
    for (int i = 0; i < R; ++i) {
        const Vector scale = splat(*p.row(i).scales), shrink = splat(alpha[i]);
        for (int j = 0; j < J; ++j) {
            float* to = c + i * ldc + j * kLanes;
            store(to, fma(join(acc[i][j]), scale, mul(shrink, load(to))));
        }
    }
}

template <int J>
inline void mix_columns(const Pairs& p, const uint8_t* values, int64_t quads, int64_t rows, const float* alpha, float* c,
    int64_t ldc) {
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows) {
        mix_part<kTileRows, J>(p.row(i), values, quads, alpha + i, c + i * ldc, ldc);
    }
    for (; i < rows; ++i) {
        mix_part<1, J>(p.row(i), values, quads, alpha + i, c + i * ldc, ldc);
    }
}

// 一次 attend 用的内存，与它的几步。
class Int8Attention {
public:
    Int8Attention(const Block& block, float* scratch)
        : block_(block), spans_(block.value_width, block.width - block.value_width), next_(scratch) {
        const int64_t rows = kBlockRows, q_bytes = 2 * (spans_.latent + spans_.rope), parts = spans_.parts();
        q_ = {take<int8_t>(rows * q_bytes), take<float>(rows * parts), take<int32_t>(rows * parts * 2), q_bytes, parts};
        p_ = {take<int8_t>(rows * 2 * kInt8Tile), take<float>(rows), take<int32_t>(rows * 2), 2 * kInt8Tile, 1};
        keys_ = take<uint8_t>(kInt8Tile * spans_.width());
        values_ = take<uint8_t>(kInt8Tile * spans_.latent);
        scores_ = take<float>(rows * kInt8Tile);
        alpha_ = take<float>(rows);
        scales_ = {take<float>(kInt8Tile), take<float>(kInt8Tile), take<float>(kInt8Tile)};
    }

    void run() {
        const int64_t width = dsx::padded(block_.width);
        for (int64_t i = 0; i < block_.rows; ++i) {
            split_span(block_.q + i * width, spans_.r, 0, 0, q_.row(i));
            split_span(block_.q + i * width + spans_.r, spans_.dr, spans_.latent_parts(), spans_.latent, q_.row(i));
        }
        for (int64_t t = block_.begin; t < block_.end; t += kInt8Tile) {
            tile(t, block_.end - t < kInt8Tile ? block_.end - t : kInt8Tile);
        }
    }

private:
    void tile(int64_t t, int64_t count) {
        const int8_t* rows = static_cast<const int8_t*>(block_.keys) + (t - block_.begin) * block_.key_stride;
        const int64_t left = (block_.end - t - count) * block_.key_stride;
        ahead_ = reinterpret_cast<const char*>(rows + count * block_.key_stride);
        ahead_end_ = ahead_ + (left < kInt8Tile * block_.key_stride ? left : kInt8Tile * block_.key_stride);
        scales_.read(rows, block_.key_stride, count, spans_);
        pack_keys(rows, block_.key_stride, count, spans_, keys_);
        score(count);
        soften(block_, t, count, kInt8Tile, scores_, alpha_);
        for (int64_t i = 0; i < block_.rows; ++i) {
            float* p = scores_ + i * kInt8Tile;
            for (int64_t j = 0; j < kInt8Tile; j += kLanes) {
                store(p + j, mul(load(p + j), load(scales_.latent + j)));
            }
            split_part(p, kInt8Tile, kInt8Tile, p_.row(i));
        }
        weave_values(rows, block_.key_stride, count, spans_, values_);
        mix((count + 3) / 4);
    }

    void score(int64_t count) {
        for (int64_t column = 0; column < count; column += kColumnTile) {
            int64_t i = 0;
            for (; i + kTileRows <= block_.rows; i += kTileRows) {
                score_rows<kTileRows>(q_.row(i), keys_, spans_, scales_, column, scores_ + i * kInt8Tile);
                fetch();
            }
            for (; i < block_.rows; ++i) {
                score_rows<1>(q_.row(i), keys_, spans_, scales_, column, scores_ + i * kInt8Tile);
                fetch();
            }
        }
    }

    void mix(int64_t quads) {
        const int64_t width = dsx::padded(block_.value_width);
        int64_t column = 0;
        for (; column + kColumnTile <= width; column += kColumnTile) {
            mix_columns<kTileVectors>(
                p_, values_ + column * kInt8Tile, quads, block_.rows, alpha_, block_.acc + column, width);
        }
        for (; column < width; column += kLanes) {
            mix_columns<1>(p_, values_ + column * kInt8Tile, quads, block_.rows, alpha_, block_.acc + column, width);
        }
    }

    // 一边算一边把下一格的一段取进 L2：读内存的时间藏在计算后面。
    void fetch() {
        constexpr int kLines = 96;
        for (int i = 0; i < kLines && ahead_ < ahead_end_; ++i, ahead_ += 64) {
            prefetch(ahead_);
        }
    }

    template <typename T>
    T* take(int64_t count) {
        T* taken = reinterpret_cast<T*>(next_);
        next_ += dsx::padded((count * static_cast<int64_t>(sizeof(T)) + 3) / 4);
        return taken;
    }

    const Block& block_;
    Spans spans_;
    float* next_;
    Pairs q_, p_;
    uint8_t *keys_, *values_;
    float *scores_, *alpha_;
    KeyScales scales_;
    const char *ahead_ = nullptr, *ahead_end_ = nullptr;
};

void attend_int8(const Block& block, float* scratch) { Int8Attention(block, scratch).run(); }

}  // namespace
