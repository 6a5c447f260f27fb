#include "quant_linear_op.h"

#include "isa.h"
#include "quant_linear.h"
#include "quant_op.h"

namespace dsx {
namespace {

// 几个算子只差名字、位数与最后的零点：端口、属性的次序相同，用 int8 的那一份。
namespace spec = ops::int8_linear;
namespace affine = ops::int4_affine_linear;
static_assert(ops::int4_linear::kInputs.size() == spec::kInputs.size() && ops::int4_linear::codes == size_t{spec::codes} &&
              ops::int4_linear::scales == size_t{spec::scales});
static_assert(affine::kInputs.size() == spec::kInputs.size() + 1 && affine::codes == size_t{spec::codes} &&
              affine::scales == size_t{spec::scales} && affine::zero_points == spec::kInputs.size());

struct Int8Op {
    static constexpr const char* kName = ops::int8_linear::kName;
    static constexpr const auto& kInputs = ops::int8_linear::kInputs;
    static constexpr int64_t kBits = 8;
    static constexpr bool kAffine = false;
};
struct Int4Op {
    static constexpr const char* kName = ops::int4_linear::kName;
    static constexpr const auto& kInputs = ops::int4_linear::kInputs;
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
        K_ = attribute(node, spec::K), N_ = attribute(node, spec::N), block_ = attribute(node, spec::block_size);
        if (K_ < 1 || N_ < 1 || !is_supported_block(block_)) {
            refuse(Op::kName, "K、N 要大于 0，block_size 是 32、64 或 128：K=" + std::to_string(K_) + "，N=" + std::to_string(N_) +
                   "，block_size=" + std::to_string(block_));
        }
    }

    OrtStatusPtr ComputeV2(OrtKernelContext* context) {
        return guard([&] { compute(Ort::KernelContext(context)); });
    }

private:
    void compute(const Ort::KernelContext& context) const {
        const int64_t blocks = (K_ + block_ - 1) / block_;
        const Inputs inputs(Op::kName, Op::kInputs, context);
        std::vector<int64_t> shape = inputs.shape(spec::x);
        if (shape.empty() || shape.back() != K_) {
            inputs.refuse(inputs.shown(spec::x) + "，最后一维应为 K=" + std::to_string(K_));
        }
        inputs.check_shape(spec::codes, {N_, blocks, kernels_.bytes(block_)});
        inputs.check_shape(spec::scales, {N_, blocks});
        const uint8_t* zeros = nullptr;
        if constexpr (Op::kAffine) {
            inputs.check_shape(affine::zero_points, {N_, zero_row(blocks)});
            zeros = inputs.template data<uint8_t>(affine::zero_points);
        }
        int64_t rows = 1;
        for (size_t i = 0; i + 1 < shape.size(); ++i) {
            rows *= shape[i];
        }
        shape.back() = N_;
        float* y = context.GetOutput(spec::y, shape).template GetTensorMutableData<float>();
        const QuantLinear op{rows, K_, N_, block_, inputs.template data<float>(spec::x),
            inputs.template data<uint8_t>(spec::codes), float16_data(inputs, spec::scales), zeros, y};
        run(op, kernels_, pool_of(context));
    }

    const QuantKernels& kernels_;
    int64_t K_, N_, block_;
};

}  // namespace

void add_quant_linear(Ort::CustomOpDomain& domain) {
    // 会话里只存它们的指针，要活到进程结束。
    static QuantOperator<Int8Op, Kernel<Int8Op>, spec::kOutputs> int8;
    static QuantOperator<Int4Op, Kernel<Int4Op>, spec::kOutputs> int4;
    static QuantOperator<Int4AffineOp, Kernel<Int4AffineOp>, spec::kOutputs> affine;
    domain.Add(&int8);
    domain.Add(&int4);
    domain.Add(&affine);
}

}  // namespace dsx
