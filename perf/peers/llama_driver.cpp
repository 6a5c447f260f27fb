// 住着 llama.cpp 或 ik_llama.cpp 的进程：一行一问、一行一答，问法与 perf.isolate 的 Worker 相同。
//
//     llama_driver 模型.gguf 线程数 上下文 [exact]
//
// 两家共用这一份：-DPEER_IK 是 ik_llama.cpp（缓存的接口是旧名字，另有它自己的开关），不带是 llama.cpp。只用公开的 llama.h。
#include "llama.h"

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <iostream>
#include <map>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <unistd.h>
#include <utility>
#include <vector>

namespace {

using Tokens = std::vector<llama_token>;
// 填缓存时一块多少个 token；两家一次前向至多 2048 个。
constexpr int kFill = 512, kBatch = 2048;

#ifdef PEER_IK
void remove(llama_context* context, int sequence, int from) { llama_kv_cache_seq_rm(context, sequence, from, -1); }
void copy(llama_context* context, int from, int to) { llama_kv_cache_seq_cp(context, from, to, -1, -1); }
void clear(llama_context* context) { llama_kv_cache_clear(context); }
int first(llama_context* context, int sequence) { return llama_kv_cache_seq_pos_min(context, sequence); }
int last(llama_context* context, int sequence) { return llama_kv_cache_seq_pos_max(context, sequence); }
void release(llama_model* model) { llama_free_model(model); }
size_t state_size(llama_context* context) { return llama_state_seq_get_size(context, 0, 0); }
size_t save(llama_context* context, std::vector<uint8_t>& state) {
    return llama_state_seq_get_data(context, state.data(), state.size(), 0, 0);
}
bool restore(llama_context* context, const std::vector<uint8_t>& state, int sequence) {
    const size_t read = llama_state_seq_set_data(context, state.data(), state.size(), sequence, 0);
    return read != 0 && read != SIZE_MAX;
}
#else
void remove(llama_context* context, int sequence, int from) {
    llama_memory_seq_rm(llama_get_memory(context), sequence, from, -1);
}
void copy(llama_context* context, int from, int to) { llama_memory_seq_cp(llama_get_memory(context), from, to, -1, -1); }
void clear(llama_context* context) { llama_memory_clear(llama_get_memory(context), false); }
int first(llama_context* context, int sequence) { return llama_memory_seq_pos_min(llama_get_memory(context), sequence); }
int last(llama_context* context, int sequence) { return llama_memory_seq_pos_max(llama_get_memory(context), sequence); }
void release(llama_model* model) { llama_model_free(model); }
size_t state_size(llama_context* context) { return llama_state_seq_get_size(context, 0); }
size_t save(llama_context* context, std::vector<uint8_t>& state) {
    return llama_state_seq_get_data(context, state.data(), state.size(), 0);
}
bool restore(llama_context* context, const std::vector<uint8_t>& state, int sequence) {
    return llama_state_seq_set_data(context, state.data(), state.size(), sequence) != 0;
}
#endif

llama_model_params model_params() {
    llama_model_params params = llama_model_default_params();
    params.n_gpu_layers = 0;
#ifdef PEER_IK
    params.use_mmap = false;
    params.repack_tensors = true;  // -rtr 1
    params.mla = 3;                // -mla 3
#else
    params.load_mode = LLAMA_LOAD_MODE_NONE;
#endif
    return params;
}

// unified：各序列共用一段缓存，拼得成一个序列；分开的才是它批量解码的缺省。
llama_context_params context_params(int threads, int context, int sequences, bool unified, bool exact) {
    llama_context_params params = llama_context_default_params();
    params.n_ctx = context;
    params.n_batch = kBatch;
    params.n_seq_max = sequences;
    params.n_threads = params.n_threads_batch = threads;
    if (exact) {
        params.type_k = params.type_v = GGML_TYPE_F32;
    }
#ifdef PEER_IK
    params.flash_attn = !exact;  // -fa 1
    params.mla_attn = 3;
    params.fused_moe_up_gate = true;  // -fmoe 1
    (void)unified;                    // 它只有共用的
#else
    params.flash_attn_type = exact ? LLAMA_FLASH_ATTN_TYPE_DISABLED : LLAMA_FLASH_ATTN_TYPE_ENABLED;
    params.kv_unified = unified;
#endif
    return params;
}

// 一次前向要的：token、位置、序列，每一行要不要 logits。
class Batch {
  public:
    explicit Batch(int capacity) : batch_(llama_batch_init(capacity, 0, 1)) { batch_.n_tokens = 0; }
    ~Batch() { llama_batch_free(batch_); }
    Batch(const Batch&) = delete;
    Batch& operator=(const Batch&) = delete;

    void add(llama_token token, int position, int sequence, bool wanted) {
        const int row = batch_.n_tokens++;
        batch_.token[row] = token;
        batch_.pos[row] = position;
        batch_.n_seq_id[row] = 1;
        batch_.seq_id[row][0] = sequence;
        batch_.logits[row] = wanted;
    }
    const llama_batch& get() const { return batch_; }

  private:
    llama_batch batch_;
};

double seconds_since(std::chrono::steady_clock::time_point began) {
    return std::chrono::duration<double>(std::chrono::steady_clock::now() - began).count();
}

class Engine {
  public:
    Engine(const char* path, int threads, int context, bool exact)
        : threads_(threads), exact_(exact), model_(llama_model_load_from_file(path, model_params()), release) {
        if (model_ == nullptr) {
            throw std::runtime_error(std::string("装载不了 ") + path);
        }
        vocab_ = llama_vocab_n_tokens(llama_model_get_vocab(model_.get()));
        open(context, 2, true);  // 两个序列只为 fill
    }

    int vocab() const { return vocab_; }

    // 退回到 past 个 token，再来 tokens；最后一行的 logits，会被下一次覆盖。
    const float* logits(const Tokens& tokens, int past) {
        remove(context_.get(), 0, past);
        run(tokens, past);
        filled_ = past + static_cast<int>(tokens.size());
        return row(static_cast<int>(tokens.size() - 1) % kBatch);
    }

    double prefill(const Tokens& tokens) {
        const auto began = std::chrono::steady_clock::now();
        logits(tokens, 0);
        return seconds_since(began);
    }

    void go_to(int depth) {
        if (depth > filled_) {
            fill(depth);
        }
        depth_ = depth;
    }

    // 从 depth 起逐个喂，每步都取 logits；每个 token 的秒数。
    double decode(const Tokens& tokens) {
        const auto began = std::chrono::steady_clock::now();
        for (size_t i = 0; i < tokens.size(); ++i) {
            logits({tokens[i]}, depth_ + static_cast<int>(i));
        }
        return seconds_since(began) / tokens.size();
    }

    // 换成 rows 个空的序列，各至多 context 个 token。
    void open_rows(int rows, int context) {
        open(rows * context, rows, false);
        rows_ = rows;
    }

    // 各行都从空的起逐个喂 token，第 r 行从第 r 个起轮着来，一步里各行的专家因此不同；每步取每一行的 logits；每个 token（各行合计）的秒数。
    double decode_rows(const Tokens& tokens) {
        clear(context_.get());
        const auto began = std::chrono::steady_clock::now();
        for (size_t i = 0; i < tokens.size(); ++i) {
            Batch batch(rows_);
            for (int sequence = 0; sequence < rows_; ++sequence) {
                batch.add(tokens[(i + sequence) % tokens.size()], static_cast<int>(i), sequence, true);
            }
            decode(batch);
            for (int sequence = 0; sequence < rows_; ++sequence) {
                row(sequence);
            }
        }
        return seconds_since(began) / (tokens.size() * rows_);
    }

    std::vector<int> positions() { return {first(context_.get(), 0), last(context_.get(), 0), last(context_.get(), 1)}; }

  private:
    void open(int context, int sequences, bool unified) {
        context_.reset();  // 先放掉旧的：两份缓存不同时在
        const llama_context_params params = context_params(threads_, context, sequences, unified, exact_);
        context_.reset(llama_init_from_model(model_.get(), params));
        if (context_ == nullptr) {
            throw std::runtime_error("建不了 " + std::to_string(context) + " 个 token 的上下文");
        }
        filled_ = depth_ = 0;
    }

    // 让缓存里有 length 个 token：逐块在空缓存上 prefill（位置照旧，只是看不见前面的块），再用公开的状态接口拼成一个序列。
    // 一块块接着 prefill 的话，8192 个 token 的注意力要几分钟，而只测时间用不着块与块之间的注意力。
    void fill(int length) {
        std::mt19937 random(0);
        std::uniform_int_distribution<llama_token> any(0, vocab_ - 1);
        std::vector<std::vector<uint8_t>> states;
        if (filled_ > 0) {
            states.push_back(state());
        }
        for (int start = filled_; start < length; start += kFill) {
            clear(context_.get());
            Tokens block(std::min(kFill, length - start));
            std::generate(block.begin(), block.end(), [&] { return any(random); });
            run(block, start);
            states.push_back(state());
        }
        clear(context_.get());
        for (const auto& one : states) {
            if (!restore(context_.get(), one, 1)) {
                throw std::runtime_error("放不回缓存");
            }
            copy(context_.get(), 1, 0);
            remove(context_.get(), 1, 0);
        }
        filled_ = length;
    }

    std::vector<uint8_t> state() {
        std::vector<uint8_t> found(state_size(context_.get()));
        if (save(context_.get(), found) == 0) {
            throw std::runtime_error("取不出缓存");
        }
        return found;
    }

    // 一次前向，只要最后一行的 logits。
    void run(const Tokens& tokens, int past) {
        for (size_t start = 0; start < tokens.size(); start += kBatch) {
            const size_t end = std::min(start + kBatch, tokens.size());
            Batch batch(kBatch);
            for (size_t i = start; i < end; ++i) {
                batch.add(tokens[i], past + static_cast<int>(i), 0, i + 1 == tokens.size());
            }
            decode(batch);
        }
    }

    void decode(const Batch& batch) {
        if (const int code = llama_decode(context_.get(), batch.get())) {
            throw std::runtime_error("llama_decode 返回 " + std::to_string(code));
        }
    }

    const float* row(int index) {
        const float* found = llama_get_logits_ith(context_.get(), index);
        if (found == nullptr) {
            throw std::runtime_error("没有 logits");
        }
        return found;
    }

    int threads_;
    bool exact_;
    std::unique_ptr<llama_model, void (*)(llama_model*)> model_;
    std::unique_ptr<llama_context, void (*)(llama_context*)> context_{nullptr, llama_free};
    int vocab_ = 0, filled_ = 0, depth_ = 0, rows_ = 1;
};

// ["method", {"name": [1, 2], "other": 3}]：参数只有整数与整数的列表。
struct Request {
    std::string method;
    std::map<std::string, Tokens> numbers;

    const Tokens& list(const std::string& name) const { return numbers.at(name); }
    int one(const std::string& name) const { return numbers.at(name).at(0); }
};

Request parse(const std::string& line) {
    Request found;
    Tokens* values = nullptr;
    for (size_t at = 0; at < line.size();) {
        if (line[at] == '"') {
            const size_t end = line.find('"', at + 1);
            const std::string word = line.substr(at + 1, end - at - 1);
            if (found.method.empty()) {
                found.method = word;
            } else {
                values = &found.numbers[word];
            }
            at = end + 1;
        } else if (values != nullptr && (line[at] == '-' || (line[at] >= '0' && line[at] <= '9'))) {
            size_t used = 0;
            values->push_back(static_cast<llama_token>(std::stol(line.substr(at, 12), &used)));
            at += used;
        } else {
            ++at;
        }
    }
    return found;
}

template <typename T>
std::string json(const T* values, size_t count, const char* format) {
    std::string out = "[";
    char text[32];
    for (size_t i = 0; i < count; ++i) {
        std::snprintf(text, sizeof text, format, values[i]);
        out += i == 0 ? "" : ",";
        out += text;
    }
    return out + "]";
}

std::string json(double value) {
    char text[32];
    std::snprintf(text, sizeof text, "%.9g", value);
    return text;
}

std::string json(const std::string& text) {
    std::string out = "\"";
    for (const char c : text) {
        if (c == '"' || c == '\\') {
            out += '\\';
        }
        out += c == '\n' ? ' ' : c;
    }
    return out + "\"";
}

std::string answer(Engine& engine, const Request& request) {
    const std::string& method = request.method;
    if (method == "system") {
        return json(std::string(llama_print_system_info()));
    }
    if (method == "last_logits" || method == "logits") {
        const float* row = engine.logits(request.list("tokens"), method == "logits" ? request.one("past") : 0);
        return json(row, engine.vocab(), "%.9g");
    }
    if (method == "prefill") {
        return json(engine.prefill(request.list("tokens")));
    }
    if (method == "go_to") {
        engine.go_to(request.one("depth"));
        return "null";
    }
    if (method == "decode") {
        return json(engine.decode(request.list("tokens")));
    }
    if (method == "open_rows") {
        engine.open_rows(request.one("rows"), request.one("context"));
        return "null";
    }
    if (method == "decode_rows") {
        return json(engine.decode_rows(request.list("tokens")));
    }
    if (method == "positions") {
        const std::vector<int> found = engine.positions();
        return json(found.data(), found.size(), "%d");
    }
    throw std::runtime_error("没有 " + method);
}

}  // namespace

int main(int argc, char** argv) {
    // 库往标准输出写的改道标准错误；回答走原来的。
    FILE* replies = fdopen(dup(1), "w");
    dup2(2, 1);
    const auto reply = [&](const char* kind, const std::string& value) {
        std::fprintf(replies, "{\"%s\": %s}\n", kind, value.c_str());
        std::fflush(replies);
    };
    try {
        if (argc < 4) {
            throw std::runtime_error("要：模型、线程数、上下文");
        }
        llama_log_set([](ggml_log_level, const char*, void*) {}, nullptr);
        llama_backend_init();
        Engine engine(argv[1], std::atoi(argv[2]), std::atoi(argv[3]), argc > 4);
        reply("result", "null");
        for (std::string line; std::getline(std::cin, line);) {
            try {
                reply("result", answer(engine, parse(line)));
            } catch (const std::exception& error) {
                reply("error", json(std::string(error.what())));
            }
        }
    } catch (const std::exception& error) {
        reply("error", json(std::string(error.what())));
        return 1;
    }
    return 0;
}
