// int8 的 latent 缓存上的注意力，一路一行 query：key 的 4 个字节广播给各路，行不必重排，分数不必横向求和，softmax 与概率的拆分也逐路做。
// 拆分、整数点积与 scale 的定义同 int8_attend.h。写在 int8_planes.h 的点积、Ints 的 load_ints、nearest_ints、pack_bytes 之上。
#pragma once

#include "int8_spans.h"
#include "prefetch.h"
#include "soften.h"

namespace {

constexpr int64_t kFour = 4;              // 一路一次几个码
constexpr int64_t kStep = 2 * kBytes;     // 一组的 4 个码，两个平面
constexpr int kLaneKeys = 8;              // 一次几个 key：两个平面是 16 个累加器
constexpr int kPanelVectors = 4;          // value 一次重排几个向量的列
constexpr int kPanelRows = 2;
static_assert(kBlockRows % kLanes == 0 && kInt8Tile % kLaneKeys == 0 && kLanes % kPanelRows == 0);

// 一组 query 的一段：[n / 4, 平面, kLanes] 个 4 字节；各路的 scale 与起点。
struct LanePart {
    const int8_t* planes;
    const float* scales;
    const int32_t* starts;
};

// N 个 key 的一段，乘上两侧的 scale；first 为真则写，否则加到 out 上。每一步顺手从 next 取一行 cache line 进 L2。
template <int N>
inline void score_lanes(const LanePart& q, const int8_t* keys, int64_t stride, int64_t count, const float* key_scales,
    bool first, const int8_t* next, float* out) {
    Ints high[N], low[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
        high[j] = load_ints(q.starts);
        low[j] = load_ints(q.starts + kLanes);
    }
    for (int64_t t = 0; t < count; t += kFour) {
        const Acts a = load_acts(q.planes + t / kFour * kStep), b = load_acts(q.planes + t / kFour * kStep + kBytes);
        prefetch(next + N * t);
#pragma GCC unroll 8
        for (int j = 0; j < N; ++j) {
            const Bytes key = stored_bytes(splat_bytes(keys + j * stride + t));
            high[j] = dot(high[j], key, a);
            low[j] = dot(low[j], key, b);
        }
    }
    const Vector scale = load(q.scales);
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
        float* to = out + j * kLanes;
        const Vector value = mul(join({high[j], low[j]}), mul(scale, splat(key_scales[j])));
        store(to, first ? value : add(load(to), value));
    }
}

// 一次 attend 用的内存，与它的几步。
class Int8Lanes {
public:
    Int8Lanes(const Block& block, float* scratch)
        : block_(block), spans_(block.value_width, block.width - block.value_width), next_(scratch),
          running_(block, take<float>(Running::kFloats)) {
        const int64_t rows = kBlockRows, q_bytes = 2 * (spans_.latent + spans_.rope), parts = spans_.parts();
        row_ = {take<int8_t>(kLanes * q_bytes), take<float>(kLanes * parts), take<int32_t>(kLanes * parts * 2), q_bytes, parts};
        q_ = {take<int8_t>(rows * q_bytes), take<float>(rows * parts), take<int32_t>(rows * parts * 2), q_bytes, parts};
        p_ = {take<int8_t>(rows * 2 * kInt8Tile), take<float>(rows), take<int32_t>(rows * 2), 2 * kInt8Tile, 1};
        scores_ = take<float>(kLanes * kInt8Tile);
        scales_ = {take<float>(kInt8Tile), take<float>(kInt8Tile), take<float>(kInt8Tile)};
        panel_ = take<uint8_t>(kPanelVectors * kInt8Tile * kLanes);
    }

    void run() {
        for (int64_t i = 0; i < block_.rows; i += kLanes) {
            split_queries(i);
        }
        for (int64_t t = block_.begin; t < block_.end; t += kInt8Tile) {
            tile(t, block_.end - t < kInt8Tile ? block_.end - t : kInt8Tile);
        }
        running_.finish(block_);
    }

private:
    // 第 i 行起的一组：逐行拆成平面，再换成一路一行；不足的行全是 0。
    void split_queries(int64_t i) {
        const int64_t width = dsx::padded(block_.width), parts = spans_.parts();
        std::memset(row_.planes, 0, static_cast<size_t>(kLanes * row_.stride));
        for (int64_t lane = 0; lane < kLanes; ++lane) {
            const bool real = i + lane < block_.rows;
            if (real) {
                const float* x = block_.q + (i + lane) * width;
                split_span(x, spans_.r, 0, 0, row_.row(lane));
                split_span(x + spans_.r, spans_.dr, spans_.latent_parts(), spans_.latent, row_.row(lane));
            }
            for (int64_t p = 0; p < parts; ++p) {
                q_.scales[i * parts + p * kLanes + lane] = real ? row_.row(lane).scales[p] : 0;
                for (int plane = 0; plane < 2; ++plane) {
                    q_.starts[2 * (i * parts + p * kLanes) + plane * kLanes + lane] =
                        real ? row_.row(lane).starts[2 * p + plane] : 0;
                }
            }
        }
        turn_planes(i, 0, spans_.latent);
        turn_planes(i, spans_.latent, spans_.rope);
    }

    // 前面补齐之后一共 before 个的那些段，一共 length 个。
    void turn_planes(int64_t i, int64_t before, int64_t length) {
        for (int64_t begin = 0; begin < length; begin += kInt8Part) {
            const int64_t left = length - begin, n = left < kInt8Part ? left : kInt8Part;
            for (int64_t at = 0; at < 2 * n; at += kBytes) {
                Bytes lines[kLanes];
                for (int lane = 0; lane < kLanes; ++lane) {
                    const int8_t* from = row_.planes + lane * row_.stride + 2 * (before + begin) + at;
                    lines[lane] = load_bytes(reinterpret_cast<const uint8_t*>(from));
                }
                int8_t* to = group_planes(i, before + begin + at % n) + at / n * kBytes;
                transpose(lines, reinterpret_cast<uint8_t*>(to), kStep);
            }
        }
    }
    // 第 i 行起的一组里，前面一共 before 个的那一段。
    int8_t* group_planes(int64_t i, int64_t before) const { return q_.planes + i * q_.stride + before / kFour * kStep; }
    LanePart part(int64_t i, int64_t p, int64_t before) const {
        const int64_t at = i * q_.parts + p * kLanes;
        return {group_planes(i, before), q_.scales + at, q_.starts + 2 * at};
    }

    void tile(int64_t t, int64_t count) {
        const int8_t* rows = static_cast<const int8_t*>(block_.keys) + (t - block_.begin) * block_.key_stride;
        scales_.read(rows, block_.key_stride, count, spans_);
        for (int64_t i = 0; i < block_.rows; i += kLanes) {
            score(i, rows, count, block_.end - t);
            split_probabilities(i, t, count);
        }
        for (int64_t column = 0; column < block_.value_width; column += kBytes) {
            weave_panel(rows, count, column);
            const int64_t left = (dsx::padded(block_.value_width) - column) / kLanes;
            left >= kPanelVectors ? mix_panel<kPanelVectors>(column, count) : mix_rest(column, count, left);
        }
    }

    // left：这一格起一共还有几个 key。
    void score(int64_t i, const int8_t* rows, int64_t count, int64_t left) {
        int64_t j = 0;
        for (; j + kLaneKeys <= count; j += kLaneKeys) {
            // 往后四组；没有了，或者不是头一遍看这一格，就再取这一组自己。
            const bool more = i == 0 && j + 5 * kLaneKeys <= left;
            score_keys<kLaneKeys>(i, rows, j, more ? 4 * kLaneKeys * block_.key_stride : 0);
        }
        for (; j < count; ++j) {
            score_keys<1>(i, rows, j, 0);
        }
    }

    // 第 j 个 key 起的 N 个对一组 query：latent，旋转部分的高字节、低字节，逐段加起来。
    template <int N>
    void score_keys(int64_t i, const int8_t* rows, int64_t j, int64_t ahead_bytes) {
        const int8_t* keys = rows + j * block_.key_stride;
        const auto span = [&](int64_t first, int64_t before, int64_t length, int64_t offset, const float* key_scales) {
            for (int64_t begin = 0; begin < length; begin += kInt8Part) {
                const int64_t n = length - begin < kInt8Part ? length - begin : kInt8Part;
                score_lanes<N>(part(i, first + begin / kInt8Part, before + begin), keys + offset + begin, block_.key_stride, n,
                    key_scales + j, offset + begin == 0, keys + ahead_bytes, scores_ + j * kLanes);
                ahead_bytes += ahead_bytes > 0 ? N * n : 0;
            }
        };
        span(0, 0, spans_.r, 0, scales_.latent);
        span(spans_.latent_parts(), spans_.latent, spans_.dr, spans_.r, scales_.high);
        span(spans_.latent_parts(), spans_.latent, spans_.dr, spans_.r + spans_.dr, scales_.low);
    }

    // 一组的一格：softmax，概率乘上各 key 的 scale，拆成两个平面，每路 4 个 key 相邻。
    void split_probabilities(int64_t i, int64_t t, int64_t count) {
        Vector even = splat(0), odd = splat(0), bad = splat(0);
        soften_lanes(block_, running_, i, t, count, scores_, [&](int64_t key, Vector a, Vector b) {
            const Vector x = mul(a, splat(scales_.latent[key])), y = mul(b, splat(scales_.latent[key + 1]));
            even = max(even, max(x, sub(splat(0), x)));
            odd = max(odd, max(y, sub(splat(0), y)));
            bad = add(bad, add(sub(x, x), sub(y, y)));
            store(scores_ + key * kLanes, x);
            store(scores_ + (key + 1) * kLanes, y);
        });
        const int64_t room = (count + kFour - 1) / kFour * kFour;
        for (int64_t key = (count + 1) / 2 * 2; key < room; ++key) {
            store(scores_ + key * kLanes, splat(0));
        }
        float largest[kLanes], inverse[kLanes];
        store(largest, max(even, odd));
        for (int lane = 0; lane < kLanes; ++lane) {
            inverse[lane] = largest[lane] > 0 ? 127.0f / largest[lane] : 0;
        }
        store(p_.scales + i, add(divide(load(largest), splat(127)), bad));
        quantize_probabilities(i, room, load(inverse));
    }

    void quantize_probabilities(int64_t i, int64_t room, Vector inverse) {
        Ints sums[2] = {splat_ints(0), splat_ints(0)};
        for (int64_t key = 0; key < room; key += kFour) {
            Ints codes[2][kFour];
            for (int k = 0; k < kFour; ++k) {
                const Vector x = mul(load(scores_ + (key + k) * kLanes), inverse), upper = nearest(x);
                codes[0][k] = nearest_ints(upper);
                codes[1][k] = nearest_ints(mul(sub(x, upper), splat(dsx::kLowSteps)));
            }
            for (int plane = 0; plane < 2; ++plane) {
                for (const Ints& code : codes[plane]) {
                    sums[plane] = add(sums[plane], code);
                }
                store_bytes(probabilities(i, key) + plane * kBytes, pack_bytes(codes[plane]));
            }
        }
        for (int plane = 0; plane < 2; ++plane) {
            store_ints(p_.starts + 2 * i + plane * kLanes, fold(sums[plane]));
        }
    }
    // 第 i 行起的一组，第 key 个起的 4 个 key。
    uint8_t* probabilities(int64_t i, int64_t key) const {
        return reinterpret_cast<uint8_t*>(p_.planes + i * p_.stride + key / kFour * kStep);
    }

    // 从 column 起的一个向量的字节那么多列：“一路一列”，每 4 个 key 一个向量。
    void weave_panel(const int8_t* rows, int64_t count, int64_t column) {
        for (int64_t first = 0; first < count; first += kFour) {
            Bytes lines[kFour];
            for (int k = 0; k < kFour; ++k) {
                const int8_t* row = rows + (first + k < count ? first + k : count - 1) * block_.key_stride;
                lines[k] = load_span(row + column, spans_.r - column);
            }
            weave(lines, panel_ + first / kFour * kBytes, kQuads * kBytes);
        }
    }

    void mix_rest(int64_t column, int64_t count, int64_t vectors) {
        vectors == 1 ? mix_panel<1>(column, count) : vectors == 2 ? mix_panel<2>(column, count) : mix_panel<3>(column, count);
    }
    template <int J>
    void mix_panel(int64_t column, int64_t count) {
        int64_t row = 0;
        for (; row + kPanelRows <= block_.rows; row += kPanelRows) {
            mix<kPanelRows, J>(row, column, (count + kFour - 1) / kFour);
        }
        for (; row < block_.rows; ++row) {
            mix<1, J>(row, column, (count + kFour - 1) / kFour);
        }
    }

    // R 行概率对 J 个向量的列：acc = alpha · acc + scale · (p · value)。
    template <int R, int J>
    void mix(int64_t row, int64_t column, int64_t quads) {
        const int64_t i = row / kLanes * kLanes, lane = row % kLanes, width = dsx::padded(block_.value_width);
        const int32_t* starts = p_.starts + 2 * i + lane;
        const auto* p = reinterpret_cast<const int8_t*>(probabilities(i, 0)) + kFour * lane;
        PairSums acc[R][J];
        for (int k = 0; k < R; ++k) {
            for (int j = 0; j < J; ++j) {
                acc[k][j] = {splat_ints(starts[k]), splat_ints(starts[kLanes + k])};
            }
        }
        for (int64_t t = 0; t < quads; ++t) {
            PairCodes codes[J];
            for (int j = 0; j < J; ++j) {
                codes[j] = load_pair_codes(panel_ + (j * kQuads + t) * kBytes);
            }
            for (int k = 0; k < R; ++k) {
                const PairActs x = splat_pair(p + t * kStep + kFour * k, kBytes, 0);
                for (int j = 0; j < J; ++j) {
                    acc[k][j] = pair_dot(acc[k][j], codes[j], x);
                }
            }
        }
        for (int k = 0; k < R; ++k) {
            const Vector scale = splat(p_.scales[row + k]), shrink = splat(running_.alpha[row + k]);
            for (int j = 0; j < J; ++j) {
                float* to = block_.acc + (row + k) * width + column + j * kLanes;
                store(to, fma(join(acc[k][j]), scale, mul(shrink, load(to))));
            }
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
    Running running_;
    Pairs row_, q_, p_;  // 一组 query 拆开的各行；一路一行的 query 与概率
    float* scores_;
    KeyScales scales_;
    uint8_t* panel_;
};

void attend_int8(const Block& block, float* scratch) { Int8Lanes(block, scratch).run(); }

}  // namespace
