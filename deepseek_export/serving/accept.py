"""一行在一步里给出哪几个 token：逐个照普通解码的办法选，选的与草稿相同，就接着选下一个。

第 i 个位置的 logits 是在前 i 个草稿之后算的，草稿又都与选的相同，所以与逐个解码选的是同一些：同样的 logits、处理器、位置、随机数。草稿只决定一步能走
多远，从不决定走到哪里。
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress

import numpy as np

from deepseek_export.runtime.sampling import unusable_logits
from deepseek_export.serving.forward import Step
from deepseek_export.serving.request import Request


def accepted(
    request: Request,
    logits: np.ndarray | None,
    best: list[int],
    peaks: list[float],
    drafts: list[int],
    row: int,
) -> tuple[list[int], Exception | None]:
    """一行接下来的 token。

    Args:
        request: 这一行的请求。
        logits: ``[K+1, V]`` float32；只取最大的那个的请求可以没有。
        best, peaks: 各 K+1 个，每个位置 logit 最大的 token 与它的值。
        drafts: 这一行的草稿，至多 K 个。
        row: 第几行，写进错误里。

    Returns:
        ``(token, 错误)``：有错误时，token 是在它之前选好的，可以是空的。
    """
    sampler, taken = request.work.sampler, list[int]()
    known = _known(request)
    position = request.length
    for at in range(len(drafts) + 1):
        if not math.isfinite(peaks[at]):
            return taken, unusable_logits(row, peaks[at])
        try:
            token = best[at]
            if not sampler.plain:
                token = sampler.pick(_given(logits)[at], position + at, known)
        except Exception as error:  # 处理器可以是别人的代码；不能连累同批的请求
            return taken, error
        taken.append(token)
        if at == len(drafts) or token != drafts[at] or request.ends_with(token):
            break
        known.append(token)
    return taken, None


def _known(request: Request) -> list[int]:
    """此前的整条序列，末尾可以接上草稿；没有处理器的请求没有人看。"""
    if not request.work.sampler.processors:
        return []
    request.history.drop_drafts()
    return request.history


def _given(logits: np.ndarray | None) -> np.ndarray:
    if logits is None:
        raise ValueError("要照采样参数选，却没有取 logits")
    return logits


def drafting(requests: Sequence[Request]) -> Callable[[int, np.ndarray], np.ndarray] | None:
    """怎么选草稿：与主模型选 token 一样，同样的参数、处理器与随机数，只是看草稿模型的 logits；都只取最大的就是 ``None``。

    随机数相同，两个分布又相近，选中的就多半相同，比总取最大的接受得多；语法也因此管着草稿。
    """
    special = [slot for slot, request in enumerate(requests) if not request.work.sampler.plain]
    if not special:
        return None
    known = [_known(request) for request in requests]

    def choose(step: int, logits: np.ndarray) -> np.ndarray:
        chosen = logits.argmax(axis=1).astype(np.int64, copy=False)
        for slot in special:
            request = requests[slot]
            # 草稿是什么都行：处理器的错误，到真要选这个位置的时候再说。
            with suppress(Exception):
                if np.isfinite(logits[slot, chosen[slot]]):
                    position = request.length + step
                    chosen[slot] = request.work.sampler.pick(logits[slot], position, known[slot])
            known[slot].append(int(chosen[slot]))
        return chosen

    return choose


def ragged(step: Step, wanted: np.ndarray) -> list[list[int]]:
    """各行自己的草稿；``wanted`` ``[B]`` 是各要几个。"""
    return [row[:count] for row, count in zip(step.drafts.tolist(), wanted.tolist(), strict=True)]
