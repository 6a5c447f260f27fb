// 没有 Python 也运行 dsx build 的引擎：装载 C++ 插件，反序列化，逐个 token 解码。
//
//     tensorrt_decode OUT/engines/rtx-sm89/model.plan libdsx_tensorrt.so 32 5,9,23,100
//
// 参数是引擎、plugins/tensorrt 的库、要几个新 token、提示词的 token id；打印新的 token id。用不带草稿的 bundle（-p mla+moe）。
// 显存用 CUDA 驱动接口管，只要 cuda.h。还没有在 GPU 上跑过：只核对过能用 TensorRT 11 的头文件编译。
#include <NvInfer.h>
#include <cuda.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <map>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Ids = std::vector<int64_t>;

class Log : public nvinfer1::ILogger {
    void log(Severity severity, const char* text) noexcept override {
        if (severity <= Severity::kWARNING) {
            std::cerr << text << "\n";
        }
    }
};

void require(bool ok, const std::string& what) {
    if (!ok) {
        throw std::runtime_error(what);
    }
}

void cuda(CUresult status, const char* what) {
    const char* text = nullptr;
    if (status != CUDA_SUCCESS) {
        cuGetErrorString(status, &text);
    }
    require(status == CUDA_SUCCESS, std::string(what) + "：" + (text ? text : "没有给出原因"));
}

size_t width(nvinfer1::DataType type) {
    switch (type) {
        case nvinfer1::DataType::kINT64:
            return 8;
        case nvinfer1::DataType::kFLOAT:
        case nvinfer1::DataType::kINT32:
            return 4;
        case nvinfer1::DataType::kHALF:
        case nvinfer1::DataType::kBF16:
            return 2;
        default:
            throw std::runtime_error("没有见过的 dtype");
    }
}

size_t bytes_of(const nvinfer1::Dims& dims, nvinfer1::DataType type) {
    size_t bytes = width(type);
    for (int i = 0; i < dims.nbDims; ++i) {
        bytes *= static_cast<size_t>(dims.d[i]);
    }
    return bytes;
}

// 一块清零的显存，不够大就换一块（内容不留）。
class Buffer {
public:
    Buffer() = default;
    Buffer(const Buffer&) = delete;
    Buffer& operator=(const Buffer&) = delete;
    ~Buffer() { cuMemFree(address_); }

    void* at_least(size_t bytes) {
        if (bytes > bytes_) {
            cuMemFree(address_);
            address_ = 0;
            bytes_ = 0;
            cuda(cuMemAlloc(&address_, bytes), "分配显存");
            cuda(cuMemsetD8(address_, 0, bytes), "清零显存");
            bytes_ = bytes;
        }
        return reinterpret_cast<void*>(address_);
    }
    CUdeviceptr address() const { return address_; }

private:
    CUdeviceptr address_ = 0;
    size_t bytes_ = 0;
};

// 主上下文与一条流。
struct Device {
    Device() {
        cuda(cuInit(0), "初始化驱动");
        cuda(cuDeviceGet(&device, 0), "找 GPU");
        cuda(cuDevicePrimaryCtxRetain(&context, device), "建上下文");
        cuda(cuCtxSetCurrent(context), "切换上下文");
        cuda(cuStreamCreate(&stream, CU_STREAM_NON_BLOCKING), "建流");
    }
    ~Device() {
        cuStreamDestroy(stream);
        cuDevicePrimaryCtxRelease(device);
    }

    CUdevice device = 0;
    CUcontext context = nullptr;
    CUstream stream = nullptr;
};

class Decoder {
public:
    Decoder(Device& device, nvinfer1::ICudaEngine& engine) : device_(device), engine_(engine) {
        // dsx 的引擎要应用自己给中间值的显存；各优化配置的上下文不会同时执行，共用一块。
        const int64_t scratch = engine.getDeviceMemorySizeV2();
        void* shared = workspace_.at_least(static_cast<size_t>(scratch));
        for (int i = 0; i < engine.getNbOptimizationProfiles(); ++i) {
            const auto how = nvinfer1::ExecutionContextAllocationStrategy::kUSER_MANAGED;
            contexts_.emplace_back(engine.createExecutionContext(how));
            require(contexts_.back() != nullptr, "建不了执行上下文");
            contexts_.back()->setDeviceMemoryV2(shared, scratch);
            require(contexts_.back()->setOptimizationProfileAsync(i, device.stream), "选不了优化配置");
        }
    }

    // 送进 ids，缓存里已有 past 个；返回最后一行 logit 最大的 token，同样大取小的。
    int64_t step(const Ids& ids, int64_t past) {
        const auto count = static_cast<int64_t>(ids.size());
        const int64_t last = count - 1;
        nvinfer1::IExecutionContext& context = *contexts_[profile_for(count)];
        feed(context, "input_ids", {2, {1, count}}, ids.data());
        feed(context, "past_lens", {1, {1}}, &past);
        feed(context, "logits_positions", {2, {1, 1}}, &last);  // 只要最后一行的
        feed_key_span(context, profile_for(count), past + count);
        bind_caches(context);
        for (int i = 0; i < engine_.getNbIOTensors(); ++i) {
            const char* name = engine_.getIOTensorName(i);
            const bool output = engine_.getTensorIOMode(name) == nvinfer1::TensorIOMode::kOUTPUT;
            if (output && std::strstr(name, "cache_out.") == nullptr) {
                const size_t bytes = bytes_of(context.getTensorShape(name), engine_.getTensorDataType(name));
                require(context.setTensorAddress(name, buffers_[name].at_least(bytes)), name);
            }
        }
        require(context.enqueueV3(device_.stream), "执行失败");
        int64_t best = 0;  // 引擎已经在设备上选好，不必取回 logits
        cuda(cuMemcpyDtoHAsync(&best, buffers_["best_id"].address(), sizeof best, device_.stream), "取 best_id");
        cuda(cuStreamSynchronize(device_.stream), "等待");
        return best;
    }

private:
    // 解码与 prefill 各有一个优化配置，按新 token 的个数选。
    int profile_for(int64_t count) const {
        for (int i = 0; i < engine_.getNbOptimizationProfiles(); ++i) {
            const auto bound = [&](nvinfer1::OptProfileSelector which) {
                return engine_.getProfileShape("input_ids", i, which).d[1];
            };
            if (bound(nvinfer1::OptProfileSelector::kMIN) <= count && count <= bound(nvinfer1::OptProfileSelector::kMAX)) {
                return i;
            }
        }
        throw std::runtime_error("一次 " + std::to_string(count) + " 个 token 不在引擎的优化配置里");
    }

    // 主机的数据是普通内存，拷贝返回时已经读完，调用方不必留着。
    void feed(nvinfer1::IExecutionContext& context, const char* name, const nvinfer1::Dims& dims, const int64_t* data) {
        const size_t bytes = bytes_of(dims, nvinfer1::DataType::kINT64);
        void* address = buffers_[name].at_least(bytes);
        cuda(cuMemcpyHtoD(buffers_[name].address(), data, bytes), name);
        require(context.setInputShape(name, dims) && context.setTensorAddress(name, address), name);
    }

    // prefill 看缓存的前几行，只看形状，内容不读；mla.form=absorb 的引擎没有这个输入。
    void feed_key_span(nvinfer1::IExecutionContext& context, int profile, int64_t length) {
        for (int i = 0; i < engine_.getNbIOTensors(); ++i) {
            const char* name = engine_.getIOTensorName(i);
            if (std::strcmp(name, "key_span") == 0) {
                const auto bound = [&](nvinfer1::OptProfileSelector which) {
                    return engine_.getProfileShape(name, profile, which).d[1];
                };
                const int64_t most = bound(nvinfer1::OptProfileSelector::kMAX);
                const nvinfer1::Dims dims{2, {1, std::min(length, most)}};
                void* address = buffers_[name].at_least(static_cast<size_t>(dims.d[1]));
                require(context.setInputShape(name, dims) && context.setTensorAddress(name, address), name);
            }
        }
    }

    // 缓存的输入与输出是同一块显存，引擎原地更新；容量在建引擎时已定成常数。
    void bind_caches(nvinfer1::IExecutionContext& context) {
        for (int i = 0; i < engine_.getNbIOTensors(); ++i) {
            const std::string name = engine_.getIOTensorName(i);
            const size_t at = name.find("cache.");
            if (at == std::string::npos) {
                continue;
            }
            nvinfer1::Dims dims = engine_.getTensorShape(name.c_str());
            dims.d[0] = 1;
            void* address = buffers_[name].at_least(bytes_of(dims, engine_.getTensorDataType(name.c_str())));
            const std::string out = name.substr(0, at) + "cache_out." + name.substr(at + 6);
            const bool bound = context.setInputShape(name.c_str(), dims) &&
                               context.setTensorAddress(name.c_str(), address) &&
                               context.setTensorAddress(out.c_str(), address);
            require(bound, name);
        }
    }

    Device& device_;
    nvinfer1::ICudaEngine& engine_;
    std::map<std::string, Buffer> buffers_;
    Buffer workspace_;
    std::vector<std::unique_ptr<nvinfer1::IExecutionContext>> contexts_;
};

Ids parse(const std::string& text) {
    Ids ids;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) {
        ids.push_back(std::stoll(part));
    }
    return ids;
}

void decode(const char* plan, const char* plugins, size_t tokens, const Ids& prompt) {
    Log log;
    Device device;
    std::unique_ptr<nvinfer1::IRuntime> runtime(nvinfer1::createInferRuntime(log));
    require(runtime != nullptr, "建不了 TensorRT 的 runtime");
    // 先有 TensorRT，再装插件；插件要在反序列化之前登记好。
    require(runtime->getPluginRegistry().loadLibrary(plugins) != nullptr, std::string("装载不了 ") + plugins);
    std::ifstream file(plan, std::ios::binary);
    const std::vector<char> content((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
    require(!content.empty(), std::string("读不了 ") + plan);
    std::unique_ptr<nvinfer1::ICudaEngine> engine(runtime->deserializeCudaEngine(content.data(), content.size()));
    require(engine != nullptr, std::string(plan) + " 不是为这张卡、这个 TensorRT 建的");
    const int64_t capacity = engine->getTensorShape("kv_cache.0").d[2];
    require(static_cast<int64_t>(prompt.size() + tokens) <= capacity, "放不进引擎的缓存，容量是 " + std::to_string(capacity));
    Decoder decoder(device, *engine);
    Ids step = prompt;
    for (int64_t past = 0, made = 0; made < static_cast<int64_t>(tokens); ++made) {
        const int64_t next = decoder.step(step, past);
        past += static_cast<int64_t>(step.size());
        step.assign(1, next);
        std::cout << (made ? "," : "") << next << std::flush;
    }
    std::cout << "\n";
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 5) {
        std::cerr << "用法：" << argv[0] << " model.plan libdsx_tensorrt.so 新token数 提示词的id,逗号分隔\n";
        return 2;
    }
    try {
        decode(argv[1], argv[2], std::stoul(argv[3]), parse(argv[4]));
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
}
