"""把一次比较的输入与参照输出存成 Polygraphy 的格式，任何人都能用 ``polygraphy run`` 复现。"""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from polygraphy.comparator import RunResults
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER

from deepseek_export.bundle import Bundle
from deepseek_export.capture import names
from deepseek_export.parity.tolerances import TOLERANCES
from deepseek_export.reference import ReferenceModel

FOLDER = "reports/polygraphy"


@torch.no_grad()
def save_comparison(bundle: Bundle, model: ReferenceModel, rows: Sequence[Sequence[int]]) -> str | None:
    """写 ``inputs.json`` 与 ``outputs.json``。

    Args:
        bundle: 写进它的 ``reports/polygraphy/``。
        model: 参考模型，给出参照的 logits 与 hidden。
        rows: 等长的 token 序列，做一次 prefill。

    Returns:
        可直接粘贴的命令；缓存是 bfloat16（Polygraphy 存不了）或权重按引用（Polygraphy 不会按配方生成）时为 ``None``。
    """
    if bundle.manifest.cache.dtype == "bfloat16" or bundle.manifest.weights.mode == "reference":
        return None
    folder = bundle.path / FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    ids = torch.tensor([list(row) for row in rows])
    past = torch.zeros(ids.shape[0], dtype=torch.int64)
    positions = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
    cache_dtype = getattr(torch, bundle.manifest.cache.dtype)
    caches = model.empty_caches(ids.shape[0], ids.shape[1], cache_dtype)
    feeds = {
        names.INPUT_IDS: ids.numpy(),
        names.PAST_LENS: past.numpy(),
        names.LOGITS_POSITIONS: np.ascontiguousarray(positions.numpy()),
    }
    for i, layer in enumerate(caches):
        for tensor, cache in zip(bundle.manifest.cache.tensors, layer, strict=True):
            feeds[names.cache_input(tensor.name, i)] = cache.numpy()
    logits, hidden, _ = model(ids, past, positions, caches)
    results = RunResults()
    results.add([{names.LOGITS: logits.numpy(), names.HIDDEN: hidden.numpy()}], runner_name="pytorch")
    with G_LOGGER.verbosity(G_LOGGER.ERROR):
        save_json([feeds], str(folder / "inputs.json"))
        results.save(str(folder / "outputs.json"))
    limit = TOLERANCES["logits", bundle.manifest.dtype].max_abs
    return polygraphy_command(bundle.path, limit)


def polygraphy_command(bundle: Path, limit: float) -> str:
    """复现命令；容差取自容差表。"""
    model, folder = shlex.quote(str(bundle / "model.onnx")), shlex.quote(str(bundle / FOLDER))
    return (
        f"polygraphy run {model} --onnxrt --load-inputs {folder}/inputs.json "
        f"--load-outputs {folder}/outputs.json --atol {limit:g} --rtol 0"
    )
