#include "int8_experts_op.h"

#include <array>

#include "int8_experts.h"
#include "isa.h"

namespace dsx {
namespace {

// 次序与名字同 deepseek_export/ops/table.py 的 INT8_EXPERTS（tests/unit/test_cpu_int8.py 核对）。
constexpr const char* kName = "Int8Experts";
constexpr std::array<const char*, 6> kInputs{
    "x", "log_weights", "gate_up", "gate_up_scales", "down", "down_scales"};
constexpr size_t kGateUp = 2, kDown = 4;

class Kernel {
public:
    // 指令集在会话建立时定下，之后的环境变量不影响它。
    explicit Kernel(const OrtKernelInfo* info) : kernels_(requested_int8_kernels()) {
        const Ort::ConstKernelInfo node(info);
        k_ = node.GetAttribute<int64_t>("k"), block_ = node.GetAttribute<int64_t>("block_size");
        if (k_ < 1 || (block_ != 32 && block_ != 64 && block_ != 128)) {
            refuse(kName, "k 要大于 0，block_size 是 32、64 或 128：k=" + std::to_string(k_) + "，block_size=" + std::to_string(block_));
        }
    }

    OrtStatusPtr ComputeV2(OrtKernelContext* context) {
        return guard([&] { compute(Ort::KernelContext(context)); });
    }

private:
    void compute(const Ort::KernelContext& context) const {
        const Inputs inputs(kName, kInputs, context);
        Int8Experts op = sizes_of(inputs);
        op.x = inputs.data<float>(0), op.log_weights = inputs.data<float>(1);
        op.gate_up = inputs.data<uint8_t>(kGateUp), op.gate_up_scales = inputs.data<float>(kGateUp + 1);
        op.down = inputs.data<uint8_t>(kDown), op.down_scales = inputs.data<float>(kDown + 1);
        op.y = context.GetOutput(0, inputs.shape(0)).GetTensorMutableData<float>();
        run(op, kernels_, pool_of(context));
    }

    // 由各输入的形状得出尺寸，并核对它们彼此相符。
    Int8Experts sizes_of(const Inputs<kInputs.size()>& inputs) const {
        inputs.check_ranks({2, 2, 3, 3, 3, 3});
        Int8Experts op{};
        op.k = k_, op.block = block_;
        op.N = inputs.shape(0)[0], op.D = inputs.shape(0)[1], op.E = inputs.shape(1)[1], op.I = inputs.shape(kDown)[2];
        if (op.E < k_) {
            inputs.refuse(inputs.shown(1) + "，专家少于 k=" + std::to_string(k_));
        }
        if (op.D < 1 || op.I < 1 || op.D % block_ != 0 || op.I % block_ != 0) {
            inputs.refuse("D、I 要是 block_size=" + std::to_string(block_) + " 的倍数：" + inputs.shown(0) + "，" +
                          inputs.shown(kDown));
        }
        inputs.check_shape(1, {op.N, op.E});
        inputs.check_shape(kGateUp, {op.E, 2 * op.I, op.D});
        inputs.check_shape(kGateUp + 1, {op.E, 2 * op.I, op.D / block_});
        inputs.check_shape(kDown, {op.E, op.D, op.I});
        inputs.check_shape(kDown + 1, {op.E, op.D, op.I / block_});
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
    const char* GetName() const { return kName; }
    const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
    size_t GetInputTypeCount() const { return kInputs.size(); }
    ONNXTensorElementDataType GetInputType(size_t i) const {
        return i == kGateUp || i == kDown ? ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8 : ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    }
    size_t GetOutputTypeCount() const { return 1; }
    ONNXTensorElementDataType GetOutputType(size_t) const { return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT; }
};

}  // namespace

void add_int8_experts(Ort::CustomOpDomain& domain) {
    static Operator made;  // 会话里只存它的指针，要活到进程结束
    domain.Add(&made);
}

}  // namespace dsx
