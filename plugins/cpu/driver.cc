// 不经 ONNX Runtime 直接跑各个算子：交叉编译的 kernel 因此能在 qemu 里测。测试用，不装进包。
//
//   dsx_cpu_driver --isas            这台机器能用的指令集
//   dsx_cpu_driver --library PATH    装载算子库，问它同样的问题
//   dsx_cpu_driver < 请求 > 结果      请求逐个做，直到读完；指令集由 DSX_CPU_ISA 定
//
// 请求是 int64：哪个算子、线程数、参数的个数与各参数、输入的个数；再是各输入：字节数与内容。参数、输入的次序就是下面各函数读的次序。
// 结果是各输出：字节数与内容。每个输入各占一块正好那么大的内存。
#include <dlfcn.h>

#include <atomic>
#include <cstring>
#include <exception>
#include <functional>
#include <iostream>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "isa.h"
#include "lightning_indexer.h"
#include "mla_attention.h"
#include "quant_experts.h"
#include "quant_linear.h"

namespace {

// 64 字节对齐、正好 size 字节的内存；空的也给得出地址。
class Buffer {
public:
    explicit Buffer(size_t size) : size_(size), data_(static_cast<char*>(::operator new(size, kAlignment))) {}
    Buffer(Buffer&& other) noexcept : size_(other.size_), data_(other.data_) { other.data_ = nullptr; }
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { ::operator delete(data_, kAlignment); }

    size_t size() const { return size_; }
    char* data() const { return data_; }

private:
    static constexpr std::align_val_t kAlignment{64};

    size_t size_;
    char* data_;
};

void read_exactly(char* to, size_t size) {
    if (!std::cin.read(to, static_cast<std::streamsize>(size))) {
        throw std::runtime_error("请求不完整");
    }
}

int64_t read_int() {
    int64_t value = 0;
    read_exactly(reinterpret_cast<char*>(&value), sizeof value);
    return value;
}

void write(const Buffer& buffer) {
    const auto size = static_cast<int64_t>(buffer.size());
    std::cout.write(reinterpret_cast<const char*>(&size), sizeof size);
    std::cout.write(buffer.data(), size);
}

// 一个请求：参数与输入按次序取。
class Request {
public:
    Request() {
        threads_ = read_int();
        numbers_.resize(static_cast<size_t>(read_int()));
        for (int64_t& number : numbers_) {
            number = read_int();
        }
        for (int64_t left = read_int(); left > 0; --left) {
            inputs_.emplace_back(static_cast<size_t>(read_int()));
            read_exactly(inputs_.back().data(), inputs_.back().size());
        }
    }

    int64_t number() { return numbers_.at(number_++); }
    dsx::Dtype dtype() { return static_cast<dsx::Dtype>(number()); }
    bool has_more() const { return input_ < inputs_.size(); }
    const Buffer& input() { return inputs_.at(input_++); }
    template <typename T>
    const T* data() {
        return reinterpret_cast<const T*>(input().data());
    }

    dsx::Parallel parallel() const {
        return [threads = threads_](int64_t total, const std::function<void(int64_t)>& task) {
            std::atomic<int64_t> next{0};
            const auto work = [&] {
                for (int64_t i = next++; i < total; i = next++) {
                    task(i);
                }
            };
            std::vector<std::thread> others;
            for (int64_t i = 1; i < threads; ++i) {
                others.emplace_back(work);
            }
            work();
            for (std::thread& other : others) {
                other.join();
            }
        };
    }

private:
    int64_t threads_;
    std::vector<int64_t> numbers_;
    std::vector<Buffer> inputs_;
    size_t number_ = 0, input_ = 0;
};

// 缓存的输出：原地时是输入的副本，否则是填了 0xAA 的新内存，由 kernel 自己复制。
Buffer cache_out(const Buffer& cache, bool in_place) {
    Buffer out(cache.size());
    if (in_place) {
        std::memcpy(out.data(), cache.data(), cache.size());
    } else {
        std::memset(out.data(), 0xAA, cache.size());
    }
    return out;
}

void mla_attention(Request& request) {
    dsx::MlaAttention op{};
    op.B = request.number(), op.S = request.number(), op.H = request.number(), op.dn = request.number();
    op.dr = request.number(), op.dv = request.number(), op.r = request.number(), op.T = request.number();
    op.dtype = request.dtype(), op.cache_dtype = request.dtype(), op.weight_dtype = request.dtype();
    op.weight_block = request.number();
    const auto form = static_cast<dsx::Form>(request.number());
    const bool in_place = request.number() != 0;
    op.slots = request.number();
    op.q_nope = request.input().data(), op.q_pe = request.input().data();
    op.c_kv = request.input().data(), op.k_pe = request.input().data();
    const Buffer& cache = request.input();
    op.past_lens = request.data<int64_t>();
    op.w_kv_b = request.input().data();
    op.scale = *request.data<float>();
    if (request.has_more()) {
        op.indices = request.data<int32_t>(), op.counts = request.data<int32_t>();
    }
    const Buffer o(static_cast<size_t>(op.B * op.S * op.H * op.dv * dsx::bytes_of(op.dtype))), out = cache_out(cache, in_place);
    op.o = o.data(), op.kv_cache_out = out.data();
    op.kv_cache = in_place ? out.data() : cache.data();
    dsx::run(op, form, dsx::requested_kernels(), dsx::requested_quant_kernels(8), request.parallel());
    write(o);
    write(out);
}

void quant_linear(Request& request) {
    const int64_t bits = request.number();
    dsx::QuantLinear op{};
    op.M = request.number(), op.K = request.number(), op.N = request.number(), op.block = request.number();
    op.x = request.data<float>(), op.codes = request.data<uint8_t>(), op.scales = request.data<uint16_t>();
    op.zeros = request.has_more() ? request.data<uint8_t>() : nullptr;
    const Buffer y(static_cast<size_t>(op.M * op.N) * sizeof(float));
    op.y = reinterpret_cast<float*>(y.data());
    dsx::run(op, dsx::requested_quant_kernels(bits), request.parallel());
    write(y);
}

void quant_experts(Request& request) {
    const int64_t bits = request.number();
    dsx::QuantExperts op{};
    op.N = request.number(), op.D = request.number(), op.I = request.number(), op.E = request.number();
    op.k = request.number(), op.block = request.number();
    op.x = request.data<float>(), op.log_weights = request.data<float>();
    op.gate_up = request.data<uint8_t>(), op.gate_up_scales = request.data<uint16_t>();
    op.down = request.data<uint8_t>(), op.down_scales = request.data<uint16_t>();
    if (request.has_more()) {
        op.gate_up_zeros = request.data<uint8_t>(), op.down_zeros = request.data<uint8_t>();
    }
    const Buffer y(static_cast<size_t>(op.N * op.D) * sizeof(float));
    op.y = reinterpret_cast<float*>(y.data());
    dsx::run(op, dsx::requested_quant_kernels(bits), request.parallel());
    write(y);
}

void lightning_indexer(Request& request) {
    dsx::LightningIndexer op{};
    op.B = request.number(), op.S = request.number(), op.H = request.number(), op.di = request.number();
    op.T = request.number(), op.topk = request.number();
    op.dtype = request.dtype(), op.cache_dtype = request.dtype();
    const bool in_place = request.number() != 0;
    op.q = request.input().data(), op.w = request.data<float>(), op.k = request.input().data();
    const Buffer& cache = request.input();
    op.past_lens = request.data<int64_t>();
    const auto rows = static_cast<size_t>(op.B * op.S);
    const Buffer indices(rows * static_cast<size_t>(op.topk) * sizeof(int32_t)), counts(rows * sizeof(int32_t));
    const Buffer out = cache_out(cache, in_place);
    op.indices = reinterpret_cast<int32_t*>(indices.data()), op.counts = reinterpret_cast<int32_t*>(counts.data());
    op.index_cache_out = out.data();
    op.index_cache = in_place ? out.data() : cache.data();
    dsx::run(op, dsx::requested_kernels(), dsx::requested_quant_kernels(8), request.parallel());
    write(indices);
    write(counts);
    write(out);
}

void serve() {
    constexpr void (*kOperators[])(Request&) = {mla_attention, quant_linear, quant_experts, lightning_indexer};
    while (std::cin.peek() != std::char_traits<char>::eof()) {
        const auto which = static_cast<size_t>(read_int());
        if (which >= std::size(kOperators)) {
            throw std::runtime_error("没有第 " + std::to_string(which) + " 个算子");
        }
        Request request;
        kOperators[which](request);
    }
}

std::string names() {
    std::string out;
    for (const std::string& isa : dsx::available_isas()) {
        out += out.empty() ? isa : "," + isa;
    }
    return out;
}

std::string names_from(const char* path) {
    void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
        throw std::runtime_error(dlerror());
    }
    const auto ask = reinterpret_cast<const char* (*)()>(dlsym(library, "dsx_cpu_isas"));
    if (ask == nullptr) {
        throw std::runtime_error(dlerror());
    }
    return ask();
}

}  // namespace

int main(int count, char** arguments) {
    const std::string first = count > 1 ? arguments[1] : "";
    try {
        if (first == "--isas" && count == 2) {
            std::cout << names() << "\n";
        } else if (first == "--library" && count == 3) {
            std::cout << names_from(arguments[2]) << "\n";
        } else if (count == 1) {
            serve();
        } else {
            throw std::runtime_error("用法：dsx_cpu_driver [--isas | --library PATH]");
        }
        std::cout.flush();
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
    return 0;
}
