// int8、int4 的几个算子在 ONNX Runtime 一侧共用的部分。
#pragma once

#include "ort.h"

namespace dsx {

inline bool is_supported_block(int64_t block) { return block == 32 || block == 64 || block == 128; }

// float16 按 16 位整数读：C++ 没有这个类型。
template <size_t kCount>
const uint16_t* float16_data(const Inputs<kCount>& inputs, size_t input) {
    return static_cast<const uint16_t*>(inputs.raw(input));
}

// 名字与输入取自 Op，输出取自契约的那张表。
template <typename Op, typename Kernel, const auto& kOutputs>
struct QuantOperator : Ort::CustomOpBase<QuantOperator<Op, Kernel, kOutputs>, Kernel, true> {
    QuantOperator() { this->version = kOrtApi; }

    OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
        return guard([&] { *kernel = new Kernel(info); });
    }
    const char* GetName() const { return Op::kName; }
    const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
    size_t GetInputTypeCount() const { return Op::kInputs.size(); }
    ONNXTensorElementDataType GetInputType(size_t i) const { return type_of(Op::kInputs[i]); }
    size_t GetOutputTypeCount() const { return kOutputs.size(); }
    ONNXTensorElementDataType GetOutputType(size_t i) const { return type_of(kOutputs[i]); }
};

}  // namespace dsx
