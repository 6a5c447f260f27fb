"""只有一个稀疏注意力节点、没有函数体的模型：装了算子库才能运行，所以跑的一定是 kernel。不导入 torch。"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import onnxruntime as ort

from deepseek_export.backend.ort.values import ort_value
from deepseek_export.cpu_library import CpuLibrary
from deepseek_export.dtypes import DTYPES
from deepseek_export.ops.spec import OpSpec
from deepseek_export.ops.table import LIGHTNING_INDEXER, SPARSE_MLA_ATTENTION
from tools.cpu_node import SCALE, make_inputs, op_session

#: (S, T, past_lens)：不到、刚过、远过名额；解码、多 token、跨几段与几批的 prefill。
SHAPES = ((1, 8, (0,)), (1, 40, (39, 17)), (1, 1500, (1499, 20)), (5, 90, (0, 1, 85)), (300, 330, (30,)))


@functools.cache
def session_for(
    library: CpuLibrary, spec: OpSpec, kinds: tuple[tuple[str, str], ...], topk: int, isa: str, threads: int
) -> ort.InferenceSession:
    attributes = {"topk": topk} if spec is LIGHTNING_INDEXER else {"scale": SCALE}
    return op_session(library, spec, dict(kinds), attributes, isa, "", threads)


def run(
    session: ort.InferenceSession, inputs: dict[str, np.ndarray], outputs: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """绑好内存跑一次；``outputs`` 里与输入同一块的就是原地。"""
    binding = session.io_binding()
    for name, array in inputs.items():
        binding.bind_ortvalue_input(name, ort_value(array))
    for name, array in outputs.items():
        binding.bind_ortvalue_output(name, ort_value(array))
    options = ort.RunOptions()
    options.log_severity_level = 4
    session.run_with_iobinding(binding, options)
    return outputs


def index_inputs(
    dtype: str, cache_dtype: str, S: int, T: int, past: tuple[int, ...], H: int = 33, di: int = 20
) -> dict[str, np.ndarray]:
    rng, B = np.random.default_rng(S * T + H), len(past)

    def made(*shape: int, kind: str = dtype) -> np.ndarray:
        return rng.standard_normal(shape, dtype=np.float32).astype(DTYPES[kind].numpy)

    def rows() -> np.ndarray:
        """int8 的一行：随机的码，各行的 scale 不同。"""
        if cache_dtype != "int8":
            return made(B, 1, T, di, kind=cache_dtype)
        found = rng.integers(-127, 128, (B, 1, T, di + 3), np.int8)
        found[..., di] = rng.integers(32, 128, found.shape[:-1])
        found[..., di + 2] = -20
        return found

    return {
        "q": made(B, S, H, di),
        "w": made(B, S, H, kind="float32"),
        "k": made(B, S, di),
        "index_cache": rows(),
        "past_lens": np.array(past, np.int64),
    }


def select(
    library: CpuLibrary,
    inputs: dict[str, np.ndarray],
    topk: int,
    isa: str = "",
    threads: int = 1,
    in_place: bool = True,
) -> dict[str, np.ndarray]:
    used = {name: array.copy() for name, array in inputs.items()}
    B, S = used["k"].shape[:2]
    kinds = (("T", used["q"].dtype.name), ("C", used["index_cache"].dtype.name))
    cache = used["index_cache"] if in_place else np.zeros_like(used["index_cache"])
    outputs = {
        "indices": np.zeros((B, S, topk), np.int32),
        "counts": np.zeros((B, S), np.int32),
        "index_cache_out": cache,
    }
    return run(session_for(library, LIGHTNING_INDEXER, kinds, topk, isa, threads), used, outputs)


def attention_inputs(
    dtype: str, cache_dtype: str, S: int, T: int, past: tuple[int, ...], H: int, topk: int, widths: Any
) -> dict[str, np.ndarray]:
    inputs = make_inputs(dtype, cache_dtype, S, H, T, past, **widths)
    rng = np.random.default_rng(T + topk)
    indices = np.full((len(past), S, topk), -1, np.int32)
    counts = np.minimum(np.array(past)[:, None] + np.arange(1, S + 1), topk).astype(np.int32)
    for b, i in np.ndindex(*counts.shape):
        chosen = rng.choice(past[b] + i + 1, counts[b, i], replace=False)
        indices[b, i, : counts[b, i]] = np.sort(chosen)
    order = [port.name for port in SPARSE_MLA_ATTENTION.inputs[:7]]
    return {name: inputs[name] for name in order} | {"indices": indices, "counts": counts}


def attend(
    library: CpuLibrary, inputs: dict[str, np.ndarray], isa: str = "", threads: int = 1, in_place: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    used = {name: array.copy() for name, array in inputs.items()}
    B, S, H, dn = used["q_nope"].shape
    kinds = tuple((v, used[n].dtype.name) for v, n in (("T", "q_nope"), ("C", "kv_cache"), ("W", "w_kv_b")))
    cache = used["kv_cache"] if in_place else np.zeros_like(used["kv_cache"])
    o = np.zeros((B, S, H, used["w_kv_b"].shape[0] // H - dn), used["q_nope"].dtype)
    session = session_for(library, SPARSE_MLA_ATTENTION, kinds, 0, isa, threads)
    run(session, used, {"o": o, "kv_cache_out": cache})
    return o, cache
