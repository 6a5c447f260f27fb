"""与同类并排（CPU-8–CPU-10、CPU-31–CPU-35）：同一份 bfloat16 检查点、同样的线程数与 token，一个引擎一个进程，轮流各测一个样本。

要可选依赖 ``peers``、C++ 算子库与编译好的 llama.cpp（``docs/peers.md``）；ik_llama.cpp 与 vLLM 没有就少它们的几列，结果里写着。
不量化的与 transformers 在 :mod:`perf.suites.peers_torch`。
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_export.benchmark.reading import open_reader
from deepseek_export.benchmark.spread import Spread
from deepseek_export.checkpoint.weight_only import QuantBlock, Quantization, QuantKind
from deepseek_export.cpu_library import BUILD_COMMAND
from deepseek_export.machine import cpu_flags
from deepseek_export.parity.measures import measure
from perf.isolate import Answering, Worker
from perf.peers.field import Field, Pair, speeds
from perf.peers.llama_build import IK_BUILD, LLAMA_BUILD, LlamaBuild
from perf.results import Case, SuiteResult
from perf.workload.library import require_library
from perf.workload.workspace import SHAPES, Workspace

TITLE = "与同类并排"
DSX, DSX_COARSE, DSX_INT4 = "dsx int8", "dsx int8 块 128", "dsx int4"
DSX_CACHE, DSX_INT4_CACHE = "dsx int8 缓存 int8", "dsx int4 缓存 int8"
LLAMA, LLAMA_INT4 = "llama.cpp Q8_0", "llama.cpp Q4_0"
IK, IK_INT4 = "ik_llama.cpp Q8_0", "ik_llama.cpp Q4_0"
VLLM = "vLLM bfloat16"
SERIES = (VLLM, LLAMA, LLAMA_INT4, IK, IK_INT4, DSX, DSX_COARSE, DSX_INT4)
#: 只在有上下文的深度上测：缓存的 dtype 在那里才要紧。
DEEP = (DSX_CACHE, DSX_INT4_CACHE)
#: 同样位数的才比；``dsx`` 是缺省的 int8。
PAIRS = (
    *(Pair("dsx", DSX, peer) for peer in (LLAMA, IK, VLLM)),
    *(Pair("dsx 块 128", DSX_COARSE, peer) for peer in (LLAMA, IK)),
    *(Pair("dsx int4", DSX_INT4, peer) for peer in (LLAMA_INT4, IK_INT4)),
    *(Pair("dsx 缓存 int8", DSX_CACHE, peer) for peer in (LLAMA, IK)),
    *(Pair("dsx int4 缓存 int8", DSX_INT4_CACHE, peer) for peer in (LLAMA_INT4, IK_INT4)),
)
READ = "读完要读的字节"
#: vLLM 所在环境的 Python。
VLLM_PYTHON = "DSX_VLLM_PYTHON"
_ENGINES = "perf.peers.engines"
_VLLM_WORKER = Path(__file__).parents[1] / "peers/vllm_worker.py"
#: 一行一起解码的至多有几个 token。
_ROW_TOKENS = 64


@dataclass(frozen=True)
class Scenario:
    """固定的场景。

    Attributes:
        shape: 形状；完整的就是 9.3 亿参数、每个 token 激活 3.3 亿的那个。
        prompts: prefill 多少个 token，各一格；vLLM 只测头一个。
        depths: 在这些深度上解码；vLLM 只测 0。
        batches: 这么多行一起从空的起解码。
        tokens: 解码的一个样本喂几个 token。
        prompt_runs: prefill 每个引擎几个样本。
        runs: 其余每个引擎几个样本。
    """

    shape: str = "0.9B"
    prompts: tuple[int, ...] = (256, 2048)
    depths: tuple[int, ...] = (0, 8192)
    batches: tuple[int, ...] = (8, 16)
    tokens: int = 16
    prompt_runs: int = 3
    runs: int = 5


FULL = Scenario()
QUICK = Scenario(shape="peers-2", prompts=(64,), batches=(2,), tokens=4, runs=3)


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """测全部引擎。

    Raises:
        ImportError: 没有装 ``peers``。
        FileNotFoundError: 没有 C++ 算子库，或没有编译好的 llama.cpp。
        RuntimeError: dsx 的引擎打不开或跑不了，或驱动编译不过；同类的退场，原话写进结果。
    """
    scenario = QUICK if quick else FULL
    versions = peer_versions()
    openers, absent = _openers(workspace, scenario, threads)
    for reason in absent.values():
        print(f"不测：{reason}", file=sys.stderr)
    vocab = SHAPES[scenario.shape]["vocab_size"]
    tokens = np.random.default_rng(0).integers(0, vocab, max(scenario.prompts)).tolist()
    reference = _reference(workspace.checkpoint(scenario.shape, dtype="bfloat16"), scenario, threads, tokens)
    with ExitStack() as stack:
        field = Field()
        field.open(openers, stack)
        build = field.each((LLAMA, IK, VLLM), "system")
        cases = list(_cases(field, scenario, threads, tokens, reference))
    facts = {"build": build, "absent": absent, "failed": field.failed, "amx": amx(build)}
    cases[-1].facts.update({name: found for name, found in facts.items() if found})
    return SuiteResult(suite="peers", title=TITLE, scenario=asdict(scenario) | versions, cases=cases)


def peer_versions() -> dict[str, str]:
    """场景里要记的版本。

    Raises:
        ImportError: 没有装 ``peers``。
    """
    try:
        return {name: metadata.version(name) for name in ("gguf", "transformers", "torch")}
    except metadata.PackageNotFoundError as error:
        raise ImportError(f"没有装 {error.name}，怎么装见 docs/peers.md") from error


def dsx(
    workspace: Workspace,
    shape: str,
    threads: int,
    context: int,
    kind: QuantKind,
    block: QuantBlock,
    cache_dtype: str = "bfloat16",
    **environment: str,
) -> Worker:
    """``ort-cpu`` 的量化 bundle；``environment`` 是进程另加的环境变量。"""
    overrides, quantization = (f"mla.cache_dtype={cache_dtype}",), Quantization(kind=kind, block=block)
    checkpoint = workspace.checkpoint(shape, dtype="bfloat16")
    bundle = workspace.bundle(checkpoint, "mla+moe", "float32", overrides, quantization)
    return Worker(f"{_ENGINES}:Dsx", environment, bundle=str(bundle), threads=threads, context=context)


def llama(driver: Path, model: Path, threads: int, context: int, *flags: str) -> Answering:
    """住着 llama.cpp 或 ik_llama.cpp 的进程。"""
    command = [str(driver), str(model), str(threads), str(context), *flags]
    return Answering(driver.name, command, {"GGML_NO_BACKTRACE": "1"})


def amx(build: Mapping[str, str], flags: set[str] | None = None) -> str:
    """机器有 AMX 时说明谁用它；没有就是空的。"""
    flags = (cpu_flags() or set()) if flags is None else flags
    if not any(flag.startswith("amx_") for flag in flags):
        return ""
    using = [name for name, text in build.items() if "AMX" in text or name == VLLM]
    return f"这台机器有，dsx 没有用它的 kernel；编译时打开了它、或自己会用的：{'、'.join(using) or '没有'}"


def _openers(
    workspace: Workspace, scenario: Scenario, threads: int
) -> tuple[dict[str, Callable[[], Answering]], dict[str, str]]:
    """名字 → 打开引擎（bundle 与 GGUF 到那时才造）；没有的同类 → 为什么。"""
    from perf.peers.llama_file import WeightType, write_gguf

    require_library()
    context = max(*scenario.prompts, max(scenario.depths) + scenario.tokens)

    @cache
    def gguf(weights: WeightType) -> Path:
        checkpoint = workspace.checkpoint(scenario.shape, dtype="bfloat16")
        return write_gguf(checkpoint, workspace.folder / f"{weights}.gguf", weights)

    @cache
    def driver(build: LlamaBuild) -> Path:
        return build.compile_driver(workspace.folder)

    def built(build: LlamaBuild, weights: WeightType) -> Answering:
        return llama(driver(build), gguf(weights), threads, context)

    ours = partial(dsx, workspace, scenario.shape, threads, context)
    peer = LlamaBuild.find(LLAMA_BUILD, ik=False)
    found: dict[str, Callable[[], Answering]] = {
        DSX: partial(ours, "int8", 32),
        DSX_COARSE: partial(ours, "int8", 128),
        DSX_INT4: partial(ours, "int4", 32),
        DSX_CACHE: partial(ours, "int8", 32, "int8"),
        DSX_INT4_CACHE: partial(ours, "int4", 32, "int8"),
        LLAMA: partial(built, peer, "Q8_0"),
        LLAMA_INT4: partial(built, peer, "Q4_0"),
    }
    absent = {}
    try:
        ik = LlamaBuild.find(IK_BUILD, ik=True)
        found |= {IK: partial(built, ik, "Q8_0"), IK_INT4: partial(built, ik, "Q4_0")}
    except FileNotFoundError as error:
        absent["ik_llama.cpp"] = str(error)
    try:
        python = vllm_python()
        found[VLLM] = partial(_vllm, python, workspace, scenario, threads)
    except FileNotFoundError as error:
        absent[VLLM] = str(error)
    return found, absent


def vllm_python() -> str:
    """装着 vLLM 的 Python。

    Raises:
        FileNotFoundError: 没有设，或不是一个文件。
    """
    given = os.environ.get(VLLM_PYTHON)
    if not given or not Path(given).is_file():
        raise FileNotFoundError(f"{VLLM_PYTHON} 没有设，或不是一个 Python（见 docs/peers.md）")
    return given


def _vllm(python: str, workspace: Workspace, scenario: Scenario, threads: int) -> Answering:
    checkpoint = workspace.checkpoint(scenario.shape, dtype="bfloat16")
    context = max(scenario.prompts[0], _ROW_TOKENS) + scenario.tokens
    command = [
        python,
        str(_VLLM_WORKER),
        str(checkpoint),
        *map(str, (threads, context, max(scenario.batches))),
    ]
    return Answering(VLLM, command)


def _reference(checkpoint: Path, scenario: Scenario, threads: int, tokens: list[int]) -> np.ndarray:
    """transformers 的 logits，头一种 prefill；看得出各引擎跑的是同一个模型。"""
    worker = Worker(f"{_ENGINES}:Transformers", checkpoint=str(checkpoint), threads=threads)
    try:
        return np.array(worker.ask("last_logits", tokens=tokens[: scenario.prompts[0]]))
    finally:
        worker.close()


def _cases(
    field: Field, scenario: Scenario, threads: int, tokens: list[int], reference: np.ndarray
) -> Iterator[Case]:
    """prefill 在前：它从空缓存开始，会冲掉填好的。行数多的在最后，在那里中止的不连累别的格子；内存在它们之前量，写在最后。"""
    for prompt in scenario.prompts:
        yield _prefill(field, scenario, tokens[:prompt], reference)
    for depth in scenario.depths:
        yield _decode(field, scenario, threads, tokens[: scenario.tokens], depth)
    memory = field.memory(SERIES, PAIRS)
    for rows in scenario.batches:
        found = field.each(SERIES, "open_rows", rows=rows, context=_ROW_TOKENS)
        samples = field.samples(found, scenario.runs, "decode_rows", tokens=tokens[: scenario.tokens])
        yield speeds(f"batch {rows}", samples, PAIRS)
    yield memory


def _prefill(field: Field, scenario: Scenario, tokens: list[int], reference: np.ndarray) -> Case:
    first = len(tokens) == scenario.prompts[0]
    facts: dict[str, Any] = {}
    if first:
        others = [name for name in SERIES if name != VLLM]  # vLLM 自己采样，不交出 logits
        logits = field.each(others, "last_logits", tokens=tokens)
        # 不是门槛，只为看得出各引擎跑的是同一个模型；逐层相等由测试在小形状上证明。
        facts["difference"] = {
            name: measure(np.array(found), reference).calc_diff for name, found in logits.items()
        }
    names = [name for name in SERIES if first or name != VLLM]
    samples = field.samples(names, scenario.prompt_runs, "prefill", tokens=tokens)
    each = {name: [seconds / len(tokens) for seconds in found] for name, found in samples.items()}
    return speeds(f"prefill {len(tokens)}", each, PAIRS, **facts)


def _decode(field: Field, scenario: Scenario, threads: int, tokens: list[int], depth: int) -> Case:
    """另有一格轮流读内存：dsx 的一步对把它要读的字节读完要多久。"""
    names = [name for name in SERIES if name != VLLM] + list(DEEP) if depth else list(SERIES)
    field.each([name for name in names if name != VLLM], "go_to", depth=depth)
    nbytes = field.each([name for name in names if name.startswith("dsx")], "step_bytes", depth=depth)
    reader = open_reader(threads)
    if reader is None:
        raise FileNotFoundError(f"C++ 算子库是早先构建的，没有读速的探针：{BUILD_COMMAND}")
    with reader:
        samples = field.samples(names, scenario.runs, "decode", {READ: reader.rate}, tokens=tokens)
    rates = samples.pop(READ)
    made = speeds(f"depth {depth}", samples, PAIRS, depth=depth, step_bytes=nbytes)
    made.values["读内存.gb_s"] = Spread.of([rate / 1e9 for rate in rates])
    made.ratios |= {
        f"{name}/{READ}": Spread.of(
            [seconds * rate / nbytes[name] for seconds, rate in zip(samples[name], rates, strict=True)]
        )
        for name in nbytes
    }
    return made
