#include "mla_attention_op.h"

#include <array>
#include <cstdlib>
#include <memory>

#include "isa.h"
#include "mla_attention.h"

namespace dsx {
namespace {

struct Type {
    Dtype dtype;
    ONNXTensorElementDataType onnx;
};
constexpr Type kFloat{Dtype::kFloat32, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT};
constexpr Type kHalf{Dtype::kFloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16};
constexpr Type kBrain{Dtype::kBfloat16, ONNX_TENSOR_ELEMENT_DATA_TYPE_BFLOAT16};
constexpr Type kByte{Dtype::kInt8, ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8};
constexpr std::array<Type, 3> kComputeTypes{kFloat, kHalf, kBrain};
constexpr std::array<Type, 4> kCacheTypes{kFloat, kHalf, kBrain, kByte};

// 次序与名字同 deepseek_export/ops/table.py 的 MLA_ATTENTION（tests/unit/test_cpu_library.py 核对）。
constexpr const char* kName = "MlaAttention";
constexpr std::array<const char*, 7> kInputs{"q_nope", "q_pe", "c_kv", "k_pe", "kv_cache", "past_lens", "w_kv_b"};
constexpr std::array<const char*, 2> kOutputs{"o", "kv_cache_out"};
constexpr size_t kCacheInput = 4, kPastLens = 5, kWeight = 6, kCacheOutput = 1;

// 由各输入的形状得出尺寸，并核对它们彼此相符。
MlaAttention sizes_of(const Inputs<kInputs.size()>& inputs, Dtype cache_dtype) {
    inputs.check_ranks({4, 4, 3, 3, 4, 1, 2});
    MlaAttention op{};
    const std::vector<int64_t>& q_nope = inputs.shape(0);
    op.B = q_nope[0], op.S = q_nope[1], op.H = q_nope[2], op.dn = q_nope[3];
    op.dr = inputs.shape(1)[3], op.r = inputs.shape(2)[2], op.T = inputs.shape(kCacheInput)[2];
    if (op.H < 1 || op.dn < 1 || op.dr < 1 || op.r < 1) {
        inputs.refuse("头数与各个宽度都要大于 0：" + inputs.shown(0) + "，" + inputs.shown(1));
    }
    const int64_t rows = inputs.shape(kWeight)[0];
    if (rows % op.H != 0 || rows / op.H <= op.dn) {
        inputs.refuse(inputs.shown(kWeight) + "，行数应为 H*(dn+dv)，H=" + std::to_string(op.H) + "，dn=" + std::to_string(op.dn));
    }
    op.dv = rows / op.H - op.dn;
    inputs.check_shape(1, {op.B, op.S, op.H, op.dr});
    inputs.check_shape(2, {op.B, op.S, op.r});
    inputs.check_shape(3, {op.B, op.S, op.dr});
    inputs.check_shape(kCacheInput, {op.B, 1, op.T, cache_width(cache_dtype, op.r, op.dr)});
    inputs.check_shape(kPastLens, {op.B});
    inputs.check_shape(kWeight, {op.H * (op.dn + op.dv), op.r});
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

class Kernel {
public:
    // 指令集与形式在会话建立时定下，之后的环境变量不影响它。
    Kernel(Dtype dtype, Dtype cache_dtype, Dtype weight_dtype, const OrtKernelInfo* info)
        : dtype_(dtype), cache_dtype_(cache_dtype), weight_dtype_(weight_dtype), kernels_(requested_kernels()), form_(requested_form()) {
        scale_ = Ort::ConstKernelInfo(info).GetAttribute<float>("scale");
    }

    OrtStatusPtr ComputeV2(OrtKernelContext* context) {
        return guard([&] { compute(Ort::KernelContext(context)); });
    }

private:
    void compute(const Ort::KernelContext& context) const {
        const Inputs inputs(kName, kInputs, context);
        MlaAttention op = sizes_of(inputs, cache_dtype_);
        op.scale = scale_, op.dtype = dtype_, op.cache_dtype = cache_dtype_, op.weight_dtype = weight_dtype_;
        op.q_nope = inputs.raw(0), op.q_pe = inputs.raw(1), op.c_kv = inputs.raw(2), op.k_pe = inputs.raw(3);
        op.kv_cache = inputs.raw(kCacheInput), op.w_kv_b = inputs.raw(kWeight);
        op.past_lens = inputs.data<int64_t>(kPastLens);
        for (int64_t b = 0; b < op.B; ++b) {
            if (op.past_lens[b] < 0 || op.past_lens[b] > op.T - op.S) {
                inputs.refuse("past_lens[" + std::to_string(b) + "] = " + std::to_string(op.past_lens[b]) + "，加 S=" +
                       std::to_string(op.S) + " 个新位置放不进容量 T=" + std::to_string(op.T));
            }
        }
        const std::array<int64_t, 4> o_shape{op.B, op.S, op.H, op.dv};
        op.o = context.GetOutput(0, o_shape.data(), o_shape.size()).GetTensorMutableRawData();
        op.kv_cache_out = context.GetOutput(kCacheOutput, inputs.shape(kCacheInput)).GetTensorMutableRawData();
        run(op, form_, kernels_, pool_of(context));
    }

    Dtype dtype_, cache_dtype_, weight_dtype_;
    const Kernels& kernels_;
    Form form_;
    float scale_;
};

// 一种 (计算 dtype, 缓存 dtype, 权重 dtype)；同名的几个由 ONNX Runtime 合成一个算子，类型不在其中的节点在建立会话时就被拒绝。
struct Operator : Ort::CustomOpBase<Operator, Kernel, true> {
    Operator(Type compute, Type cache, Type weight) : compute_(compute), cache_(cache), weight_(weight) {
        version = kOrtApi;
        GetMayInplace = [](int** inputs, int** outputs) -> size_t {
            *inputs = static_cast<int*>(std::malloc(sizeof(int)));
            *outputs = static_cast<int*>(std::malloc(sizeof(int)));
            **inputs = kCacheInput;
            **outputs = kCacheOutput;
            return 1;
        };
        ReleaseMayInplace = [](int* inputs, int* outputs) {
            std::free(inputs);
            std::free(outputs);
        };
    }

    OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
        return guard([&] { *kernel = new Kernel(compute_.dtype, cache_.dtype, weight_.dtype, info); });
    }
    const char* GetName() const { return kName; }
    const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
    size_t GetInputTypeCount() const { return kInputs.size(); }
    ONNXTensorElementDataType GetInputType(size_t i) const {
        switch (i) {
        case kPastLens: return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
        case kCacheInput: return cache_.onnx;
        case kWeight: return weight_.onnx;
        default: return compute_.onnx;
        }
    }
    size_t GetOutputTypeCount() const { return kOutputs.size(); }
    ONNXTensorElementDataType GetOutputType(size_t i) const { return i == kCacheOutput ? cache_.onnx : compute_.onnx; }

    Type compute_, cache_, weight_;
};

}  // namespace

void add_mla_attention(Ort::CustomOpDomain& domain) {
    // 会话里只存它们的指针，要活到进程结束。
    static std::vector<std::unique_ptr<Operator>> operators;
    const auto add = [&domain](const Type& compute, const Type& cache, const Type& weight) {
        operators.push_back(std::make_unique<Operator>(compute, cache, weight));
        domain.Add(operators.back().get());
    };
    for (const Type& cache : kCacheTypes) {
        for (const Type& compute : kComputeTypes) {
            add(compute, cache, compute);
        }
        add(kFloat, cache, kBrain);  // 量化的 bundle 把 w_kv_b 存成 bfloat16
    }
}

}  // namespace dsx
