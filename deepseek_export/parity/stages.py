"""每个 stage 单独比：喂参考模型在那条边上的 hidden，看它交出去的是不是参考模型的下一条边。

整套连起来的由 model、tokens 两级照常比；这里的输入一律取参考模型的，所以第一处不通过就是出错的那个 stage。
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch

from deepseek_export.backend.base import Backend
from deepseek_export.bundle import Bundle, BundleWeights
from deepseek_export.bundle.stages import StageSet
from deepseek_export.capture import names
from deepseek_export.parity.arrays import to_numpy
from deepseek_export.parity.context import Context
from deepseek_export.parity.keys import logits_key, router_dtype
from deepseek_export.parity.logits import logits_cases
from deepseek_export.parity.report import Case
from deepseek_export.parity.routing import router_margin
from deepseek_export.reference.model import DecoderLayer
from deepseek_export.reference.weights import torch_dtype

#: 一套 stage 的 op、block 两级、草稿模型单独的比较与量化的损失为什么不比。
NOT_CUT = "图分在各 stage 里，截不出算子与块：op、block、loss 三级与草稿模型的逐块比较用切开之前的 bundle"


@torch.no_grad()
def stage_cases(stages: StageSet, backend: Backend, context: Context) -> Iterator[Case]:
    """一次 prefill，每个 stage 一项（末个是 logits）。

    Args:
        stages: 哪一套。
        backend: 每个 stage 在哪里跑。
        context: 这次校验。

    Raises:
        DsxError: stage 打不开，或跑不了。
    """
    manifest, model = context.manifest, context.model
    ids = torch.tensor(context.block_rows)
    batch, width = ids.shape
    past = torch.zeros(batch, dtype=torch.int64)
    positions = torch.arange(width).expand(batch, -1)
    x, cos, sin = model.embed(ids, past)
    edges, margins = [x], []
    for layer, cache in zip(
        model.layers, model.empty_caches(batch, width, torch_dtype(manifest.cache.dtype)), strict=True
    ):
        assert isinstance(layer, DecoderLayer)
        residual, x, *_ = layer(x, cos, sin, past, *cache)
        edges.append(x)
        margins.append(router_margin(layer, residual, manifest.model))
    logits, _ = model.head(x, positions)
    drafts, vocab = width - 1, manifest.model.vocab_size
    feeds = {
        names.INPUT_IDS: ids.numpy(),
        names.PAST_LENS: past.numpy(),
        names.LOGITS_POSITIONS: np.ascontiguousarray(positions.numpy()),
        names.DRAFT_IDS: np.zeros((batch, drafts), np.int64),
        names.DRAFT_PROBS: np.zeros((batch, drafts, vocab), np.float32),
        names.UNIFORM: np.zeros((batch, width), np.float32),
        names.TEMPERATURE: np.ones(1, np.float32),
    }
    for number, (item, directory) in enumerate(zip(stages.record.stages, stages.directories, strict=True)):
        last = number == len(stages.directories) - 1
        output, want = (names.LOGITS, logits) if last else ("hidden_out", edges[item.layers[-1] + 1])
        with context.step(item.directory):
            bundle = backend.prepared(Bundle.open(directory))
            runner = backend.open(bundle, bundle.manifest.main, BundleWeights(bundle))
            given = {**feeds, "hidden_in": to_numpy(edges[item.layers[0]])}
            inputs = {name: given[name] for name in runner.contract.inputs}
            got = runner.run(inputs, (output,), runner.new_caches(batch, width))[output]
        margin = torch.stack([margins[layer] for layer in item.layers]).amin(0).numpy()
        name = f"{item.directory} {output}"
        yield from logits_cases(
            "model", name, logits_key(manifest), got, to_numpy(want), margin, router_dtype(manifest)
        )
