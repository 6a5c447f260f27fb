#include "int8_experts_op.h"

#include <array>

#include "int8_experts.h"
#include "isa.h"

namespace dsx {
namespace {

// 次序与名字同 deepseek_export/ops/table.py 的 INT8_EXPERTS（tests/unit/test_cpu_int8.py 核对）。
constexpr std::array<const char*, 6> kInputs{
    "x", "log_weights", "gate_up", "gate_up_scales", "down", "down_scales"};
constexpr size_t kGateUp = 2, kDown = 4;

[[noreturn]] void refuse(const std::string& what) { throw Ort::Exception("dsx::Int8Experts：" + what, ORT_INVALID_ARGUMENT); }

using Shapes = std::array<std::vector<int64_t>, kInputs.size()>;

void check(const Shapes& shapes, size_t input, const std::vector<int64_t>& expected) {
    if (shapes[input] != expected) {
        refuse(std::string(kInputs[input]) + " 是 " + text(shapes[input]) + "，应为 " + text(expected));
    }
}

class Kernel {
public:
    // 指令集在会话建立时定下，之后的环境变量不影响它。
    explicit Kernel(const OrtKernelInfo* info) : kernels_(requested_int8_kernels()) {
        const Ort::ConstKernelInfo node(info);
        k_ = node.GetAttribute<int64_t>("k"), block_ = node.GetAttribute<int64_t>("block_size");
        if (k_ < 1 || (block_ != 32 && block_ != 64 && block_ != 128)) {
            refuse("k 要大于 0，block_size 是 32、64 或 128：k=" + std::to_string(k_) + "，block_size=" + std::to_string(block_));
        }
    }

    OrtStatusPtr ComputeV2(OrtKernelContext* context) {
        return guard([&] { compute(Ort::KernelContext(context)); });
    }

private:
    void compute(const Ort::KernelContext& context) const {
        std::array<Ort::ConstValue, kInputs.size()> inputs;
        Shapes shapes;
        for (size_t i = 0; i < kInputs.size(); ++i) {
            inputs[i] = context.GetInput(i);
            shapes[i] = inputs[i].GetTensorTypeAndShapeInfo().GetShape();
        }
        Int8Experts op = sizes_of(shapes);
        op.x = inputs[0].GetTensorData<float>(), op.log_weights = inputs[1].GetTensorData<float>();
        op.gate_up = inputs[kGateUp].GetTensorData<uint8_t>(), op.down = inputs[kDown].GetTensorData<uint8_t>();
        op.gate_up_scales = inputs[kGateUp + 1].GetTensorData<float>();
        op.down_scales = inputs[kDown + 1].GetTensorData<float>();
        op.y = context.GetOutput(0, shapes[0]).GetTensorMutableData<float>();
        run(op, kernels_, pool_of(context));
    }

    // 由各输入的形状得出尺寸，并核对它们彼此相符。
    Int8Experts sizes_of(const Shapes& shapes) const {
        constexpr std::array<size_t, kInputs.size()> ranks{2, 2, 3, 3, 3, 3};
        for (size_t i = 0; i < ranks.size(); ++i) {
            if (shapes[i].size() != ranks[i]) {
                refuse(std::string(kInputs[i]) + " 是 " + text(shapes[i]) + "，应有 " + std::to_string(ranks[i]) + " 维");
            }
        }
        Int8Experts op{};
        op.k = k_, op.block = block_;
        op.N = shapes[0][0], op.D = shapes[0][1], op.E = shapes[1][1], op.I = shapes[kDown][2];
        if (op.E < k_) {
            refuse("log_weights 是 " + text(shapes[1]) + "，专家少于 k=" + std::to_string(k_));
        }
        if (op.D < 1 || op.I < 1 || op.D % block_ != 0 || op.I % block_ != 0) {
            refuse("D、I 要是 block_size=" + std::to_string(block_) + " 的倍数：x 是 " + text(shapes[0]) + "，down 是 " +
                   text(shapes[kDown]));
        }
        check(shapes, 1, {op.N, op.E});
        check(shapes, kGateUp, {op.E, 2 * op.I, op.D});
        check(shapes, kGateUp + 1, {op.E, 2 * op.I, op.D / block_});
        check(shapes, kDown, {op.E, op.D, op.I});
        check(shapes, kDown + 1, {op.E, op.D, op.I / block_});
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
    const char* GetName() const { return "Int8Experts"; }
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
