"""被比的引擎，各住一个进程（``perf.isolate``），方法相同：

- ``last_logits(tokens)``：空缓存上一次前向，最后一行的 logits。
- ``prefill(tokens)``：同上，返回秒数。
- ``go_to(depth)``：让缓存里正好有 ``depth`` 个 token，不计时。
- ``decode(tokens)``：从那个深度起逐个喂 ``tokens``，每步都取 logits，走完退回原处；返回每个 token 的秒数。
- ``open_rows(rows, context)``：换成 ``rows`` 个空的序列，不计时。
- ``decode_rows(tokens)``：各行一起，从空的起逐个喂 ``tokens``，第 r 行从第 r 个起轮着来，一步里各行的专家因此不同；每步取每一行的 logits；
  返回每个 token（各行合计）的秒数。

这里的是 Python 的；llama.cpp 与 ik_llama.cpp 是 ``llama_driver.cpp``，vLLM 是 ``vllm_worker.py``。
"""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np


class Dsx:
    """一个 ``ort-cpu`` 的 bundle，缓存直接填成随机数（计算量与真的上下文相同）。"""

    def __init__(self, bundle: str, threads: int, context: int) -> None:
        from deepseek_export import api
        from deepseek_export.benchmark.depth import fill_caches

        self._bundle = bundle
        self._session = api.load(bundle, threads).session
        self._caches = self._rows = self._session.new_caches(1, context)
        fill_caches(self._caches, context, seed=0)
        self._depth = 0

    def logits(self, tokens: list[int], past: int) -> np.ndarray:
        """已有 ``past`` 个 token，再来 ``tokens``；最后一行的 logits。"""
        last = np.array([[len(tokens) - 1]])
        return self._session.run(np.array([tokens]), np.array([past]), last, self._caches)[0, 0]

    def last_logits(self, tokens: list[int]) -> list[float]:
        return self.logits(tokens, 0).tolist()

    def prefill(self, tokens: list[int]) -> float:
        return _seconds(lambda: self.logits(tokens, 0))

    def go_to(self, depth: int) -> None:
        self._depth = depth

    def decode(self, tokens: list[int]) -> float:
        return _each(lambda index, token: self.logits([token], self._depth + index), tokens)

    def step_bytes(self, depth: int) -> int:
        """一步至少读多少字节。"""
        from deepseek_export.benchmark.reading import step_bytes
        from deepseek_export.bundle import Bundle

        return step_bytes([Bundle.open(self._bundle).manifest], 1, depth + 1).total

    def open_rows(self, rows: int, context: int) -> None:
        self._rows = self._session.new_caches(rows, context)

    def decode_rows(self, tokens: list[int]) -> float:
        rows = self._rows.batch
        last = np.zeros((rows, 1), np.int64)
        turns = np.resize(tokens, len(tokens) + rows)

        def step(index: int, _: int) -> None:
            self._session.run(turns[index : index + rows, None], np.full(rows, index), last, self._rows)

        return _each(step, tokens) / rows


class Transformers:
    """transformers 自己的模型，缓存同样直接填好；``compiled`` 则整个 forward 经 ``torch.compile``，``batch`` 行都喂同样的 token。"""

    def __init__(
        self,
        checkpoint: str,
        threads: int,
        dtype: str = "bfloat16",
        compiled: bool = False,
        batch: int = 1,
    ) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        from deepseek_export.integration.compat import cache_name

        self._cache_name = cache_name()
        torch.set_num_threads(threads)
        self.model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
        self._forward: Callable[..., Any] = self.model
        if compiled:
            # 上下文每步长一个 token，形状不写死，否则每步都重新编译；空缓存、新填的与退回过的各要一个图，缺省到 8 个就悄悄退回原样执行。
            torch._dynamo.config.recompile_limit = 64
            self._forward = torch.compile(self.model, dynamic=True)
        self._cache: Any = None
        self._batch = batch

    def compilations(self) -> int:
        """``torch.compile`` 至今编译了几个图。"""
        from torch._dynamo.utils import counters

        return counters["stats"]["unique_graphs"]

    def logits(self, tokens: list[int], cache: Any) -> np.ndarray:
        """在 ``cache`` 之后再来 ``tokens``；最后一行的 logits。"""
        import torch

        with torch.inference_mode():
            found = self._forward(
                torch.tensor([tokens] * self._batch), past_key_values=cache, logits_to_keep=1
            )
        return found.logits[0, -1].float().numpy()

    def new_cache(self) -> Any:
        """空的缓存。"""
        from transformers import DynamicCache

        return DynamicCache(config=self.model.config)

    def last_logits(self, tokens: list[int]) -> list[float]:
        return self.logits(tokens, self.new_cache()).tolist()

    def prefill(self, tokens: list[int]) -> float:
        cache = self.new_cache()
        return _seconds(lambda: self.logits(tokens, cache))

    def go_to(self, depth: int) -> None:
        import torch

        self._cache = self.new_cache()
        if depth == 0:
            return
        self.logits([0], self._cache)  # 走一步，缓存就有了真的布局，再换成那么长的随机数
        for layer in self._cache.layers:
            for name in ("keys", "values", "indexer_keys"):
                if (kept := getattr(layer, name, None)) is not None:
                    shape = list(kept.shape)
                    shape[-2] = depth
                    setattr(layer, name, torch.randn(shape).to(kept.dtype))

    def decode(self, tokens: list[int]) -> float:
        cache = self._cache
        seconds = _each(lambda _, token: self.logits([token], cache), tokens)
        cache.crop(-len(tokens))
        return seconds


def _seconds(work: Callable[[], object]) -> float:
    began = perf_counter()
    work()
    return perf_counter() - began


def _each(step: Callable[[int, int], object], tokens: list[int]) -> float:
    """逐个走完 ``tokens``，每个 token 的平均秒数。"""
    began = perf_counter()
    for index, token in enumerate(tokens):
        step(index, token)
    return (perf_counter() - began) / len(tokens)
