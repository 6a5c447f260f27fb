"""perf/gpu：没有 GPU 时只说一行；一个点怎样算达标；写出的是历史的一行；只要它说的那几个库。"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
from click.testing import CliRunner

from perf import gates, results
from perf.__main__ import cli
from perf.gpu import __main__ as entry
from perf.gpu import session
from perf.gpu.engine import run_engine
from perf.results import SuiteResult

pytestmark = pytest.mark.unit

ROOT = Path(__file__).resolve().parents[2]
CEILINGS = {"memory": 2e12, "compute": 500e12}
FAILED = {
    "case": "MoeExperts V3 N=7",
    "dtype": "bfloat16",
    "ok": False,
    "max_abs": 3.5,
    "coordinate": (6, 1),
    "calc_diff": 0.25,
    "repeatable": True,
    "guard_intact": False,
}


def test_refuses_without_a_gpu(tmp_path):
    """KERNEL-8：没有 GPU，单独启动是一行、退出码 1，什么也不写；作为一套则跳过。"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "perf.gpu", "--out", tmp_path]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "没有可用的 NVIDIA GPU，什么也没有测\n"
    assert not done.stdout
    assert not list(tmp_path.iterdir())
    skipped = CliRunner().invoke(cli, ["check", "gpu", "--out", str(tmp_path)])
    assert skipped.exit_code == 1
    assert "跳过 gpu：没有可用的 NVIDIA GPU" in skipped.output


def test_a_point_is_held_to_the_tighter_ceiling():
    """受限于带宽的点要 80 %，受限于算力的点要 60 %；正好达到时比值是 1。"""
    memory = session.timed_case("a", [1.25e-3, 1.25e-3, 2.5e-3], int(2e9), int(1e9), CEILINGS)
    assert memory["facts"]["bound"] == "带宽"
    assert memory["facts"]["share"] == pytest.approx(0.8)
    assert memory["ratios"]["用时/目标"]["median"] == pytest.approx(1)
    assert memory["ratios"]["用时/目标"]["high"] == pytest.approx(2)
    compute = session.timed_case("b", [1e-3 / 0.6], int(1e6), int(500e9), CEILINGS, active_experts=8)
    assert compute["facts"] == {"bound": "算力", "share": pytest.approx(0.6), "active_experts": 8}
    assert compute["ratios"]["用时/目标"]["median"] == pytest.approx(1)


def test_the_file_it_writes_is_a_row_of_the_history(tmp_path, monkeypatch):
    """KERNEL-8：写出的一行由 ``python -m perf add`` 收进历史，门槛看得到它；没有路径。"""
    point = session.timed_case("LatentAttention H16 B1 S1 T1024", [1e-6], 10**6, 10**6, CEILINGS)
    first = {"name": "上限", "values": {"copy.gb_s": session.spread([2000.0])}, "facts": {"skipped": []}}
    suite = {"suite": "gpu", "title": session.TITLE, "cases": [first, point]}
    suite["scenario"] = {"card": "NVIDIA X"}
    monkeypatch.setattr(session, "measure", lambda *_: suite)
    monkeypatch.setattr(sys, "argv", ["perf.gpu", "--out", str(tmp_path)])
    assert entry.main() == 0
    (path,) = tmp_path.glob("gpu-nvidia-x-*.jsonl")
    monkeypatch.setattr(results, "HISTORY", tmp_path / "runs.jsonl")
    done = CliRunner().invoke(cli, ["add", str(path), "--out", str(tmp_path / "report")])
    assert done.exit_code == 0, done.output
    (row,) = results.load()
    assert row.suites == [SuiteResult.model_validate(suite)]
    assert row.environment["command"] == "python -m perf.gpu"
    assert [v.id for v in gates.check([row], gates.load_gates())] == [
        gate.id for gate in gates.load_gates().gates if gate.suite == "gpu"
    ]
    assert "NVIDIA 卡上插件的 kernel" in (tmp_path / "report/report.md").read_text(encoding="utf-8")
    failing = {**first, "facts": {"verified": False}}
    monkeypatch.setattr(session, "measure", lambda *_: suite | {"cases": [first, point, failing]})
    monkeypatch.setattr(sys, "argv", ["perf.gpu", "--out", str(tmp_path), "--bundle", "OUT"])
    assert entry.main() == 1


def test_a_failed_check_stops_before_timing(monkeypatch):
    """核对不过：写明是哪一项、差多少、在哪里，不计时。"""
    monkeypatch.setattr(session.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(session.Session, "__init__", lambda self, budget: None)
    monkeypatch.setattr(session.Session, "check_everything", lambda self: [{"ok": True}, FAILED])
    with pytest.raises(RuntimeError) as raised:
        session.measure(session.QUICK, 1)
    assert str(raised.value).splitlines() == [
        "1 / 2 项核对不过，没有计时",
        "MoeExperts V3 N=7（bfloat16）最大差 3.5 在 (6, 1)，calc_diff 2.50e-01，可重复 True，哨兵完好 False",
    ]


def test_an_engine_that_cannot_run_says_why(tmp_path):
    """给了 bundle 却跑不成算没有通过，不抛异常。"""
    found = run_engine(tmp_path, 90)
    assert not found["verified"]
    assert found["error"].startswith("DSX-E402 ")


#: 那台机器上只有 torch、triton、cuda-bindings、numpy：其余的依赖一律导入不了。
BLOCKED = """
import ast, importlib, sys
blocked, path = set(sys.argv[1].split(",")), sys.argv[2]

class Blocker:
    def find_spec(self, name, where=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
sys.path.insert(0, path)
names = {"perf.gpu.__main__"}
for file in ("__main__", "session", "harness"):
    tree = ast.parse(open(f"{path}/perf/gpu/{file}.py", encoding="utf-8").read())
    names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
for name in sorted(names - {"perf.gpu.engine"}):
    importlib.import_module(name)
print(len([name for name in names if name.startswith("deepseek_export")]))
"""


def test_needs_nothing_but_what_it_says():
    """KERNEL-8：``python -m perf.gpu`` 用到的每个模块，没有 dsx 的其余依赖也导入得了。"""
    requirements = metadata.requires("deepseek-export") or []
    required = {
        re.match(r"[\w-]+", line)[0].lower().replace("-", "_") for line in requirements if "extra" not in line
    }
    blocked = required - {"torch", "numpy"} | {"onnx", "transformers", "tensorrt_rtx", "tensorrt", "onnx_ir"}
    assert {"pydantic", "ml_dtypes", "click"} <= blocked
    command = [sys.executable, "-c", BLOCKED, ",".join(blocked), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 4
