// ONNX 的类型 → 与指令集有关的那一侧认的 Dtype；会话里只存指针的算子怎么登记。
#pragma once

#include <cstdlib>
#include <stdexcept>
#include <string>

#include "kernels.h"
#include "ort.h"

namespace dsx {

inline Dtype dtype_of(int onnx) {
    switch (onnx) {
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT: return Dtype::kFloat32;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16: return Dtype::kFloat16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16: return Dtype::kBfloat16;
    case ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8: return Dtype::kInt8;
    default: throw std::logic_error("契约里的类型 " + std::to_string(onnx) + " 没有实现");
    }
}

// 缓存在第 in 个输入、第 out 个输出：告诉 ONNX Runtime 它们可以是同一块内存。
template <int kIn, int kOut>
void declare_in_place(OrtCustomOp& op) {
    op.GetMayInplace = [](int** inputs, int** outputs) -> size_t {
        *inputs = static_cast<int*>(std::malloc(sizeof(int)));
        *outputs = static_cast<int*>(std::malloc(sizeof(int)));
        **inputs = kIn;
        **outputs = kOut;
        return 1;
    };
    op.ReleaseMayInplace = [](int* inputs, int* outputs) {
        std::free(inputs);
        std::free(outputs);
    };
}

// 每个序列的 S 个新位置放得进容量 T，否则抛出。
template <size_t kCount>
void check_past_lens(const Inputs<kCount>& inputs, const int64_t* past_lens, int64_t B, int64_t S, int64_t T) {
    for (int64_t b = 0; b < B; ++b) {
        if (past_lens[b] < 0 || past_lens[b] > T - S) {
            inputs.refuse("past_lens[" + std::to_string(b) + "] = " + std::to_string(past_lens[b]) + "，加 S=" +
                          std::to_string(S) + " 个新位置放不进容量 T=" + std::to_string(T));
        }
    }
}

}  // namespace dsx
