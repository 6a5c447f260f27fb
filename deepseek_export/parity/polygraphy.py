"""把一次比较的输入与参照输出存成 Polygraphy 的格式，任何人都能用 ``polygraphy run`` 复现。"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto
from polygraphy.comparator import RunResults
from polygraphy.json import save_json
from polygraphy.logger import G_LOGGER

from deepseek_export.bundle import Bundle
from deepseek_export.bundle.disk import check_free_space, disk_errors
from deepseek_export.bundle.graph import Slot, point_at
from deepseek_export.capture import names
from deepseek_export.parity.block import Output
from deepseek_export.parity.inputs import cache_feeds
from deepseek_export.parity.keys import logits_key
from deepseek_export.parity.measures import rms
from deepseek_export.parity.subgraph import ModelGraph
from deepseek_export.parity.tolerances import tolerance
from deepseek_export.reference import ReferenceModel
from deepseek_export.reference.weights import torch_dtype

FOLDER = "reports/polygraphy"
GRAPH, WEIGHTS, INPUTS, OUTPUTS = "graph.onnx", "weights.bin", "inputs.json", "outputs.json"


@dataclass(frozen=True)
class Iteration:
    """一次前向：输入名 → 数组，输出名 → PyTorch 的结果。"""

    feeds: Mapping[str, np.ndarray]
    want: Mapping[str, np.ndarray]


def save_comparison(
    folder: Path, model: onnx.ModelProto, graph: ModelGraph, iterations: Sequence[Iteration]
) -> None:
    """一个自足的目录：截好的图、它用到的权重、输入与参照。

    Args:
        folder: 新建的目录。
        model: :meth:`~deepseek_export.parity.subgraph.ModelGraph.cut` 的结果。
        graph: ``model`` 从它截得，权重的内容从它取。
        iterations: 每次前向。
    """
    with disk_errors(folder):
        folder.mkdir()
        _pack_weights(model, graph, folder)
        onnx.save(model, folder / GRAPH)
        save_iterations(folder, iterations)


def _pack_weights(model: onnx.ModelProto, graph: ModelGraph, folder: Path) -> None:
    """把 ``model`` 用到的外部权重逐个写进 ``folder``，并改指过去。

    链接都不行：ONNX Runtime 不认符号链接与目录之外的路径；多一个硬链接，onnx 就不肯再读 bundle 自己的那个文件。
    """
    external = [t for t in model.graph.initializer if t.data_location == TensorProto.EXTERNAL]
    lengths = [int(entry.value) for t in external for entry in t.external_data if entry.key == "length"]
    check_free_space(folder, sum(lengths))
    with (folder / WEIGHTS).open("wb") as packed:
        for tensor in external:
            offset = packed.tell()
            # 不用 tofile：写不下时它抛的没有错误号
            packed.write(np.ascontiguousarray(graph.array(tensor.name)).reshape(-1).view(np.uint8).data)
            packed.flush()
            point_at(tensor, Slot(WEIGHTS, offset, packed.tell() - offset))


def save_iterations(folder: Path, iterations: Sequence[Iteration]) -> None:
    """写 ``inputs.json`` 与 ``outputs.json``。"""
    results = RunResults()
    results.add([dict(iteration.want) for iteration in iterations], runner_name="pytorch")
    with G_LOGGER.verbosity(G_LOGGER.ERROR):
        save_json([dict(iteration.feeds) for iteration in iterations], str(folder / INPUTS))
        results.save(str(folder / OUTPUTS))


def polygraphy_command(model: Path, folder: Path, default: float, outputs: Iterable[Output] = ()) -> str:
    """复现命令，可直接粘贴。

    Args:
        model: ONNX 文件。
        folder: :func:`save_iterations` 写的目录。
        default: 最大绝对差的上限。
        outputs: 各自有上限的输出；与 ``default`` 不同的才写进命令，同一个值在几次前向里上限不同时取大的。
    """
    limits: dict[str, float] = {}
    for output in outputs:
        # int8 缓存的字节，Polygraphy 不会还原：放过它，由 dsx 自己比。
        packed = output.decode is not None
        limit = 255.0 if packed else output.tolerance.limit(rms(output.want))
        limits[output.value] = max(limit, limits.get(output.value, 0.0))
    tolerances = [f"{default:g}"]
    tolerances += [f"{name}:{limit:.4g}" for name, limit in limits.items() if limit != default]
    words = ["polygraphy", "run", str(model), "--onnxrt"]
    words += ["--load-inputs", str(folder / INPUTS), "--load-outputs", str(folder / OUTPUTS)]
    return shlex.join([*words, "--atol", *tolerances, "--rtol", "0"])


@torch.no_grad()
def save_model_comparison(bundle: Bundle, model: ReferenceModel, rows: Sequence[Sequence[int]]) -> str | None:
    """整个主模型的一次 prefill：存进 bundle 的 ``reports/polygraphy/``。

    Args:
        bundle: 被验证的 bundle。
        model: 参考模型，给出参照的 logits 与 hidden。
        rows: 等长的 token 序列。

    Returns:
        复现命令；模型或缓存是 bfloat16（Polygraphy 存不了）或权重按引用（Polygraphy 不会按配方生成）时为 ``None``。
    """
    manifest = bundle.manifest
    if "bfloat16" in (manifest.dtype, manifest.cache.dtype) or manifest.weights.mode == "reference":
        return None
    folder = bundle.path / FOLDER
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    ids = torch.tensor([list(row) for row in rows])
    past = torch.zeros(ids.shape[0], dtype=torch.int64)
    positions = torch.arange(ids.shape[1]).expand(ids.shape[0], -1)
    caches = model.empty_caches(ids.shape[0], ids.shape[1], torch_dtype(manifest.cache.dtype))
    feeds = {
        names.INPUT_IDS: ids.numpy(),
        names.PAST_LENS: past.numpy(),
        names.LOGITS_POSITIONS: np.ascontiguousarray(positions.numpy()),
    }
    for i, layer in enumerate(caches):
        feeds |= cache_feeds(manifest, i, layer)
    logits, hidden, _ = model(ids, past, positions, caches)
    want = {names.LOGITS: logits.numpy(), names.HIDDEN: hidden.numpy()}
    with disk_errors(folder):
        save_iterations(folder, [Iteration(feeds, want)])
    limit = tolerance(*logits_key(bundle.manifest)).max_abs
    return polygraphy_command(bundle.model_path, folder, limit)
