"""``dsx bench``：在用户自己的 bundle 上测 prefill、解码、各深度的一步与内存，可以与另一个 bundle 交替比。"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from deepseek_export import api
from deepseek_export.benchmark.depth_steps import Depth, measure_depth
from deepseek_export.benchmark.environment import environment
from deepseek_export.benchmark.memory import MemorySample, memory_in_subprocess
from deepseek_export.benchmark.reading import open_reader
from deepseek_export.benchmark.spread import Spread, interleaved, paired_ratio
from deepseek_export.bundle import Bundle
from deepseek_export.bundle.disk import keeping, write_report
from deepseek_export.bundle.manifest import Manifest
from deepseek_export.bundle.stages import StageSet, is_stage_set
from deepseek_export.errors import DsxError
from deepseek_export.model import CompiledModel
from deepseek_export.progress import Progress
from deepseek_export.runtime import GenerationResult
from deepseek_export.runtime.generate import check_positive
from deepseek_export.runtime.sampling import is_integer

REPORT = "reports/bench.json"
BUNDLE, AGAINST = "bundle", "against"
DEFAULT_DEPTHS = (256, 1024, 4096, 8192)


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Scenario(_Model):
    """固定的场景。

    Attributes:
        batch: 一批几条。
        prompt_len: 每条提示词多少个 token，由 ``seed`` 随机生成；给了文本就用文本，长度由文本决定。
        new_tokens: 每条生成多少个 token，遇到 EOS 不停。
        depths: 在这些上下文长度上各测一步；空的表示 :data:`DEFAULT_DEPTHS` 里模型放得下的。
        runs: 每种跑几遍；之前另有一遍预热。
        seed: token 与缓存内容的种子。
        threads: 线程数；``None`` 由 ONNX Runtime 决定。
    """

    batch: int = 1
    prompt_len: int = 256
    new_tokens: int = 64
    depths: tuple[int, ...] = ()
    runs: int = 5
    seed: int = 0
    threads: int | None = None


class Subject(_Model):
    """被测的一个 bundle。"""

    path: str
    profile: str
    target: str
    dtype: str
    cache_bytes_per_token: int
    memory: MemorySample | None


class Way(_Model):
    """一种跑法：哪个 bundle，普通还是投机。

    Attributes:
        prefill_s: 一次 prefill 的秒数。
        token_s: 解码时每产出一个 token 的秒数（整批合计）。
        speculation: 投机解码的统计，取最后一遍的。
        notes: 运行时要告诉用户的话，例如中途不再投机。
    """

    prefill_s: Spread
    token_s: Spread
    speculation: dict[str, Any] | None
    notes: list[str]


class Ratio(_Model):
    """两种跑法逐对之比，小于 1 是分子快。

    Attributes:
        what: 比的是什么，例如 ``decode``、``depth 8192``。
        numerator, denominator: 两种跑法，名字同 :attr:`BenchReport.ways` 与 :attr:`Depth.step_s`。
    """

    what: str
    numerator: str
    denominator: str
    value: Spread


class BenchReport(_Model):
    """一次 ``dsx bench`` 的全部结果。"""

    environment: dict[str, Any]
    scenario: Scenario
    subjects: dict[str, Subject]
    ways: dict[str, Way]
    depths: list[Depth]
    ratios: list[Ratio]


@dataclass(frozen=True)
class _Run:
    """一遍生成里要的数。"""

    prefill_s: float
    token_s: float
    result: GenerationResult


def bench_bundle(
    bundle: Path | str,
    *,
    against: Path | str | None = None,
    scenario: Scenario | None = None,
    prompts: Sequence[str] | None = None,
    verify_weights: bool | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """测一个 bundle，结果写进 ``reports/bench.json``。

    带草稿模型的 bundle 同时测普通解码与投机解码；给了 ``against`` 则两个 bundle 在同一次运行里交替地测。内存各在自己的进程里量。

    Args:
        bundle: 被测的 bundle。
        against: 对照的 bundle，须来自同一个检查点。
        scenario: 场景；缺省见 :class:`Scenario`。
        prompts: 用这些文本代替随机的 token；投机解码的接受率只有在真的文本上才有意义。
        verify_weights: 先读一遍哪些权重，核对 sha256，同 ``api.load``。
        progress: 进度显示。

    Returns:
        报告；一套 stage 没有内存一项。

    Raises:
        DsxError: ``DSX-E404`` / ``DSX-E405``，报告写不下，是 :class:`~deepseek_export.errors.UnwrittenReport`，带着测完的结果；``DSX-E412``，测的时候 bundle 被换掉；``DSX-E710``，场景超出模型的最大长度；``DSX-E711``，两个 bundle 不是同一个检查点；其余同 ``api.load``。
    """
    scenario, progress = scenario or Scenario(), progress or Progress()
    bundles = {BUNDLE: _open(bundle)} | ({} if against is None else {AGAINST: _open(against)})
    _check_same_source(bundles)
    for opened in bundles.values():
        checked = StageSet.open(opened.path) if is_stage_set(opened.path) else opened
        checked.confirm_weights(verify_weights, progress)
    scenario = _fitted(bundles[BUNDLE], scenario, prompts is None)
    started = environment(scenario.threads)
    subjects = {}
    for name, opened in bundles.items():
        progress.start(f"内存：{opened.path}")
        # 一套 stage 的内存在它的几个进程里，在这个进程里量不着。
        sample = (
            None
            if is_stage_set(opened.path)
            else memory_in_subprocess(opened.path, scenario.batch, max(scenario.depths), scenario.threads)
        )
        subjects[name] = _subject(opened, sample)
    progress.start("加载模型")
    models = {
        name: api.load(opened.path, scenario.threads, verify_weights=False)
        for name, opened in bundles.items()
    }
    rows = _rows(models[BUNDLE], scenario, prompts)
    runners = {
        way: _runner(models[name], rows, scenario.new_tokens, speculative)
        for name, model in models.items()
        for way, speculative in _ways(name, model)
    }
    progress.start("生成")
    runs = interleaved(runners, scenario.runs)
    ways = {name: _way(found) for name, found in runs.items()}
    sessions = {name: model.session for name, model in models.items()}
    manifests = {name: _manifests(opened) for name, opened in bundles.items()}
    depths = []
    with open_reader(scenario.threads) or nullcontext() as reader:
        for context in scenario.depths:
            progress.start(f"上下文 {context}")
            depths.append(
                measure_depth(
                    manifests, sessions, context, reader, scenario.batch, scenario.runs, scenario.seed
                )
            )
    report = BenchReport(
        environment=started,
        scenario=scenario,
        subjects=subjects,
        ways=ways,
        depths=depths,
        ratios=_ratios(ways, depths),
    )
    for opened in bundles.values():
        opened.check_in_place()
    with keeping(report):
        write_report(bundles[BUNDLE].path / REPORT, report.model_dump(mode="json"))
    return report


def bench(
    bundle: Path | str,
    against: Path | str | None = None,
    *,
    batch: int = 1,
    prompt_len: int = 256,
    prompts: Sequence[str] | None = None,
    new_tokens: int = 64,
    depths: Sequence[int] = (),
    runs: int = 5,
    seed: int = 0,
    threads: int | None = None,
    verify_weights: bool | None = None,
    progress: Progress | None = None,
) -> BenchReport:
    """在这台机器上测一个 bundle 的速度与内存；同 ``dsx bench``，结果也写进 ``reports/bench.json``。

    Args:
        bundle, against, prompts, verify_weights, progress: 见 :func:`bench_bundle`。
        batch, prompt_len, new_tokens, depths, runs, seed, threads: 场景，见 :class:`Scenario`。

    Raises:
        DsxError: ``DSX-E512``，场景的取值不对；其余见 :func:`bench_bundle`。
    """
    for name, value in (("batch", batch), ("prompt_len", prompt_len), ("runs", runs)):
        check_positive(name, value)
    for depth in depths:
        check_positive("depths", depth)
    if not (is_integer(new_tokens) and new_tokens >= 2):
        what = f"new_tokens={new_tokens!r}"
        raise DsxError("DSX-E512", what, "把 new_tokens 设为不小于 2 的整数：头一个不算解码")
    scenario = Scenario(
        batch=batch,
        prompt_len=prompt_len,
        new_tokens=new_tokens,
        depths=tuple(depths),
        runs=runs,
        seed=seed,
        threads=threads,
    )
    return bench_bundle(
        bundle,
        against=against,
        scenario=scenario,
        prompts=prompts,
        verify_weights=verify_weights,
        progress=progress,
    )


def _open(path: Path | str) -> Bundle:
    """一个 bundle，或一套 stage 合起来的整个。"""
    return StageSet.open(path).bundle if is_stage_set(path) else Bundle.open(path)


def _manifests(bundle: Bundle) -> list[Manifest]:
    """bundle 的 manifest；一套 stage 的就是每个 stage 的，权重在那里。"""
    if not is_stage_set(bundle.path):
        return [bundle.manifest]
    return [Bundle.open(directory).manifest for directory in StageSet.open(bundle.path).directories]


def _check_same_source(bundles: dict[str, Bundle]) -> None:
    first, *rest = bundles.values()
    for other in rest:
        if other.manifest.source.fingerprint != first.manifest.source.fingerprint:
            raise DsxError(
                "DSX-E711",
                f"{first.path} 来自 {first.manifest.source.path}，{other.path} 来自 {other.manifest.source.path}，权重不同",
                "用同一个检查点导出两个 bundle 再比",
            )


def _fitted(bundle: Bundle, scenario: Scenario, random_prompt: bool) -> Scenario:
    """补上缺省的上下文长度，核对全部长度都放得下。"""
    limit = bundle.manifest.model.max_position_embeddings
    depths = scenario.depths or tuple(depth for depth in DEFAULT_DEPTHS if depth <= limit) or (limit,)
    length = scenario.prompt_len if random_prompt else 0
    if max(length + scenario.new_tokens, *depths) > limit:
        raise DsxError(
            "DSX-E710",
            f"提示词 {length} 加新 token {scenario.new_tokens}，上下文 {list(depths)}，"
            f"而 max_position_embeddings 是 {limit}",
            f"用 --prompt-len、--new-tokens、--depth 把长度都压到 {limit} 以内",
        )
    return scenario.model_copy(update={"depths": depths})


def _rows(model: CompiledModel, scenario: Scenario, prompts: Sequence[str] | None) -> list[list[int]]:
    """每条的 token；文本不够一批就轮着用。"""
    if prompts:
        encoded = [model.encode(text) for text in prompts]
        return [encoded[row % len(encoded)] for row in range(scenario.batch)]
    rng = np.random.default_rng(scenario.seed)
    shape = (scenario.batch, scenario.prompt_len)
    return [row.tolist() for row in rng.integers(0, model.session.vocab_size, shape)]


def _ways(name: str, model: CompiledModel) -> list[tuple[str, bool]]:
    ways = [(f"{name}/plain", False)]
    return ways if model.speculative is None else [*ways, (f"{name}/speculative", True)]


def _runner(
    model: CompiledModel, rows: list[list[int]], new_tokens: int, speculative: bool
) -> Callable[[], _Run]:
    def run() -> _Run:
        result = model.generate(rows, new_tokens, speculative=speculative, ignore_eos=True)
        return _Run(result.prefill_s, result.decode_s / result.decode_tokens, result)

    return run


def _way(runs: list[_Run]) -> Way:
    last = runs[-1].result
    return Way(
        prefill_s=Spread.of([run.prefill_s for run in runs]),
        token_s=Spread.of([run.token_s for run in runs]),
        speculation=None if last.speculation is None else last.speculation.as_dict(),
        notes=list(last.notes),
    )


def _subject(bundle: Bundle, memory: MemorySample | None) -> Subject:
    manifest = bundle.manifest
    return Subject(
        path=str(bundle.path),
        profile=manifest.profile.name,
        target=manifest.target,
        dtype=manifest.dtype,
        cache_bytes_per_token=manifest.cache.bytes_per_token,
        memory=memory,
    )


def _ratios(ways: dict[str, Way], depths: list[Depth]) -> list[Ratio]:
    """投机 / 普通（同一个 bundle），以及被测 / 对照。"""
    tokens = {name: way.token_s for name, way in ways.items()}
    prefills = {name: way.prefill_s for name, way in ways.items()}
    ours, base = f"{BUNDLE}/plain", f"{AGAINST}/plain"
    wanted = [("decode", tokens, f"{name}/speculative", f"{name}/plain") for name in (BUNDLE, AGAINST)]
    wanted += [("prefill", prefills, ours, base), ("decode", tokens, ours, base)]
    wanted += [(f"depth {depth.context}", depth.step_s, BUNDLE, AGAINST) for depth in depths]
    return [
        Ratio(what=what, numerator=top, denominator=bottom, value=paired_ratio(found[top], found[bottom]))
        for what, found, top, bottom in wanted
        if top in found and bottom in found
    ]
