"""tokens 层：greedy 续写逐 token 相同。"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from deepseek_export.errors import DsxError
from deepseek_export.parity.checks import Check
from deepseek_export.parity.context import Context
from deepseek_export.parity.keys import router_dtype
from deepseek_export.parity.logits import logits_cases
from deepseek_export.parity.oracle import Oracle
from deepseek_export.parity.report import Case
from deepseek_export.parity.routing import row_margin
from deepseek_export.parity.tolerances import Key, token_margin


def run(check: Check, context: Context) -> Iterator[Case]:
    """每条 prompt 单独跑一遍、再合成一个 batch 跑一遍，都与基准的 greedy 比；带草稿模型的再用投机解码各跑一遍。

    分叉处若基准自己的两个候选 logit 相差在容差之内，或者之前路由已在近平局处分叉（见 :func:`_routing_forked`），记为近平局；
    否则不通过。
    """
    (key,), steps = check.keys, context.steps
    oracle, rows = context.want(check), context.rows[: check.prompts]

    def forked(ids: Sequence[int]) -> bool:
        return _routing_forked(context, oracle, key, ids)

    want = []
    for i, row in enumerate(rows):
        with context.step(f"prompt {i}: oracle"):
            want.append(oracle.greedy(row, steps))
    for way in check.ways:
        generator = context.speculative if way.speculative else context.generator
        batches = [rows] if way.batch else [[row] for row in rows]
        try:
            with context.step(way.name):
                results = [generator.generate(batch, steps, ignore_eos=True) for batch in batches]
        except DsxError as error:
            if error.code != "DSX-E505":
                raise
            # logits 里有 NaN：这正是要报告的不一致，不是中断校验的理由。
            yield Case(level="tokens", name=f"tokens {way.name}", passed=False, note=error.what)
            continue
        outputs = [ids for result in results for ids in result.token_ids]
        for i, (got, expected) in enumerate(zip(outputs, want, strict=True)):
            yield _case(f"tokens[{i}] {way.name}", list(rows[i]), got, expected, oracle, key, forked)


def _case(
    name: str,
    prompt: list[int],
    got: Sequence[int],
    want: Sequence[int],
    oracle: Oracle,
    key: Key,
    forked: Callable[[Sequence[int]], bool],
) -> Case:
    got, want = list(got), list(want)
    if got == want:
        return Case(level="tokens", name=name, passed=True, note=f"{len(want)} 个 token 全部相同")
    shared = min(len(got), len(want))
    step = next((i for i, (a, b) in enumerate(zip(got, want, strict=False)) if a != b), shared)
    if step == shared:
        return Case(level="tokens", name=name, passed=False, note=f"长度不同：{len(got)} 与 {len(want)}")
    logits = oracle.logits([*prompt, *want[:step]])[-1]
    gap = float(logits[want[step]] - logits[got[step]])
    limit = token_margin(key, float(np.sqrt((logits**2).mean())))
    near, verdict = True, "近平局"
    if gap > limit:
        near = forked([*prompt, *want[:step]])
        verdict = "之前路由在近平局处分叉" if near else "错误"
    note = f"第 {step} 步分叉：{got[step]}，应为 {want[step]}；基准 logit 相差 {gap:.2e}（{verdict}，界 {limit:.2e}）"
    return Case(level="tokens", name=name, passed=near, near_ties=int(near), note=note)


def _routing_forked(context: Context, oracle: Oracle, key: Key, ids: Sequence[int]) -> bool:
    """bundle 逐 token 走这段文本时，路由确实在近平局处分叉：分叉之前的 logits 都在容差内，之后没有整体跑偏。"""
    got, want = context.generator.logits([ids], chunk=1)[0], oracle.logits(ids)
    margin = row_margin(context.manifest, context.model, ids)
    cases = list(logits_cases("tokens", "", key, got, want, margin, router_dtype(context.manifest)))
    return all(case.passed for case in cases) and any(case.near_ties for case in cases)
