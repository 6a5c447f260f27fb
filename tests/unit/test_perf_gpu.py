"""perf/gpu：在替身的卡上走一遍验收，一步出了毛病，别的步的结果都在；目录记进历史；只要它说的那几个库。"""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from deepseek_export.kernels.codes import E4M3
from deepseek_export.ops.index_topk import index_topk
from deepseek_export.ops.quantized_linear import quantized_linear
from deepseek_export.ops.quantized_moe_experts import quantized_moe_experts
from deepseek_export.parity.tolerances import TOLERANCES
from perf import gates, results
from perf.__main__ import cli
from perf.gpu import accept, lines, phases, points, record
from perf.gpu.coded_points import (
    CODES,
    QuantizedExperts,
    QuantizedLinear,
    code_bytes,
    coded,
    restored,
    unpacked,
)
from perf.gpu.engine import run_engine
from perf.gpu.sources import Source, shapes_of

pytestmark = [pytest.mark.unit, pytest.mark.heavy]

ROOT = Path(__file__).resolve().parents[2]
FAKE = (sys.executable, "-m", "tests.fake_card")
SHORT = 25.0


def outcomes(folder: Path) -> dict[str, str]:
    """步名 → 结果。"""
    rows = lines.read(folder)
    return {row["phase"]: row["status"] for row in rows if "item" not in row and row["phase"] != "start"}


def items(folder: Path, phase: str) -> list[dict]:
    return [row for row in lines.read(folder) if row["phase"] == phase and "item" in row]


@pytest.fixture(scope="module")
def fine(tmp_path_factory) -> Path:
    """没有毛病的一次，只做要进历史的几步。"""
    folder = tmp_path_factory.mktemp("fine")
    chosen = [word for name in ("environment", "smoke", "ceilings", "headline") for word in ("--phase", name)]
    assert accept.main(["--out", str(folder), *chosen], FAKE) == 0
    return folder


def test_refuses_without_a_gpu(tmp_path):
    """KERNEL-8：没有 GPU，单独启动是一行、退出码 1，什么也不写；作为一套则跳过。"""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "perf.gpu.accept", "--out", tmp_path / "out"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "没有可用的 NVIDIA GPU，什么也没有测\n"
    assert not done.stdout
    assert not list(tmp_path.iterdir())
    skipped = CliRunner().invoke(cli, ["check", "gpu", "--out", str(tmp_path)])
    assert skipped.exit_code == 1
    assert "跳过 gpu：没有可用的 NVIDIA GPU" in skipped.output


def test_trouble_stays_where_it_is(tmp_path, monkeypatch):
    """KERNEL-10：结果不对、显存不够、被信号杀死、卡死，各在一步里：别的步照做，出事的步已经写下的也在，退出码是 1。"""
    tools = tmp_path / "tools"
    tools.mkdir()
    sanitizer = tools / "compute-sanitizer"
    sanitizer.write_text('#!/bin/sh\necho "$4" >> "$0.log"\nshift 4\nexec "$@"\n')
    sanitizer.chmod(0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setenv("FAKE_CARD", "smoke=wrong,checks=memory,headline=signal,rest=hang")
    limited = tuple(replace(one, limit=SHORT) if one.name == "rest" else one for one in phases.PHASES)
    monkeypatch.setattr(phases, "PHASES", limited)
    folder = tmp_path / "out"
    chosen = [
        "environment",
        "smoke",
        "memcheck",
        "ncu",
        "launcher",
        "checks",
        "ceilings",
        "headline",
        "runtime",
        "rest",
    ]
    arguments = ["--out", str(folder), *(word for name in chosen for word in ("--phase", name))]
    assert accept.main(arguments, FAKE) == 1
    assert outcomes(folder) == {
        "environment": "ok",
        "smoke": "failed",
        "memcheck": "ok",
        "ncu": "skipped",
        "launcher": "skipped",
        "checks": "failed",
        "ceilings": "ok",
        "headline": "crashed",
        "runtime": "ok",
        "rest": "timeout",
    }
    details = {
        row["phase"]: row["detail"] for row in lines.read(folder) if "detail" in row and "item" not in row
    }
    assert (details["ncu"], details["launcher"]) == ("没有 ncu", "没有 g++")
    assert details["headline"].startswith("SIGSEGV")
    assert (tools / "compute-sanitizer.log").read_text() == "memcheck\n"
    assert [row["status"] for row in items(folder, "smoke")] == ["failed"] * len(points.TINY)
    assert any("OutOfMemoryError" in row.get("detail", "") for row in items(folder, "checks"))
    assert any(row["status"] == "skipped" and "GB 显存" in row["detail"] for row in items(folder, "checks"))
    # 出事之前的一项在，只是带着记号：smoke 里同一个程序的核对不过。
    assert [row["item"] for row in items(folder, "headline")] == ["LatentAttention H16 B1 S1 T1024"]
    assert len(items(folder, "rest")) == 1
    (replayed,) = items(folder, "runtime")
    assert replayed["executed"] == 2
    loaded = record.load(folder)
    (timed,) = [case for case in loaded["suites"][0]["cases"] if case["name"].startswith("Latent")]
    assert timed["facts"]["unverified"].startswith("核对不过：LatentAttention H16")
    assert not timed["ratios"]
    refused = CliRunner().invoke(cli, ["add", str(folder), "--out", str(tmp_path / "report")])
    assert refused.exit_code == 1
    assert "没有一个核对过的计时" in refused.output


def test_a_later_slot_does_what_is_left(fine, tmp_path):
    """KERNEL-10：时间用完的步写明跳过，不算失败；另一次用 ``--phase`` 接着做，最后一次为准。"""
    folder = tmp_path / "again"
    shutil.copytree(fine, folder)
    assert accept.main(["--out", str(folder), "--budget", "0", "--phase", "smoke"], FAKE) == 0
    assert outcomes(folder)["smoke"] == "skipped"
    assert accept.main(["--out", str(folder), "--phase", "smoke"], FAKE) == 0
    assert outcomes(folder)["smoke"] == "ok"
    assert record.load(folder)["suites"][0]["cases"][0]["facts"]["checks"] == len(points.TINY)


def test_the_folder_becomes_a_row_of_the_history(fine, tmp_path, monkeypatch):
    """KERNEL-8：目录由 ``python -m perf add`` 收进历史，门槛看得到核对过的点；审计的估计在测得的旁边；没有路径。"""
    monkeypatch.setattr(results, "HISTORY", tmp_path / "runs.jsonl")
    done = CliRunner().invoke(cli, ["add", str(fine), "--out", str(tmp_path / "report")])
    assert done.exit_code == 0, done.output
    (row,) = results.load()
    (suite,) = row.suites
    assert row.environment["command"] == "python -m perf.gpu.accept"
    assert str(fine) not in row.model_dump_json()
    first, *cases = suite.cases
    assert first.name == "上限"
    assert first.facts["phases"]["smoke"] == "ok"
    assert set(first.values) == {"copy.gb_s", "matmul.tflop_s", "launch.seconds"}
    assert first.facts["skipped"]
    by = {case.name: case for case in cases}
    verified, unverified = by["LatentAttention H16 B1 S1 T1024"], by["LatentAttention H128 B1 S1 T1024"]
    # 上限也由替身的 1 毫秒得来：拷贝 2 GiB，所以这个点至少要它的字节数那么一份。
    share = verified.facts["share"]
    point = points.full(16, 1, 1, 1024)
    traffic, _ = point.work(point.inputs(Source("cpu")))
    assert share == pytest.approx(traffic / (2 << 30), rel=1e-6)
    assert verified.ratios["用时/目标"].median == pytest.approx(0.8 / share)
    assert 0 < verified.facts["estimated_share"] <= 1
    assert unverified.facts["unverified"] == "没有核对过"
    assert not unverified.ratios
    verdicts = gates.check([row], gates.load_gates())
    assert {v.case for v in verdicts} == {name for name, case in by.items() if case.ratios}
    text = (tmp_path / "report/report.md").read_text(encoding="utf-8")
    assert "NVIDIA 卡上插件的 kernel" in text
    page = (tmp_path / "report/report.html").read_text(encoding="utf-8")
    assert "LatentAttention 占上限的几成" in page
    assert "估计至多" in page


def test_what_is_not_such_a_folder_is_refused(tmp_path):
    """不是验收写的目录、environment 没有做成的、混着几张卡的，说明，不写历史。"""
    refused = CliRunner().invoke(cli, ["add", str(tmp_path)])
    assert refused.exit_code == 1
    assert "没有 rows.jsonl" in refused.output
    lines.append(tmp_path / lines.ROWS, {"phase": "start", "started": "", "environment": {}})
    with pytest.raises(FileNotFoundError, match="没有卡的一行"):
        record.load(tmp_path)
    for card in ("A", "B"):
        lines.append(tmp_path / lines.ROWS, {"phase": "smoke", "item": "card", "status": "ok", "on": card})
    refused = CliRunner().invoke(cli, ["add", str(tmp_path)])
    assert refused.exit_code == 1
    assert "混着几张卡的结果：A、B" in refused.output


def test_a_torn_line_costs_only_itself(tmp_path):
    """KERNEL-10：进程死在写的半路，前后的行都读得出来。"""
    path = tmp_path / lines.ROWS
    lines.append(path, {"phase": "a"})
    with path.open("ab") as file:
        file.write(b'{"phase": "b", "ti')
    lines.append(path, {"phase": "c"})
    assert [row["phase"] for row in lines.read(tmp_path)] == ["a", "c"]


def test_points_survive_the_file():
    """点写成 JSON 再读回来，还是它；启动表要的形状与造出来的输入一样。"""
    for point in points.EVERY:
        assert points.from_row(json.loads(json.dumps(points.to_row(point)))) == point
        assert point.needs(reference=True) >= point.needs(reference=False) > 0
    source = Source("cpu")
    for point in points.TINY:
        inputs = point.inputs(source)
        assert shapes_of(point.table(89), inputs) == point.shapes()
        outputs = point.outputs(inputs)
        assert [output.dtype.is_floating_point for output in outputs][:1] == [
            not isinstance(point, points.Selection | points.Update)
        ]
        assert point.measure(inputs, outputs).max_abs != 0
        traffic, flops = point.work(inputs)
        assert min(traffic, flops) > 0


def test_a_wrong_selection_is_seen():
    """KERNEL-8：换了一个分数差得远的 key、少选一个、个数不对，都与参考不同；选得对就一点不差。"""
    point = points.Selection(2, 90, (60, 80), topk=16)
    inputs = point.inputs(Source("cpu"))
    indices, counts = index_topk(*inputs, 16)
    exact = TOLERANCES["selection", "bfloat16"]
    assert exact.accepts(point.measure(inputs, (indices, counts)))
    outside = next(place for place in range(60) if place not in indices[0, 0])
    swapped, fewer, miscounted = indices.clone(), indices.clone(), counts.clone()
    swapped[0, 0, 0], fewer[1, 1, -1], miscounted[1, 0] = outside, -1, 15
    for wrong in ((swapped, counts), (fewer, counts), (indices, miscounted), (indices + 1000, counts)):
        assert not exact.accepts(point.measure(inputs, wrong))


@pytest.mark.parametrize("codes", CODES)
@pytest.mark.parametrize("kind", [QuantizedExperts, QuantizedLinear])
def test_a_wrong_code_is_seen(kind, codes):
    """KERNEL-8：同一份码由算子的参考实现算，与点自己的参考相等；错一个码、用了隔壁的 scale，看得出来。"""
    point = kind("tiny", 5, codes)
    form = CODES[codes]
    x, *rest = point.inputs(Source("cpu"))
    op = quantized_moe_experts if kind is QuantizedExperts else quantized_linear
    about = (form.columns, form.rows, int(codes == E4M3))

    def result(*changed):
        wide = [unpacked(one, form) if one.dtype == torch.int8 else one for one in (x, *changed)]
        return (op(*wide, *about),)

    tolerance = TOLERANCES["op", "bfloat16"]
    assert tolerance.accepts(point.measure((x, *rest), result(*rest)))
    scales = [one.roll(1, -1) if one.is_floating_point() and one.shape[-1] > 1 else one for one in rest]
    if form.columns < 128:
        assert not tolerance.accepts(point.measure((x, *rest), result(*scales)))
    low = [one ^ 0x48 if one.dtype == torch.int8 else one for one in rest]
    assert not tolerance.accepts(point.measure((x, *rest), result(*low)))


def test_random_codes_are_all_finite_and_of_the_right_size():
    """e4m3 的两个 NaN 码不出现，别的都出现；三种码还原之后都约 1/sqrt(K)，所以容差的尺度相同。"""
    source = Source("cpu")
    for form in CODES.values():
        codes, scales = coded(source, form, 256, 512, dtype=torch.bfloat16)
        found = restored(codes, scales, form, torch.float32)
        assert found.isfinite().all()
        assert 0.5 < float(found.square().mean().sqrt()) * 512**0.5 < 2
        assert len(unpacked(codes, form).unique()) == {"int8": 256, "int4": 16, E4M3: 254}[form.codes]
        nbytes = sum(one.numel() * one.element_size() for one in (codes, scales))
        assert nbytes == code_bytes(form, 256, 512)


def test_an_engine_that_cannot_run_says_why(tmp_path):
    """给了 bundle 却跑不成算没有通过，不抛异常。"""
    found = run_engine(tmp_path)
    assert not found["verified"]
    assert found["error"].startswith("DSX-E402 ")


LAUNCH = """
import ctypes, sys
from pathlib import Path
from deepseek_export.kernels.compile import compile_table
from perf.gpu import native, points

library = ctypes.CDLL(str(native.build_library(Path(sys.argv[1]))))
point = points.TINY[0]
program = compile_table(point.table(89))
for address in (16, 8):
    try:
        native.launch(library, program, point.shapes(), [address] * 3, [16], 16, 0)
    except RuntimeError as error:
        print(error)
"""


def test_the_native_launcher_speaks_c(tmp_path):
    """KERNEL-10：C++ 启动器不需要 TensorRT 就编译得出来；替身的驱动下启动序列走得通，错误说得出来。"""
    triton = importlib.util.find_spec("triton")
    if shutil.which("g++") is None or triton is None or triton.origin is None:
        pytest.skip("没有 g++，或没有 triton 带的 cuda.h，不能编译 C++ 一侧")
    include = Path(triton.origin).parent / "backends/nvidia/include"
    fake = tmp_path / "libcuda.so.1"
    source = ROOT / "plugins/tensorrt/fake_cuda.cc"
    subprocess.run(["g++", "-shared", "-fPIC", f"-I{include}", "-o", fake, source], check=True)
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path), "FAKE_SMS": "132", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", LAUNCH, str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "没有按 16 字节对齐" in done.stdout
    assert len(re.findall(r"^launch \d", done.stdout, re.M)) == 2


#: 那台机器上只有 torch、triton、cuda-bindings、numpy：其余的依赖一律导入不了。
BLOCKED = """
import importlib, sys
blocked, path = set(sys.argv[1].split(",")), sys.argv[2]

class Blocker:
    def find_spec(self, name, where=None, target=None):
        if name.partition(".")[0] in blocked:
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Blocker())
sys.path.insert(0, path)
for name in sys.argv[3:]:
    importlib.import_module(name)
"""


def test_needs_nothing_but_what_it_says():
    """KERNEL-8：验收用到的每个模块，没有 dsx 的其余依赖也导入得了。"""
    requirements = metadata.requires("deepseek-export") or []
    required = {
        re.match(r"[\w-]+", line)[0].lower().replace("-", "_") for line in requirements if "extra" not in line
    }
    blocked = required - {"torch", "numpy"} | {"onnx", "transformers", "tensorrt_rtx", "tensorrt", "onnx_ir"}
    assert {"pydantic", "ml_dtypes", "click"} <= blocked
    names = set()
    for path in (ROOT / "perf/gpu").glob("*.py"):
        if path.stem == "engine":  # 要装 dsx 与 TensorRT，另有说明
            continue
        names.add(f"perf.gpu.{path.stem}")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names |= {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}
    assert "deepseek_export.backend.tensorrt.replay" in names
    command = [sys.executable, "-c", BLOCKED, ",".join(blocked), str(ROOT), *sorted(names)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
