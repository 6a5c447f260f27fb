// 算子的契约：由 deepseek_export/ops/table.py 生成（make ops-header），不要手改。
//
// 一个算子一个 namespace：名字，输入输出的次序（枚举与端口同名）、类型变量、秩，属性的名字与类型。
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <string>

namespace dsx::ops {

inline constexpr char const* kDomain = "dsx";
inline constexpr char const* kPluginNamespace = "dsx";
inline constexpr char const* kPluginVersion = "1";

// 类型变量：允许的 ONNX 类型（与 ONNXTensorElementDataType 同值）。
struct Types {
    size_t count;
    std::array<int, 4> onnx;
};

struct Port {
    char const* name;
    Types const* type;
    size_t rank;  // 0 是不定
};

template <typename T>
struct Attribute {
    char const* name;
};

inline constexpr Types kT{3, {1, 10, 16}};  // float32、float16、bfloat16
inline constexpr Types kC{4, {1, 10, 16, 3}};  // float32、float16、bfloat16、int8
inline constexpr Types kF{3, {1, 10, 16}};  // float32、float16、bfloat16
inline constexpr Types kW{4, {1, 10, 16, 3}};  // float32、float16、bfloat16、int8
inline constexpr Types kQ{2, {3, 22}};  // int8、int4
inline constexpr Types kS{3, {1, 10, 16}};  // float32、float16、bfloat16
inline constexpr Types kI64{1, {7}};  // int64
inline constexpr Types kI32{1, {6}};  // int32
inline constexpr Types kF32{1, {1}};  // float32
inline constexpr Types kF16{1, {10}};  // float16
inline constexpr Types kU8{1, {2}};  // uint8
inline constexpr Types kI8{1, {3}};  // int8

// 有 TensorRT 插件的算子。
inline constexpr std::array<char const*, 7> kPlugins{"LatentAttention", "LatentCacheUpdate", "IndexTopK", "SparseLatentAttention", "MoeExperts", "QuantizedMoeExperts", "QuantizedLinear"};

namespace mla_attention {
inline constexpr char const* kName = "MlaAttention";
enum Input : size_t { q_nope, q_pe, c_kv, k_pe, kv_cache, past_lens, w_kv_b };
inline constexpr std::array<Port, 7> kInputs{{
    {"q_nope", &kT, 4},  // [B, S, H, dn]
    {"q_pe", &kT, 4},  // [B, S, H, dr]
    {"c_kv", &kT, 3},  // [B, S, r]
    {"k_pe", &kT, 3},  // [B, S, dr]
    {"kv_cache", &kC, 4},  // [B, 1, T, cw]
    {"past_lens", &kI64, 1},  // [B]
    {"w_kv_b", &kW, 2},  // [H*(dn+dv), kw]
}};
enum Output : size_t { o, kv_cache_out };
inline constexpr std::array<Port, 2> kOutputs{{
    {"o", &kT, 4},  // [B, S, H, dv]
    {"kv_cache_out", &kC, 4},  // [B, 1, T, cw]
}};
inline constexpr Attribute<float> scale{"scale"};
}  // namespace mla_attention

namespace lightning_indexer {
inline constexpr char const* kName = "LightningIndexer";
enum Input : size_t { q, w, k, index_cache, past_lens };
inline constexpr std::array<Port, 5> kInputs{{
    {"q", &kT, 4},  // [B, Sq, Hi, di]
    {"w", &kF32, 3},  // [B, Sq, Hi]
    {"k", &kT, 3},  // [B, S, di]
    {"index_cache", &kC, 4},  // [B, 1, T, iw]
    {"past_lens", &kI64, 1},  // [B]
}};
enum Output : size_t { indices, counts, index_cache_out };
inline constexpr std::array<Port, 3> kOutputs{{
    {"indices", &kI32, 3},  // [B, S, ks]
    {"counts", &kI32, 2},  // [B, S]
    {"index_cache_out", &kC, 4},  // [B, 1, T, iw]
}};
inline constexpr Attribute<int64_t> topk{"topk"};
}  // namespace lightning_indexer

namespace sparse_mla_attention {
inline constexpr char const* kName = "SparseMlaAttention";
enum Input : size_t { q_nope, q_pe, c_kv, k_pe, kv_cache, past_lens, w_kv_b, indices, counts };
inline constexpr std::array<Port, 9> kInputs{{
    {"q_nope", &kT, 4},  // [B, S, H, dn]
    {"q_pe", &kT, 4},  // [B, S, H, dr]
    {"c_kv", &kT, 3},  // [B, S, r]
    {"k_pe", &kT, 3},  // [B, S, dr]
    {"kv_cache", &kC, 4},  // [B, 1, T, cw]
    {"past_lens", &kI64, 1},  // [B]
    {"w_kv_b", &kW, 2},  // [H*(dn+dv), kw]
    {"indices", &kI32, 3},  // [B, S, ks]
    {"counts", &kI32, 2},  // [B, S]
}};
enum Output : size_t { o, kv_cache_out };
inline constexpr std::array<Port, 2> kOutputs{{
    {"o", &kT, 4},  // [B, S, H, dv]
    {"kv_cache_out", &kC, 4},  // [B, 1, T, cw]
}};
inline constexpr Attribute<float> scale{"scale"};
}  // namespace sparse_mla_attention

namespace latent_attention {
inline constexpr char const* kName = "LatentAttention";
enum Input : size_t { q, kv_cache, past_lens };
inline constexpr std::array<Port, 3> kInputs{{
    {"q", &kT, 4},  // [B, S, H, r+dr]
    {"kv_cache", &kC, 4},  // [B, 1, T, cw]
    {"past_lens", &kI64, 1},  // [B]
}};
enum Output : size_t { context };
inline constexpr std::array<Port, 1> kOutputs{{
    {"context", &kT, 3},  // [H, B*S, r]
}};
inline constexpr Attribute<float> scale{"scale"};
inline constexpr Attribute<int64_t> kv_lora_rank{"kv_lora_rank"};
}  // namespace latent_attention

namespace latent_cache_update {
inline constexpr char const* kName = "LatentCacheUpdate";
enum Input : size_t { c_kv, k_pe, kv_cache, past_lens };
inline constexpr std::array<Port, 4> kInputs{{
    {"c_kv", &kT, 3},  // [B, S, r]
    {"k_pe", &kT, 3},  // [B, S, dr]
    {"kv_cache", &kI8, 4},  // [B, 1, T, cw]
    {"past_lens", &kI64, 1},  // [B]
}};
enum Output : size_t { kv_cache_out };
inline constexpr std::array<Port, 1> kOutputs{{
    {"kv_cache_out", &kI8, 4},  // [B, 1, T, cw]
}};
}  // namespace latent_cache_update

namespace index_topk {
inline constexpr char const* kName = "IndexTopK";
enum Input : size_t { q, w, index_cache, past_lens };
inline constexpr std::array<Port, 4> kInputs{{
    {"q", &kT, 4},  // [B, S, Hi, di]
    {"w", &kF32, 3},  // [B, S, Hi]
    {"index_cache", &kF, 4},  // [B, 1, T, di]
    {"past_lens", &kI64, 1},  // [B]
}};
enum Output : size_t { indices, counts };
inline constexpr std::array<Port, 2> kOutputs{{
    {"indices", &kI32, 3},  // [B, S, ks]
    {"counts", &kI32, 2},  // [B, S]
}};
inline constexpr Attribute<int64_t> topk{"topk"};
}  // namespace index_topk

namespace sparse_latent_attention {
inline constexpr char const* kName = "SparseLatentAttention";
enum Input : size_t { q, kv_cache, indices, counts };
inline constexpr std::array<Port, 4> kInputs{{
    {"q", &kT, 4},  // [B, S, H, r+dr]
    {"kv_cache", &kF, 4},  // [B, 1, T, r+dr]
    {"indices", &kI32, 3},  // [B, S, ks]
    {"counts", &kI32, 2},  // [B, S]
}};
enum Output : size_t { context };
inline constexpr std::array<Port, 1> kOutputs{{
    {"context", &kT, 3},  // [H, B*S, r]
}};
inline constexpr Attribute<float> scale{"scale"};
inline constexpr Attribute<int64_t> kv_lora_rank{"kv_lora_rank"};
}  // namespace sparse_latent_attention

namespace moe_gate {
inline constexpr char const* kName = "MoeGate";
enum Input : size_t { logits, bias };
inline constexpr std::array<Port, 2> kInputs{{
    {"logits", &kF32, 2},  // [N, E]
    {"bias", &kF32, 1},  // [E]
}};
enum Output : size_t { topk_ids, topk_weights };
inline constexpr std::array<Port, 2> kOutputs{{
    {"topk_ids", &kI32, 2},  // [N, k]
    {"topk_weights", &kF32, 2},  // [N, k]
}};
inline constexpr Attribute<std::string> scoring_func{"scoring_func"};
inline constexpr Attribute<int64_t> n_group{"n_group"};
inline constexpr Attribute<int64_t> topk_group{"topk_group"};
inline constexpr Attribute<std::string> group_score{"group_score"};
inline constexpr Attribute<int64_t> top_k{"top_k"};
inline constexpr Attribute<int64_t> norm_topk_prob{"norm_topk_prob"};
inline constexpr Attribute<float> routed_scaling_factor{"routed_scaling_factor"};
}  // namespace moe_gate

namespace moe_experts {
inline constexpr char const* kName = "MoeExperts";
enum Input : size_t { x, topk_ids, topk_weights, w_gate, w_up, w_down };
inline constexpr std::array<Port, 6> kInputs{{
    {"x", &kT, 2},  // [N, D]
    {"topk_ids", &kI32, 2},  // [N, k]
    {"topk_weights", &kF32, 2},  // [N, k]
    {"w_gate", &kT, 3},  // [E, I, D]
    {"w_up", &kT, 3},  // [E, I, D]
    {"w_down", &kT, 3},  // [E, D, I]
}};
enum Output : size_t { y };
inline constexpr std::array<Port, 1> kOutputs{{
    {"y", &kT, 2},  // [N, D]
}};
}  // namespace moe_experts

namespace quantized_moe_experts {
inline constexpr char const* kName = "QuantizedMoeExperts";
enum Input : size_t { x, topk_ids, topk_weights, w_gate, w_gate_scales, w_up, w_up_scales, w_down, w_down_scales };
inline constexpr std::array<Port, 9> kInputs{{
    {"x", &kT, 2},  // [N, D]
    {"topk_ids", &kI32, 2},  // [N, k]
    {"topk_weights", &kF32, 2},  // [N, k]
    {"w_gate", &kQ, 3},  // [E, I, D]
    {"w_gate_scales", &kS, 3},  // [E, I/block_rows, D/block_size]
    {"w_up", &kQ, 3},  // [E, I, D]
    {"w_up_scales", &kS, 3},  // [E, I/block_rows, D/block_size]
    {"w_down", &kQ, 3},  // [E, D, I]
    {"w_down_scales", &kS, 3},  // [E, D/block_rows, I/block_size]
}};
enum Output : size_t { y };
inline constexpr std::array<Port, 1> kOutputs{{
    {"y", &kT, 2},  // [N, D]
}};
inline constexpr Attribute<int64_t> block_size{"block_size"};
inline constexpr Attribute<int64_t> block_rows{"block_rows"};
inline constexpr Attribute<int64_t> e4m3{"e4m3"};
}  // namespace quantized_moe_experts

namespace quantized_linear {
inline constexpr char const* kName = "QuantizedLinear";
enum Input : size_t { x, w, w_scales };
inline constexpr std::array<Port, 3> kInputs{{
    {"x", &kT, 3},  // [B, S, K]
    {"w", &kQ, 2},  // [N, K]
    {"w_scales", &kS, 2},  // [N/block_rows, K/block_size]
}};
enum Output : size_t { y };
inline constexpr std::array<Port, 1> kOutputs{{
    {"y", &kT, 3},  // [B, S, N]
}};
inline constexpr Attribute<int64_t> block_size{"block_size"};
inline constexpr Attribute<int64_t> block_rows{"block_rows"};
inline constexpr Attribute<int64_t> e4m3{"e4m3"};
}  // namespace quantized_linear

namespace spec_accept {
inline constexpr char const* kName = "SpecAccept";
enum Input : size_t { draft_ids, target_logits };
inline constexpr std::array<Port, 2> kInputs{{
    {"draft_ids", &kI64, 2},  // [B, K]
    {"target_logits", &kT, 3},  // [B, K+1, V]
}};
enum Output : size_t { num_accepted, next_id };
inline constexpr std::array<Port, 2> kOutputs{{
    {"num_accepted", &kI64, 1},  // [B]
    {"next_id", &kI64, 1},  // [B]
}};
}  // namespace spec_accept

namespace spec_accept_rejection {
inline constexpr char const* kName = "SpecAcceptRejection";
enum Input : size_t { draft_ids, target_logits, draft_probs, uniform, temperature };
inline constexpr std::array<Port, 5> kInputs{{
    {"draft_ids", &kI64, 2},  // [B, K]
    {"target_logits", &kT, 3},  // [B, K+1, V]
    {"draft_probs", &kF32, 3},  // [B, K, V]
    {"uniform", &kF32, 2},  // [B, K+1]
    {"temperature", &kF32, 1},  // [1]
}};
enum Output : size_t { num_accepted, next_id };
inline constexpr std::array<Port, 2> kOutputs{{
    {"num_accepted", &kI64, 1},  // [B]
    {"next_id", &kI64, 1},  // [B]
}};
}  // namespace spec_accept_rejection

namespace int8_linear {
inline constexpr char const* kName = "Int8Linear";
enum Input : size_t { x, codes, scales };
inline constexpr std::array<Port, 3> kInputs{{
    {"x", &kF32, 0},  // [..., K]
    {"codes", &kU8, 3},  // [N, K/block_size, block_size]
    {"scales", &kF16, 2},  // [N, K/block_size]
}};
enum Output : size_t { y };
inline constexpr std::array<Port, 1> kOutputs{{
    {"y", &kF32, 0},  // [..., N]
}};
inline constexpr Attribute<int64_t> K{"K"};
inline constexpr Attribute<int64_t> N{"N"};
inline constexpr Attribute<int64_t> block_size{"block_size"};
}  // namespace int8_linear

namespace int4_linear {
inline constexpr char const* kName = "Int4Linear";
enum Input : size_t { x, codes, scales };
inline constexpr std::array<Port, 3> kInputs{{
    {"x", &kF32, 0},  // [..., K]
    {"codes", &kU8, 3},  // [N, K/block_size, block_size/2]
    {"scales", &kF16, 2},  // [N, K/block_size]
}};
enum Output : size_t { y };
inline constexpr std::array<Port, 1> kOutputs{{
    {"y", &kF32, 0},  // [..., N]
}};
inline constexpr Attribute<int64_t> K{"K"};
inline constexpr Attribute<int64_t> N{"N"};
inline constexpr Attribute<int64_t> block_size{"block_size"};
}  // namespace int4_linear

namespace int8_experts {
inline constexpr char const* kName = "Int8Experts";
enum Input : size_t { x, log_weights, gate_up, gate_up_scales, down, down_scales };
inline constexpr std::array<Port, 6> kInputs{{
    {"x", &kF32, 2},  // [N, D]
    {"log_weights", &kF32, 2},  // [N, E]
    {"gate_up", &kU8, 3},  // [E, 2*I, D]
    {"gate_up_scales", &kF16, 3},  // [E, 2*I, D/block_size]
    {"down", &kU8, 3},  // [E, D, I]
    {"down_scales", &kF16, 3},  // [E, D, I/block_size]
}};
enum Output : size_t { y };
inline constexpr std::array<Port, 1> kOutputs{{
    {"y", &kF32, 2},  // [N, D]
}};
inline constexpr Attribute<int64_t> k{"k"};
inline constexpr Attribute<int64_t> block_size{"block_size"};
}  // namespace int8_experts

namespace int4_experts {
inline constexpr char const* kName = "Int4Experts";
enum Input : size_t { x, log_weights, gate_up, gate_up_scales, down, down_scales };
inline constexpr std::array<Port, 6> kInputs{{
    {"x", &kF32, 2},  // [N, D]
    {"log_weights", &kF32, 2},  // [N, E]
    {"gate_up", &kU8, 3},  // [E, 2*I, D/2]
    {"gate_up_scales", &kF16, 3},  // [E, 2*I, D/block_size]
    {"down", &kU8, 3},  // [E, D, I/2]
    {"down_scales", &kF16, 3},  // [E, D, I/block_size]
}};
enum Output : size_t { y };
inline constexpr std::array<Port, 1> kOutputs{{
    {"y", &kF32, 2},  // [N, D]
}};
inline constexpr Attribute<int64_t> k{"k"};
inline constexpr Attribute<int64_t> block_size{"block_size"};
}  // namespace int4_experts

namespace int4_affine_linear {
inline constexpr char const* kName = "Int4AffineLinear";
enum Input : size_t { x, codes, scales, zero_points };
inline constexpr std::array<Port, 4> kInputs{{
    {"x", &kF32, 0},  // [..., K]
    {"codes", &kU8, 3},  // [N, K/block_size, block_size/2]
    {"scales", &kF16, 2},  // [N, K/block_size]
    {"zero_points", &kU8, 2},  // [N, K/block_size/2]
}};
enum Output : size_t { y };
inline constexpr std::array<Port, 1> kOutputs{{
    {"y", &kF32, 0},  // [..., N]
}};
inline constexpr Attribute<int64_t> K{"K"};
inline constexpr Attribute<int64_t> N{"N"};
inline constexpr Attribute<int64_t> block_size{"block_size"};
}  // namespace int4_affine_linear

namespace int4_affine_experts {
inline constexpr char const* kName = "Int4AffineExperts";
enum Input : size_t { x, log_weights, gate_up, gate_up_scales, down, down_scales, gate_up_zero_points, down_zero_points };
inline constexpr std::array<Port, 8> kInputs{{
    {"x", &kF32, 2},  // [N, D]
    {"log_weights", &kF32, 2},  // [N, E]
    {"gate_up", &kU8, 3},  // [E, 2*I, D/2]
    {"gate_up_scales", &kF16, 3},  // [E, 2*I, D/block_size]
    {"down", &kU8, 3},  // [E, D, I/2]
    {"down_scales", &kF16, 3},  // [E, D, I/block_size]
    {"gate_up_zero_points", &kU8, 3},  // [E, 2*I, D/block_size/2]
    {"down_zero_points", &kU8, 3},  // [E, D, I/block_size/2]
}};
enum Output : size_t { y };
inline constexpr std::array<Port, 1> kOutputs{{
    {"y", &kF32, 2},  // [N, D]
}};
inline constexpr Attribute<int64_t> k{"k"};
inline constexpr Attribute<int64_t> block_size{"block_size"};
}  // namespace int4_affine_experts

}  // namespace dsx::ops
