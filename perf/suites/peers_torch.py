"""int8 与不量化的并排：transformers（原样与 ``torch.compile``）、llama.cpp 的 BF16、没有算子库的同一个 bundle。

要的与 :mod:`perf.suites.peers` 相同；慢的都在这里，那一套因此测得快。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import numpy as np

from deepseek_export.benchmark.spread import interleaved
from deepseek_export.cpu_library import OFF
from deepseek_export.parity.measures import measure
from perf.isolate import Answering, Worker
from perf.peers.field import WITHIN, Field, Pair, speeds
from perf.peers.llama_build import LLAMA_BUILD, LlamaBuild
from perf.results import Case, SuiteResult
from perf.suites.peers import DSX, dsx, llama, peer_versions
from perf.workload.library import require_library
from perf.workload.workspace import SHAPES, Workspace

TITLE = "与 transformers、不量化的并排"
BODIES, LLAMA_BF16 = "dsx int8 函数体", "llama.cpp BF16"
EAGER, COMPILED = "transformers", "transformers compile"
SERIES = (EAGER, COMPILED, LLAMA_BF16, BODIES, DSX)
PAIRS = tuple(Pair("dsx", DSX, peer) for peer in (EAGER, COMPILED, LLAMA_BF16, BODIES))
#: 一种形状最多排练几遍。
_REHEARSALS = 8


@dataclass(frozen=True)
class Scenario:
    """固定的场景。

    Attributes:
        shape, tokens, runs: 见 :class:`perf.suites.peers.Scenario`。
        prompt: prefill 多少个 token。
        depths: 在这些深度上解码。
        slow_tokens: transformers 的一个样本喂几个：深处一个 token 就要一秒多。
        compile_s: 一种形状最多等 ``torch.compile`` 几秒；0 是不测它。
    """

    shape: str = "0.9B"
    prompt: int = 256
    depths: tuple[int, ...] = (0, 8192)
    tokens: int = 16
    slow_tokens: int = 2
    compile_s: int = 300
    runs: int = 5


FULL = Scenario()
QUICK = Scenario(shape="peers-2", compile_s=0, runs=3)


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """测全部引擎。

    Raises:
        ImportError: 没有装 ``peers``。
        FileNotFoundError: 没有 C++ 算子库，或没有编译好的 llama.cpp。
        RuntimeError: dsx 的引擎打不开或跑不了；别的退场，原话写进结果。
    """
    scenario, versions = QUICK if quick else FULL, peer_versions()
    vocab = SHAPES[scenario.shape]["vocab_size"]
    tokens = np.random.default_rng(0).integers(0, vocab, scenario.prompt).tolist()
    with ExitStack() as stack:
        field, facts = Field(), dict[str, Any]()
        field.open(_openers(workspace, scenario, threads), stack)
        if (compiled := field.engines.get(COMPILED)) and (error := rehearse(compiled, scenario, tokens)):
            field.failed[COMPILED] = error
            del field.engines[COMPILED]
        before = field.each([COMPILED], "compilations")
        cases = list(_cases(field, scenario, tokens))
        after = field.each([COMPILED], "compilations")
        if COMPILED in after:
            facts |= {"graphs": before[COMPILED], "recompiled": after[COMPILED] - before[COMPILED]}
        cases.append(field.memory(field.engines, PAIRS))
    cases[-1].facts.update(facts | ({"failed": field.failed} if field.failed else {}))
    return SuiteResult(suite="peers-torch", title=TITLE, scenario=asdict(scenario) | versions, cases=cases)


def rehearse(worker: Answering, scenario: Scenario, tokens: list[int]) -> str | None:
    """按测量的次序把每种形状走到不再编译；不行就返回原话。

    一个深度至少走两遍：刚填好的缓存与退回过的缓存，内存布局不同，各编译一次。
    """

    def settle(method: str, tokens: list[int]) -> None:
        still = 0
        for _ in range(_REHEARSALS):
            before = worker.ask("compilations")
            worker.ask(method, tokens=tokens, within=scenario.compile_s)
            still = still + 1 if worker.ask("compilations") == before else 0
            if still == 2:
                return
        raise RuntimeError(f"{method} 走了 {_REHEARSALS} 遍还在重新编译")

    try:
        settle("prefill", tokens)
        for depth in scenario.depths:
            worker.ask("go_to", depth=depth, within=scenario.compile_s)
            settle("decode", tokens[: scenario.slow_tokens])
    except RuntimeError as error:
        return str(error)
    return None


def _openers(workspace: Workspace, scenario: Scenario, threads: int) -> dict[str, Callable[[], Answering]]:
    """名字 → 打开引擎；bundle 与 GGUF 到那时才造。"""
    from perf.peers.llama_file import write_gguf

    require_library()
    build = LlamaBuild.find(LLAMA_BUILD, ik=False)
    context = max(scenario.prompt, max(scenario.depths) + scenario.tokens)
    checkpoint = partial(workspace.checkpoint, scenario.shape, dtype="bfloat16")

    def transformers(compiled: bool) -> Worker:
        return Worker(
            "perf.peers.engines:Transformers",
            checkpoint=str(checkpoint()),
            threads=threads,
            compiled=compiled,
        )

    def bfloat16() -> Answering:
        model = write_gguf(checkpoint(), workspace.folder / "BF16.gguf", "BF16")
        return llama(build.compile_driver(workspace.folder), model, threads, context)

    ours = partial(dsx, workspace, scenario.shape, threads, context, "int8", 32)
    found: dict[str, Callable[[], Answering]] = {
        EAGER: partial(transformers, compiled=False),
        LLAMA_BF16: bfloat16,
        BODIES: partial(ours, DSX_CPU_LIBRARY=OFF),
        DSX: ours,
    }
    return found | ({COMPILED: partial(transformers, compiled=True)} if scenario.compile_s else {})


def _cases(field: Field, scenario: Scenario, tokens: list[int]) -> Iterator[Case]:
    logits = {
        name: np.array(found) for name, found in field.each(SERIES, "last_logits", tokens=tokens).items()
    }
    samples = field.samples(SERIES, scenario.runs, "prefill", tokens=tokens)
    each = {name: [seconds / scenario.prompt for seconds in found] for name, found in samples.items()}
    difference = {name: measure(found, logits[EAGER]).calc_diff for name, found in logits.items()}
    yield speeds(f"prefill {scenario.prompt}", each, PAIRS, difference=difference)
    for depth in scenario.depths:
        field.each(SERIES, "go_to", depth=depth)
        decode = {
            name: partial(
                engine.ask,
                "decode",
                within=WITHIN,
                tokens=tokens[: scenario.slow_tokens if name in (EAGER, COMPILED) else scenario.tokens],
            )
            for name, engine in field.engines.items()
        }
        yield speeds(f"depth {depth}", interleaved(decode, scenario.runs), PAIRS, depth=depth)
