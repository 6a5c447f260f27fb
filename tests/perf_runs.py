"""``perf`` 的测试用的假结果：字段与真的相同，数是编的。"""

from __future__ import annotations

from importlib import import_module

from deepseek_export.benchmark.spread import Spread
from perf.gates import load_gates
from perf.peers.field import RATE
from perf.results import Case, Run, SuiteResult
from perf.suites import SUITES, compile, mtp, peers, peers_torch, sparse

ENVIRONMENT = {
    "command": "python -m perf run",
    "cpu": {"model": "某 CPU", "machine": "x86_64", "cores": 2, "flags": ["avx2"]},
    "memory_bytes": 8 << 30,
    "load_average": 0.1,
    "gpus": [],
    "system": "Linux",
    "python": "3.11",
    "libraries": {"onnxruntime": "1.32.0", "transformers": None},
    "threads": 2,
    "git": "abc1234",
}


def spread(*samples: float) -> Spread:
    return Spread.of(samples)


def memory_case(name: str, ratio: Spread) -> Case:
    fields = ("cache_computed", "cache_resident", "peak")
    values = {
        f"{profile}.{field}": spread(size, size * 1.1)
        for profile, size in (("baseline", 5e8), ("mla", 1e8))
        for field in fields
    }
    return Case(name=name, values=values, ratios={"cache": ratio, "process": ratio})


def suite(name: str, cases: list[Case]) -> SuiteResult:
    title = import_module(SUITES[name]).TITLE
    return SuiteResult(suite=name, title=title, scenario={"context": 8192, "batches": [1, 4]}, cases=cases)


def every_suite() -> list[SuiteResult]:
    """每套一份小结果，字段与真的相同。"""
    one = spread(0.01, 0.012, 0.011)
    decode = [
        Case(
            name=f"context {context}",
            values={f"{name}.step_s": one for name in ("baseline", "naive", "absorb", "transformers")},
            ratios={"absorb/transformers": spread(0.1, 0.2)},
            facts={"context": context},
        )
        for context in (256, 8192)
    ]
    steps = [
        Case(
            name=f"context {context} b{batch}",
            values={f"{name}.step_s": one for name in (*sparse.BUNDLES, "transformers")[:series]},
            ratios={"dsa/dense-mla": spread(0.3), "dsa/算术": spread(1.2)},
            facts={"context": context, "batch": batch},
        )
        for context, batch, series in ((2048, 1, 4), (32768, 1, 3), (2048, 8, 3), (32768, 8, 3))
    ]
    prefill = Case(
        name="prefill 16384",
        values={f"{name}.prefill_s": one for name in ("dsa", "dense-mla")},
        ratios={"prefill dsa/dense-mla": spread(0.9)},
    )
    speculation = Case(
        name="demo b8",
        values={"plain.token_s": one, "speculative.token_s": one, "speculative.round_cost": spread(2.0)},
        ratios={"time": spread(1.9, 2.1)},
        facts={"acceptances": list(mtp.ACCEPTANCES), "curve": [2.0] * len(mtp.ACCEPTANCES)},
    )
    experts = Case(
        name="b1",
        values={f"{n}.{field}": one for n in ("moe", "off", "dense") for field in ("token_s", "prefill_s")},
        ratios={"decode moe/off": spread(0.3), "decode moe/dense": spread(0.4)},
    )
    quality = Case(
        name="demo",
        values={"moe.held_loss": spread(3.0), "dense.held_loss": spread(3.1)},
        ratios={"held loss moe/dense": spread(0.97)},
        facts={
            "steps": [1, 2],
            "curves": {name: [4.0, 3.0] for name in ("moe", "no-bias", "dense")},
            "loads": {name: [[3.0, 1.0], [2.0, 2.0]] for name in ("moe", "no-bias")},
        },
    )
    sizes = Case(
        name="0.1B",
        values={
            f"{name}.{field}": value
            for name in (compile.REFERENCE, compile.PACKED, compile.PEER)
            for field, value in (("seconds", one), ("peak", spread(4e8)))
        },
        facts={"parameters": 1e8, "written": {compile.REFERENCE: 9e5, compile.PACKED: 4e8}},
    )
    layers = Case(name="V3 61 层 / 4 层", values={"61.seconds": one}, ratios={"capture": spread(1.0)})
    engine = Case(
        name="引擎 8 层",
        values={"dsx.seconds": one, "dsx.peak": spread(1e9), "dsx.plan_bytes": spread(9e6)},
        facts={"layers": 8},
    )
    speeds = [
        Case(
            name=name,
            values={f"{engine}.{RATE}": spread(30.0, 33.0) for engine in peers.SERIES},
            ratios=_gated("peers", name) | {f"dsx 块 128/{peers.LLAMA}": spread(0.3, 0.4)},
        )
        for name in ("prefill 256", "depth 0", "depth 8192", "batch 8")
    ]
    memory = Case(
        name="内存",
        values={f"{engine}.peak": spread(2e9) for engine in peers.SERIES},
        ratios=_gated("peers", "内存"),
    )
    torch = Case(name="depth 0", values={f"{engine}.{RATE}": spread(30.0) for engine in peers_torch.SERIES})
    return [
        suite("mla-memory", [memory_case("v3 b1 float32", spread(0.1, 0.12))]),
        suite("mla-decode", decode),
        suite("sparse", [*steps, prefill]),
        suite("mtp", [speculation, speculation.model_copy(update={"name": "padded b8"})]),
        suite("moe", [experts]),
        suite("moe-quality", [quality]),
        suite("compile", [sizes, layers, engine]),
        suite("peers", [*speeds, memory]),
        suite("peers-torch", [torch, memory]),
        suite("gpu", [_kernel("LatentAttention H16 B1 S1 T1024", 0.4), _kernel("MoeExperts V3 N16", None)]),
        *(
            _from_gates(name)
            for name in (
                "serve",
                "cluster",
                "cluster-model",
                "apply",
                "cpu-kernel",
                "int8-cache",
                "quant",
                "scale",
                "engine-memory",
            )
        ),
        suite(
            "decode-profile", [Case(name="depth 0", values={"dsx.step_s": one}, facts={"host_share": 0.01})]
        ),
    ]


def _kernel(name: str, guess: float | None) -> Case:
    """卡上的一个点；``guess`` 是审计的估计。"""
    return Case(
        name=name,
        values={"dsx.seconds": spread(1e-3, 2e-3)},
        ratios={"用时/目标": spread(0.01)},
        facts={"bound": "带宽", "share": 0.3, "estimated_share": guess},
    )


def _gated(name: str, case: str) -> dict[str, Spread]:
    """门槛在这一格上要的比值。"""
    found = (gate for gate in load_gates().gates if gate.suite == name and case.startswith(gate.case))
    return {gate.ratio: spread(0.3, 0.4) for gate in found}


def _from_gates(name: str) -> SuiteResult:
    """没有图的那几套：门槛看的格子与比值各一个。"""
    found = [gate for gate in load_gates().gates if gate.suite == name]
    return suite(
        name, [Case(name=g.case or "demo", values={}, ratios={g.ratio: spread(0.01)}) for g in found]
    )


def make_run(suites: list[SuiteResult], quick: bool = False, **environment: object) -> Run:
    return Run(
        started="2026-01-01T00:00:00+00:00",
        quick=quick,
        environment=ENVIRONMENT | environment,
        suites=suites,
        skipped=["peers：没有装"],
    )
