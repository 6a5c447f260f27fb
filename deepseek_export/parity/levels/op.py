"""op 层：把 bundle 里的一个 ``dsx::`` 节点（或它下沉之后的样子）单独截出来，与 eager 参考实现比。

权重一侧来自 bundle 的文件，另一侧按配方从检查点现算，所以权重绑错也会在这里暴露。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from deepseek_export.bundle import Manifest
from deepseek_export.capture.bodies import gate_attributes
from deepseek_export.checkpoint.bind import bind_recipes
from deepseek_export.checkpoint.recipe import load_array, mtp_recipes, weight_recipes
from deepseek_export.ops.int8_cache import encode_rows, padded_rows
from deepseek_export.ops.int8_index import encode_keys
from deepseek_export.ops.lightning_indexer import lightning_indexer
from deepseek_export.ops.mla_attention import mla_attention
from deepseek_export.ops.moe_experts import moe_experts
from deepseek_export.ops.moe_gate import moe_gate
from deepseek_export.ops.sparse_mla_attention import sparse_mla_attention
from deepseek_export.ops.table import LIGHTNING_INDEXER, MLA_ATTENTION, MOE_GATE, OPS, SPARSE_MLA_ATTENTION
from deepseek_export.parity.arrays import to_numpy, to_torch
from deepseek_export.parity.block import Output
from deepseek_export.parity.checks import Check
from deepseek_export.parity.context import Context
from deepseek_export.parity.keys import index_int8
from deepseek_export.parity.report import Case, compare
from deepseek_export.parity.selection import Ranking, mask_of
from deepseek_export.parity.tolerances import Key
from deepseek_export.records import OpSite
from deepseek_export.reference.weights import torch_dtype

#: (B, S, T, past_lens)：空缓存、解码、MTP 校验式的小 S、长 prefill（auto 走 naive）、长度不等、容量恰好用满。
_MLA_SHAPES = (
    (1, 1, 8, (0,)),
    (2, 1, 64, (63, 17)),
    (2, 4, 64, (0, 60)),
    (3, 5, 40, (0, 1, 35)),
    (1, 256, 256, (0,)),
)
_MOE_TOKENS = (1, 2, 33)


def run(check: Check, context: Context) -> Iterator[Case]:
    """一张图里的几个算子，换多种形状各比一次。"""
    manifest, checkpoint = context.manifest, context.checkpoint
    entry = next(entry for entry in manifest.graphs if entry.file == check.graph)
    rng = np.random.default_rng(context.seed)
    config, dtype, rounding = checkpoint.config, manifest.dtype, context.rounding
    if entry.role == "main":
        recipes = weight_recipes(config, dtype)
    else:
        recipes = mtp_recipes(config, entry.layers[0] - config.num_hidden_layers, dtype)
    recipes = bind_recipes(recipes, checkpoint)

    def weight(name: str) -> Tensor:
        read = rounding.get(name, load_array)
        return torch.from_numpy(read(name, recipes[name], checkpoint.store))

    attention, rest = check.keys
    graph = context.graph(check.graph)
    for site in check.sites:
        with context.step(f"layers.{site.layer} {site.op}"):
            if site.op in (MLA_ATTENTION.name, SPARSE_MLA_ATTENTION.name):
                yield from _mla_cases(manifest, graph, site, weight, rng, attention)
            elif site.op == LIGHTNING_INDEXER.name:
                yield from _index_cases(manifest, graph, site, rng, rest)
            else:
                gate = next(s for s in entry.sites if s.layer == site.layer and s.op == MOE_GATE.name)
                yield from _moe_cases(manifest, graph, gate, site, weight, rng, rest)


def _mla_cases(manifest, graph, site: OpSite, weight, rng, key: Key) -> Iterator[Case]:
    c, dtype = manifest.model, np.dtype(manifest.dtype)
    spec = OPS[site.op]
    sparse = spec is SPARSE_MLA_ATTENTION
    ports = dict(zip((port.name for port in spec.inputs), site.inputs, strict=True))
    w_kv_b = weight(ports.pop("w_kv_b"))
    outputs = [site.outputs[0]]
    call = graph.session(graph.cut(list(ports.values()), outputs))
    for B, S, T, past in _MLA_SHAPES + (sparse_shapes(c.indexer.topk) if sparse else ()):
        shapes = {
            "q_nope": (B, S, c.num_attention_heads, c.qk_nope_head_dim),
            "q_pe": (B, S, c.num_attention_heads, c.qk_rope_head_dim),
            "c_kv": (B, S, c.kv_lora_rank),
            "k_pe": (B, S, c.qk_rope_head_dim),
        }
        arrays = {name: rng.standard_normal(shape).astype(dtype) for name, shape in shapes.items()}
        latents = torch.from_numpy(rng.standard_normal((B, 1, T, c.latent_cache_values), np.float32))
        arrays["kv_cache"] = to_numpy(_cached(latents, manifest, site.layer))
        arrays["past_lens"] = np.array(past, np.int64)
        if sparse:
            arrays |= _chosen(rng, S, past, c.indexer.topk)
        (got,) = call({ports[name]: array for name, array in arrays.items()}, outputs)
        tensors = {name: to_torch(array) for name, array in arrays.items()}
        eager: Callable[..., tuple[Tensor, Tensor]] = sparse_mla_attention if sparse else mla_attention
        given = {"w_kv_b": w_kv_b, "scale": c.softmax_scale, "form": manifest.profile.mla.form}
        want, _ = eager(**tensors, **given)
        yield compare("op", f"layers.{site.layer} {spec.name} B={B} S={S} T={T}", key, got, want.numpy())


def sparse_shapes(topk: int) -> tuple[tuple[int, int, int, tuple[int, ...]], ...]:
    """越过名额数的 (B, S, T, past_lens)：刚过一个，长短悬殊的解码，跨过去的几个 token。"""
    return (
        (1, 1, topk + 1, (topk,)),
        (2, 1, 2 * topk + 5, (2 * topk + 4, topk // 2)),
        (2, 4, topk + 8, (topk - 2, topk + 4)),
    )


def _chosen(rng: np.random.Generator, S: int, past: Sequence[int], topk: int) -> dict[str, np.ndarray]:
    """合乎契约的 ``indices``、``counts``：看得见的位置里随便取，升序。"""
    counts = np.minimum(np.array(past)[:, None] + np.arange(1, S + 1), topk).astype(np.int32)
    indices = np.full((*counts.shape, topk), -1, np.int32)
    for b, i in np.ndindex(*counts.shape):
        picked = rng.choice(past[b] + i + 1, counts[b, i], replace=False)
        indices[b, i, : counts[b, i]] = np.sort(picked)
    return {"indices": indices, "counts": counts}


def _index_cases(manifest, graph, site: OpSite, rng, key: Key) -> Iterator[Case]:
    """选中的集合；并列带之内换一个不算错。索引 key 是 int8 的，另量它与没有舍入时选中的有多一致。"""
    c = manifest.model.indexer
    dtype, int8 = np.dtype(manifest.dtype), index_int8(manifest)
    stored = torch_dtype(manifest.dtype if manifest.cache.dtype == "int8" else manifest.cache.dtype)
    ports = [port.name for port in LIGHTNING_INDEXER.inputs]
    outputs = [site.outputs[0]]
    call = graph.session(graph.cut(list(site.inputs), outputs))
    for B, S, T, past in _MLA_SHAPES[:4] + sparse_shapes(c.topk):
        q, k = (
            rng.standard_normal((B, S, *rest)).astype(dtype)
            for rest in ((c.n_heads, c.head_dim), (c.head_dim,))
        )
        w = rng.standard_normal((B, S, c.n_heads), np.float32)
        plain = torch.from_numpy(rng.standard_normal((B, 1, T, c.head_dim), np.float32))
        rows = encode_keys(plain) if int8 else plain.to(stored)
        arrays = dict(zip(ports, (q, w, k, to_numpy(rows), np.array(past, np.int64)), strict=True))
        (got,) = call(dict(zip(site.inputs, arrays.values(), strict=True)), outputs)
        tensors = [to_torch(array) for array in arrays.values()]
        query, weights, keys, cached, lens = tensors
        want, _, cache = lightning_indexer(query, weights, keys, cached, lens, c.topk)
        ranked = Ranking.of(query, weights, cache, lens, c.topk)
        output = Output(f"layers.{site.layer}", site.outputs[0], want.numpy(), key, ranking=ranked)
        name = f"layers.{site.layer} {LIGHTNING_INDEXER.name} B={B} S={S} T={T}"
        yield output.compare("op", name, got)
        if int8:
            exact, _, _ = lightning_indexer(query, weights, keys, plain, lens, c.topk)
            masks = (mask_of(array, T) for array in (got, exact.numpy()))
            yield compare("op", f"{name}，选中的集合对没有舍入的", ("selection_loss", "int8", None), *masks)


def _cached(latents: Tensor, manifest: Manifest, layer: int) -> Tensor:
    """[..., r+dr] float32 → 缓存里的样子。"""
    dtype, r = torch_dtype(manifest.cache.dtype), manifest.model.kv_lora_rank
    if dtype == torch.int8:
        width = manifest.cache.of_layer(layer)[0].width
        return padded_rows(encode_rows(latents[..., :r], latents[..., r:]), width)
    return latents.to(dtype)


def _moe_cases(manifest, graph, gate: OpSite, site: OpSite, weight, rng, key: Key) -> Iterator[Case]:
    """gate 与 experts 一起比：下沉到 ONNX Runtime 的 MoE 之后，中间的 ids、weights 已不存在。"""
    c, dtype = manifest.model, np.dtype(manifest.dtype)
    logits_name, bias_name = gate.inputs
    x_name, _, _, *weight_names = site.inputs
    bias, experts = weight(bias_name), [weight(name) for name in weight_names]
    outputs = [site.outputs[0]]
    call = graph.session(graph.cut([logits_name, x_name], outputs))
    for N in _MOE_TOKENS:
        x = rng.standard_normal((N, c.hidden_size)).astype(dtype)
        logits = 2 * rng.standard_normal((N, c.n_routed_experts)).astype(np.float32)
        (got,) = call({logits_name: logits, x_name: x}, outputs)
        ids, weights = moe_gate(torch.from_numpy(logits), bias, **gate_attributes(c))
        want = moe_experts(torch.from_numpy(x), ids, weights, *experts)
        yield compare("op", f"layers.{site.layer} MoeGate+MoeExperts N={N}", key, got, want.numpy())
