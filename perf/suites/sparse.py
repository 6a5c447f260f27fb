"""稀疏注意力（DSA-12）：同样宽度的 V3.2 与 V3，收集选中的行对读完整个缓存。

两个检查点的头、潜向量、hidden 都是 V3 的，前者多一个 V3.2 的索引器；权重 int8（块 128），两种缓存 bfloat16。同一步里还测 int8 的索引 key、transformers 自己的
V3.2（同一份 bfloat16 检查点）、llama.cpp 的 ``deepseek32``（由它写的 Q8_0，要编译好的 llama.cpp，见 ``docs/peers.md``），没有的、跑不动的写下原话。算术是把要读的字节与要做的乘加按这台机器当场测得的复制与矩阵乘折成时间：``字节``
只数读，``算术`` 逐段取读与乘加里慢的那个。

prefill 分块走（与生成时相同），每个样本一个进程，同时量内存峰值。末一格不计时：int8 的索引 key 选中的集合与 logits 差多少。
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_export import api
from deepseek_export.benchmark.depth import DepthDecoder
from deepseek_export.benchmark.spread import Spread, interleaved, paired_ratio
from deepseek_export.bundle import Bundle
from deepseek_export.checkpoint import ModelConfig
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.runtime.session import ModelSession
from perf import isolate
from perf.peers.llama_build import LLAMA_BUILD, LlamaBuild
from perf.results import Case, SuiteResult
from perf.suites.cpu_kernel import COPY, COPY_BYTES, MATMUL, MATMUL_SIZE, machine_ceilings, timed
from perf.suites.peers import llama
from perf.workload.index_quality import quality_case
from perf.workload.library import require_library
from perf.workload.workspace import Workspace, parameter_count

TITLE = "稀疏注意力"
DSA, DSA_INT8, DENSE, PEER, LLAMA = "dsa", "dsa-int8", "dense-mla", "transformers", "llama.cpp"
#: bundle 的名字 → （``Scenario.shapes`` 里的第几个，方案的覆盖项）。
BUNDLES = {
    DSA: (0, ("mla.cache_dtype=bfloat16",)),
    DSA_INT8: (0, ("mla.cache_dtype=bfloat16", "dsa.index_cache_dtype=int8")),
    DENSE: (1, ("mla.cache_dtype=bfloat16",)),
}
#: 复制一次读一遍、写一遍；一次方阵乘的浮点运算。
_COPIED, _MULTIPLIED = 2 * COPY_BYTES, 2 * MATMUL_SIZE**3
_BFLOAT16 = 2


@dataclass(frozen=True)
class Scenario:
    """固定的场景。

    Attributes:
        shapes: 稀疏的与稠密的，除了索引器都相同。
        contexts, batches: 解码的每一种组合一格；``contexts`` 含这一步的 token。
        peer_contexts: 其中 transformers、llama.cpp 也测的，batch 1。
        peer_s: 等它们的一步、填一次缓存最多几秒。
        prompt, chunk: prefill 几个 token，每块几个。
        prompt_runs: prefill 几遍。
        quality_prompt: 比 int8 索引 key 的误差时走几个 token；形状是缩小的那个。
    """

    shapes: tuple[str, str] = ("v3.2-wide-2", "v3-wide-2")
    contexts: tuple[int, ...] = (2048, 8192, 32768, 131072)
    batches: tuple[int, ...] = (1, 8)
    peer_contexts: tuple[int, ...] = (2048, 8192, 32768)
    peer_s: int = 120
    runs: int = 7
    prompt: int = 16384
    chunk: int = 512
    prompt_runs: int = 2
    quality_prompt: int = 2048


FULL = Scenario()
QUICK = Scenario(
    shapes=("v3.2-small-2", "v3-small-2"),
    contexts=(512, 8192),
    batches=(1,),
    peer_contexts=(512,),
    runs=3,
    prompt=2048,
    prompt_runs=1,
    quality_prompt=640,
)


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """先解码，再 prefill。

    Raises:
        FileNotFoundError: 没有 C++ 算子库。
    """
    scenario = QUICK if quick else FULL
    require_library()
    checkpoints = [workspace.checkpoint(shape, dtype="bfloat16") for shape in scenario.shapes]
    quantization = Quantization(kind="int8", block=128)
    bundles = {
        name: workspace.bundle(checkpoints[which], "mla", "float32", overrides, quantization)
        for name, (which, overrides) in BUNDLES.items()
    }
    cases = [
        *_decode(workspace, scenario, checkpoints[0], bundles, threads),
        _prefill(scenario, bundles, threads),
        quality_case(
            workspace.checkpoint(QUICK.shapes[0], dtype="bfloat16"), scenario.quality_prompt, threads
        ),
    ]
    return SuiteResult(suite="sparse", title=TITLE, scenario=asdict(scenario), cases=cases)


@dataclass(frozen=True)
class Work:
    """一步解码的一段：至少要读几个字节、做几次浮点运算。"""

    nbytes: float
    flops: float

    def seconds(self, copy: float, matmul: float) -> float:
        """读与乘加里慢的那个；``copy``、``matmul`` 是每字节、每次浮点运算的秒数。"""
        return max(self.nbytes * copy, self.flops * matmul)


def work_of(config: ModelConfig, weights: Work, batch: int, context: int) -> list[Work]:
    """稀疏的一步解码，依次做的几段；``weights`` 是一行的权重那一段。

    名额够看得见的全部时，索引器不打分，注意力读全部的行。
    """
    indexer, layers = config.indexer, config.num_hidden_layers
    assert indexer is not None
    rows, width = min(context, indexer.topk), config.kv_lora_rank + config.qk_rope_head_dim
    macs = batch * rows * config.num_attention_heads * (width + config.kv_lora_rank)
    parts = [
        Work(weights.nbytes, batch * weights.flops),
        Work(layers * batch * rows * width * _BFLOAT16, layers * 2.0 * macs),
    ]
    if context > indexer.topk:
        keys = layers * batch * context * indexer.head_dim
        parts.append(Work(keys * _BFLOAT16, 2.0 * keys * indexer.n_heads))
    return parts


def _decode(
    workspace: Workspace, scenario: Scenario, checkpoint: Path, bundles: dict[str, Path], threads: int
) -> Iterator[Case]:
    """``checkpoint`` 是稀疏的那一个，同类也用它。"""
    sessions = {name: api.load(path, threads).session for name, path in bundles.items()}
    ceilings = {key: partial(timed, call) for key, call in machine_ceilings(threads).items()}
    config = Bundle.open(bundles[DSA]).manifest.model
    # 嵌入表一步只读一行。
    weights = Work(
        (bundles[DSA] / "weights/model.safetensors").stat().st_size,
        2.0 * (parameter_count(checkpoint) - config.vocab_size * config.hidden_size),
    )
    with ExitStack() as stack:
        peers, failed = open_peers(workspace.folder, scenario, checkpoint, threads)
        for peer in peers.values():
            stack.callback(peer.close)
        for context, batch in itertools.product(scenario.contexts, scenario.batches):
            steps = {
                name: DepthDecoder(session, batch, context).step for name, session in sessions.items()
            } | ceilings
            facts: dict[str, Any] = {"context": context, "batch": batch}
            seconds = _spreads(interleaved(steps, scenario.runs))
            beside: dict[str, tuple[Spread, Spread]] = {}
            if batch == 1 and context in scenario.peer_contexts:
                for name, peer in peers.items():
                    if name not in failed and (error := rehearse(peer, context, scenario.peer_s)):
                        failed[name] = error
                    if name not in failed:
                        ask = partial(peer.ask, "decode", tokens=[0], within=scenario.peer_s)
                        pair = _spreads(interleaved({DSA: steps[DSA], name: ask}, scenario.runs))
                        beside[name] = pair[DSA], pair[name]
                facts |= {"failed": dict(failed)} if failed else {}
            work = work_of(config, weights, batch, context)
            yield decode_case(f"context {context} b{batch}", seconds, beside, work, facts)


def _spreads(samples: dict[str, list[float]]) -> dict[str, Spread]:
    return {name: Spread.of(found) for name, found in samples.items()}


def open_peers(
    folder: Path, scenario: Scenario, checkpoint: Path, threads: int
) -> tuple[dict[str, isolate.Answering], dict[str, str]]:
    """同类的进程，同一份权重；打不开的 → 为什么。"""
    found: dict[str, isolate.Answering] = {
        PEER: isolate.Worker("perf.peers.engines:Transformers", checkpoint=str(checkpoint), threads=threads)
    }
    try:
        from perf.peers.llama_file import write_gguf

        driver = LlamaBuild.find(LLAMA_BUILD, ik=False).compile_driver(folder)
        model = write_gguf(checkpoint, folder / "sparse-Q8_0.gguf", "Q8_0")
        found[LLAMA] = llama(driver, model, threads, max(scenario.peer_contexts))
    except (ImportError, FileNotFoundError, RuntimeError) as error:
        return found, {LLAMA: str(error)}
    return found, {}


def rehearse(peer: isolate.Answering, context: int, within: float) -> str | None:
    """填好缓存、走一步；跑不动（内存不够、超过时限）就返回原话，那之后不再问它。"""
    try:
        peer.ask("go_to", depth=context - 1, within=within)
        peer.ask("decode", tokens=[0], within=within)
    except RuntimeError as error:
        return str(error)
    return None


def decode_case(
    name: str,
    seconds: dict[str, Spread],
    beside: dict[str, tuple[Spread, Spread]],
    parts: list[Work],
    facts: dict[str, Any],
) -> Case:
    """一格：几个系列与这台机器的两个上限，各次的秒数。

    同类各另与收集的那一个交替（``beside``：名字 → 收集的与它的，跑不动的没有）：transformers 一步长几个数量级，线程歇下来之前会拖慢紧跟着的那一个。
    """
    copy, matmul = seconds[COPY].median / _COPIED, seconds[MATMUL].median / _MULTIPLIED
    dsa = seconds[DSA]
    ratios = {f"{DSA}/{DENSE}": paired_ratio(dsa, seconds[DENSE])}
    ratios |= {f"{DSA}/{peer}": paired_ratio(*pair) for peer, pair in beside.items()}
    ratios[f"{DSA_INT8}/{DSA}"] = paired_ratio(seconds[DSA_INT8], dsa)
    ratios[f"{DSA}/字节"] = dsa.scaled(1 / sum(part.nbytes * copy for part in parts))
    ratios[f"{DSA}/算术"] = dsa.scaled(1 / sum(part.seconds(copy, matmul) for part in parts))
    values = {f"{key}.step_s": seconds[key] for key in BUNDLES}
    values |= {f"{peer}.step_s": its for peer, (_, its) in beside.items()}
    for key, unit, amount in ((COPY, "gb_s", _COPIED), (MATMUL, "gflop_s", _MULTIPLIED)):
        values[f"{key}.{unit}"] = Spread.of([amount / sample / 1e9 for sample in seconds[key].samples])
    return Case(name=name, values=values, ratios=ratios, facts=facts)


def _prefill(scenario: Scenario, bundles: dict[str, Path], threads: int) -> Case:
    """每个样本一个进程：整段 prompt 的用时与内存峰值。"""
    prompt = {"prompt": scenario.prompt, "chunk": scenario.chunk, "threads": threads}
    samples = interleaved(
        {
            name: partial(isolate.call, f"{__name__}:prefiller", bundle=str(path), **prompt)
            for name, path in bundles.items()
            if name != DSA_INT8
        },
        scenario.prompt_runs,
        warmup=0,
    )
    values = {
        f"{name}.{shown}": Spread.of([one[key] for one in found])
        for name, found in samples.items()
        for key, shown in (("seconds", "prefill_s"), ("peak", "peak"))
    }
    ratios = {
        f"{shown} {DSA}/{DENSE}": paired_ratio(values[f"{DSA}.{key}"], values[f"{DENSE}.{key}"])
        for shown, key in (("prefill", "prefill_s"), ("peak", "peak"))
    }
    return Case(name=f"prefill {scenario.prompt}", values=values, ratios=ratios)


def prefiller(bundle: str, prompt: int, chunk: int, threads: int) -> Callable[[], dict[str, Any]]:
    """装好 bundle，返回走完一段随机 prompt 的调用；在自己的进程里用。"""
    session = api.load(bundle, threads).session
    tokens = np.random.default_rng(0).integers(0, session.vocab_size, prompt)
    return partial(_walk, session, tokens, chunk)


def _walk(session: ModelSession, tokens: np.ndarray, chunk: int) -> dict[str, Any]:
    caches = session.new_caches(1, len(tokens))
    for start in range(0, len(tokens), chunk):
        part = tokens[None, start : start + chunk]
        session.run(part, np.array([start]), np.array([[part.shape[1] - 1]]), caches)
    return {}
