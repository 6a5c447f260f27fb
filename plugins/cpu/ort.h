// 各个算子共用的 ONNX Runtime 接口。
//
// 头文件可以比 1.21 新，但只用 1.21 就有的接口，并按 1.21 的版本登记，所以同一个 .so 能装进 1.21 以上的任何 ONNX Runtime。
#pragma once

#ifndef ORT_API_MANUAL_INIT
#define ORT_API_MANUAL_INIT
#endif
#include <onnxruntime_cxx_api.h>

#include <string>
#include <vector>

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
