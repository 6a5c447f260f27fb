"""``dsx bench`` 的统计、环境与报告。"""

from __future__ import annotations

import json
import re
import subprocess
from importlib import metadata

import numpy as np
import pytest

from deepseek_export import api, machine
from deepseek_export.benchmark.bundle import BenchReport, Scenario, bench_bundle
from deepseek_export.benchmark.depth import DepthDecoder
from deepseek_export.benchmark.environment import environment
from deepseek_export.benchmark.memory import measure, memory_in_subprocess
from deepseek_export.benchmark.spread import Spread, interleaved, paired_ratio
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.errors import DsxError
from tests.integration.cli import dsx

pytestmark = pytest.mark.unit

SMALL = Scenario(batch=2, prompt_len=6, new_tokens=4, depths=(20, 300), runs=2, threads=1)
#: 命令行上同样的场景。
OPTIONS = (
    *("--batch", 2, "--prompt-len", 6, "--new-tokens", 4, "--runs", 2, "--threads", 1),
    *("--depth", 20, "--depth", 300),
)


@pytest.fixture(scope="module")
def speculative(tmp_path_factory):
    """演示检查点的 ``full``，与 ``dsx demo`` 导出的相同。"""
    return api.export(
        CHECKPOINT,
        tmp_path_factory.mktemp("bench") / "out",
        "full",
        target="ort-cpu",
        overrides=["mtp.num_draft_tokens=3"],
    )


def test_spread_and_paired_ratio():
    spread = Spread.of([3, 1, 2])
    assert (spread.median, spread.low, spread.high, spread.samples) == (2, 1, 3, (3, 1, 2))
    assert spread.scaled(10).samples == (30, 10, 20)
    wide = Spread.of([100, 100.5]).at_least(0.01)
    assert (wide.low, wide.high, wide.samples) == (99.2475, 101.2525, (100, 100.5))
    assert spread.at_least(0.01) == spread
    assert (wide.scaled(2).low, wide.scaled(2).high) == (2 * wide.low, 2 * wide.high)
    assert wide.overlaps(Spread.of([99.25]))
    assert Spread.of([101.25]).overlaps(wide)
    assert not wide.overlaps(Spread.of([101.26]))
    # 机器在第三对里慢了一倍：逐对之比不变。
    ratio = paired_ratio(Spread.of([1, 1, 2]), Spread.of([4, 4, 8]))
    assert ratio.samples == (0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="shorter"):
        paired_ratio(spread, Spread.of([1, 2]))


def test_interleaved_rotates_and_turns_around_and_drops_the_warm_up():
    order = []

    def contender(name):
        return lambda: order.append(name) or len(order)

    results = interleaved({name: contender(name) for name in "abc"}, runs=3, warmup=1)
    assert "".join(order) == "bac" + "abc" + "cba" + "bca"
    assert results == {"a": [4, 9, 12], "b": [5, 8, 10], "c": [6, 7, 11]}


def test_environment_names_the_machine(tmp_path):
    found = environment(2)
    assert found["threads"] == 2
    assert found["cpu"]["cores"] == machine.cores()
    assert set(found["cpu"]["flags"]) <= machine.cpu_flags()
    assert found["memory_bytes"] == machine.memory_bytes()
    assert found["libraries"]["onnxruntime"] == metadata.version("onnxruntime")
    assert found["git"] is None
    assert environment(None, tmp_path)["git"] is None  # 不是 git 检出
    json.dumps(found)


@pytest.mark.parametrize(
    ("script", "gpus"),
    [
        (
            "echo 'NVIDIA H100 80GB HBM3, 580.82'; echo 'NVIDIA L4, 580.82'",
            [
                {"name": "NVIDIA H100 80GB HBM3", "driver": "580.82"},
                {"name": "NVIDIA L4", "driver": "580.82"},
            ],
        ),
        ("echo 'NVIDIA-SMI has failed'; exit 9", []),
        (None, []),
    ],
    ids=["cards", "no driver", "not installed"],
)
def test_environment_asks_the_system_for_its_cards(script, gpus, tmp_path, monkeypatch):
    """显卡由 ``nvidia-smi`` 说；它失败、没有它都是没有显卡。也没有 git 时，源码的版本不知道。"""
    monkeypatch.setenv("PATH", str(tmp_path))
    if script is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    found = environment(None, tmp_path)
    assert (found["gpus"], found["git"]) == (gpus, None)


def test_results_a_measurement_writes_do_not_make_the_source_dirty(tmp_path):
    def git(*command: str) -> None:
        identity = ("-c", "user.name=t", "-c", "user.email=t@t")
        subprocess.run(["git", "-C", str(tmp_path), *identity, *command], check=True, capture_output=True)

    history, source = tmp_path / "perf/history/runs.jsonl", tmp_path / "source.py"
    history.parent.mkdir(parents=True)
    history.touch()
    source.touch()
    git("init")
    git("add", ".")
    git("commit", "-m", "first")
    clean = environment(None, tmp_path)["git"]
    assert re.fullmatch("[0-9a-f]{7,}", clean)
    history.write_text("新的一行")
    assert environment(None, tmp_path)["git"] == clean
    source.write_text("改了")
    assert environment(None, tmp_path)["git"] == f"{clean}-dirty"


def test_process_memory(tmp_path):
    found = machine.process_memory()
    assert found is not None
    assert 0 < found.resident <= found.peak
    status = tmp_path / "status"
    assert machine.process_memory(status) is None
    status.write_text("VmHWM:\t 20 kB\nVmRSS:\t 10 kB\n")
    assert machine.process_memory(status) == (10240, 20480)


def test_depth_decoder_fills_exactly_the_context(exported):
    session = api.load(exported("v3-yarn", "mla+moe").path, 1).session
    decoder = DepthDecoder(session, 2, 300, seed=1)
    array = decoder.caches.array("kv_cache.0")
    assert np.all(np.abs(array[:, :, :299]).sum(axis=-1) > 0)
    assert np.all(array[:, :, 299:] == 0)
    assert decoder.step() > 0
    assert np.all(np.abs(array[:, :, 299]).sum(axis=-1) > 0)  # 这一步的 token 写在末尾
    assert np.all(array[:, :, 300:] == 0)


def test_computed_cache_is_what_the_process_really_takes(exported):
    """填满之后进程多占的物理内存，与按形状算的相差不到一成；在新进程里量，测试进程的堆里总有用过又释放的大块。"""
    sample = memory_in_subprocess(exported("v3-yarn", "mla+moe").path, batch=128, context=500)
    assert sample is not None
    assert 0.9 < sample.cache_resident / sample.cache_computed < 1.1


def test_memory_sample(exported):
    sample = measure(exported("v3-yarn", "mla+moe").path, batch=1, context=300, threads=1)
    assert sample.cache_computed == 3 * 512 * (40 + 16) * 4
    assert 0 < sample.loaded <= sample.peak
    assert sample.resident <= sample.peak


def bench(bundle, *options: object) -> tuple[BenchReport, str]:
    """``dsx bench`` 写进 bundle 的报告，与印出来的表。"""
    process = dsx("bench", bundle.path, *OPTIONS, *options)
    assert process.returncode == 0, process.stderr
    written = json.loads((bundle.path / "reports/bench.json").read_text(encoding="utf-8"))
    report = BenchReport.model_validate(written)
    assert report.model_dump(mode="json") == written
    return report, process.stdout


def test_bench_writes_its_report(exported):
    """被测与对照交替；报告写进 bundle，能原样读回，也印成表。"""
    ours, base = exported("v3-yarn", "mla+moe"), exported("v3-yarn", "baseline")
    report, text = bench(ours, "--against", base.path)
    assert report.scenario == SMALL
    assert set(report.ways) == {"bundle/plain", "against/plain"}
    assert [depth.context for depth in report.depths] == [20, 300]
    assert len(report.ratios) == 4
    assert all(len(ratio.value.samples) == SMALL.runs for ratio in report.ratios)
    memory = {name: subject.memory for name, subject in report.subjects.items()}
    assert memory["bundle"].cache_computed < memory["against"].cache_computed
    for expected in ("逐个 token", "对照", "实测的缓存", "上下文 300", "机器"):
        assert expected in text


@pytest.mark.heavy
def test_bench_measures_speculation_and_survives_unknown_memory(speculative, monkeypatch):
    """带草稿模型时两种解码都测；系统不给进程内存时写「未知」。"""
    monkeypatch.setattr("deepseek_export.benchmark.memory.process_memory", lambda: None)
    report, text = bench(speculative, "-P", "床前明月光")
    assert set(report.ways) == {"bundle/plain", "bundle/speculative"}
    assert report.ways["bundle/speculative"].speculation["main_calls"] > 0
    ratios = [(ratio.what, ratio.numerator, ratio.denominator) for ratio in report.ratios]
    assert ratios == [("decode", "bundle/speculative", "bundle/plain")]
    assert "未知" in text
    assert "解码：被测 投机 / 被测 逐个 token" in text


def test_bench_refuses_what_would_not_be_the_scenario(exported, speculative):
    bundle = exported("v3-yarn", "mla+moe")
    for changes in ({"prompt_len": 510}, {"depths": (513,)}):
        with pytest.raises(DsxError) as caught:
            bench_bundle(bundle.path, scenario=SMALL.model_copy(update=changes))
        assert caught.value.code == "DSX-E710"
        assert "512" in caught.value.what
    with pytest.raises(DsxError) as caught:
        bench_bundle(bundle.path, against=speculative.path, scenario=SMALL)
    assert caught.value.code == "DSX-E711"
