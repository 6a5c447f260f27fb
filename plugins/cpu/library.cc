// ONNX Runtime 的算子库：登记各个算子。同名的函数体因此不再使用，模型不用改。
#include <string>

#include "isa.h"
#include "lightning_indexer_op.h"
#include "mla_attention_op.h"
#include "ort.h"
#include "quant_experts_op.h"
#include "quant_linear_op.h"

#if defined(_WIN32)
#define DSX_EXPORT __declspec(dllexport)
#else
#define DSX_EXPORT __attribute__((visibility("default")))
#endif

namespace dsx {
namespace {

const OrtCustomOpDomain* domain() {
    static const Ort::CustomOpDomain made = [] {
        Ort::CustomOpDomain domain(ops::kDomain);
        add_mla_attention(domain);
        add_lightning_indexer(domain);
        // 只有普通循环可用的平台上不登记：ONNX Runtime 自己的 kernel 在那里快得多，走函数体。
        if (available_isas().size() > 1) {
            add_quant_linear(domain);
            add_quant_experts(domain);
        }
        return domain;
    }();
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
        for (const std::string& isa : dsx::available_isas()) {
            out += out.empty() ? isa : "," + isa;
        }
        return out;
    }();
    return names.c_str();
}

}  // extern "C"
