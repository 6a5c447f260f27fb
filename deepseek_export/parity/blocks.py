"""block 层：每个块单独比，输入一律取参考模型的（teacher forcing），所以第一处不通过就是出错的那一块。"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from deepseek_export.bundle import Manifest
from deepseek_export.capture import names
from deepseek_export.ops.int8_cache import decode_rows, padded_rows
from deepseek_export.ops.int8_index import decode_keys
from deepseek_export.parity.arrays import to_numpy
from deepseek_export.parity.block import Block, Output
from deepseek_export.parity.checks import PHASES
from deepseek_export.parity.inputs import cache_feeds
from deepseek_export.parity.keys import Keys, selection_dtype
from deepseek_export.parity.routing import router_margin
from deepseek_export.parity.selection import Ranking, in_router_units, ranking
from deepseek_export.parity.tolerances import Dtype, Key
from deepseek_export.reference import ReferenceModel
from deepseek_export.reference.mla import Selection
from deepseek_export.reference.model import INDEX_CACHE, DecoderLayer
from deepseek_export.reference.weights import torch_dtype

_CAPACITY_SLACK = 3


@torch.no_grad()
def main_blocks(
    manifest: Manifest, model: ReferenceModel, rows: Sequence[Sequence[int]], keys: Keys
) -> Iterator[Block]:
    """主模型的块：嵌入、每层的注意力与前馈、输出头；各有 prefill 与其后的一步解码。

    Args:
        manifest: bundle 的 manifest。
        model: 同 profile、同 dtype 的参考模型。
        rows: 等长的 token 序列；前 len-1 个做 prefill，最后一个做解码。
        keys: 见 :func:`~deepseek_export.parity.keys.block_keys`。
    """
    ids = torch.tensor([list(row) for row in rows])
    B, S = ids.shape[0], ids.shape[1] - 1
    starts = (torch.zeros(B, dtype=torch.int64), torch.full((B,), S))
    steps = [
        _Step(manifest, model, keys, *step)
        for step in zip(PHASES, (ids[:, :S], ids[:, S:]), starts, strict=True)
    ]
    caches = model.empty_caches(B, S + _CAPACITY_SLACK, torch_dtype(manifest.cache.dtype))
    for step in steps:
        yield step.embed()
    for i, cache in enumerate(caches):
        for step in steps:
            cache = yield from step.layer(i, cache)
    for step in steps:
        yield step.head()


class _Step:
    """一个阶段：拿着参考模型的当前激活，一块一块往前走。"""

    def __init__(self, manifest: Manifest, model: ReferenceModel, keys: Keys, phase: str, ids, past_lens):
        self.manifest, self.model, self.phase = manifest, model, phase
        self.attention, self.rest = keys
        self.past_lens = past_lens
        self.x, self.cos, self.sin = model.embed(ids, past_lens)
        self.ids = ids
        self.feeds = {names.PAST_LENS: past_lens.numpy()}
        self.selection: Selection = ()

    def embed(self) -> Block:
        feeds = {names.INPUT_IDS: self.ids.numpy(), **self.feeds}
        block = embed_block(self.rest, "", self.phase, feeds, (self.x, self.cos, self.sin))
        self.feeds |= {names.EMBED_COS: self.cos.numpy(), names.EMBED_SIN: self.sin.numpy()}
        return block

    def layer(self, i: int, caches):
        """返回参考模型更新后的缓存。"""
        layer = self.model.layers[i]
        assert isinstance(layer, DecoderLayer)
        feeds = {**self.feeds, names.layer_output(i - 1): self.x.numpy()}
        config = self.model.config
        chooser = config.chooser_of(i)
        if chooser is not None and chooser != i:
            values = names.selection(chooser).values()
            feeds |= {name: chosen.numpy() for name, chosen in zip(values, self.selection, strict=True)}
        given = (self.x, self.cos, self.sin, self.past_lens, caches)
        residual, x, updated, self.selection = layer.step(*given, self.selection)
        where, key = (i, i), self.attention
        block = attention_block(
            self.manifest, key, f"layers.{i}.", self.phase, feeds, where, residual, caches, updated
        )
        ranked = ranking(layer, *given)
        if ranked is not None:
            band = selection_dtype(self.manifest, key[1])
            block = with_selection(block, key, band, i, self.selection[0], ranked)
        yield block
        margin = router_margin(layer, residual, self.model.config).numpy()
        yield mlp_block(self.rest, f"layers.{i}.", self.phase, feeds, i, residual, x, margin)
        self.x = x
        return updated

    def head(self) -> Block:
        positions = torch.arange(self.x.shape[1]).expand(self.x.shape[0], -1)
        logits, hidden = self.model.head(self.x, positions)
        feeds = {
            names.layer_output(self.manifest.model.num_hidden_layers - 1): self.x.numpy(),
            names.LOGITS_POSITIONS: positions.numpy(),
        }
        outputs = (
            Output("head", names.LOGITS, logits.numpy(), self.rest),
            Output("hidden", names.HIDDEN, hidden.numpy(), self.rest),
        )
        return Block("head", self.phase, feeds, outputs)


def embed_block(
    key: Key, prefix: str, phase: str, feeds: Mapping[str, np.ndarray], want: Sequence[Tensor]
) -> Block:
    """词嵌入与 cos/sin；``key`` 是容差，``prefix`` 是名字的前缀，主模型为空。"""
    labels, values = ("embed", "rope cos", "rope sin"), (names.EMBED_X, names.EMBED_COS, names.EMBED_SIN)
    outputs = tuple(
        Output(f"{prefix}{label}", value, tensor.numpy(), key)
        for label, value, tensor in zip(labels, values, want, strict=True)
    )
    return Block(f"{prefix}embed", phase, feeds, outputs)


def attention_block(
    manifest: Manifest,
    key: Key,
    prefix: str,
    phase: str,
    feeds: Mapping[str, np.ndarray],
    where: tuple[int, int],
    residual: Tensor,
    caches: Sequence[Tensor],
    updated: Sequence[Tensor],
) -> Block:
    """一层的注意力：输出是残差与更新后的缓存。

    Args:
        manifest: bundle 的 manifest。
        key: 容差。
        prefix: 名字的前缀，例如 ``layers.3.``。
        phase: 阶段。
        feeds: 缓存之外的输入。
        where: 层号，以及这一层的缓存在图里的编号。
        residual: 参考模型在注意力之后的残差。
        caches, updated: 参考模型这一层更新前后的缓存。
    """
    layer, index = where
    feeds = {**feeds, **cache_feeds(manifest, layer, caches, index)}
    outputs = [Output(f"{prefix}self_attn", names.attn_residual(layer), residual.numpy(), key)]
    for tensor, new in zip(manifest.cache.of_layer(layer), updated, strict=True):
        value = names.cache_output(tensor.name, index)
        decode = _decoder(tensor.name, manifest) if new.dtype == torch.int8 else None
        want = to_numpy(padded_rows(new, tensor.width))
        outputs.append(Output(f"{prefix}{tensor.name}_out", value, want, key, decode))
    return Block(f"{prefix}self_attn", phase, feeds, tuple(outputs))


def _decoder(cache: str, manifest: Manifest) -> Callable[[Tensor], Tensor]:
    """int8 的缓存 ``cache`` 的一行怎么还原。"""
    if cache == INDEX_CACHE:
        return decode_keys
    config = manifest.model
    return partial(decode_rows, kv_lora_rank=config.kv_lora_rank, dr=config.qk_rope_head_dim)


def with_selection(
    block: Block, key: Key, band: Dtype, layer: int, indices: Tensor, ranked: Ranking
) -> Block:
    """自己挑 key 的注意力块再加一个输出：选中的集合。

    Args:
        block: :func:`attention_block` 的结果。
        key: 块的容差。
        band: 并列带取哪个 dtype 的，见 :func:`~deepseek_export.parity.keys.selection_dtype`。
        layer: 层号。
        indices: 参考模型选中的，[B, S, topk]。
        ranked: 参考模型的打分。
    """
    name = f"{block.name.removesuffix('self_attn')}indexer"
    chosen: Key = ("selection", band, None)
    output = Output(name, names.selection(layer)["indices"], indices.numpy(), chosen, ranking=ranked)
    margin = in_router_units(ranked.margin, band, key[1]).numpy()
    return replace(block, outputs=(*block.outputs, output), selection_margin=margin)


def mlp_block(
    key: Key,
    prefix: str,
    phase: str,
    feeds: Mapping[str, np.ndarray],
    layer: int,
    residual: Tensor,
    x: Tensor,
    margin: np.ndarray,
) -> Block:
    """一层的前馈（含残差）；参数同 :func:`attention_block`。

    Args:
        x: 参考模型这一层的输出。
        margin: 见 :func:`~deepseek_export.parity.routing.router_margin`。
    """
    source = names.attn_residual(layer)
    output = Output(f"{prefix}mlp", names.layer_output(layer), x.numpy(), key)
    return Block(f"{prefix}mlp", phase, {**feeds, source: residual.numpy()}, (output,), margin, source)
