"""被比的引擎，各住一个进程（``perf.isolate.Worker``），方法相同：

- ``last_logits(tokens)``：空缓存上一次前向，最后一行的 logits。
- ``prefill(tokens)``：同上，返回秒数。
- ``go_to(depth)``：让缓存里正好有 ``depth`` 个 token，不计时。
- ``decode(tokens)``：从那个深度起逐个喂 ``tokens``，每步都取 logits，走完退回原处；返回每个 token 的秒数。
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from time import perf_counter
from typing import Any

import numpy as np

#: llama.cpp 填缓存时一块多少个 token。
_FILL = 512


class Dsx:
    """一个 ``ort-cpu`` 的 bundle，缓存直接填成随机数（计算量与真的上下文相同）。"""

    def __init__(self, bundle: str, threads: int, context: int) -> None:
        from deepseek_export import api
        from deepseek_export.benchmark.depth import fill_caches

        self._session = api.load(bundle, threads).session
        self._caches = self._session.new_caches(1, context)
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


class LlamaCpp:
    """llama.cpp，经 ``llama-cpp-python`` 的底层接口：权重读进内存（不映射）。

    ``exact`` 只用来核对文件：缓存 float32，flash attention 关着（它把 float32 的缓存也转成 float16）。
    """

    def __init__(self, model: str, threads: int, context: int, exact: bool = False) -> None:
        import llama_cpp as llama
        from gguf import GGMLQuantizationType

        self._llama = llama
        self._quiet = llama.llama_log_callback(lambda level, text, data: None)  # 库只借用，要留着
        llama.llama_log_set(self._quiet, None)
        llama.llama_backend_init()
        settings = llama.llama_model_default_params()
        settings.load_mode = llama.LLAMA_LOAD_MODE_NONE
        self._model = llama.llama_model_load_from_file(model.encode(), settings)
        if not self._model:
            raise RuntimeError(f"llama.cpp 装载不了 {model}")
        options = llama.llama_context_default_params()
        options.n_ctx, options.n_seq_max, options.kv_unified = context, 2, True  # 两个序列只为 _fill
        options.n_threads = options.n_threads_batch = threads
        options.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_ENABLED
        if exact:
            options.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
            options.type_k = options.type_v = GGMLQuantizationType.F32
        self._context = llama.llama_init_from_model(self._model, options)
        if not self._context:
            raise RuntimeError(f"llama.cpp 建不了 {context} 个 token 的上下文")
        self._vocab = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(self._model))
        self._filled = self._depth = 0

    def system(self) -> str:
        """编译时打开了哪些指令集，llama.cpp 的原话。"""
        return self._llama.llama_print_system_info().decode()

    def logits(self, tokens: list[int], past: int) -> np.ndarray:
        """退回到 ``past`` 个 token，再来 ``tokens``；最后一行的 logits，内存会被下一次覆盖。"""
        llama = self._llama
        llama.llama_memory_seq_rm(llama.llama_get_memory(self._context), 0, past, -1)
        self._run(tokens, range(past, past + len(tokens)))
        self._filled = past + len(tokens)
        row = llama.llama_get_logits_ith(self._context, -1)
        return np.ctypeslib.as_array(row, (self._vocab,))

    def last_logits(self, tokens: list[int]) -> list[float]:
        return self.logits(tokens, 0).tolist()

    def prefill(self, tokens: list[int]) -> float:
        return _seconds(lambda: self.logits(tokens, 0))

    def go_to(self, depth: int) -> None:
        if depth > self._filled:
            self._fill(depth)
        self._depth = depth

    def _fill(self, length: int) -> None:
        """让缓存里有 ``length`` 个 token：逐块在空缓存上 prefill（位置照旧，只是看不见前面的块），再用公开的状态接口拼成一个序列。

        一块块接着 prefill 的话，8192 个 token 的注意力在这里要几分钟，而只测时间用不着块与块之间的注意力。
        """
        llama, memory = self._llama, self._llama.llama_get_memory(self._context)
        rng, states = np.random.default_rng(0), [self._state()] if self._filled else []
        for start in range(self._filled, length, _FILL):
            llama.llama_memory_clear(memory, False)
            positions = range(start, min(start + _FILL, length))
            self._run(rng.integers(0, self._vocab, len(positions)).tolist(), positions)
            states.append(self._state())
        llama.llama_memory_clear(memory, False)
        for state in states:
            if not llama.llama_state_seq_set_data(self._context, state, len(state), 1):
                raise RuntimeError("llama.cpp 放不回缓存")
            llama.llama_memory_seq_cp(memory, 1, 0, -1, -1)
            llama.llama_memory_seq_rm(memory, 1, -1, -1)
        self._filled = length

    def _state(self) -> ctypes.Array[ctypes.c_uint8]:
        """序列 0 在缓存里的全部内容。"""
        state = (ctypes.c_uint8 * self._llama.llama_state_seq_get_size(self._context, 0))()
        self._llama.llama_state_seq_get_data(self._context, state, len(state), 0)
        return state

    def _run(self, tokens: list[int], positions: range) -> None:
        """一次前向，只要最后一行的 logits。"""
        llama, count = self._llama, len(tokens)
        # 批只借用这两个数组，要留到算完。
        ids, at = (llama.llama_token * count)(*tokens), (llama.llama_pos * count)(*positions)
        batch = llama.llama_batch_get_one(ids, count)
        batch.pos = at
        if code := llama.llama_decode(self._context, batch):
            raise RuntimeError(f"llama_decode 返回 {code}")

    def decode(self, tokens: list[int]) -> float:
        return _each(lambda index, token: self.logits([token], self._depth + index), tokens)


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
