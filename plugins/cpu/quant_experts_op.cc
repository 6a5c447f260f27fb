#include "quant_experts_op.h"

#include "isa.h"
#include "quant_experts.h"
#include "quant_op.h"

namespace dsx {
namespace {

// 几个算子只差名字、位数与最后的零点：端口、属性的次序相同，用 int8 的那一份。
namespace spec = ops::int8_experts;
namespace affine = ops::int4_affine_experts;
static_assert(ops::int4_experts::kInputs.size() == spec::kInputs.size() && ops::int4_experts::gate_up == size_t{spec::gate_up} &&
              ops::int4_experts::down_scales == size_t{spec::down_scales});
static_assert(affine::kInputs.size() == spec::kInputs.size() + 2 && affine::gate_up == size_t{spec::gate_up} &&
              affine::down_scales == size_t{spec::down_scales} && affine::gate_up_zero_points == spec::kInputs.size());

struct Int8Op {
    static constexpr const char* kName = ops::int8_experts::kName;
    static constexpr const auto& kInputs = ops::int8_experts::kInputs;
    static constexpr int64_t kBits = 8;
    static constexpr bool kAffine = false;
};
struct Int4Op {
    static constexpr const char* kName = ops::int4_experts::kName;
    static constexpr const auto& kInputs = ops::int4_experts::kInputs;
    static constexpr int64_t kBits = 4;
    static constexpr bool kAffine = false;
};
struct Int4AffineOp {
    static constexpr const char* kName = affine::kName;
    static constexpr const auto& kInputs = affine::kInputs;
    static constexpr int64_t kBits = 4;
    static constexpr bool kAffine = true;
};

template <typename Op>
class Kernel {
public:
    // 指令集在会话建立时定下，之后的环境变量不影响它。
    explicit Kernel(const OrtKernelInfo* info) : kernels_(requested_quant_kernels(Op::kBits)) {
        const Ort::ConstKernelInfo node(info);
        k_ = attribute(node, spec::k), block_ = attribute(node, spec::block_size);
        if (k_ < 1 || !is_supported_block(block_)) {
            refuse(Op::kName, "k 要大于 0，block_size 是 32、64 或 128：k=" + std::to_string(k_) + "，block_size=" + std::to_string(block_));
        }
    }

    OrtStatusPtr ComputeV2(OrtKernelContext* context) {
        return guard([&] { compute(Ort::KernelContext(context)); });
    }

private:
    void compute(const Ort::KernelContext& context) const {
        const Inputs inputs(Op::kName, Op::kInputs, context);
        QuantExperts op = sizes_of(inputs);
        op.x = inputs.template data<float>(spec::x), op.log_weights = inputs.template data<float>(spec::log_weights);
        op.gate_up = inputs.template data<uint8_t>(spec::gate_up), op.gate_up_scales = float16_data(inputs, spec::gate_up_scales);
        op.down = inputs.template data<uint8_t>(spec::down), op.down_scales = float16_data(inputs, spec::down_scales);
        if constexpr (Op::kAffine) {
            op.gate_up_zeros = inputs.template data<uint8_t>(affine::gate_up_zero_points);
            op.down_zeros = inputs.template data<uint8_t>(affine::down_zero_points);
        }
        op.y = context.GetOutput(spec::y, inputs.shape(spec::x)).template GetTensorMutableData<float>();
        run(op, kernels_, pool_of(context));
    }

    // 由各输入的形状得出尺寸，并核对它们彼此相符。
    QuantExperts sizes_of(const Inputs<Op::kInputs.size()>& inputs) const {
        inputs.check_ranks();
        QuantExperts op{};
        op.k = k_, op.block = block_;
        op.N = inputs.shape(spec::x)[0], op.D = inputs.shape(spec::x)[1];
        op.E = inputs.shape(spec::log_weights)[1], op.I = inputs.shape(spec::down)[2] * 8 / Op::kBits;
        if (op.E < k_) {
            inputs.refuse(inputs.shown(spec::log_weights) + "，专家少于 k=" + std::to_string(k_));
        }
        if (op.D < 1 || op.I < 1 || op.D % block_ != 0 || op.I % block_ != 0) {
            inputs.refuse("D、I 要是 block_size=" + std::to_string(block_) + " 的倍数：" + inputs.shown(spec::x) + "，" +
                          inputs.shown(spec::down));
        }
        inputs.check_shape(spec::log_weights, {op.N, op.E});
        inputs.check_shape(spec::gate_up, {op.E, 2 * op.I, kernels_.bytes(op.D)});
        inputs.check_shape(spec::gate_up_scales, {op.E, 2 * op.I, op.D / block_});
        inputs.check_shape(spec::down, {op.E, op.D, kernels_.bytes(op.I)});
        inputs.check_shape(spec::down_scales, {op.E, op.D, op.I / block_});
        if constexpr (Op::kAffine) {
            inputs.check_shape(affine::gate_up_zero_points, {op.E, 2 * op.I, zero_row(op.D / block_)});
            inputs.check_shape(affine::down_zero_points, {op.E, op.D, zero_row(op.I / block_)});
        }
        return op;
    }

    const QuantKernels& kernels_;
    int64_t k_, block_;
};

}  // namespace

void add_quant_experts(Ort::CustomOpDomain& domain) {
    // 会话里只存它们的指针，要活到进程结束。
    static QuantOperator<Int8Op, Kernel<Int8Op>, spec::kOutputs> int8;
    static QuantOperator<Int4Op, Kernel<Int4Op>, spec::kOutputs> int4;
    static QuantOperator<Int4AffineOp, Kernel<Int4AffineOp>, spec::kOutputs> affine;
    domain.Add(&int8);
    domain.Add(&int4);
    domain.Add(&affine);
}

}  // namespace dsx
