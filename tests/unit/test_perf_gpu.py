"""perf/gpu：没有 GPU 时只说一行；报告写清不过的、未测的与达标与否。"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from perf.gpu.engine import run_engine
from perf.gpu.report import markdown

pytestmark = pytest.mark.unit

SCRIPT = Path(__file__).resolve().parents[2] / "perf/gpu/run.py"
ENVIRONMENT = {"card": "NVIDIA X", "date": "2026-01-02", "sm": 90, "seed": 7}
PASSED = {"case": "LatentAttention H=16", "dtype": "float16", "ok": True}
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


def timed(bound: str, share: float, target: float) -> dict:
    timing = {"median": 12.34, "low": 12.0, "high": 13.0, "samples": 9}
    numbers = {"gb_s": 2000.4, "tflop_s": 55.55, "bound": bound, "share": share, "target": target}
    return {"time_us": timing, **numbers}


def test_refuses_without_a_gpu(tmp_path):
    """没有 GPU：一行，退出码 1，什么也不写。"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, SCRIPT, "--out", tmp_path]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "没有可用的 NVIDIA GPU，什么也没有测\n"
    assert not done.stdout
    assert not list(tmp_path.iterdir())


def test_report_of_a_failed_check():
    """核对不过：写明是哪一项、差多少、在哪里，没有计时表。"""
    text = markdown({"environment": ENVIRONMENT, "correctness": [PASSED, FAILED], "seconds": 5.0})
    assert "# NVIDIA X，2026-01-02" in text
    assert "1 / 2 通过" in text
    assert "不过：MoeExperts V3 N=7（bfloat16）最大差 3.5 在 (6, 1)，calc_diff 2.50e-01" in text
    assert "哨兵完好 False" in text
    assert "核对不过，没有计时。" in text
    assert "|" not in text


def test_report_of_timings():
    """每个点一行：达标、不达标、未测。"""
    attention = [
        {"H": 16, "B": 1, "S": 1, "T": 1024, **timed("memory", 0.81, 0.8)},
        {"H": 128, "B": 16, "S": 1, "T": 8192, **timed("compute", 0.59, 0.6)},
        {"H": 128, "B": 128, "S": 1, "T": 32768, "skipped": True},
    ]
    experts = [
        {"shape": "V3", "N": 16, "active_experts": 100, "torch": {"median": 25.0}, "speedup": 2.026}
        | timed("memory", 0.5, 0.8),
        {"shape": "V3", "N": 4096, "skipped": True},
    ]
    report = {"environment": ENVIRONMENT, "correctness": [PASSED], "seconds": 300.0}
    report |= {"ceilings": {"copy_gb_s": 2500.0, "matmul_tflop_s": 600.0}}
    report |= {"engine": {"skipped": "没有给 --bundle，没有运行引擎"}}
    rows = markdown({**report, "attention": attention, "experts": experts}).splitlines()
    assert "| 16 | 1 | 1 | 1024 | 12.3 | 2000 | 55.5 | 带宽 | 81% | 是 |" in rows
    assert "| 128 | 16 | 1 | 8192 | 12.3 | 2000 | 55.5 | 算力 | 59% | 否 |" in rows
    assert "| 128 | 128 | 1 | 32768 | 未测 | - | - | - | - | - |" in rows
    assert "| V3 | 16 | 100 | 12.3 | 2000 | 55.5 | 带宽 | 50% | 否 | 25.0 | 2.03 |" in rows
    assert "| V3 | 4096 | - | 未测 | - | - | - | - | - | - | - |" in rows
    assert rows[-1] == "没有给 --bundle，没有运行引擎"
    broken = {"verified": False, "error": "DSX-E912 …"}
    assert markdown({**report, "attention": [], "experts": [], "engine": broken}).endswith(
        "没有跑成：DSX-E912 …\n"
    )
    engine = {"flavour": "tensorrt", "version": "11.0", "bundle": "OUT", "decode_tokens_s": 99.5}
    engine |= {"verified": True, "first_failure": None}
    rows = markdown({**report, "attention": [], "experts": [], "engine": engine}).splitlines()
    assert rows[-1] == "tensorrt 11.0，OUT：逐层校验通过，batch 1 解码 99.5 token/s"


def test_an_engine_that_cannot_run_says_why(tmp_path):
    """没有给 bundle 是一句话；给了却跑不成算没有通过，不抛异常。"""
    assert run_engine(None, 90) == {"skipped": "没有给 --bundle，没有运行引擎"}
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
tree = ast.parse(open(f"{path}/perf/gpu/run.py", encoding="utf-8").read())
names = {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
for name in sorted(names):
    importlib.import_module(name)
print(len([name for name in names if name.startswith("deepseek_export")]))
"""


def test_needs_nothing_but_what_it_says():
    """KERNEL-7：run.py 用到的每个模块，没有 dsx 的其余依赖也导入得了。"""
    requirements = metadata.requires("deepseek-export") or []
    required = {
        re.match(r"[\w-]+", line)[0].lower().replace("-", "_") for line in requirements if "extra" not in line
    }
    blocked = required - {"torch", "numpy"} | {"transformers", "tensorrt_rtx", "tensorrt", "onnx_ir"}
    assert {"onnx", "pydantic", "ml_dtypes", "click"} <= blocked
    command = [sys.executable, "-c", BLOCKED, ",".join(blocked), str(SCRIPT.parents[2])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 4
