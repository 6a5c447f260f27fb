#include "lightning_indexer.h"

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "half.h"
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
    for (int64_t b = 0; b < op.B; ++b) {
        for (int64_t i = 0; i < op.S; ++i) {
            const void* from = at(op.k, op.dtype, (b * op.S + i) * op.di);
            void* to = at(op.index_cache_out, op.cache_dtype, (b * op.T + op.past_lens[b] + i) * op.di);
            if (op.dtype == op.cache_dtype) {
                std::memcpy(to, from, static_cast<size_t>(op.di * bytes_of(op.dtype)));
                continue;
            }
            float* row = task_scratch.need(padded(op.di));
            kernels.widen(op.dtype, from, op.di, 1, op.di, row, op.di, op.di);
            if (op.cache_dtype == Dtype::kFloat32) {
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

class Ranker {
public:
    Ranker(const LightningIndexer& op, const Kernels& kernels, const Parallel& parallel)
        : op_(op), kernels_(kernels), parallel_(parallel), width_(padded(op.di)) {}

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
        const int64_t H = op_.H, rows = task.count * H;
        float* q = task_scratch.need(rows * width_ + kTile * width_ + rows * kTile + kTile);
        float* keys = q + rows * width_;
        float* products = keys + kTile * width_;
        float* sums = products + rows * kTile;
        const int64_t query = op_.query_row(task.b, task.first);
        kernels_.widen(op_.dtype, at(op_.q, op_.dtype, query * H * op_.di), op_.di, rows, op_.di, q, width_, width_);
        for (int64_t i = 0; i < task.count; ++i) {
            running[i].start(op_.topk);
        }
        for (int64_t t = task.begin; t < task.end; t += kTile) {
            const int64_t count = std::min(kTile, task.end - t);
            const void* source = at(op_.index_cache_out, op_.cache_dtype, (task.b * op_.T + t) * op_.di);
            kernels_.widen(op_.cache_dtype, source, op_.di, count, op_.di, keys, width_, width_);
            std::fill(keys + count * width_, keys + kTile * width_, 0.0f);
            kernels_.multiply_transposed(q, width_, keys, width_, rows, kTile, width_, products, kTile);
            kernels_.rectify(products, rows * kTile);
            for (int64_t i = 0; i < task.count; ++i) {
                const int64_t seen = std::min(count, visible(task.b, task.first + i) - t);
                if (seen <= 0) {
                    continue;
                }
                kernels_.multiply(op_.w + (query + i) * H, H, products + i * H * kTile, kTile, 1, kTile, H, sums, kTile);
                for (int64_t j = 0; j < seen; ++j) {
                    running[i].see(sums[j], t + j);
                }
            }
        }
        for (int64_t i = 0; i < task.count; ++i) {
            slots_[static_cast<size_t>(index * kTokens + i)] = running[i].finish();
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
    const Parallel& parallel_;
    int64_t width_, first_ = 0, groups_ = 0;
    std::vector<Task> tasks_;
    std::vector<size_t> starts_;                  // 每组 token 的任务从哪里起
    std::vector<std::vector<Candidate>> slots_;  // 每个任务、每个 token 留下的候选
};

}  // namespace

void run(const LightningIndexer& op, const Kernels& kernels, const Parallel& parallel) {
    if (op.index_cache != op.index_cache_out) {
        std::memcpy(op.index_cache_out, op.index_cache, static_cast<size_t>(op.B * op.T * op.di * bytes_of(op.cache_dtype)));
    }
    write_keys(op, kernels);
    Ranker ranker(op, kernels, parallel);
    for (int64_t first = 0; first < op.S && op.B > 0; first += kSlabTokens) {
        ranker.run(first, std::min(kSlabTokens, op.S - first));
    }
}

}  // namespace dsx
