#include "lightning_indexer.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "half.h"
#include "int8_cache.h"
#include "scratch.h"

namespace dsx {
namespace {

// 几个相邻的 token 一起对一格 key 打分：展宽一次，用几次。
constexpr int64_t kTokens = 4;
// 一次处理几个 token：各段留下的候选因此有上限，与 prompt 的长度无关。
constexpr int64_t kSlabTokens = 256;
// 沿缓存切成几段，每段至少几个 key；段数只由形状决定。
constexpr int64_t kTasks = 32;
constexpr int64_t kShortestSplit = 512;

thread_local Scratch task_scratch;

const void* at(const void* base, Dtype dtype, int64_t i) { return static_cast<const char*>(base) + i * bytes_of(dtype); }
void* at(void* base, Dtype dtype, int64_t i) { return static_cast<char*>(base) + i * bytes_of(dtype); }

struct Candidate {
    float score;
    int32_t place;
};

// 分数高的在前，并列取小的位置：全序，所以怎么分段、怎么分线程都选出同样的。
bool before(const Candidate& a, const Candidate& b) {
    return a.score > b.score || (a.score == b.score && a.place < b.place);
}

// 按位置递增地看分数，随时只留着至多 2·topk 个候选。
class TopK {
public:
    void start(int64_t topk) {
        topk_ = static_cast<size_t>(topk), full_ = false;
        floor_ = -std::numeric_limits<float>::infinity();
        kept_.clear();
        kept_.reserve(2 * topk_);
    }
    void see(float score, int64_t place) {
        // 满了之后，与门槛并列的位置更大，轮不到它。
        if (full_ && !(score > floor_)) {
            return;
        }
        kept_.push_back({score, static_cast<int32_t>(place)});
        if (kept_.size() == 2 * topk_) {
            shrink();
        }
    }
    const std::vector<Candidate>& finish() {
        if (kept_.size() > topk_) {
            shrink();
        }
        return kept_;
    }

private:
    void shrink() {
        const auto last = kept_.begin() + static_cast<std::ptrdiff_t>(topk_ - 1);
        std::nth_element(kept_.begin(), last, kept_.end(), before);
        floor_ = last->score;
        full_ = true;
        kept_.resize(topk_);
    }

    size_t topk_ = 0;
    float floor_ = 0;
    bool full_ = false;
    std::vector<Candidate> kept_;
};

thread_local TopK running[kTokens];

void write_keys(const LightningIndexer& op, const Kernels& kernels) {
    const int64_t stride = index_width(op.cache_dtype, op.di);
    for (int64_t b = 0; b < op.B; ++b) {
        for (int64_t i = 0; i < op.S; ++i) {
            const void* from = at(op.k, op.dtype, (b * op.S + i) * op.di);
            void* to = at(op.index_cache_out, op.cache_dtype, (b * op.T + op.past_lens[b] + i) * stride);
            if (op.dtype == op.cache_dtype) {
                std::memcpy(to, from, static_cast<size_t>(op.di * bytes_of(op.dtype)));
                continue;
            }
            float* row = task_scratch.need(padded(op.di));
            kernels.widen(op.dtype, from, op.di, 1, op.di, row, op.di, op.di);
            if (op.cache_dtype == Dtype::kInt8) {
                auto* bytes = static_cast<int8_t*>(to);
                encode_part(row, op.di, bytes, bytes + op.di);
            } else if (op.cache_dtype == Dtype::kFloat32) {
                std::memcpy(to, row, static_cast<size_t>(op.di) * sizeof(float));
            } else {
                const auto narrow = op.cache_dtype == Dtype::kFloat16 ? f16_of_float : bf16_of_float;
                std::transform(row, row + op.di, static_cast<uint16_t*>(to), narrow);
            }
        }
    }
}

// 一个序列里 count 个相邻的 token 对 key 的一段 [begin, end)。
struct Task {
    int64_t b, first, count, begin, end;
};

// 一个任务的 query，对一格 key 的乘积 products[rows, kTile] = max(q · k, 0)；不满一格的补零行。浮点的 key 展宽成 float32 再乘。
class FloatProducts {
public:
    static int64_t scratch(const LightningIndexer& op, int64_t rows) { return (rows + kTile) * padded(op.di); }

    FloatProducts(const LightningIndexer& op, const Kernels& kernels, int64_t query, int64_t rows, float* memory)
        : op_(op), kernels_(kernels), rows_(rows), width_(padded(op.di)), q_(memory), keys_(memory + rows * width_) {
        kernels_.widen(op_.dtype, at(op_.q, op_.dtype, query * op_.H * op_.di), op_.di, rows_, op_.di, q_, width_, width_);
    }
    const float* weights(const float* given) const { return given; }
    void multiply(int64_t row, int64_t count, float* products) {
        const void* source = at(op_.index_cache_out, op_.cache_dtype, row * op_.di);
        kernels_.widen(op_.cache_dtype, source, op_.di, count, op_.di, keys_, width_, width_);
        std::fill(keys_ + count * width_, keys_ + kTile * width_, 0.0f);
        kernels_.multiply_transposed(q_, width_, keys_, width_, rows_, kTile, width_, products, kTile);
        kernels_.rectify(products, rows_ * kTile);
    }
    void scale(float*) const {}

private:
    const LightningIndexer& op_;
    const Kernels& kernels_;
    int64_t rows_, width_;
    float *q_, *keys_;
};

// int8 的 key：query 也逐头舍入到 int8，乘积是整数；query 的 scale 并进权重，key 的最后乘到各头之和上。
class Int8Products {
public:
    static int64_t scratch(const LightningIndexer& op, int64_t rows) {
        const int64_t width = int8_width(op), bytes = rows * width + 2 * kTile * width;
        return bytes / 4 + 2 * padded(rows) + padded(op.di) + kTile;
    }

    Int8Products(const LightningIndexer& op, const Kernels& kernels, const QuantKernels& int8, int64_t query, int64_t rows,
        float* memory)
        : op_(op), int8_(int8), query_(query), rows_(rows), width_(int8_width(op)) {
        // 先是要对齐的字节，width_ 是 64 的倍数；再是各种 float。
        keys_ = reinterpret_cast<uint8_t*>(memory);
        packed_ = keys_ + kTile * width_;
        q_ = reinterpret_cast<int8_t*>(packed_ + kTile * width_);
        weights_ = memory + (2 * kTile + rows) * width_ / 4;
        starts_ = reinterpret_cast<int32_t*>(weights_ + padded(rows));
        float* const row = weights_ + 2 * padded(rows);
        scales_ = row + padded(op.di);
        for (int64_t i = 0; i < rows_; ++i) {
            const int64_t at_row = query * op_.H + i;
            kernels.widen(op_.dtype, at(op_.q, op_.dtype, at_row * op_.di), op_.di, 1, op_.di, row, padded(op_.di), op_.di);
            int8_t* const codes = q_ + i * width_;
            int8_t bytes[kScaleBytes];
            weights_[i] = op_.w[at_row] * encode_part(row, op_.di, codes, bytes);
            std::fill(codes + op_.di, codes + width_, int8_t{0});
            int32_t sum = 0;
            for (int64_t j = 0; j < op_.di; ++j) {
                sum += codes[j];
            }
            starts_[i] = -kZeroPoint * sum;
        }
    }
    // 给的是 [B, S, H] 里的一行，这里的已经乘过 query 的 scale。
    const float* weights(const float* given) const { return weights_ + (given - (op_.w + query_ * op_.H)); }
    void multiply(int64_t row, int64_t count, float* products) {
        const int64_t stride = index_width(Dtype::kInt8, op_.di);
        const auto* source = static_cast<const int8_t*>(op_.index_cache_out) + row * stride;
        std::fill(keys_, keys_ + kTile * width_, static_cast<uint8_t>(kZeroPoint));
        for (int64_t j = 0; j < count; ++j) {
            for (int64_t i = 0; i < op_.di; ++i) {
                keys_[j * width_ + i] = static_cast<uint8_t>(source[j * stride + i]) ^ 0x80;
            }
            scales_[j] = scale_of(source + j * stride + op_.di);
        }
        std::fill(scales_ + count, scales_ + kTile, 0.0f);
        int8_.rectified_dots(q_, starts_, rows_, keys_, width_, products, packed_);
    }
    void scale(float* sums) const {
        for (int64_t j = 0; j < kTile; ++j) {
            sums[j] *= scales_[j];
        }
    }

private:
    static int64_t int8_width(const LightningIndexer& op) { return (op.di + kInt8Pad - 1) / kInt8Pad * kInt8Pad; }

    const LightningIndexer& op_;
    const QuantKernels& int8_;
    int64_t query_, rows_, width_;
    uint8_t *keys_ = nullptr, *packed_ = nullptr;
    int8_t* q_ = nullptr;
    float *weights_ = nullptr, *scales_ = nullptr;
    int32_t* starts_ = nullptr;
};

class Ranker {
public:
    Ranker(const LightningIndexer& op, const Kernels& kernels, const QuantKernels& int8, const Parallel& parallel)
        : op_(op), kernels_(kernels), int8_(int8), parallel_(parallel) {}

    void run(int64_t first, int64_t count) {
        plan(first, count);
        slots_.assign(tasks_.size() * kTokens, {});
        parallel_(static_cast<int64_t>(tasks_.size()), [this](int64_t i) { score(i); });
        parallel_(op_.B * count, [&](int64_t i) { merge(i / count, first + i % count); });
    }

private:
    int64_t visible(int64_t b, int64_t token) const { return op_.past_lens[b] + token + 1; }

    void plan(int64_t first, int64_t count) {
        tasks_.clear();
        starts_.clear();
        const int64_t groups = (count + kTokens - 1) / kTokens;
        first_ = first, groups_ = groups;
        for (int64_t b = 0; b < op_.B; ++b) {
            for (int64_t group = 0; group < groups; ++group) {
                starts_.push_back(tasks_.size());
                const int64_t token = first + group * kTokens, tokens = std::min(kTokens, first + count - token);
                const int64_t length = visible(b, token + tokens - 1);
                if (length <= op_.topk) {
                    continue;  // 全部选中，不必打分
                }
                const int64_t most = std::max<int64_t>(1, kTasks / (op_.B * groups));
                const int64_t parts = std::min(most, (length + kShortestSplit - 1) / kShortestSplit);
                const int64_t step = ((length + parts - 1) / parts + kTile - 1) / kTile * kTile;
                for (int64_t begin = 0; begin < length; begin += step) {
                    tasks_.push_back({b, token, tokens, begin, std::min(begin + step, length)});
                }
            }
        }
        starts_.push_back(tasks_.size());
    }

    // 分数 Σ_h w_h · relu(q_h · k)。一格总是凑满 kTile 个 key（补零行），一个 key 的分数因此与它在哪一段、哪一块里无关。
    void score(int64_t index) {
        const Task& task = tasks_[static_cast<size_t>(index)];
        const int64_t rows = task.count * op_.H, query = op_.query_row(task.b, task.first);
        const bool int8 = op_.cache_dtype == Dtype::kInt8;
        const int64_t own = int8 ? Int8Products::scratch(op_, rows) : FloatProducts::scratch(op_, rows);
        float* const memory = task_scratch.need(padded(own) + rows * kTile + kTile);
        float* const products = memory + padded(own);
        if (int8) {
            rank(index, Int8Products(op_, kernels_, int8_, query, rows, memory), products);
        } else {
            rank(index, FloatProducts(op_, kernels_, query, rows, memory), products);
        }
        for (int64_t i = 0; i < task.count; ++i) {
            slots_[static_cast<size_t>(index * kTokens + i)] = running[i].finish();
        }
    }

    template <typename Products>
    void rank(int64_t index, Products made, float* products) {
        const Task& task = tasks_[static_cast<size_t>(index)];
        const int64_t H = op_.H, query = op_.query_row(task.b, task.first);
        float* const sums = products + task.count * H * kTile;
        for (int64_t i = 0; i < task.count; ++i) {
            running[i].start(op_.topk);
        }
        for (int64_t t = task.begin; t < task.end; t += kTile) {
            const int64_t count = std::min(kTile, task.end - t);
            made.multiply(task.b * op_.T + t, count, products);
            for (int64_t i = 0; i < task.count; ++i) {
                const int64_t seen = std::min(count, visible(task.b, task.first + i) - t);
                if (seen <= 0) {
                    continue;
                }
                const float* w = made.weights(op_.w + (query + i) * H);
                kernels_.multiply(w, H, products + i * H * kTile, kTile, 1, kTile, H, sums, kTile);
                made.scale(sums);
                for (int64_t j = 0; j < seen; ++j) {
                    running[i].see(sums[j], t + j);
                }
            }
        }
    }

    void merge(int64_t b, int64_t token) const {
        const int64_t query = op_.query_row(b, token), topk = op_.topk, seen = std::min(visible(b, token), topk);
        int32_t* out = op_.indices + query * topk;
        op_.counts[query] = static_cast<int32_t>(seen);
        if (seen == visible(b, token)) {
            for (int64_t j = 0; j < seen; ++j) {
                out[j] = static_cast<int32_t>(j);
            }
        } else {
            const auto group = static_cast<size_t>(b * groups_ + (token - first_) / kTokens);
            const auto slot = static_cast<size_t>((token - first_) % kTokens);
            std::vector<Candidate> all;
            for (size_t i = starts_[group]; i < starts_[group + 1]; ++i) {
                const std::vector<Candidate>& part = slots_[i * kTokens + slot];
                all.insert(all.end(), part.begin(), part.end());
            }
            if (static_cast<int64_t>(all.size()) > seen) {
                std::nth_element(all.begin(), all.begin() + (seen - 1), all.end(), before);
            }
            for (int64_t j = 0; j < seen; ++j) {
                out[j] = all[static_cast<size_t>(j)].place;
            }
            std::sort(out, out + seen);
        }
        std::fill(out + seen, out + topk, -1);
    }

    const LightningIndexer& op_;
    const Kernels& kernels_;
    const QuantKernels& int8_;
    const Parallel& parallel_;
    int64_t first_ = 0, groups_ = 0;
    std::vector<Task> tasks_;
    std::vector<size_t> starts_;                  // 每组 token 的任务从哪里起
    std::vector<std::vector<Candidate>> slots_;  // 每个任务、每个 token 留下的候选
};

}  // namespace

void run(const LightningIndexer& op, const Kernels& kernels, const QuantKernels& int8, const Parallel& parallel) {
    if (op.index_cache != op.index_cache_out) {
        const int64_t row = index_width(op.cache_dtype, op.di) * bytes_of(op.cache_dtype);
        std::memcpy(op.index_cache_out, op.index_cache, static_cast<size_t>(op.B * op.T * row));
    }
    write_keys(op, kernels);
    Ranker ranker(op, kernels, int8, parallel);
    for (int64_t first = 0; first < op.S && op.B > 0; first += kSlabTokens) {
        ranker.run(first, std::min(kSlabTokens, op.S - first));
    }
}

}  // namespace dsx
