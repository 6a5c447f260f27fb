"""服务（SERVE-60 至 63）：引擎对生成器，HTTP 对引擎，前缀复用，以及对 llama.cpp 的 ``llama-server``；同一份权重，轮流各测一遍。

要 C++ 算子库与 ``serve``；没有 ``llama-server`` 时不测那一格，结果里写着。
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import numpy as np

from deepseek_export.benchmark.spread import Spread, interleaved, paired_ratio
from deepseek_export.checkpoint.weight_only import Quantization
from perf.isolate import Worker
from perf.results import Case, SuiteResult
from perf.servers.contenders import (
    Local,
    dsx_serve,
    find_llama_server,
    llama_server,
    llama_version,
)
from perf.servers.load import Ask, Job, Measured, closed_loop, jobs, over_http
from perf.servers.words import write_tokenizer
from perf.workload.library import require_library
from perf.workload.workspace import SHAPES, Workspace

TITLE = "服务"
DSX, LLAMA = "dsx serve int8", "llama-server Q8_0"


@dataclass(frozen=True)
class Scenario:
    """固定的场景：闭环，客户数等于槽数，长度由种子定，遇 EOS 不停。

    Attributes:
        shape: 形状，int8 块 32（Q8_0 的块）。
        slots: 槽数，也是客户数。
        requests: 对 llama-server 的一遍几个请求；``loop_requests`` 是 HTTP 对引擎的。
        prompt, new_tokens: 长度的范围。
        prefix: 复用的前缀有多长；另有 ``tail`` 个新的。
        steady: 满批次的一步：提示词多长、走几步。
        runs: 每样几遍；``peer_runs`` 是对 llama-server 的，一遍要几分钟。
    """

    shape: str = "0.9B"
    slots: int = 8
    requests: int = 64
    loop_requests: int = 24
    prompt: tuple[int, int] = (64, 1024)
    new_tokens: tuple[int, int] = (32, 256)
    prefix: int = 2048
    tail: int = 64
    steady: tuple[int, int] = (64, 96)
    runs: int = 3
    peer_runs: int = 2


FULL = Scenario()
QUICK = Scenario(
    shape="peers-2",
    requests=12,
    loop_requests=12,
    prompt=(16, 64),
    new_tokens=(8, 24),
    prefix=256,
    steady=(16, 24),
    runs=1,
    peer_runs=1,
)


def run(workspace: Workspace, quick: bool, threads: int) -> SuiteResult:
    """测全部格子。

    Raises:
        FileNotFoundError: 没有 C++ 算子库。
        RuntimeError: 服务起不来，或有请求失败。
    """
    scenario = QUICK if quick else FULL
    require_library()
    vocab = SHAPES[scenario.shape]["vocab_size"]
    checkpoint = workspace.checkpoint(scenario.shape, dtype="bfloat16")
    write_tokenizer(checkpoint, vocab)
    bundle = workspace.bundle(
        checkpoint, "mla+moe", "float32", ("mla.cache_dtype=bfloat16",), Quantization(kind="int8", block=32)
    )
    todo = jobs(scenario.requests, scenario.prompt, scenario.new_tokens, vocab, seed=0)
    cases = _local(bundle, scenario, threads, todo[: scenario.loop_requests])
    try:
        find_llama_server()
    except FileNotFoundError as error:
        cases[0].facts["llama-server"] = str(error)
    else:
        cases.append(_against_llama(workspace, checkpoint, bundle, scenario, threads, todo))
    return SuiteResult(suite="serve", title=TITLE, scenario=asdict(scenario), cases=cases)


def _local(bundle: Path, scenario: Scenario, threads: int, todo: list[Job]) -> list[Case]:
    """不要别人的三格：引擎对生成器，HTTP 对引擎，前缀复用。"""
    prompt, steps = scenario.steady
    with ExitStack() as stack:
        local = Worker(
            f"{Local.__module__}:{Local.__name__}", bundle=str(bundle), threads=threads, slots=scenario.slots
        )
        stack.callback(local.close)
        found = interleaved(
            {
                name: partial(local.ask, f"{name}_step", prompt=prompt, new_tokens=steps)
                for name in ("generator", "engine")
            },
            2 * scenario.runs + 1,
        )
        step = {name: Spread.of(samples) for name, samples in found.items()}
        steady = Case(
            name=f"满批次 {scenario.slots}",
            values={f"{name}.step_s": spread for name, spread in step.items()},
            ratios={"engine/generator": paired_ratio(step["engine"], step["generator"])},
        )
        server = stack.enter_context(dsx_serve(bundle, threads, scenario.slots))
        ask = over_http(server.url, "bench")
        ways = interleaved(
            {
                "engine": lambda: Measured(**local.ask("closed_loop", todo=[asdict(job) for job in todo])),
                "http": lambda: closed_loop(ask, todo, scenario.slots),
            },
            scenario.runs,
            warmup=0,
        )
        token = {name: Spread.of([one.token_s for one in measured]) for name, measured in ways.items()}
        through = Case(
            name="闭环",
            values={f"{name}.token_s": spread for name, spread in token.items()},
            ratios={"HTTP/engine": paired_ratio(token["http"], token["engine"])},
        )
        reuse = _prefix(ask, scenario, SHAPES[scenario.shape]["vocab_size"])
    return [steady, through, reuse]


def _prefix(ask: Ask, scenario: Scenario, vocab: int) -> Case:
    """同一段前缀第二次来：等第一个 token 的时间。每一对用自己的 ``cache_salt``，头一次一定是冷的。"""
    rng = np.random.default_rng(1)
    cold, warm = [], []
    for number in range(2 * scenario.runs + 1):
        prefix = rng.integers(2, vocab, scenario.prefix).tolist()
        pair = [
            ask(Job([*prefix, *rng.integers(2, vocab, scenario.tail).tolist()], 2, f"pair-{number}"))
            for _ in range(2)
        ]
        cold.append(pair[0].first_s)
        warm.append(pair[1].first_s)
    spreads = {"cold": Spread.of(cold), "warm": Spread.of(warm)}
    return Case(
        name=f"前缀 {scenario.prefix}",
        values={f"{name}.first_s": spread for name, spread in spreads.items()},
        ratios={"warm/cold": paired_ratio(spreads["warm"], spreads["cold"])},
    )


def _against_llama(
    workspace: Workspace, checkpoint: Path, bundle: Path, scenario: Scenario, threads: int, todo: list[Job]
) -> Case:
    """一个服务测完一遍就停下，再起另一个：两个核上，闲着的那一个也占内存与定时器。"""
    from perf.peers.llama_file import write_gguf

    model = write_gguf(checkpoint, workspace.folder / "serve-Q8_0.gguf", "Q8_0", words=True)
    context = scenario.prompt[1] + scenario.new_tokens[1]

    def measured(name: str) -> Measured:
        opened = (
            dsx_serve(bundle, threads, scenario.slots)
            if name == DSX
            else llama_server(model, threads, scenario.slots, context)
        )
        with opened as server:
            ask = over_http(server.url, "bench")
            ask(todo[0])  # 头一个请求不算：映射的权重第一次读进来
            return closed_loop(ask, todo, scenario.slots)

    found = interleaved({name: partial(measured, name) for name in (DSX, LLAMA)}, scenario.peer_runs, 0)
    values: dict[str, Spread] = {}
    ratios: dict[str, Spread] = {}
    for field, ratio in (
        ("token_s", "每个 token"),
        ("first_s", "首个 token"),
        ("gap_p50_s", "间隔的中位数"),
        ("gap_p95_s", "间隔的 95 分位"),
    ):
        seen = {name: [getattr(one, field) for one in found[name]] for name in found}
        if any(value is None for samples in seen.values() for value in samples):
            continue  # 有一遍的回答都只有一段：没有间隔可比
        spreads = {name: Spread.of(samples) for name, samples in seen.items()}
        values |= {f"{name}.{field}": spread for name, spread in spreads.items()}
        ratios[f"{ratio} dsx/llama-server"] = paired_ratio(spreads[DSX], spreads[LLAMA])
    tokens = {name: measured[-1].tokens for name, measured in found.items()}
    return Case(
        name="对 llama-server", values=values, ratios=ratios, facts={"version": llama_version()} | tokens
    )
