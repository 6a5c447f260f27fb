"""住着 vLLM 的进程，问法与 ``perf.isolate`` 的 Worker 相同；由装着 vLLM 的那个环境的 Python 运行，所以只用标准库与 vLLM。

    PYTHON vllm_worker.py 检查点 线程数 上下文 至多几行

它自己采样，喂的是自己产出的 token；一步的用时含采样与调度，这就是它的用户等的。
"""

from __future__ import annotations

import json
import os
import sys
from time import perf_counter
from typing import Any


class Vllm:
    """CPU 后端，bfloat16，不捕获图，不复用前缀；引擎就在这个进程里，一步一步地走。"""

    def __init__(self, checkpoint: str, threads: int, context: int, rows: int) -> None:
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        os.environ["VLLM_CPU_OMP_THREADS_BIND"] = f"0-{threads - 1}"
        os.environ["OMP_NUM_THREADS"] = str(threads)
        os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
        import vllm

        self._vllm, self._made, self._rows = vllm, 0, 1
        self._engine = vllm.LLM(
            model=checkpoint,
            dtype="bfloat16",
            enforce_eager=True,
            skip_tokenizer_init=True,
            max_model_len=context,
            max_num_seqs=rows,
            enable_prefix_caching=False,
        ).llm_engine

    def system(self) -> str:
        """版本，与各层的注意力走哪一条路。"""
        layers = self._engine.vllm_config.compilation_config.static_forward_context.values()
        paths = {type(layer.impl).__name__ for layer in layers if hasattr(layer, "impl")}
        return f"vLLM {self._vllm.__version__}，{'、'.join(sorted(paths)) or '不知道走哪条路'}"

    def prefill(self, tokens: list[int]) -> float:
        """到第一个 token 为止。"""
        self._add(tokens, 1)
        return sum(self._steps())

    def decode(self, tokens: list[int]) -> float:
        """一个 token 的提示词之后逐个走 ``len(tokens)`` 步，每个 token 的秒数。"""
        self._add(tokens[:1], len(tokens) + 1)
        return self._later(1)

    def open_rows(self, rows: int, context: int) -> None:
        self._rows = rows

    def decode_rows(self, tokens: list[int]) -> float:
        """``rows`` 行一起，每个 token（各行合计）的秒数。"""
        for row in range(self._rows):
            self._add([tokens[row % len(tokens)]], len(tokens) + 1)
        return self._later(self._rows)

    def _add(self, tokens: list[int], new_tokens: int) -> None:
        self._made += 1
        sampling = self._vllm.SamplingParams(
            temperature=0.0, max_tokens=new_tokens, ignore_eos=True, detokenize=False
        )
        self._engine.add_request(str(self._made), {"prompt_token_ids": tokens}, sampling)

    def _steps(self) -> list[float]:
        """走到全部请求结束，每一步的秒数。"""
        found = []
        while self._engine.has_unfinished_requests():
            began = perf_counter()
            self._engine.step()
            found.append(perf_counter() - began)
        return found

    def _later(self, rows: int) -> float:
        """第一步是提示词，不算。"""
        steps = self._steps()[1:]
        return sum(steps) / (len(steps) * rows)


def main(checkpoint: str, threads: str, context: str, rows: str) -> None:
    """一行一问，一行一答；库往标准输出写的东西改道标准错误。"""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def reply(**found: Any) -> None:
        replies.write(json.dumps(found) + "\n")
        replies.flush()

    def words(error: Exception) -> str:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"

    try:
        engine = Vllm(checkpoint, int(threads), int(context), int(rows))
    except Exception as error:  # 对方要的是原话，不是这个进程的退出码
        reply(error=words(error))
        return
    reply(result=None)
    for line in sys.stdin:
        method, arguments = json.loads(line)
        try:
            reply(result=getattr(engine, method)(**arguments))
        except Exception as error:
            reply(error=words(error))


if __name__ == "__main__":
    main(*sys.argv[1:])
