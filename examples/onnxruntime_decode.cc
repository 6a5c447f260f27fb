// 只用 ONNX Runtime 的 C++ 接口解码：与 onnxruntime_decode.py 同一个循环，没有 Python，没有 dsx。
//
//     onnxruntime_decode OUT/model.onnx 32 5,9,23,100 [libdsx_cpu.so]
//
// 参数是图、要几个新 token、提示词的 token id；最后一个可选，装上之后 ort-cpu 的 bundle 走 C++ 算子库的 kernel。
// 打印新的 token id，逗号分隔。不看停止符，也没有分词器：那是宿主程序的事。
#include <onnxruntime_cxx_api.h>

#include <algorithm>
#include <cstdint>
#include <exception>
#include <iostream>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Ids = std::vector<int64_t>;

Ids parse(const std::string& text) {
    Ids ids;
    std::stringstream stream(text);
    for (std::string part; std::getline(stream, part, ',');) {
        ids.push_back(std::stoll(part));
    }
    return ids;
}

size_t width(ONNXTensorElementDataType type) {
    switch (type) {
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT:
            return 4;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16:
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16:
            return 2;
        case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8:
            return 1;
        default:
            throw std::runtime_error("没有见过的缓存类型");
    }
}

// 每层的缓存 kv_cache.{i} [1, 1, T, 宽] 既是输入又是输出，绑到同一块内存，图原地更新；返回的内存要活到解码结束。
std::vector<std::vector<char>> bind_caches(Ort::Session& session, Ort::IoBinding& io, const OrtMemoryInfo* memory,
                                           int64_t capacity) {
    Ort::AllocatorWithDefaultOptions allocator;
    std::vector<std::vector<char>> caches;
    for (size_t i = 0; i < session.GetInputCount(); ++i) {
        const std::string name = session.GetInputNameAllocated(i, allocator).get();
        const size_t at = name.find("cache.");
        if (at == std::string::npos) {
            continue;
        }
        const Ort::TypeInfo type = session.GetInputTypeInfo(i);
        const auto info = type.GetTensorTypeAndShapeInfo();
        Ids shape = info.GetShape();  // 符号维是 -1
        shape[0] = 1;
        shape[2] = capacity;
        auto& bytes = caches.emplace_back(shape[1] * shape[2] * shape[3] * width(info.GetElementType()));  // 全是零
        const Ort::Value value = Ort::Value::CreateTensor(memory, bytes.data(), bytes.size(), shape.data(), shape.size(),
                                                          info.GetElementType());
        io.BindInput(name.c_str(), value);
        io.BindOutput((name.substr(0, at) + "cache_out." + name.substr(at + 6)).c_str(), value);
    }
    return caches;
}

// 一行 logits 里最大的那个的编号；同样大取小的。
int64_t argmax(const Ort::Value& logits) {
    const auto info = logits.GetTensorTypeAndShapeInfo();
    const auto count = static_cast<int64_t>(info.GetElementCount());
    if (info.GetElementType() == ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16) {
        const auto* row = logits.GetTensorData<Ort::Float16_t>();
        const auto less = [](Ort::Float16_t a, Ort::Float16_t b) { return a.ToFloat() < b.ToFloat(); };
        return std::max_element(row, row + count, less) - row;
    }
    const auto* row = logits.GetTensorData<float>();
    return std::max_element(row, row + count) - row;
}

// 先一次送进整个提示词（prefill），再每步一个 token。
Ids greedy(Ort::Session& session, const Ids& prompt, size_t tokens) {
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtDeviceAllocator, OrtMemTypeCPU);
    Ort::IoBinding io(session);
    io.BindOutput("logits", memory);  // 第一个绑，下面的 GetOutputValues()[0] 就是它
    const auto caches = bind_caches(session, io, memory, static_cast<int64_t>(prompt.size() + tokens));
    Ids step = prompt, found;
    for (int64_t past = 0; found.size() < tokens;) {
        int64_t last = static_cast<int64_t>(step.size()) - 1;  // 只要最后一行的 logits
        const auto bind = [&](const char* name, int64_t* data, const Ids& shape) {
            const size_t count = static_cast<size_t>(shape.back());
            io.BindInput(name, Ort::Value::CreateTensor<int64_t>(memory, data, count, shape.data(), shape.size()));
        };
        bind("input_ids", step.data(), {1, last + 1});
        bind("past_lens", &past, {1});  // 缓存里已有多少
        bind("logits_positions", &last, {1, 1});
        session.Run(Ort::RunOptions{}, io);
        past += last + 1;
        step.assign(1, argmax(io.GetOutputValues()[0]));
        found.push_back(step[0]);
    }
    return found;
}

}  // namespace

int main(int argc, char** argv) {
    if (argc != 4 && argc != 5) {
        std::cerr << "用法：" << argv[0] << " MODEL.onnx 新token数 提示词的id,逗号分隔 [libdsx_cpu.so]\n";
        return 2;
    }
    try {
        const Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "dsx-example");
        Ort::SessionOptions options;
        if (argc == 5) {
            options.RegisterCustomOpsLibrary(argv[4]);
        }
        Ort::Session session(env, argv[1], options);
        const Ids ids = greedy(session, parse(argv[3]), std::stoul(argv[2]));
        for (size_t i = 0; i < ids.size(); ++i) {
            std::cout << (i ? "," : "") << ids[i];
        }
        std::cout << "\n";
    } catch (const std::exception& error) {
        std::cerr << error.what() << "\n";
        return 1;
    }
}
