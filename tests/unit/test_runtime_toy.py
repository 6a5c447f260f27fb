"""遵守 ``model.onnx`` 输入输出约定的最小真模型，供其余 test_runtime_* 共用；本文件也核对它自己。

两层单头注意力，位置编码查表（越过最大位置会直接报错），缓存由 TensorScatter 更新。
past_lens、可见性掩码、分块或 logits_positions 错一点，结果就会变。
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from deepseek_export.backend.ort.runner import OrtRunner
from deepseek_export.dtypes import DTYPES
from deepseek_export.runtime import ModelSession

pytestmark = pytest.mark.unit

VOCAB, WIDTH, LATENT, LAYERS = 23, 12, 6, 2


@dataclass(frozen=True)
class Toy:
    """权重、numpy 前向和 ONNX 导出。"""

    weights: dict[str, np.ndarray]
    max_positions: int

    def forward(self, ids: list[int]) -> np.ndarray:
        """一个序列的全部 logits ``[S, V]`` float32，没有缓存，直接算。"""
        w = self.weights
        x = w["embed"][ids] + w["position"][: len(ids)]
        visible = np.tril(np.ones((len(ids), len(ids)), bool))
        for layer in range(LAYERS):
            key = x @ w[f"wkv.{layer}"]
            scores = np.where(visible, (x @ w[f"wq.{layer}"]) @ key.T, -np.inf)
            probs = np.exp(scores - scores.max(axis=-1, keepdims=True))
            x = np.tanh(x + (probs / probs.sum(axis=-1, keepdims=True)) @ key @ w[f"wo.{layer}"])
        return x @ w["head"]

    def greedy(self, ids: list[int], steps: int) -> list[int]:
        """从头重算的贪心生成，返回新 token。"""
        tokens = list(ids)
        for _ in range(steps):
            tokens.append(int(self.forward(tokens)[-1].argmax()))
        return tokens[len(ids) :]


def make_toy(max_positions: int = 600, seed: int = 0) -> Toy:
    """随机权重；幅度够大，贪心序列不会一直重复同一个 token。"""
    rng = np.random.default_rng(seed)
    shapes = {"embed": (VOCAB, WIDTH), "position": (max_positions, WIDTH), "head": (WIDTH, VOCAB)}
    for layer in range(LAYERS):
        shapes |= {f"wkv.{layer}": (WIDTH, LATENT), f"wq.{layer}": (WIDTH, LATENT)}
        shapes |= {f"wo.{layer}": (LATENT, WIDTH)}
    weights = {name: (0.7 * rng.standard_normal(shape)).astype(np.float32) for name, shape in shapes.items()}
    return Toy(weights, max_positions)


def save_toy(
    toy: Toy,
    path: Path,
    cache_dtype: str = "float32",
    logits_dtype: str = "float32",
    external: bool = False,
    split_kv: bool = False,
) -> Path:
    """写成 ONNX。``split_kv`` 用 k_cache/v_cache 两个缓存（关掉 MLA 时的约定）。"""
    nodes: list[onnx.NodeProto] = []

    def op(kind: str, *inputs: str, out: str, **attrs: Any) -> str:
        nodes.append(helper.make_node(kind, list(inputs), [out], name=out, **attrs))
        return out

    ints = {"zero": 0, "one": 1}
    axes = {"axis0": [0], "axis1": [1], "axis_last": [-1]}
    consts = {name: np.array(value, np.int64) for name, value in (ints | axes).items()}
    consts["minus_inf"] = np.array(-np.inf, np.float32)
    op("Shape", "input_ids", out="len_s", start=1, end=2)
    op("Squeeze", "len_s", "axis0", out="s")
    op("Range", "zero", "s", "one", out="range_s")
    op("Unsqueeze", "past_lens", "axis1", out="past_col")
    op("Add", "past_col", "range_s", out="pos")
    op("Gather", "embed", "input_ids", out="x_tok")
    op("Gather", "position", "pos", out="x_pos")
    x = op("Add", "x_tok", "x_pos", out="x0")
    op("Unsqueeze", "pos", "axis1", out="pos_h")
    op("Unsqueeze", "pos_h", "axis_last", out="pos_q")
    caches = []
    for layer in range(LAYERS):
        row = op("MatMul", x, f"wkv.{layer}", out=f"c{layer}")
        row = op("Unsqueeze", row, "axis1", out=f"c4{layer}")
        row = op("Cast", row, out=f"cc{layer}", to=DTYPES[cache_dtype].onnx)
        read = []
        for stem in ("k_cache", "v_cache") if split_kv else ("kv_cache",):
            name, out = f"{stem}.{layer}", f"{stem}_out.{layer}"
            op("TensorScatter", name, row, "past_lens", out=out, axis=-2, mode="linear")
            read.append(op("Cast", out, out=f"{stem}_f.{layer}", to=TensorProto.FLOAT))
            caches.append((name, out))
        keys, values = read[0], read[-1]
        q = op("Unsqueeze", op("MatMul", x, f"wq.{layer}", out=f"q{layer}"), "axis1", out=f"q4{layer}")
        scores = op("MatMul", q, op("Transpose", keys, out=f"kt{layer}", perm=[0, 1, 3, 2]), out=f"qk{layer}")
        op("Squeeze", op("Shape", keys, out=f"lt{layer}", start=2, end=3), "axis0", out=f"t{layer}")
        op("Range", "zero", f"t{layer}", "one", out=f"range_t{layer}")
        visible = op("LessOrEqual", f"range_t{layer}", "pos_q", out=f"vis{layer}")
        masked = op("Where", visible, scores, "minus_inf", out=f"masked{layer}")
        probs = op("Softmax", masked, out=f"p{layer}", axis=-1)
        mixed = op("Squeeze", op("MatMul", probs, values, out=f"o4{layer}"), "axis1", out=f"o{layer}")
        added = op("Add", x, op("MatMul", mixed, f"wo.{layer}", out=f"y{layer}"), out=f"a{layer}")
        x = op("Tanh", added, out="hidden" if layer == LAYERS - 1 else f"x{layer + 1}")
    op("Unsqueeze", "logits_positions", "axis_last", out="rows")
    op("GatherND", "hidden", "rows", out="picked", batch_dims=1)
    op("Cast", op("MatMul", "picked", "head", out="logits_f"), out="logits", to=DTYPES[logits_dtype].onnx)

    info = helper.make_tensor_value_info
    int64, cache = TensorProto.INT64, DTYPES[cache_dtype].onnx
    inputs = [info("input_ids", int64, ["B", "S"]), info("past_lens", int64, ["B"])]
    inputs += [info("logits_positions", int64, ["B", "L"])]
    inputs += [info(name, cache, ["B", 1, "T", LATENT]) for name, _ in caches]
    outputs = [info("logits", DTYPES[logits_dtype].onnx, ["B", "L", VOCAB])]
    outputs += [info("hidden", TensorProto.FLOAT, ["B", "S", WIDTH])]
    outputs += [info(out, cache, ["B", 1, "T", LATENT]) for _, out in caches]
    tensors = [numpy_helper.from_array(value, name) for name, value in (toy.weights | consts).items()]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, tensors)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    location = path.with_suffix(".data").name
    onnx.save_model(model, path, save_as_external_data=external, location=location, size_threshold=64)
    return path


@pytest.mark.parametrize("cache_dtype", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize("split_kv", [False, True])
def test_toy_matches_numpy(tmp_path: Path, cache_dtype: str, split_kv: bool) -> None:
    toy = make_toy()
    path = save_toy(toy, tmp_path / "model.onnx", cache_dtype, split_kv=split_kv, external=True)
    session = ModelSession(OrtRunner(path, threads=1, max_positions=toy.max_positions))
    ids = np.array([[3, 1, 4, 1, 5]])
    got = session.run(ids, np.array([0]), np.arange(5)[None], session.new_caches(1, 5))
    bound = {"float32": 1e-5, "float16": 3e-2, "bfloat16": 3e-1}[cache_dtype]
    assert np.abs(got[0] - toy.forward(ids[0].tolist())).max() < bound
    assert session.runner.contract.caches.bytes_per_token == (
        LAYERS * (1 + split_kv) * LATENT * (4 if cache_dtype == "float32" else 2)
    )
