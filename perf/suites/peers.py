"""与同类并排（CPU-8、CPU-9、CPU-10）：同一份 bfloat16 检查点、同样的线程数与 token，一个引擎一个进程，轮流各测一个样本。

要可选依赖 ``peers``（llama-cpp-python 在本机编译，编译选项见 ``docs/peers.md``）与 C++ 算子库。
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_export.benchmark.spread import Spread, interleaved, paired_ratio
from deepseek_export.checkpoint.weight_only import QuantBlock, Quantization, QuantKind
from deepseek_export.cpu_library import BUILD_COMMAND, OFF, find_library
from deepseek_export.parity.measures import measure
from perf.isolate import Worker
from perf.results import Case, SuiteResult
from perf.workload.workspace import SHAPES, Workspace

TITLE = "与同类并排"
DSX, DSX_COARSE, BODIES = "dsx int8", "dsx int8 块 128", "dsx int8 函数体"
DSX_INT4, LLAMA_INT4 = "dsx int4", "llama.cpp Q4_0"
LLAMA, LLAMA_BF16 = "llama.cpp Q8_0", "llama.cpp BF16"
EAGER, COMPILED = "transformers", "transformers compile"
SERIES = (EAGER, COMPILED, LLAMA_BF16, LLAMA, LLAMA_INT4, BODIES, DSX, DSX_COARSE, DSX_INT4)
RATE = "tokens_per_second"
_ENGINES = "perf.peers.engines"
#: 一种形状最多排练几遍。
_REHEARSALS = 8


@dataclass(frozen=True)
class Scenario:
    """固定的场景。

    Attributes:
        shape: 形状；完整的就是 9.3 亿参数、每个 token 激活 3.3 亿的那个。
        prompt: prefill 多少个 token。
        depths: 在这些深度上解码。
        tokens: 解码的一个样本喂几个 token。
        slow_tokens: transformers 的一个样本喂几个：深处一个 token 就要一秒多。
        compile_s: 一种形状最多等 ``torch.compile`` 几秒；0 是不测它。
        int4: 测不测 4 位的两个。
        runs: 每个引擎几个样本。
    """

    shape: str = "0.9B"
    prompt: int = 256
    depths: tuple[int, ...] = (0, 4096, 8192)
    tokens: int = 16
    slow_tokens: int = 2
    compile_s: int = 300
    int4: bool = True
    runs: int = 7


FULL = Scenario()
QUICK = Scenario(shape="peers-2", depths=(0, 8192), compile_s=0, int4=False, runs=3)


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """测全部引擎。

    Raises:
        ImportError: 没有装 ``peers``。
        FileNotFoundError: 没有 C++ 算子库。
        RuntimeError: 引擎打不开或跑不了，带它的原话；``torch.compile`` 除外，它的原话写进结果。
    """
    scenario = QUICK if quick else FULL
    versions = _versions()
    if find_library() is None:
        raise FileNotFoundError(f"没有 C++ 算子库：{BUILD_COMMAND}")
    tokens = np.random.default_rng(0).integers(0, SHAPES[scenario.shape]["vocab_size"], scenario.prompt)
    with ExitStack() as stack:
        engines: dict[str, Worker] = {}
        for name, opener in _openers(workspace, scenario, threads).items():
            engines[name] = opener()
            stack.callback(engines[name].close)
        facts: dict[str, Any] = {"build": engines[LLAMA].ask("system")}
        if COMPILED in engines and (error := rehearse(engines[COMPILED], scenario, tokens.tolist())):
            facts["failed"] = {COMPILED: error}
            del engines[COMPILED]
        compiled = engines.get(COMPILED)
        before = compiled.ask("compilations") if compiled else 0
        cases = list(_cases(engines, scenario, tokens.tolist()))
        if compiled:
            facts |= {"graphs": before, "recompiled": compiled.ask("compilations") - before}
        cases.append(_memory(engines, facts))
    return SuiteResult(suite="peers", title=TITLE, scenario=asdict(scenario) | versions, cases=cases)


def _versions() -> dict[str, str]:
    names = ("llama-cpp-python", "gguf", "transformers", "torch")
    try:
        return {name: metadata.version(name) for name in names}
    except metadata.PackageNotFoundError as error:
        raise ImportError(f"没有装 {error.name}，怎么装见 docs/peers.md") from error


def _openers(workspace: Workspace, scenario: Scenario, threads: int) -> dict[str, Callable[[], Worker]]:
    """名字 → 打开引擎；检查点、bundle 与 GGUF 到那时才造。"""
    from perf.peers.llama_file import WeightType, write_gguf

    context = max(scenario.prompt, max(scenario.depths) + scenario.tokens)

    def checkpoint() -> Path:
        return workspace.checkpoint(scenario.shape, dtype="bfloat16")

    def dsx(block: QuantBlock = 32, kind: QuantKind = "int8", **environment: str) -> Worker:
        overrides, quantization = ("mla.cache_dtype=bfloat16",), Quantization(kind=kind, block=block)
        bundle = workspace.bundle(checkpoint(), "mla+moe", "float32", overrides, quantization)
        return Worker(f"{_ENGINES}:Dsx", environment, bundle=str(bundle), threads=threads, context=context)

    def llama(weights: WeightType) -> Worker:
        file = write_gguf(checkpoint(), workspace.folder / f"{weights}.gguf", weights)
        return Worker(f"{_ENGINES}:LlamaCpp", model=str(file), threads=threads, context=context)

    def transformers(compiled: bool) -> Worker:
        model = str(checkpoint())
        return Worker(f"{_ENGINES}:Transformers", checkpoint=model, threads=threads, compiled=compiled)

    found: dict[str, Callable[[], Worker]] = {
        DSX: dsx,
        DSX_COARSE: partial(dsx, block=128),
        BODIES: partial(dsx, DSX_CPU_LIBRARY=OFF),
        LLAMA: partial(llama, "Q8_0"),
        LLAMA_BF16: partial(llama, "BF16"),
        EAGER: partial(transformers, compiled=False),
    }
    if scenario.int4:
        found |= {DSX_INT4: partial(dsx, kind="int4"), LLAMA_INT4: partial(llama, "Q4_0")}
    return found | ({COMPILED: partial(transformers, compiled=True)} if scenario.compile_s else {})


def rehearse(worker: Worker, scenario: Scenario, tokens: list[int]) -> str | None:
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


def _cases(engines: dict[str, Worker], scenario: Scenario, tokens: list[int]) -> Iterator[Case]:
    """prefill 在前：它从空缓存开始，会冲掉填好的。"""
    logits = {name: np.array(worker.ask("last_logits", tokens=tokens)) for name, worker in engines.items()}
    prefill = {name: partial(worker.ask, "prefill", tokens=tokens) for name, worker in engines.items()}
    yield case(
        f"prefill {scenario.prompt}",
        {
            name: [found / scenario.prompt for found in samples]
            for name, samples in interleaved(prefill, scenario.runs).items()
        },
        # 不是门槛，只为看得出各引擎跑的是同一个模型；逐层相等由测试在小形状上证明。
        {"difference": {name: measure(found, logits[EAGER]).calc_diff for name, found in logits.items()}},
    )
    for depth in scenario.depths:
        for worker in engines.values():
            worker.ask("go_to", depth=depth)
        counts = {
            name: scenario.slow_tokens if name in (EAGER, COMPILED) else scenario.tokens for name in engines
        }
        decode = {
            name: partial(worker.ask, "decode", tokens=tokens[: counts[name]])
            for name, worker in engines.items()
        }
        yield case(f"depth {depth}", interleaved(decode, scenario.runs), {"depth": depth})


def case(name: str, samples: dict[str, list[float]], facts: dict[str, Any]) -> Case:
    """``samples`` 是每个 token 的秒数；报每秒几个 token，比值仍是时间之比。"""
    seconds = {engine: Spread.of(found) for engine, found in samples.items()}
    return Case(
        name=name,
        values={
            f"{engine}.{RATE}": Spread.of([1 / sample for sample in found.samples])
            for engine, found in seconds.items()
        },
        ratios={
            f"dsx/{engine}": paired_ratio(seconds[DSX], found)
            for engine, found in seconds.items()
            if engine != DSX
        }
        | {f"dsx 块 128/{LLAMA}": paired_ratio(seconds[DSX_COARSE], seconds[LLAMA])}
        | (
            {f"{DSX_INT4}/{LLAMA_INT4}": paired_ratio(seconds[DSX_INT4], seconds[LLAMA_INT4])}
            if DSX_INT4 in seconds
            else {}
        ),
        facts=facts,
    )


def _memory(engines: dict[str, Worker], facts: dict[str, Any]) -> Case:
    """全部测完之后：最深的缓存还在，各进程现在与最多占多少。"""
    values: dict[str, Spread] = {}
    for name, worker in engines.items():
        found = worker.memory()
        values |= {f"{name}.resident": Spread.of([found.resident]), f"{name}.peak": Spread.of([found.peak])}
    return Case(name="内存", values=values, facts=facts)
