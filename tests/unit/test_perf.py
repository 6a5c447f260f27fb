"""perf/：门槛、退步、历史、两次运行之比与隔离的进程。测量本身不在测试里跑。"""

from __future__ import annotations

import re
from dataclasses import asdict
from importlib import import_module
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner, Result

from deepseek_export.benchmark.environment import environment
from deepseek_export.benchmark.memory import MemorySample
from deepseek_export.checkpoint import Checkpoint
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.reference import Forms, load_draft, load_reference
from perf import gates, isolate, report, results
from perf.__main__ import cli
from perf.peers.llama_build import LLAMA_BUILD
from perf.results import Case, Run, SuiteResult
from perf.suites import SUITES, cpu_kernel, mla_memory, mtp, scale, sparse
from perf.workload import engine_build
from perf.workload.padded import write_padded
from perf.workload.workspace import SHAPES, Workspace, parameter_count
from tests.models import model_config
from tests.perf_runs import make_run, memory_case, spread, suite

pytestmark = pytest.mark.unit


def test_history_is_append_only_and_latest_prefers_full_runs(tmp_path):
    path = tmp_path / "results/history.jsonl"
    assert results.load(path) == []
    with pytest.raises(ValueError, match="python -m perf run"):
        results.latest([])
    full = make_run([suite("mla-memory", [memory_case("full", spread(0.1))])])
    quick = make_run([suite("mla-memory", [memory_case("quick", spread(0.2))])], quick=True)
    for run in (full, quick):
        before = path.read_text() if path.exists() else ""
        results.append(run, path)
        assert path.read_text().startswith(before)
    assert results.load(path) == [full, quick]
    assert [run.suites for run in results.latest([full, quick])] == [full.suites, []]
    assert results.latest([quick])[0].quick
    # 另一种配置的结果不混进同一份报告。
    other = make_run([suite("moe", [])], threads=4)
    assert [run.suites for run in results.latest([full, other])] == [other.suites]


def test_history_rows_are_valid_and_name_commands_that_repeat_them(monkeypatch, tmp_path):
    """历史的每一行都读得回来，命令里没有输出的路径；新的一行也没有，只写它自己的那一套，带同一个环境块。"""
    history = results.load()
    assert history
    assert report.markdown(history, []).count("\n## ") == 1 + sum(len(run.suites) for run in history)
    for run in history:
        assert re.fullmatch(
            r"python -m perf(\.gpu(\.accept)?| run( --quick)?( [a-z0-9-]+)+)", run.environment["command"]
        )
    monkeypatch.setattr(results, "HISTORY", tmp_path / "runs.jsonl")
    monkeypatch.setattr(mla_memory, "run", lambda *_: suite("mla-memory", []))
    monkeypatch.setattr(mtp, "run", lambda *_: suite("mtp", []))
    done = CliRunner().invoke(
        cli, ["run", "--quick", "mla-memory", "mtp", "--threads", "1", "--out", str(tmp_path / "report")]
    )
    rows = results.load(tmp_path / "runs.jsonl")
    assert [run.environment["command"] for run in rows] == [
        "python -m perf run --quick mla-memory",
        "python -m perf run --quick mtp",
    ], done.output
    for run in rows:
        assert set(run.environment) == {*environment(1), "command", "cpu_library"}


def test_gate_statuses():
    """中位数达到；超了而范围够得着；够不着；够不着但写明了未达到。"""
    limits = gates.Gates(
        regression_slack=0.05,
        gates=[
            gates.Gate(id="MLA-4", suite="mla-memory", ratio="cache", max=0.6, kind="memory"),
            gates.Gate(
                id="MLA-4", suite="mla-memory", case="b", ratio="process", max=0.6, kind="memory", open="原因"
            ),
        ],
    )
    cases = [memory_case("a", spread(0.5, 0.7, 0.6)), memory_case("b", spread(0.7, 0.8))]
    cases.append(memory_case("c", spread(0.59, 0.61, 0.62)))
    verdicts = gates.check([make_run([suite("mla-memory", cases)])], limits)
    found = [(v.case, v.ratio, v.status) for v in verdicts]
    assert found == [
        ("a", "cache", "pass"),
        ("b", "cache", "fail"),
        ("c", "cache", "within-spread"),
        ("b", "process", "open"),
    ]
    assert "原因" in report.verdict_line(verdicts[-1])
    assert gates.check([make_run([])], limits) == []
    limits.gates[1] = limits.gates[1].model_copy(update={"full": True})
    quick = make_run([suite("mla-memory", cases[:1])], quick=True)  # 没有 b，缩小的场景不看它
    assert [v.ratio for v in gates.check([quick], limits)] == ["cache"]
    with pytest.raises(ValueError, match="process"):
        gates.check([make_run([suite("mla-memory", cases[:1])])], limits)
    limits.gates[1] = limits.gates[1].model_copy(update={"optional": True})  # 可有可无的同类没有装
    assert [v.ratio for v in gates.check([make_run([suite("mla-memory", cases[:1])])], limits)] == ["cache"]


def test_regression_needs_disjoint_ranges_on_the_same_machine():
    limits = gates.load_gates()

    def run(*samples: float, **environment: object) -> Run:
        return make_run([suite("mla-memory", [memory_case("a", spread(*samples))])], **environment)

    history = [run(0.9), run(0.10, 0.12)]
    found = gates.regressions(run(0.20, 0.22), history, limits)
    assert [(v.ratio, v.kind, v.status) for v in found] == [
        ("cache", "memory", "fail"),
        ("process", "memory", "fail"),
    ]
    assert "0.110" in found[0].note
    assert gates.regressions(run(0.115, 0.3), history, limits) == []  # 范围相交
    assert gates.regressions(run(0.1201, 0.1201), [run(0.12)], limits) == []  # 不到 5%
    assert gates.regressions(run(0.20, 0.22, threads=4), history, limits) == []  # 不是同一种配置
    library = [run(0.10, 0.12, cpu_library="avx512")]
    assert gates.regressions(run(0.20, 0.22, cpu_library=None), library, limits) == []  # 这次走函数体
    assert gates.regressions(run(0.20, 0.22, cpu_library="avx512"), history, limits)  # 早先没有记


def test_a_fresh_run_is_compared_with_what_the_history_gives_back(tmp_path):
    """场景里的元组写进 JSON 就是列表：不认作同一个场景，退步就从来比不出来。"""

    def run(ratio: float) -> Run:
        scenario = asdict(mla_memory.QUICK)
        found = SuiteResult(
            suite="mla-memory", title="", scenario=scenario, cases=[memory_case("a", spread(ratio))]
        )
        return make_run([found])

    results.append(run(0.1), tmp_path / "history.jsonl")
    history = results.load(tmp_path / "history.jsonl")
    assert [v.ratio for v in gates.regressions(run(0.2), history, gates.load_gates())] == ["cache", "process"]


def test_compare_asks_for_overlap_of_every_ratio(monkeypatch):
    """第二次运行的每个比值都要与第一次的散布相交；缩小的、别的场景与别的机器不算；没有两次就是没有重现。"""

    def run(case: Case, quick: bool = False, **environment: object) -> Run:
        return make_run([suite("mla-memory", [case])], quick, **environment)

    def compared(*history: Run) -> Result:
        monkeypatch.setattr(results, "load", lambda: list(history))
        return CliRunner().invoke(cli, ["compare", "mla-memory"])

    old = run(memory_case("a", spread(0.10, 0.12)), git="1111111")
    same = compared(
        old, run(memory_case("a", spread(0.5)), quick=True), run(memory_case("a", spread(0.12, 0.2)))
    )
    assert same.exit_code == 0, same.output
    assert "1111111" in same.output
    assert "相交  a · process：0.11（0.1–0.12）、0.16（0.12–0.2）" in same.output
    apart = compared(old, run(memory_case("a", spread(0.13))))
    assert apart.exit_code == 1
    assert "不相交  a · cache" in apart.output
    assert "没有重现：mla-memory" in apart.output
    renamed = compared(old, run(memory_case("b", spread(0.11))))
    assert renamed.exit_code == 1
    assert "不相交  b · cache：没有、0.11" in renamed.output
    for alone in ((), (old,), (old, run(memory_case("a", spread(0.11)), threads=4))):
        assert compared(*alone).exit_code == 1
        assert "没有两次可比的完整运行" in compared(*alone).output


def test_memory_ratios_state_at_least_the_resolution(monkeypatch):
    """MLA-4：几个样本一模一样，散布也写 ±1 %；报告写明是多少。"""
    sample = MemorySample(cache_computed=1, cache_resident=100, loaded=1, resident=1, peak=1000)
    monkeypatch.setattr(mla_memory, "memory_in_subprocess", lambda *_: sample)
    workspace = SimpleNamespace(bundle=lambda *_: None, checkpoint=lambda *_: None)
    found = mla_memory.run(workspace, True, 1)
    ratio = found.cases[0].ratios["process"]
    assert (ratio.low, ratio.median, ratio.high) == (0.99, 1, 1.01)
    assert "比值的散布不窄于：±1.0 %" in report.markdown([make_run([found])], [])


def test_kernel_ratio_is_to_the_tighter_ceiling():
    """下限是两个上限各自要的时间里大的那个；读得慢时看复制，算得慢时看矩阵乘。"""
    shape = cpu_kernel.Shape(B=8, S=1, H=16, past=32767)
    assert shape.cache_bytes("float32") == 2 * shape.cache_bytes("bfloat16") == 8 * 32768 * 576 * 4
    assert shape.cache_bytes("int8") == 8 * 32768 * 646
    read, work = shape.cache_bytes("float32") / (2 * cpu_kernel.COPY_BYTES), shape.flops("absorb")
    for copy, matmul, limit in ((1.0, 0.0, read), (0.0, 1.0, work / (2 * cpu_kernel.MATMUL_SIZE**3))):
        seconds = {"float32": spread(limit, 3 * limit), "copy": spread(copy), "matmul": spread(matmul)}
        seconds = {name: found if found.median else spread(1e-30) for name, found in seconds.items()}
        case = cpu_kernel.case("x", shape, {"float32": ("float32", "absorb")}, seconds)
        assert case.ratios["float32/下限"].median == pytest.approx(2)


def test_the_arithmetic_of_a_sparse_step(tmp_path):
    """名额够时不打分、读全部的行；不够时注意力只读名额，索引 key 全读；逐段取慢的。"""
    path = Workspace(tmp_path).checkpoint("v3.2-wide-2", sparse=True)
    config, none = Checkpoint.open(path).config, sparse.Work(0, 0)
    short, long = (sparse.work_of(config, none, 2, context) for context in (2048, 32768))
    assert len(short) == 2
    assert short[1].nbytes == long[1].nbytes == 2 * 2 * 2048 * 1152
    assert long[1].flops == 2 * 2 * 2 * 2048 * 128 * 1088
    assert (long[2].nbytes, long[2].flops) == (2 * 2 * 32768 * 256, 2 * 2 * 2 * 32768 * 64 * 128)
    assert sparse.Work(3, 5).seconds(2, 1) == 6
    assert sparse.Work(3, 5).seconds(1, 2) == 10
    ten = {name: spread(10.0, 20.0) for name in sparse.BUNDLES}
    machine = {"copy": spread(2.0 * cpu_kernel.COPY_BYTES), "matmul": spread(2.0 * cpu_kernel.MATMUL_SIZE**3)}
    case = sparse.decode_case("x", ten | machine, {}, [sparse.Work(3, 5), sparse.Work(4, 1)], {})
    assert case.ratios["dsa/字节"].low == pytest.approx(10 / 7)
    assert case.ratios["dsa/算术"].low == pytest.approx(10 / 9)
    assert case.ratios["dsa/dense-mla"].samples == (1, 1)
    assert "dsa/transformers" not in case.ratios
    beside = {"transformers": (spread(30.0), spread(60.0)), "llama.cpp": (spread(30.0), spread(40.0))}
    case = sparse.decode_case("x", ten | machine, beside, [sparse.Work(3, 5)], {})
    assert case.ratios["dsa/transformers"].samples == (0.5,)
    assert case.ratios["dsa/llama.cpp"].samples == (0.75,)
    assert case.values["llama.cpp.step_s"] == spread(40.0)
    assert case.values["dsa.step_s"] == ten["dsa"]


def test_the_nodes_of_a_whole_model():
    """稀疏的家族每层一个稀疏注意力，沿用的层没有索引器；稠密的没有这两样。"""
    shared = model_config("glm-dsa")
    assert scale.expected_nodes(shared, range(4)) == {
        "MlaAttention": 0,
        "SparseMlaAttention": 4,
        "LightningIndexer": 2,
        "MoeGate": sum(map(shared.is_moe_layer, range(4))),
    }
    dense = scale.expected_nodes(model_config("v3"), range(3))
    assert (dense["MlaAttention"], dense["SparseMlaAttention"], dense["LightningIndexer"]) == (3, 0, 0)


def test_a_peer_that_cannot_run_is_told_in_its_own_words(tmp_path, monkeypatch):
    """transformers 在深处跑不动（内存、时限）、没有编译 llama.cpp 时记下原话，不让整套失败。"""
    worker = isolate.Worker("tests.isolated:Refuses")
    assert "填不下 7" in sparse.rehearse(worker, 8, 60)
    monkeypatch.setattr(sparse.isolate, "Worker", lambda *_, **__: worker)
    monkeypatch.delenv(LLAMA_BUILD, raising=False)
    peers, failed = sparse.open_peers(tmp_path, sparse.QUICK, tmp_path, 1)
    assert peers == {sparse.PEER: worker}
    assert failed.keys() == {sparse.LLAMA}
    worker.close()


def test_break_even():
    """一轮的耗时等于一轮平均产出的 token 数时，不赚不赔。"""
    assert mtp.tokens_per_round(0, 3) == 1
    assert mtp.tokens_per_round(1, 3) == 4
    assert mtp.break_even(0.9, 3) == 0
    assert mtp.break_even(4.1, 3) is None
    for cost in (1.5, 2.0, 3.9):
        assert mtp.tokens_per_round(mtp.break_even(cost, 3), 3) == pytest.approx(cost)


def test_every_suite_is_declared_with_its_scenario():
    """每套都有标题与两种场景；缩小的真的小，不是另一回事。"""
    for name, module in SUITES.items():
        found = import_module(module)
        assert found.TITLE
        assert type(found.FULL) is type(found.QUICK)
        assert found.QUICK != found.FULL
        # 只说明别的几套的时间由什么组成的，与慢的同类，没有门槛。
        judged = {gate.suite for gate in gates.load_gates().gates}
        assert name in judged | {"decode-profile", "peers-torch"}


def test_shapes_are_what_they_claim(tmp_path):
    """两种头展开的缓存一样大；稠密对照的总参数只差 router；导出用的三个规模名副其实。"""
    expanded = {
        name: SHAPES[name]["num_attention_heads"] * 320 * SHAPES[name]["num_hidden_layers"]
        for name in ("v2-lite", "v3")
    }
    assert expanded["v2-lite"] == expanded["v3"]
    workspace = Workspace(tmp_path)
    counts = {
        name: parameter_count(workspace.checkpoint(name, sparse=True))
        for name in ("wide-4", "wide-4-dense", "0.1B", "0.9B", "4B")
    }
    routers = 3 * 32 * (1024 + 1)  # 三层，每层权重加偏置校正
    assert counts["wide-4"] - counts["wide-4-dense"] == routers
    plain, indexed = (dict(SHAPES[name]) for name in ("v3-wide-2", "v3.2-wide-2"))
    assert indexed.pop("index_topk") == 2048
    assert (indexed.pop("index_n_heads"), indexed.pop("index_head_dim")) == (64, 128)
    assert indexed.pop("model_type") != plain.pop("model_type")
    assert indexed == plain
    for name in ("0.1B", "0.9B", "4B"):
        assert counts[name] / 1e9 == pytest.approx(float(name[:-1]), rel=0.25)


def test_padded_demo_computes_the_same_function(tmp_path):
    """放大只补零、加的层什么也不改：主模型与草稿的 logits 不变。"""
    shape = {"num_hidden_layers": 6, "intermediate_size": 448, "moe_intermediate_size": 160}
    padded = write_padded(CHECKPOINT, tmp_path / "padded", shape)
    ids = torch.tensor([[5, 80, 300, 7, 11, 42]])
    every, past = torch.arange(6)[None], torch.zeros(1, dtype=torch.long)
    main, draft = [], []
    for checkpoint in (Checkpoint.open(CHECKPOINT), Checkpoint.open(padded)):
        model = load_reference(checkpoint, Forms("naive", "sparse"))
        module = load_draft(checkpoint, 0, model)
        with torch.no_grad():
            logits, hidden, _ = model(ids, past, every, model.empty_caches(1, 6))
            main.append(logits)
            draft.append(module(ids, hidden, past, every, model.empty_caches(1, 6)[0])[0])
    torch.testing.assert_close(main[1], main[0], atol=1e-4, rtol=0)
    torch.testing.assert_close(draft[1], draft[0], atol=1e-4, rtol=0)


def test_isolated_call_reports_its_own_process():
    found = isolate.call("tests.isolated:prepare", value=1)
    assert found["value"] == 2
    assert found["peak"] > 0
    assert found["seconds"] >= 0
    with pytest.raises(RuntimeError, match="prepare"):
        isolate.call("tests.isolated:prepare", wrong=1)


def test_engine_curve_says_when_it_was_not_measured(monkeypatch, tmp_path):
    """TRT-10：没有装 TensorRT-RTX 时，报告里有一行写明没有测，别的照常。"""
    monkeypatch.setattr("deepseek_export.engine.flavour.Flavour.version", lambda self: None)
    found = engine_build.cases(tmp_path, (8,), 1)
    assert "没有装 tensorrt_rtx" in report.markdown([make_run([suite("compile", found)])], [])
