// ONNX Runtime 的算子库：登记各个算子。同名的函数体因此不再使用，模型不用改。
#include <array>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "int8_experts_op.h"
#include "int8_linear_op.h"
#include "isa.h"
#include "mla_attention.h"
#include "ort.h"

#if defined(_WIN32)
#define DSX_EXPORT __declspec(dllexport)
#else
#define DSX_EXPORT __attribute__((visibility("default")))
#endif

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
constexpr std::array<const char*, 7> kInputs{"q_nope", "q_pe", "c_kv", "k_pe", "kv_cache", "past_lens", "w_kv_b"};
constexpr std::array<const char*, 2> kOutputs{"o", "kv_cache_out"};
constexpr size_t kCacheInput = 4, kPastLens = 5, kWeight = 6, kCacheOutput = 1;

[[noreturn]] void refuse(const std::string& what) {
    throw Ort::Exception("dsx::MlaAttention：" + what, ORT_INVALID_ARGUMENT);
}

using Shapes = std::array<std::vector<int64_t>, kInputs.size()>;

void check_rank(const Shapes& shapes, size_t input, size_t rank) {
    if (shapes[input].size() != rank) {
        refuse(std::string(kInputs[input]) + " 是 " + text(shapes[input]) + "，应有 " + std::to_string(rank) + " 维");
    }
}

void check_shape(const Shapes& shapes, size_t input, const std::vector<int64_t>& expected) {
    if (shapes[input] != expected) {
        refuse(std::string(kInputs[input]) + " 是 " + text(shapes[input]) + "，应为 " + text(expected));
    }
}

// 由各输入的形状得出尺寸，并核对它们彼此相符。
MlaAttention sizes_of(const Shapes& shapes, Dtype cache_dtype) {
    constexpr std::array<size_t, kInputs.size()> ranks{4, 4, 3, 3, 4, 1, 2};
    for (size_t i = 0; i < ranks.size(); ++i) {
        check_rank(shapes, i, ranks[i]);
    }
    MlaAttention op{};
    op.B = shapes[0][0], op.S = shapes[0][1], op.H = shapes[0][2], op.dn = shapes[0][3];
    op.dr = shapes[1][3], op.r = shapes[2][2], op.T = shapes[4][2];
    if (op.H < 1 || op.dn < 1 || op.dr < 1 || op.r < 1) {
        refuse("头数与各个宽度都要大于 0：q_nope 是 " + text(shapes[0]) + "，q_pe 是 " + text(shapes[1]));
    }
    if (shapes[6][0] % op.H != 0 || shapes[6][0] / op.H <= op.dn) {
        refuse("w_kv_b 是 " + text(shapes[6]) + "，行数应为 H*(dn+dv)，H=" + std::to_string(op.H) + "，dn=" + std::to_string(op.dn));
    }
    op.dv = shapes[6][0] / op.H - op.dn;
    check_shape(shapes, 1, {op.B, op.S, op.H, op.dr});
    check_shape(shapes, 2, {op.B, op.S, op.r});
    check_shape(shapes, 3, {op.B, op.S, op.dr});
    check_shape(shapes, 4, {op.B, 1, op.T, cache_width(cache_dtype, op.r, op.dr)});
    check_shape(shapes, 5, {op.B});
    check_shape(shapes, 6, {op.H * (op.dn + op.dv), op.r});
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
        std::array<Ort::ConstValue, kInputs.size()> inputs;
        Shapes shapes;
        for (size_t i = 0; i < kInputs.size(); ++i) {
            inputs[i] = context.GetInput(i);
            shapes[i] = inputs[i].GetTensorTypeAndShapeInfo().GetShape();
        }
        MlaAttention op = sizes_of(shapes, cache_dtype_);
        op.scale = scale_, op.dtype = dtype_, op.cache_dtype = cache_dtype_, op.weight_dtype = weight_dtype_;
        op.q_nope = inputs[0].GetTensorRawData(), op.q_pe = inputs[1].GetTensorRawData();
        op.c_kv = inputs[2].GetTensorRawData(), op.k_pe = inputs[3].GetTensorRawData();
        op.kv_cache = inputs[kCacheInput].GetTensorRawData(), op.w_kv_b = inputs[kWeight].GetTensorRawData();
        op.past_lens = inputs[kPastLens].GetTensorData<int64_t>();
        for (int64_t b = 0; b < op.B; ++b) {
            if (op.past_lens[b] < 0 || op.past_lens[b] > op.T - op.S) {
                refuse("past_lens[" + std::to_string(b) + "] = " + std::to_string(op.past_lens[b]) + "，加 S=" +
                       std::to_string(op.S) + " 个新位置放不进容量 T=" + std::to_string(op.T));
            }
        }
        const std::array<int64_t, 4> o_shape{op.B, op.S, op.H, op.dv};
        op.o = context.GetOutput(0, o_shape.data(), o_shape.size()).GetTensorMutableRawData();
        op.kv_cache_out = context.GetOutput(kCacheOutput, shapes[kCacheInput]).GetTensorMutableRawData();
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
    const char* GetName() const { return "MlaAttention"; }
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

// 登记的对象要活到进程结束：会话里只存它们的指针。
const OrtCustomOpDomain* domain() {
    static std::vector<std::unique_ptr<Operator>> operators;
    static Ort::CustomOpDomain made{nullptr};
    static std::once_flag once;
    std::call_once(once, [] {
        made = Ort::CustomOpDomain("dsx");
        const auto add = [](const Type& compute, const Type& cache, const Type& weight) {
            operators.push_back(std::make_unique<Operator>(compute, cache, weight));
            made.Add(operators.back().get());
        };
        for (const Type& cache : kCacheTypes) {
            for (const Type& compute : kComputeTypes) {
                add(compute, cache, compute);
            }
            add(kFloat, cache, kBrain);  // 量化的 bundle 把 w_kv_b 存成 bfloat16
        }
        // 只有普通循环可用的平台上不登记：ONNX Runtime 自己的 kernel 在那里快得多，走函数体。
        if (available_kernels().size() > 1) {
            add_int8_linear(made);
            add_int8_experts(made);
        }
    });
    return made;
}

}  // namespace
}  // namespace dsx

extern "C" {

DSX_EXPORT OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
    const OrtApi* api = base->GetApi(dsx::kOrtApi);
    if (api == nullptr) {
        return nullptr;  // 比 1.21 旧：什么也不登记，模型走函数体；Python 一侧事先就会拒绝
    }
    Ort::InitApi(api);
    return dsx::guard([&] { Ort::ThrowOnError(api->AddCustomOpDomain(options, const_cast<OrtCustomOpDomain*>(dsx::domain()))); });
}

// 这台机器能用的指令集，最快的在前，逗号分隔；给 dsx doctor 与 manifest 看。
DSX_EXPORT const char* dsx_cpu_isas() {
    static const std::string names = [] {
        std::string out;
        for (const dsx::Kernels* kernels : dsx::available_kernels()) {
            out += out.empty() ? kernels->name : std::string(",") + kernels->name;
        }
        return out;
    }();
    return names.c_str();
}

}  // extern "C"
