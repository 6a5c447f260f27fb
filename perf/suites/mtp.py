"""MTP 吞吐（MTP-6）：同一个 bundle、同一个会话上，普通解码与投机解码交替；由实测的步耗算出盈亏平衡的接受率。"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

from deepseek_export import api
from deepseek_export.benchmark.spread import Spread, interleaved, paired_ratio
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.model import CompiledModel
from deepseek_export.runtime import GenerationResult
from perf.results import Case, SuiteResult
from perf.workload.padded import write_padded
from perf.workload.workspace import Workspace

TITLE = "MTP 投机解码"
PROMPTS = CHECKPOINT / "heldout_prompts.json"
#: 曲线上的点：每个草稿的条件接受率。
ACCEPTANCES = tuple(round(0.05 * i, 2) for i in range(21))


@dataclass(frozen=True)
class Scenario:
    """固定的场景：每步 4 个 token（3 个草稿加 1），greedy，遇 EOS 不停，止损线关掉（看投机本身的代价）。

    ``demo`` 是训练过的演示检查点；``padded`` 是它放进大模型的形状（:mod:`perf.workload.padded`）：输出与接受率相同，一步受限于读权重，
    与部署的模型一样。

    Attributes:
        new_tokens: 各模型每行生成几个。
        runs: 各模型交替跑几遍。
    """

    models: tuple[str, ...] = ("demo", "padded")
    batches: tuple[int, ...] = (8, 1)
    draft_tokens: int = 3
    new_tokens: tuple[int, ...] = (256, 256)
    runs: tuple[int, ...] = (7, 3)


FULL = Scenario()
QUICK = Scenario(models=("demo",), new_tokens=(64,), runs=(3,))


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """测全部格子。

    Raises:
        RuntimeError: 投机解码的输出与普通解码不同。
    """
    scenario = QUICK if quick else FULL
    cases = []
    for name, new_tokens, runs in zip(scenario.models, scenario.new_tokens, scenario.runs, strict=True):
        checkpoint = CHECKPOINT if name == "demo" else write_padded(CHECKPOINT, workspace.folder / name)
        overrides = (f"mtp.num_draft_tokens={scenario.draft_tokens}",)
        model = api.load(workspace.bundle(checkpoint, "full", "float32", overrides), threads)
        for batch in scenario.batches:
            cases.append(_case(model, f"{name} b{batch}", batch, scenario.draft_tokens, new_tokens, runs))
    return SuiteResult(suite="mtp", title=TITLE, scenario=asdict(scenario), cases=cases)


def _case(
    model: CompiledModel, name: str, batch: int, draft_tokens: int, new_tokens: int, repeats: int
) -> Case:
    rows = _rows(model, batch)
    assert model.speculative is not None
    model.speculative.floor = None

    def runner(speculative: bool):
        return lambda: model.generate(rows, new_tokens, speculative=speculative, ignore_eos=True)

    runs = interleaved({"plain": runner(False), "speculative": runner(True)}, repeats)
    last = {way: found[-1] for way, found in runs.items()}
    if last["plain"].token_ids != last["speculative"].token_ids:
        raise RuntimeError(f"{name}：投机解码的输出与普通解码不同")
    stats = last["speculative"].speculation
    assert stats is not None
    values = {f"{way}.decode_s": Spread.of([r.decode_s for r in found]) for way, found in runs.items()}
    for way in runs:
        values[f"{way}.token_s"] = values[f"{way}.decode_s"].scaled(1 / (batch * (new_tokens - 1)))
    # 一轮 = 起草 K 个加一次验证，以普通解码的一步为单位。
    round_cost = paired_ratio(
        Spread.of([_per_call(r, stats.main_calls) for r in runs["speculative"]]),
        Spread.of([_per_call(r, new_tokens - 1) for r in runs["plain"]]),
    )
    values["speculative.round_cost"] = round_cost
    curve = [round_cost.median / tokens_per_round(p, draft_tokens) for p in ACCEPTANCES]
    facts = {
        "batch": batch,
        "speculation": stats.as_dict(),
        "acceptances": list(ACCEPTANCES),
        "curve": curve,
        "break_even": break_even(round_cost.median, draft_tokens),
    }
    ratios = {"time": paired_ratio(values["speculative.decode_s"], values["plain.decode_s"])}
    return Case(name=name, values=values, ratios=ratios, facts=facts)


def _rows(model: CompiledModel, batch: int) -> list[list[int]]:
    """留出集的开头，均匀地取，中英文各半。"""
    texts = json.loads(Path(PROMPTS).read_text(encoding="utf-8"))
    return [model.encode(texts[i * len(texts) // batch % len(texts)]) for i in range(batch)]


def _per_call(result: GenerationResult, calls: int) -> float:
    return result.decode_s / calls


def tokens_per_round(acceptance: float, drafts: int) -> float:
    """每个草稿以 ``acceptance`` 的条件概率被接受时，一轮平均产出几个 token。"""
    return sum(acceptance**i for i in range(drafts + 1))


def break_even(round_cost: float, drafts: int) -> float | None:
    """投机与普通一样快时的条件接受率；全中也不划算为 ``None``，零接受也划算为 0。"""
    if round_cost > drafts + 1:
        return None
    low, high = 0.0, 1.0
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (low, middle) if tokens_per_round(middle, drafts) >= round_cost else (middle, high)
    return high if round_cost > 1 else 0.0
