#include "mla_attention_op.h"

#include <array>
#include <cstdlib>
#include <memory>

#include "isa.h"
#include "mla_attention.h"
#include "op_dtypes.h"

namespace dsx {
namespace {

namespace spec = ops::mla_attention;
namespace sparse = ops::sparse_mla_attention;

// 两个算子的契约；稀疏的前七个输入、两个输出与属性都同 MlaAttention，后面多出选中的行。
struct Dense {
    static constexpr bool kSparse = false;
    static constexpr char const* kName = spec::kName;
    static constexpr auto& kInputs = spec::kInputs;
};
struct Sparse {
    static constexpr bool kSparse = true;
    static constexpr char const* kName = sparse::kName;
    static constexpr auto& kInputs = sparse::kInputs;
};
static_assert(static_cast<size_t>(sparse::w_kv_b) == static_cast<size_t>(spec::w_kv_b));
static_assert(static_cast<size_t>(sparse::kv_cache) == static_cast<size_t>(spec::kv_cache));

// int8 的 w_kv_b 每几个码一个 scale，由一行的宽度得出。
template <size_t kCount>
int64_t weight_block_of(const Inputs<kCount>& inputs, int64_t r) {
    for (const int64_t block : {32, 64, 128}) {
        if (r % block == 0 && inputs.shape(spec::w_kv_b)[1] == weight_row(r, block)) {
            return block;
        }
    }
    inputs.refuse(inputs.shown(spec::w_kv_b) + "，int8 的一行应是 r=" + std::to_string(r) +
                  " 个码，再是每 32、64 或 128 个一个 float16 的 scale");
}

// 由各输入的形状得出尺寸，并核对它们彼此相符。
template <size_t kCount>
MlaAttention sizes_of(const Inputs<kCount>& inputs, Dtype cache_dtype, Dtype weight_dtype) {
    inputs.check_ranks();
    MlaAttention op{};
    const std::vector<int64_t>& query = inputs.shape(spec::q_nope);
    op.B = query[0], op.S = query[1], op.H = query[2], op.dn = query[3];
    op.dr = inputs.shape(spec::q_pe)[3], op.r = inputs.shape(spec::c_kv)[2], op.T = inputs.shape(spec::kv_cache)[2];
    if (op.H < 1 || op.dn < 1 || op.dr < 1 || op.r < 1) {
        inputs.refuse("头数与各个宽度都要大于 0：" + inputs.shown(spec::q_nope) + "，" + inputs.shown(spec::q_pe));
    }
    const int64_t rows = inputs.shape(spec::w_kv_b)[0];
    if (rows % op.H != 0 || rows / op.H <= op.dn) {
        inputs.refuse(inputs.shown(spec::w_kv_b) + "，行数应为 H*(dn+dv)，H=" + std::to_string(op.H) + "，dn=" + std::to_string(op.dn));
    }
    op.dv = rows / op.H - op.dn;
    inputs.check_shape(spec::q_pe, {op.B, op.S, op.H, op.dr});
    inputs.check_shape(spec::c_kv, {op.B, op.S, op.r});
    inputs.check_shape(spec::k_pe, {op.B, op.S, op.dr});
    inputs.check_shape(spec::kv_cache, {op.B, 1, op.T, cache_width(cache_dtype, op.r, op.dr)});
    inputs.check_shape(spec::past_lens, {op.B});
    int64_t width = op.r;
    if (weight_dtype == Dtype::kInt8) {
        op.weight_block = weight_block_of(inputs, op.r);
        width = weight_row(op.r, op.weight_block);
    }
    inputs.check_shape(spec::w_kv_b, {op.H * (op.dn + op.dv), width});
    return op;
}

Form requested_form() {
    const char* value = std::getenv("DSX_CPU_MLA_FORM");
    const std::string name = value ? value : "";
    if (name.empty() || name == "auto") {
        return Form::kAuto;
    }
    if (name == "absorb" || name == "naive") {
        return name == "absorb" ? Form::kAbsorb : Form::kNaive;
    }
    throw std::invalid_argument("DSX_CPU_MLA_FORM=" + name + " 不可用，能用：auto、absorb、naive");
}

// 选中的行：形状相符，下标在缓存里；越界的下标不能拿去读内存。
template <size_t kCount>
void read_selection(const Inputs<kCount>& inputs, MlaAttention& op) {
    op.slots = inputs.shape(sparse::indices)[2];
    inputs.check_shape(sparse::indices, {op.B, op.S, op.slots});
    inputs.check_shape(sparse::counts, {op.B, op.S});
    op.indices = inputs.template data<int32_t>(sparse::indices), op.counts = inputs.template data<int32_t>(sparse::counts);
    for (int64_t i = 0; i < op.B * op.S; ++i) {
        if (op.counts[i] < 1 || op.counts[i] > op.slots) {
            inputs.refuse("第 " + std::to_string(i) + " 个 query 的 counts 是 " + std::to_string(op.counts[i]) + "，应在 1 到 " +
                          std::to_string(op.slots) + " 之间");
        }
        const int32_t* chosen = op.indices + i * op.slots;
        for (int64_t j = 0; j < op.counts[i]; ++j) {
            if (chosen[j] < 0 || chosen[j] >= op.T) {
                inputs.refuse("第 " + std::to_string(i) + " 个 query 选中的位置 " + std::to_string(chosen[j]) + " 不在缓存的 " +
                              std::to_string(op.T) + " 行里");
            }
        }
    }
}

template <typename Contract>
class Kernel {
public:
    // 指令集与形式在会话建立时定下，之后的环境变量不影响它。
    Kernel(Dtype dtype, Dtype cache_dtype, Dtype weight_dtype, const OrtKernelInfo* info)
        : dtype_(dtype), cache_dtype_(cache_dtype), weight_dtype_(weight_dtype), kernels_(requested_kernels()),
          int8_(requested_quant_kernels(8)), form_(requested_form()) {
        scale_ = attribute(Ort::ConstKernelInfo(info), spec::scale);
    }

    OrtStatusPtr ComputeV2(OrtKernelContext* context) {
        return guard([&] { compute(Ort::KernelContext(context)); });
    }

private:
    void compute(const Ort::KernelContext& context) const {
        const Inputs inputs(Contract::kName, Contract::kInputs, context);
        MlaAttention op = sizes_of(inputs, cache_dtype_, weight_dtype_);
        op.scale = scale_, op.dtype = dtype_, op.cache_dtype = cache_dtype_, op.weight_dtype = weight_dtype_;
        op.q_nope = inputs.raw(spec::q_nope), op.q_pe = inputs.raw(spec::q_pe);
        op.c_kv = inputs.raw(spec::c_kv), op.k_pe = inputs.raw(spec::k_pe);
        op.kv_cache = inputs.raw(spec::kv_cache), op.w_kv_b = inputs.raw(spec::w_kv_b);
        op.past_lens = inputs.template data<int64_t>(spec::past_lens);
        check_past_lens(inputs, op.past_lens, op.B, op.S, op.T);
        if constexpr (Contract::kSparse) {
            read_selection(inputs, op);
        }
        const std::array<int64_t, 4> o_shape{op.B, op.S, op.H, op.dv};
        op.o = context.GetOutput(spec::o, o_shape.data(), o_shape.size()).GetTensorMutableRawData();
        op.kv_cache_out = context.GetOutput(spec::kv_cache_out, inputs.shape(spec::kv_cache)).GetTensorMutableRawData();
        run(op, form_, kernels_, int8_, pool_of(context));
    }

    Dtype dtype_, cache_dtype_, weight_dtype_;
    const Kernels& kernels_;
    const QuantKernels& int8_;
    Form form_;
    float scale_;
};

// 一种 (计算, 缓存, 权重) 的 ONNX 类型；同名的几个由 ONNX Runtime 合成一个算子，类型不在其中的节点在建立会话时就被拒绝。
template <typename Contract>
struct Operator : Ort::CustomOpBase<Operator<Contract>, Kernel<Contract>, true> {
    Operator(int compute, int cache, int weight) : compute_(compute), cache_(cache), weight_(weight) {
        this->version = kOrtApi;
        declare_in_place<spec::kv_cache, spec::kv_cache_out>(*this);
    }

    OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
        return guard([&] { *kernel = new Kernel<Contract>(dtype_of(compute_), dtype_of(cache_), dtype_of(weight_), info); });
    }
    const char* GetName() const { return Contract::kName; }
    const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
    size_t GetInputTypeCount() const { return Contract::kInputs.size(); }
    ONNXTensorElementDataType GetInputType(size_t i) const { return chosen(Contract::kInputs[i]); }
    size_t GetOutputTypeCount() const { return spec::kOutputs.size(); }
    ONNXTensorElementDataType GetOutputType(size_t i) const { return chosen(spec::kOutputs[i]); }

private:
    ONNXTensorElementDataType chosen(const ops::Port& port) const {
        const int variable = port.type == &ops::kT ? compute_ : port.type == &ops::kC ? cache_ : weight_;
        return port.type->count == 1 ? type_of(port) : static_cast<ONNXTensorElementDataType>(variable);
    }

    int compute_, cache_, weight_;
};

template <typename Contract>
void add_all(Ort::CustomOpDomain& domain) {
    // 会话里只存它们的指针，要活到进程结束。
    static std::vector<std::unique_ptr<Operator<Contract>>> operators;
    const auto add = [&domain](int compute, int cache, int weight) {
        operators.push_back(std::make_unique<Operator<Contract>>(compute, cache, weight));
        domain.Add(operators.back().get());
    };
    for (size_t c = 0; c < ops::kC.count; ++c) {
        const int cache = ops::kC.onnx[c];
        for (size_t t = 0; t < ops::kT.count; ++t) {
            add(ops::kT.onnx[t], cache, ops::kT.onnx[t]);
        }
        // 量化的 bundle 把 w_kv_b 存成 int8 或 bfloat16
        add(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, cache, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8);
        add(ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT, cache, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16);
    }
}

}  // namespace

void add_mla_attention(Ort::CustomOpDomain& domain) {
    add_all<Dense>(domain);
    add_all<Sparse>(domain);
}

}  // namespace dsx
