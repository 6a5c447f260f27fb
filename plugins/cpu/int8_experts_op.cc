#include "int8_experts_op.h"

#include "int8_experts.h"
#include "isa.h"

namespace dsx {
namespace {

namespace spec = ops::int8_experts;

class Kernel {
public:
    // 指令集在会话建立时定下，之后的环境变量不影响它。
    explicit Kernel(const OrtKernelInfo* info) : kernels_(requested_int8_kernels()) {
        const Ort::ConstKernelInfo node(info);
        k_ = attribute(node, spec::k), block_ = attribute(node, spec::block_size);
        if (k_ < 1 || (block_ != 32 && block_ != 64 && block_ != 128)) {
            refuse(spec::kName, "k 要大于 0，block_size 是 32、64 或 128：k=" + std::to_string(k_) + "，block_size=" + std::to_string(block_));
        }
    }

    OrtStatusPtr ComputeV2(OrtKernelContext* context) {
        return guard([&] { compute(Ort::KernelContext(context)); });
    }

private:
    void compute(const Ort::KernelContext& context) const {
        const Inputs inputs(spec::kName, spec::kInputs, context);
        Int8Experts op = sizes_of(inputs);
        op.x = inputs.data<float>(spec::x), op.log_weights = inputs.data<float>(spec::log_weights);
        op.gate_up = inputs.data<uint8_t>(spec::gate_up), op.gate_up_scales = inputs.data<float>(spec::gate_up_scales);
        op.down = inputs.data<uint8_t>(spec::down), op.down_scales = inputs.data<float>(spec::down_scales);
        op.y = context.GetOutput(spec::y, inputs.shape(spec::x)).GetTensorMutableData<float>();
        run(op, kernels_, pool_of(context));
    }

    // 由各输入的形状得出尺寸，并核对它们彼此相符。
    Int8Experts sizes_of(const Inputs<spec::kInputs.size()>& inputs) const {
        inputs.check_ranks();
        Int8Experts op{};
        op.k = k_, op.block = block_;
        op.N = inputs.shape(spec::x)[0], op.D = inputs.shape(spec::x)[1];
        op.E = inputs.shape(spec::log_weights)[1], op.I = inputs.shape(spec::down)[2];
        if (op.E < k_) {
            inputs.refuse(inputs.shown(spec::log_weights) + "，专家少于 k=" + std::to_string(k_));
        }
        if (op.D < 1 || op.I < 1 || op.D % block_ != 0 || op.I % block_ != 0) {
            inputs.refuse("D、I 要是 block_size=" + std::to_string(block_) + " 的倍数：" + inputs.shown(spec::x) + "，" +
                          inputs.shown(spec::down));
        }
        inputs.check_shape(spec::log_weights, {op.N, op.E});
        inputs.check_shape(spec::gate_up, {op.E, 2 * op.I, op.D});
        inputs.check_shape(spec::gate_up_scales, {op.E, 2 * op.I, op.D / block_});
        inputs.check_shape(spec::down, {op.E, op.D, op.I});
        inputs.check_shape(spec::down_scales, {op.E, op.D, op.I / block_});
        return op;
    }

    const Int8Kernels& kernels_;
    int64_t k_, block_;
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

void add_int8_experts(Ort::CustomOpDomain& domain) {
    static Operator made;  // 会话里只存它的指针，要活到进程结束
    domain.Add(&made);
}

}  // namespace dsx
