"""block 层：每个块单独比，输入一律取参考模型的（teacher forcing），所以第一处不通过就是出错的那一块。"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

from deepseek_export.bundle import Bundle
from deepseek_export.capture import names
from deepseek_export.checkpoint.weight_only import QuantKind
from deepseek_export.parity.measures import measure
from deepseek_export.parity.report import Case, compare
from deepseek_export.parity.routing import router_margin
from deepseek_export.parity.subgraph import ModelGraph
from deepseek_export.parity.tolerances import ROUTER_MARGIN, Dtype, tolerance
from deepseek_export.reference import ReferenceModel

_CAPACITY_SLACK = 3


@torch.no_grad()
def block_cases(
    bundle: Bundle,
    model: ReferenceModel,
    graph: ModelGraph,
    rows: Sequence[Sequence[int]],
    on_case: Callable[[str], None],
) -> Iterator[Case]:
    """嵌入、每层的注意力与前馈、输出头；各在 prefill 与其后的一步解码上比一次。

    Args:
        bundle: 被验证的 bundle。
        model: 同 profile、同 dtype 的参考模型。
        graph: bundle 的图。
        rows: 等长的 token 序列；前 len-1 个做 prefill，最后一个做解码。
        on_case: 每个块开始前调用。
    """
    ids = torch.tensor([list(row) for row in rows])
    B, S = ids.shape[0], ids.shape[1] - 1
    phases = (
        ("prefill", ids[:, :S], torch.zeros(B, dtype=torch.int64)),
        ("decode", ids[:, S:], torch.full((B,), S)),
    )
    steps = [_Step(bundle, graph, *phase) for phase in phases]
    cache_dtype = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
    caches = model.empty_caches(B, S + _CAPACITY_SLACK, cache_dtype[bundle.manifest.cache.dtype])
    on_case("embed")
    for step in steps:
        yield from step.embed(model)
    for i, layer in enumerate(model.layers):
        on_case(f"layers.{i}")
        cache = caches[i]
        for step in steps:
            cache = yield from step.layer(i, layer, cache, model.config)
    on_case("head")
    for step in steps:
        yield from step.head(model)


class _Step:
    """一个阶段（prefill 或 decode）：拿着参考模型的当前激活，一块一块往前走。"""

    def __init__(self, bundle: Bundle, graph: ModelGraph, name: str, ids, past_lens) -> None:
        self.manifest, self.graph, self.name = bundle.manifest, graph, name
        self.dtype, self.quant = bundle.manifest.dtype, bundle.manifest.quant
        self.ids, self.past_lens = ids, past_lens
        self.feeds: dict[str, np.ndarray] = {names.PAST_LENS: past_lens.numpy()}

    def embed(self, model: ReferenceModel) -> Iterator[Case]:
        self.x, self.cos, self.sin = model.embed(self.ids, self.past_lens)
        outputs = [names.EMBED_X, names.EMBED_COS, names.EMBED_SIN]
        feeds = {names.INPUT_IDS: self.ids.numpy(), **self.feeds}
        got = self.graph.run(feeds, outputs)
        for name, a, b in zip(
            ("embed", "rope cos", "rope sin"), got, (self.x, self.cos, self.sin), strict=True
        ):
            yield compare("block", f"{name} ({self.name})", "block", self.dtype, a, b.numpy(), self.quant)
        self.feeds |= {names.EMBED_COS: self.cos.numpy(), names.EMBED_SIN: self.sin.numpy()}

    def layer(self, i: int, layer, caches, config):
        """返回参考模型更新后的缓存。"""
        residual, x, *updated = layer(self.x, self.cos, self.sin, self.past_lens, *caches)
        feeds = {**self.feeds, names.layer_output(i - 1): self.x.numpy()}
        outputs, want = [names.attn_residual(i)], [residual]
        for tensor, old, new in zip(self.manifest.cache.tensors, caches, updated, strict=True):
            feeds[names.cache_input(tensor.name, i)] = to_numpy(old)
            if old.dtype != torch.bfloat16:  # ONNX Runtime 读不出 bfloat16 的输出
                outputs.append(names.cache_output(tensor.name, i))
                want.append(new)
        labels = ["self_attn", *(output.split(".")[0] for output in outputs[1:])]
        for label, a, b in zip(labels, self.graph.run(feeds, outputs), want, strict=True):
            dtype = self.graph.attention_dtype if label == "self_attn" else self.dtype
            name = f"layers.{i}.{label} ({self.name})"
            yield compare("block", name, "block", dtype, a, b.numpy(), self.quant)

        feeds[names.attn_residual(i)] = residual.numpy()
        (got,) = self.graph.run(feeds, [names.layer_output(i)])
        margin = router_margin(layer, residual, config).numpy()
        yield mlp_case(f"layers.{i}.mlp ({self.name})", self.dtype, got, x.numpy(), margin, self.quant)
        self.x = x
        return tuple(updated)

    def head(self, model: ReferenceModel) -> Iterator[Case]:
        positions = torch.arange(self.x.shape[1]).expand(self.x.shape[0], -1)
        want = model.head(self.x, positions)
        feeds = {
            names.layer_output(self.manifest.model.num_hidden_layers - 1): self.x.numpy(),
            names.LOGITS_POSITIONS: positions.numpy(),
        }
        got = self.graph.run(feeds, [names.LOGITS, names.HIDDEN])
        for name, a, b in zip(("head", "hidden"), got, want, strict=True):
            yield compare("block", f"{name} ({self.name})", "block", self.dtype, a, b.numpy(), self.quant)


def mlp_case(
    name: str,
    dtype: Dtype,
    got: np.ndarray,
    want: np.ndarray,
    margin: np.ndarray,
    quant: QuantKind | None = None,
) -> Case:
    """先整体比；不过时，把路由近平局的行挑出来单独计数，其余行仍按容差要求。"""
    case = compare("block", name, "block", dtype, got, want, quant)
    if case.passed:
        return case
    limit = tolerance("block", dtype, quant).max_abs * max(1.0, measure(got, want).scale)
    flipped = (np.abs(got.astype(np.float64) - want).max(-1) > limit) & (margin < ROUTER_MARGIN[dtype])
    if not flipped.any() or flipped.all():
        return case
    kept = compare("block", name, "block", dtype, got[~flipped], want[~flipped], quant)
    kept.near_ties = int(flipped.sum())
    return kept


def to_numpy(tensor: torch.Tensor) -> np.ndarray:
    """张量 → ndarray；bfloat16 用 ml_dtypes。"""
    if tensor.dtype == torch.bfloat16:
        import ml_dtypes

        return tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
