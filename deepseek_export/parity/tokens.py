"""tokens 层：greedy 续写逐 token 相同。"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from deepseek_export.bundle import Manifest
from deepseek_export.errors import DsxError
from deepseek_export.parity.logits import logits_cases, logits_key, router_dtype
from deepseek_export.parity.oracle import Oracle
from deepseek_export.parity.report import Case
from deepseek_export.parity.routing import row_margin
from deepseek_export.parity.tolerances import Key, token_margin
from deepseek_export.reference import ReferenceModel
from deepseek_export.runtime import Generator


def token_cases(
    manifest: Manifest,
    generator: Generator,
    speculative: Generator | None,
    oracle: Oracle,
    model: ReferenceModel,
    rows: Sequence[Sequence[int]],
    steps: int,
    on_case: Callable[[str], None],
) -> Iterator[Case]:
    """每条 prompt 单独跑一遍、再合成一个 batch 跑一遍，都与基准的 greedy 比；带草稿模型的再用投机解码各跑一遍。

    分叉处若基准自己的两个候选 logit 相差在容差之内，或者之前路由已在近平局处分叉（见 :func:`_routing_forked`），记为近平局；
    否则不通过。``model`` 只用来找路由近平局，其余参数同 :func:`~deepseek_export.parity.model.model_cases`。
    """
    key = logits_key(manifest)

    def forked(ids: Sequence[int]) -> bool:
        return _routing_forked(manifest, generator, oracle, model, ids)

    want = []
    for i, row in enumerate(rows):
        on_case(f"prompt {i}: oracle")
        want.append(oracle.greedy(row, steps))
    ways = _ways(generator, rows, steps, "")
    if speculative is not None:
        ways |= _ways(speculative, rows, steps, "speculative ")
    for way, run in ways.items():
        on_case(way)
        try:
            outputs = run()
        except DsxError as error:
            if error.code != "DSX-E505":
                raise
            # logits 里有 NaN：这正是要报告的不一致，不是中断校验的理由。
            yield Case(level="tokens", name=f"tokens {way}", passed=False, note=error.what)
            continue
        for i, (got, expected) in enumerate(zip(outputs, want, strict=True)):
            yield _case(f"tokens[{i}] {way}", list(rows[i]), got, expected, oracle, key, forked)


def _ways(
    generator: Generator, rows: Sequence[Sequence[int]], steps: int, prefix: str
) -> dict[str, Callable[[], list[list[int]]]]:
    return {
        f"{prefix}alone": lambda: [
            generator.generate([row], steps, ignore_eos=True).token_ids[0] for row in rows
        ],
        f"{prefix}batch": lambda: generator.generate(list(rows), steps, ignore_eos=True).token_ids,
    }


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


def _routing_forked(
    manifest: Manifest, generator: Generator, oracle: Oracle, model: ReferenceModel, ids: Sequence[int]
) -> bool:
    """bundle 逐 token 走这段文本时，路由确实在近平局处分叉：分叉之前的 logits 都在容差内，之后没有整体跑偏。"""
    got, want = generator.logits([ids], chunk=1)[0], oracle.logits(ids)
    margin, router = row_margin(manifest, model, ids), router_dtype(manifest)
    cases = list(logits_cases("tokens", "", logits_key(manifest), got, want, margin, router))
    return all(case.passed for case in cases) and any(case.near_ties for case in cases)
