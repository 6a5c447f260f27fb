"""算子契约的唯一一张表。

torch 自定义算子的签名、ONNX ``OpSchema``、函数体、TensorRT creator、启动表的张量都由这张表导出；C++ 一侧经由它生成的
``plugins/ops.h``。别处不再拼写算子名、输入次序或属性名。这里不导入 torch。

维度记号：``B`` batch，``S`` 本次新 token 数，``T`` 缓存容量，``H`` 头数，``dn``/``dr``/``dv`` 即
``qk_nope_head_dim``/``qk_rope_head_dim``/``v_head_dim``，``r`` 即 ``kv_lora_rank``，``N`` = B*S，``D`` 即 ``hidden_size``，
``cw`` 缓存一行的宽度（浮点是 ``r+dr``，int8 是 ``r+2*dr+6``，TensorRT 的目标上末尾补零到 16 的倍数，见 ``ops/int8_cache.py``），``kw`` w_kv_b 一行的宽度（浮点是 ``r``，int8 是 ``r+2*r/block``，见
``ops/weight_rows.py``），``Hi``/``di`` 索引器的头数与头宽
（``index_n_heads``/``index_head_dim``），``iw`` 索引缓存一行的宽度（浮点是 ``di``，int8 是 ``di+3``，见 ``ops/int8_index.py``），``ks`` 每个 query 选几个 key（``index_topk``），``block_rows``/``block_size`` 一个 scale 管码的几行几列（除不尽的向上取整），``E`` 专家数，``I`` 即 ``moe_intermediate_size``，``k`` 即 ``num_experts_per_tok``，``K`` 草稿 token 数，``V`` 词表大小。
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from deepseek_export.ops.spec import Attribute, OpSpec, Port

DOMAIN = "dsx"
OPSET_VERSION = 1
PLUGIN_NAMESPACE = "dsx"
PLUGIN_VERSION = "1"

MLA_ATTENTION = OpSpec(
    name="MlaAttention",
    torch_name="mla_attention",
    inputs=(
        Port("q_nope", "T", ("B", "S", "H", "dn")),
        Port("q_pe", "T", ("B", "S", "H", "dr")),
        Port("c_kv", "T", ("B", "S", "r")),
        Port("k_pe", "T", ("B", "S", "dr")),
        Port("kv_cache", "C", ("B", "1", "T", "cw")),
        Port("past_lens", "I64", ("B",)),
        Port("w_kv_b", "W", ("H*(dn+dv)", "kw")),
    ),
    outputs=(
        Port("o", "T", ("B", "S", "H", "dv")),
        Port("kv_cache_out", "C", ("B", "1", "T", "cw")),
    ),
    attributes=(Attribute("scale", "float"),),
    doc=(
        "Multi-head latent attention over a latent KV cache. q_pe/k_pe are rotated, c_kv is normalised. The new rows are "
        "written at past_lens[b]..past_lens[b]+S-1; key j is visible to query i when j <= past_lens[b]+i. "
        "Softmax accumulates in float32. An int8 cache row holds r latent codes, dr high and dr low bytes of the rotated part, "
        "and two scales k * 2^e as the bytes k >> 8, k & 255 (balanced), e. "
        "An int8 w_kv_b row holds r codes and one float16 scale per block of 32, 64 or 128 of them, little-endian."
    ),
)

LIGHTNING_INDEXER = OpSpec(
    name="LightningIndexer",
    torch_name="lightning_indexer",
    inputs=(
        Port("q", "T", ("B", "Sq", "Hi", "di")),
        Port("w", "F32", ("B", "Sq", "Hi")),
        Port("k", "T", ("B", "S", "di")),
        Port("index_cache", "C", ("B", "1", "T", "iw")),
        Port("past_lens", "I64", ("B",)),
    ),
    outputs=(
        Port("indices", "I32", ("B", "S", "ks")),
        Port("counts", "I32", ("B", "S")),
        Port("index_cache_out", "C", ("B", "1", "T", "iw")),
    ),
    attributes=(Attribute("topk", "int"),),
    doc=(
        "Selects topk cached positions per query by sum_h w_h * relu(q_h . k) in float32. q and k are rotated, k is "
        "normalised; the new keys are written at past_lens[b]..past_lens[b]+S-1 first. Query i ranks the keys "
        "j <= past_lens[b]+i; counts is their number, at most topk. The first counts entries of indices are the selected "
        "positions in ascending order, the rest is -1. Ties go to the smaller position; without more than topk visible keys "
        "nothing is ranked: Sq is S, or 0 if that holds for every query. An int8 cache row holds di codes and one scale as "
        "the bytes of an MlaAttention scale; each query head is then rounded to int8 the same way, and the products are "
        "exact integers."
    ),
)

SPARSE_MLA_ATTENTION = OpSpec(
    name="SparseMlaAttention",
    torch_name="sparse_mla_attention",
    inputs=(
        *MLA_ATTENTION.inputs,
        Port("indices", "I32", ("B", "S", "ks")),
        Port("counts", "I32", ("B", "S")),
    ),
    outputs=MLA_ATTENTION.outputs,
    attributes=MLA_ATTENTION.attributes,
    doc=(
        "MlaAttention in which a query attends to the cached rows indices[b,i,:counts[b,i]] only; they are visible to it and "
        "ascending. When T <= ks the selection is every visible row and the result is that of MlaAttention."
    ),
)

#: absorb 形式的注意力核。``q`` 是 ``[q_nope W_UK, q_pe]``；``kv_cache`` 已写入本次的 S 行。只由 TensorRT 的下沉产生。
LATENT_ATTENTION = OpSpec(
    name="LatentAttention",
    torch_name="latent_attention",
    inputs=(
        Port("q", "T", ("B", "S", "H", "r+dr")),
        Port("kv_cache", "C", ("B", "1", "T", "cw")),
        Port("past_lens", "I64", ("B",)),
    ),
    outputs=(Port("context", "T", ("H", "B*S", "r")),),
    attributes=(Attribute("scale", "float"), Attribute("kv_lora_rank", "int")),
    doc=(
        "Multi-query attention of absorbed queries over the latent cache, which serves as K (all columns) and as V (the "
        "first kv_lora_rank columns). Key j is visible to query i when j <= past_lens[b]+i. Accumulates in float32. context "
        "is head-major, as the per-head product with W_UV reads it. An int8 cache row is that of LatentCacheUpdate."
    ),
)

#: int8 缓存的写入：量化新的 S 行，就地写。浮点的缓存由 ``TensorScatter`` 写。只由 TensorRT 的下沉产生。
LATENT_CACHE_UPDATE = OpSpec(
    name="LatentCacheUpdate",
    torch_name="latent_cache_update",
    inputs=(
        Port("c_kv", "T", ("B", "S", "r")),
        Port("k_pe", "T", ("B", "S", "dr")),
        Port("kv_cache", "I8", ("B", "1", "T", "cw")),
        Port("past_lens", "I64", ("B",)),
    ),
    outputs=(Port("kv_cache_out", "I8", ("B", "1", "T", "cw")),),
    attributes=(),
    doc=(
        "Rounds the new rows to int8 and writes them at past_lens[b]..past_lens[b]+S-1 of the latent cache. The first "
        "r+2*dr+6 bytes of a row are an int8 row of MlaAttention, the rest is zero. As a plugin it writes in place: "
        "kv_cache_out is kv_cache."
    ),
    aliases=(("kv_cache_out", "kv_cache"),),
)

#: 索引器的打分与挑选。``index_cache`` 已写入本次的 S 行。只由 TensorRT 的下沉产生。
INDEX_TOPK = OpSpec(
    name="IndexTopK",
    torch_name="index_topk",
    inputs=(
        Port("q", "T", ("B", "S", "Hi", "di")),
        Port("w", "F32", ("B", "S", "Hi")),
        Port("index_cache", "F", ("B", "1", "T", "di")),
        Port("past_lens", "I64", ("B",)),
    ),
    outputs=(Port("indices", "I32", ("B", "S", "ks")), Port("counts", "I32", ("B", "S"))),
    attributes=LIGHTNING_INDEXER.attributes,
    doc=(
        "The selection of LightningIndexer over an index cache that already holds the new keys. Query i ranks the keys "
        "j <= past_lens[b]+i by sum_h w_h * relu(q_h . k) in float32; the first counts entries of indices are the "
        "selected positions in ascending order, the rest is -1. Ties go to the smaller position."
    ),
)

#: absorb 形式的注意力核，只看选中的行。``q``、``kv_cache`` 同 :data:`LATENT_ATTENTION`。只由 TensorRT 的下沉产生。
SPARSE_LATENT_ATTENTION = OpSpec(
    name="SparseLatentAttention",
    torch_name="sparse_latent_attention",
    inputs=(
        Port("q", "T", ("B", "S", "H", "r+dr")),
        Port("kv_cache", "F", ("B", "1", "T", "r+dr")),
        Port("indices", "I32", ("B", "S", "ks")),
        Port("counts", "I32", ("B", "S")),
    ),
    outputs=LATENT_ATTENTION.outputs,
    attributes=LATENT_ATTENTION.attributes,
    doc=(
        "LatentAttention in which a query attends to the cached rows indices[b,i,:counts[b,i]] only. "
        "Accumulates in float32."
    ),
)

MOE_GATE = OpSpec(
    name="MoeGate",
    torch_name="moe_gate",
    inputs=(Port("logits", "F32", ("N", "E")), Port("bias", "F32", ("E",))),
    outputs=(Port("topk_ids", "I32", ("N", "k")), Port("topk_weights", "F32", ("N", "k"))),
    attributes=(
        Attribute("scoring_func", "str"),
        Attribute("n_group", "int"),
        Attribute("topk_group", "int"),
        Attribute("group_score", "str"),
        Attribute("top_k", "int"),
        Attribute("norm_topk_prob", "int"),
        Attribute("routed_scaling_factor", "float"),
    ),
    doc=(
        "DeepSeek router: score, optional group limiting, top-k, optional normalisation, scaling; all in float32. "
        "Ties go to the smaller index."
    ),
)

MOE_EXPERTS = OpSpec(
    name="MoeExperts",
    torch_name="moe_experts",
    inputs=(
        Port("x", "T", ("N", "D")),
        Port("topk_ids", "I32", ("N", "k")),
        Port("topk_weights", "F32", ("N", "k")),
        Port("w_gate", "T", ("E", "I", "D")),
        Port("w_up", "T", ("E", "I", "D")),
        Port("w_down", "T", ("E", "D", "I")),
    ),
    outputs=(Port("y", "T", ("N", "D")),),
    attributes=(),
    doc=(
        "Routed SwiGLU experts; only experts that own a token run. Accumulates over experts in float32. "
        "An id outside [0, E) belongs to another group of experts and is skipped."
    ),
)

#: 码与 scale 怎么写，几个算子共用。``e4m3`` 是 1 的，码的每个字节是一个 e4m3，类型仍是 int8：TensorRT 为 sm80、sm86 建的引擎里不许有 FP8。
_CODE_ATTRIBUTES = (Attribute("block_size", "int"), Attribute("block_rows", "int"), Attribute("e4m3", "int"))
_CODES_DOC = (
    "weight = code * scale, one scale for block_rows x block_size codes (the last blocks may be short for e4m3), "
    "rounded to the type of x. Codes are symmetric int8 or int4 with the scale in the type of x, or, when e4m3 is 1, "
    "int8 whose bits are an e4m3 number, with a float32 scale. A kernel may skip that rounding."
)


def _coded(name: str, *dims: str) -> tuple[Port, Port]:
    """一个权重的码与 scale。"""
    *stacked, rows, columns = dims
    scales = (*stacked, f"{rows}/block_rows", f"{columns}/block_size")
    return Port(name, "Q", dims), Port(f"{name}_scales", "S", scales)


#: 权重是码的 ``MoeExperts``。只由 TensorRT 的下沉产生，函数体是还原三个权重加一个 ``MoeExperts``。码是整数的，D、I 是 block_size 的倍数。
QUANTIZED_MOE_EXPERTS = OpSpec(
    name="QuantizedMoeExperts",
    torch_name="quantized_moe_experts",
    inputs=(
        Port("x", "T", ("N", "D")),
        Port("topk_ids", "I32", ("N", "k")),
        Port("topk_weights", "F32", ("N", "k")),
        *_coded("w_gate", "E", "I", "D"),
        *_coded("w_up", "E", "I", "D"),
        *_coded("w_down", "E", "D", "I"),
    ),
    outputs=(Port("y", "T", ("N", "D")),),
    attributes=_CODE_ATTRIBUTES,
    doc=f"MoeExperts with coded weights: {_CODES_DOC}",
)

#: 权重是码的线性层。只由 TensorRT 的下沉产生，函数体是还原加一个 ``MatMul``。
QUANTIZED_LINEAR = OpSpec(
    name="QuantizedLinear",
    torch_name="quantized_linear",
    inputs=(Port("x", "T", ("B", "S", "K")), *_coded("w", "N", "K")),
    outputs=(Port("y", "T", ("B", "S", "N")),),
    attributes=_CODE_ATTRIBUTES,
    doc=f"Linear layer y = x wT with a coded weight: {_CODES_DOC}",
)

SPEC_ACCEPT = OpSpec(
    name="SpecAccept",
    torch_name="spec_accept",
    inputs=(Port("draft_ids", "I64", ("B", "K")), Port("target_logits", "T", ("B", "K+1", "V"))),
    outputs=(Port("num_accepted", "I64", ("B",)), Port("next_id", "I64", ("B",))),
    attributes=(),
    doc=(
        "Greedy verification of K draft tokens: the longest prefix that equals the arg max of the target logits, and the "
        "arg max after it. K may be 0. Ties go to the smaller index."
    ),
)

#: 输入个数固定（TensorRT 插件不接受可选输入），所以 rejection 是另一个算子，而不是同一个算子的属性。
SPEC_ACCEPT_REJECTION = OpSpec(
    name="SpecAcceptRejection",
    torch_name="spec_accept_rejection",
    inputs=(
        Port("draft_ids", "I64", ("B", "K")),
        Port("target_logits", "T", ("B", "K+1", "V")),
        Port("draft_probs", "F32", ("B", "K", "V")),
        Port("uniform", "F32", ("B", "K+1")),
        Port("temperature", "F32", ("1",)),
    ),
    outputs=(Port("num_accepted", "I64", ("B",)), Port("next_id", "I64", ("B",))),
    attributes=(),
    doc=(
        "Speculative sampling: draft i is accepted when uniform[i] * q_i < p_i; the next token is drawn from the residual "
        "distribution max(p - q, 0) (or from p after all drafts) by inverse CDF with uniform[K]. K may be 0."
    ),
)


def _quantized_linear(bits: Literal[4, 8], affine: bool = False) -> OpSpec:
    """只量化权重的线性层：码减零点乘 scale 就是权重。只由 ``ort-cpu`` 的量化产生，函数体是一个 ``MatMulNBits``。

    零点逐块给出的（``affine``，只有 4 位）是另一个算子：输入个数固定。
    """
    zeros = (Port("zero_points", "U8", ("N", "K/block_size/2")),) if affine else ()
    return OpSpec(
        name=f"Int{bits}{_AFFINE[affine]}Linear",
        torch_name=f"int{bits}_{_AFFINE[affine].lower()}{'_' if affine else ''}linear",
        inputs=(
            Port("x", "F32", ("...", "K")),
            Port("codes", "U8", ("N", "K/block_size", _packed("block_size", bits))),
            Port("scales", "F16", ("N", "K/block_size")),
            *zeros,
        ),
        outputs=(Port("y", "F32", ("...", "N")),),
        attributes=(Attribute("K", "int"), Attribute("N", "int"), Attribute("block_size", "int")),
        doc=(
            f"Linear layer with blockwise {_weights(bits, affine)}; the last block is padded. "
            "A kernel may round each block of x, to about 15 bits at best (ours) or to int8 (MatMulNBits)."
        ),
    )


def _quantized_experts(bits: Literal[4, 8], affine: bool = False) -> OpSpec:
    """只量化权重的路由专家，路由权重以对数给出；函数体是一个 ``QMoE``。D、I 是 block_size 的倍数。"""
    zeros = (
        Port("gate_up_zero_points", "U8", ("E", "2*I", "D/block_size/2")),
        Port("down_zero_points", "U8", ("E", "D", "I/block_size/2")),
    )
    return OpSpec(
        name=f"Int{bits}{_AFFINE[affine]}Experts",
        torch_name=f"int{bits}_{_AFFINE[affine].lower()}{'_' if affine else ''}experts",
        inputs=(
            Port("x", "F32", ("N", "D")),
            Port("log_weights", "F32", ("N", "E")),
            Port("gate_up", "U8", ("E", "2*I", _packed("D", bits))),
            Port("gate_up_scales", "F16", ("E", "2*I", "D/block_size")),
            Port("down", "U8", ("E", "D", _packed("I", bits))),
            Port("down_scales", "F16", ("E", "D", "I/block_size")),
            *(zeros if affine else ()),
        ),
        outputs=(Port("y", "F32", ("N", "D")),),
        attributes=(Attribute("k", "int"), Attribute("block_size", "int")),
        doc=(
            f"Routed SwiGLU experts with blockwise {_weights(bits, affine)}; gate and up rows alternate. "
            "Each token uses the k experts of largest log_weights, weighted by "
            "the softmax over those k. "
            "A kernel may round each block of the activations, to about 15 bits at best (ours) or to int8 (QMoE)."
        ),
    )


#: 零点逐块给出的算子名里多一个词。
_AFFINE = ("", "Affine")


def _weights(bits: int, affine: bool) -> str:
    """契约里怎么说码的写法。"""
    pairs = (
        "" if bits == 8 else f", two codes{' or zero points' if affine else ''} a byte, the lower half first"
    )
    if affine:
        return f"int{bits} weights: weight = (code - zero point) * scale{pairs}"
    return f"symmetric int{bits} weights: weight = (code - {1 << (bits - 1)}) * scale{pairs}"


def _packed(dim: str, bits: int) -> str:
    """一维码的字节数，具名维的写法。"""
    return dim if bits == 8 else f"{dim}/2"


INT8_LINEAR, INT4_LINEAR = _quantized_linear(8), _quantized_linear(4)
INT8_EXPERTS, INT4_EXPERTS = _quantized_experts(8), _quantized_experts(4)
INT4_AFFINE_LINEAR, INT4_AFFINE_EXPERTS = (
    _quantized_linear(4, affine=True),
    _quantized_experts(4, affine=True),
)

OPS: Mapping[str, OpSpec] = MappingProxyType(
    {
        spec.name: spec
        for spec in (
            MLA_ATTENTION,
            LIGHTNING_INDEXER,
            SPARSE_MLA_ATTENTION,
            LATENT_ATTENTION,
            LATENT_CACHE_UPDATE,
            INDEX_TOPK,
            SPARSE_LATENT_ATTENTION,
            MOE_GATE,
            MOE_EXPERTS,
            QUANTIZED_MOE_EXPERTS,
            QUANTIZED_LINEAR,
            SPEC_ACCEPT,
            SPEC_ACCEPT_REJECTION,
            INT8_LINEAR,
            INT4_LINEAR,
            INT8_EXPERTS,
            INT4_EXPERTS,
            INT4_AFFINE_LINEAR,
            INT4_AFFINE_EXPERTS,
        )
    }
)
