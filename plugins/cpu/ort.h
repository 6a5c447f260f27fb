// 各个算子共用的 ONNX Runtime 接口。
//
// 头文件可以比 1.21 新，但只用 1.21 就有的接口，并按 1.21 的版本登记，所以同一个 .so 能装进 1.21 以上的任何 ONNX Runtime。
#pragma once

#ifndef ORT_API_MANUAL_INIT
#define ORT_API_MANUAL_INIT
#endif
#include <onnxruntime_cxx_api.h>

#include <array>
#include <string>
#include <vector>

#include "../ops.h"
#include "parallel.h"

namespace dsx {

constexpr uint32_t kOrtApi = 21;
static_assert(ORT_API_VERSION >= kOrtApi, "ONNX Runtime 的头文件要 1.21 以上");

// 异常不能越过 C 接口：换成 OrtStatus，由 ONNX Runtime 报给调用方。
template <typename Body>
OrtStatusPtr guard(Body&& body) {
    try {
        body();
        return nullptr;
    } catch (const Ort::Exception& error) {
        return Ort::GetApi().CreateStatus(error.GetOrtErrorCode(), error.what());
    } catch (const std::exception& error) {
        return Ort::GetApi().CreateStatus(ORT_FAIL, error.what());
    }
}

inline std::string text(const std::vector<int64_t>& shape) {
    std::string out = "[";
    for (size_t i = 0; i < shape.size(); ++i) {
        out += (i ? ", " : "") + std::to_string(shape[i]);
    }
    return out + "]";
}

[[noreturn]] inline void refuse(const char* op, const std::string& what) {
    throw Ort::Exception("dsx::" + std::string(op) + "：" + what, ORT_INVALID_ARGUMENT);
}

template <typename T>
T attribute(const Ort::ConstKernelInfo& node, const ops::Attribute<T>& wanted) {
    return node.GetAttribute<T>(wanted.name);
}

// 只容一种类型的端口的类型。
inline ONNXTensorElementDataType type_of(const ops::Port& port) {
    return static_cast<ONNXTensorElementDataType>(port.type->onnx[0]);
}

// 一次调用的输入与它们的形状；形状不对就抛出，说明是哪个输入、应是什么。
template <size_t kCount>
class Inputs {
public:
    Inputs(const char* op, const std::array<ops::Port, kCount>& ports, const Ort::KernelContext& context)
        : op_(op), ports_(ports) {
        for (size_t i = 0; i < kCount; ++i) {
            values_[i] = context.GetInput(i);
            shapes_[i] = values_[i].GetTensorTypeAndShapeInfo().GetShape();
        }
    }

    const std::vector<int64_t>& shape(size_t input) const { return shapes_[input]; }
    std::string shown(size_t input) const { return std::string(ports_[input].name) + " 是 " + text(shapes_[input]); }
    template <typename T>
    const T* data(size_t input) const { return values_[input].template GetTensorData<T>(); }
    const void* raw(size_t input) const { return values_[input].GetTensorRawData(); }

    [[noreturn]] void refuse(const std::string& what) const { dsx::refuse(op_, what); }
    void check_ranks() const {
        for (size_t i = 0; i < kCount; ++i) {
            if (shapes_[i].size() != ports_[i].rank) {
                refuse(shown(i) + "，应有 " + std::to_string(ports_[i].rank) + " 维");
            }
        }
    }
    void check_shape(size_t input, const std::vector<int64_t>& expected) const {
        if (shapes_[input] != expected) {
            refuse(shown(input) + "，应为 " + text(expected));
        }
    }

private:
    const char* op_;
    const std::array<ops::Port, kCount>& ports_;
    std::array<Ort::ConstValue, kCount> values_;
    std::array<std::vector<int64_t>, kCount> shapes_;
};

// 用会话自己的线程池。
inline Parallel pool_of(const Ort::KernelContext& context) {
    return [&context](int64_t total, const std::function<void(int64_t)>& task) {
        if (total <= 1) {
            if (total == 1) {
                task(0);
            }
            return;
        }
        const auto call = [](void* body, size_t i) {
            (*static_cast<const std::function<void(int64_t)>*>(body))(static_cast<int64_t>(i));
        };
        const auto count = static_cast<size_t>(total);
        context.ParallelFor(call, count, count, const_cast<void*>(static_cast<const void*>(&task)));
    };
}

}  // namespace dsx
