#include "int8_linear_op.h"

#include "int8_linear.h"
#include "isa.h"

namespace dsx {
namespace {

namespace spec = ops::int8_linear;

class Kernel {
public:
    // 指令集在会话建立时定下，之后的环境变量不影响它。
    explicit Kernel(const OrtKernelInfo* info) : kernels_(requested_int8_kernels()) {
        const Ort::ConstKernelInfo node(info);
        K_ = attribute(node, spec::K), N_ = attribute(node, spec::N), block_ = attribute(node, spec::block_size);
        if (K_ < 1 || N_ < 1 || (block_ != 32 && block_ != 64 && block_ != 128)) {
            refuse(spec::kName, "K、N 要大于 0，block_size 是 32、64 或 128：K=" + std::to_string(K_) + "，N=" + std::to_string(N_) +
                   "，block_size=" + std::to_string(block_));
        }
    }

    OrtStatusPtr ComputeV2(OrtKernelContext* context) {
        return guard([&] { compute(Ort::KernelContext(context)); });
    }

private:
    void compute(const Ort::KernelContext& context) const {
        const int64_t blocks = (K_ + block_ - 1) / block_;
        const Inputs inputs(spec::kName, spec::kInputs, context);
        std::vector<int64_t> shape = inputs.shape(spec::x);
        if (shape.empty() || shape.back() != K_) {
            inputs.refuse(inputs.shown(spec::x) + "，最后一维应为 K=" + std::to_string(K_));
        }
        inputs.check_shape(spec::codes, {N_, blocks, block_});
        inputs.check_shape(spec::scales, {N_, blocks});
        int64_t rows = 1;
        for (size_t i = 0; i + 1 < shape.size(); ++i) {
            rows *= shape[i];
        }
        shape.back() = N_;
        float* y = context.GetOutput(spec::y, shape).GetTensorMutableData<float>();
        const Int8Linear op{rows, K_, N_, block_, inputs.data<float>(spec::x), inputs.data<uint8_t>(spec::codes),
            inputs.data<float>(spec::scales), y};
        run(op, kernels_, pool_of(context));
    }

    const Int8Kernels& kernels_;
    int64_t K_, N_, block_;
};

struct Operator : Ort::CustomOpBase<Operator, Kernel, true> {
    Operator() { version = kOrtApi; }

    OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
        return guard([&] { *kernel = new Kernel(info); });
    }
    const char* GetName() const { return spec::kName; }
    const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
    size_t GetInputTypeCount() const { return spec::kInputs.size(); }
    ONNXTensorElementDataType GetInputType(size_t i) const { return type_of(spec::kInputs[i]); }
    size_t GetOutputTypeCount() const { return spec::kOutputs.size(); }
    ONNXTensorElementDataType GetOutputType(size_t i) const { return type_of(spec::kOutputs[i]); }
};

}  // namespace

void add_int8_linear(Ort::CustomOpDomain& domain) {
    static Operator made;  // 会话里只存它的指针，要活到进程结束
    domain.Add(&made);
}

}  // namespace dsx
