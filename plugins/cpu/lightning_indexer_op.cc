#include "lightning_indexer_op.h"

#include <algorithm>
#include <array>
#include <limits>
#include <memory>

#include "isa.h"
#include "lightning_indexer.h"
#include "op_dtypes.h"

namespace dsx {
namespace {

namespace spec = ops::lightning_indexer;

class Kernel {
public:
    Kernel(Dtype dtype, Dtype cache_dtype, const OrtKernelInfo* info)
        : dtype_(dtype), cache_dtype_(cache_dtype), kernels_(requested_kernels()),
          int8_(requested_quant_kernels(8)) {
        topk_ = attribute(Ort::ConstKernelInfo(info), spec::topk);
        if (topk_ < 1) {
            refuse(spec::kName, "topk 是 " + std::to_string(topk_) + "，应大于 0");
        }
    }

    OrtStatusPtr ComputeV2(OrtKernelContext* context) {
        return guard([&] { compute(Ort::KernelContext(context)); });
    }

private:
    void compute(const Ort::KernelContext& context) const {
        const Inputs inputs(spec::kName, spec::kInputs, context);
        inputs.check_ranks();
        LightningIndexer op{};
        const std::vector<int64_t>& query = inputs.shape(spec::q);
        op.B = query[0], op.S = inputs.shape(spec::k)[1], op.H = query[2], op.di = query[3], op.T = inputs.shape(spec::index_cache)[2];
        if (op.H < 1 || op.di < 1 || op.T > std::numeric_limits<int32_t>::max()) {
            inputs.refuse("头数与宽度要大于 0，T 要放得进 int32：" + inputs.shown(spec::q) + "，" + inputs.shown(spec::index_cache));
        }
        // 都不必排名时 q、w 可以没有行。
        const bool unasked = query[1] == 0;
        inputs.check_shape(spec::q, {op.B, unasked ? 0 : op.S, op.H, op.di});
        inputs.check_shape(spec::w, {op.B, unasked ? 0 : op.S, op.H});
        inputs.check_shape(spec::k, {op.B, op.S, op.di});
        inputs.check_shape(spec::index_cache, {op.B, 1, op.T, index_width(cache_dtype_, op.di)});
        inputs.check_shape(spec::past_lens, {op.B});
        op.topk = topk_, op.dtype = dtype_, op.cache_dtype = cache_dtype_;
        op.q = inputs.raw(spec::q), op.w = inputs.data<float>(spec::w), op.k = inputs.raw(spec::k);
        op.index_cache = inputs.raw(spec::index_cache), op.past_lens = inputs.data<int64_t>(spec::past_lens);
        check_past_lens(inputs, op.past_lens, op.B, op.S, op.T);
        if (unasked && std::any_of(op.past_lens, op.past_lens + op.B, [&](int64_t past) { return past + op.S > topk_; })) {
            inputs.refuse(inputs.shown(spec::q) + "，没有 query，而看得见的 key 超过 topk=" + std::to_string(topk_));
        }
        const std::array<int64_t, 3> chosen{op.B, op.S, op.topk};
        const std::array<int64_t, 2> rows{op.B, op.S};
        op.indices = context.GetOutput(spec::indices, chosen.data(), chosen.size()).GetTensorMutableData<int32_t>();
        op.counts = context.GetOutput(spec::counts, rows.data(), rows.size()).GetTensorMutableData<int32_t>();
        op.index_cache_out =
            context.GetOutput(spec::index_cache_out, inputs.shape(spec::index_cache)).GetTensorMutableRawData();
        run(op, kernels_, int8_, pool_of(context));
    }

    Dtype dtype_, cache_dtype_;
    const Kernels& kernels_;
    const QuantKernels& int8_;
    int64_t topk_;
};

// 一种 (计算, 缓存) 的 ONNX 类型。
struct Operator : Ort::CustomOpBase<Operator, Kernel, true> {
    Operator(int compute, int cache) : compute_(compute), cache_(cache) {
        version = kOrtApi;
        declare_in_place<spec::index_cache, spec::index_cache_out>(*this);
    }

    OrtStatusPtr CreateKernelV2(const OrtApi&, const OrtKernelInfo* info, void** kernel) const {
        return guard([&] { *kernel = new Kernel(dtype_of(compute_), dtype_of(cache_), info); });
    }
    const char* GetName() const { return spec::kName; }
    const char* GetExecutionProviderType() const { return "CPUExecutionProvider"; }
    size_t GetInputTypeCount() const { return spec::kInputs.size(); }
    ONNXTensorElementDataType GetInputType(size_t i) const { return chosen(spec::kInputs[i]); }
    size_t GetOutputTypeCount() const { return spec::kOutputs.size(); }
    ONNXTensorElementDataType GetOutputType(size_t i) const { return chosen(spec::kOutputs[i]); }

private:
    ONNXTensorElementDataType chosen(const ops::Port& port) const {
        const int variable = port.type == &ops::kT ? compute_ : cache_;
        return port.type->count == 1 ? type_of(port) : static_cast<ONNXTensorElementDataType>(variable);
    }

    int compute_, cache_;
};

}  // namespace

void add_lightning_indexer(Ort::CustomOpDomain& domain) {
    // 会话里只存它们的指针，要活到进程结束。
    static std::vector<std::unique_ptr<Operator>> operators;
    for (size_t c = 0; c < ops::kC.count; ++c) {
        for (size_t t = 0; t < ops::kT.count; ++t) {
            operators.push_back(std::make_unique<Operator>(ops::kT.onnx[t], ops::kC.onnx[c]));
            domain.Add(operators.back().get());
        }
    }
}

}  // namespace dsx
