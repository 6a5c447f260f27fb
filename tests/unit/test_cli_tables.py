"""命令里为了不导入 torch 而另写一份的名字，必须与真正的出处一致；表格按给定的数据印。"""

from __future__ import annotations

import contextlib
import io
import os
import re
import threading
import time
from importlib import metadata
from pathlib import Path

import click
import pytest
from rich.cells import cell_len

from deepseek_export import api, machine
from deepseek_export.cli import console, demo, doctor, plan, progress, verify
from deepseek_export.cli.main import COMMANDS, LazyGroup, cli
from deepseek_export.disk_cache import DiskCache
from deepseek_export.parity.bisect import Culprit, NodeEntry
from deepseek_export.parity.checks import LEVELS
from deepseek_export.parity.compare import BlockCase, ComparisonReport
from deepseek_export.parity.measures import Measure
from deepseek_export.parity.report import Case, ParityReport
from deepseek_export.parity.tolerances import TOLERANCES
from deepseek_export.records import TARGETS
from tests.integration.cli import dsx, last_json

pytestmark = pytest.mark.unit


def test_names_agree_with_their_source():
    assert verify.LEVELS == LEVELS
    assert set(doctor.TARGETS) == set(TARGETS)


def test_every_command_has_chinese_help():
    assert isinstance(cli, LazyGroup)
    context = click.Context(cli)
    for name in COMMANDS:
        command = cli.get_command(context, name)
        assert command is not None
        text = command.get_help(command.make_context(name, [], resilient_parsing=True))
        assert any("\u4e00" <= char <= "\u9fff" for char in text)
        assert command.short_help
        for option in command.params:
            if isinstance(option, click.Option):
                assert option.help, (name, option.name)


def _lines(renderable, width: int) -> list[str]:
    out = console.Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    out.print(renderable)
    return [line.rstrip() for line in out.file.getvalue().splitlines()]


@pytest.mark.parametrize("width", [120, 80])
def test_names_are_not_broken_in_the_middle(width: int):
    """张量名整个换到下一行；一行放不下才在点、斜杠之后断。"""
    names = [f"model.layers.{i}.mlp.shared_experts.down_proj.weight" for i in range(4)]
    shown = "\n".join(_lines(console.facts("已导出", [("量化", "最敏感的：" + "、".join(names))]), width))
    assert all(name in shown for name in names)
    made = console.table("表", "名字", "值", right=("值",))
    made.add_row("layers.1.mlp.shared_experts.down_proj/MatMul", "1")
    firsts = [line.split()[0] for line in _lines(made, 36)[3:]]
    assert firsts == ["layers.1.mlp.shared_experts.", "down_proj/MatMul"]


@pytest.mark.parametrize("width", [120, 80, 60, 50])
def test_a_table_leaves_columns_out_before_it_breaks_a_name(width: int):
    """放得下就整张；放不下先去掉可有可无的列，说一声；名字与数字不从中间断，也不越过边。"""
    names = ("DeepSeek-V2-Lite", "model.layers.11.mlp", "float32", "1,234,567")
    made = console.table("表", "名字", "哪一层", "类型", "数", right=("数",), optional=("哪一层", "类型"))
    made.add_row(*names)
    lines = _lines(made, width)
    assert all(cell_len(line) <= width for line in lines)
    dropped = {120: (), 80: (), 60: ("model.layers.11.mlp",), 50: ("model.layers.11.mlp",)}[width]
    for name in names:
        assert (f" {name}" in "\n".join(lines)) is (name not in dropped)
    assert ("没有列出：哪一层" in "".join(lines)) is bool(dropped)


def test_real_tables_fit_into_80_columns(monkeypatch):
    """``dsx doctor`` 的表：标识符都是整个的。"""
    monkeypatch.setattr(console, "LOG_WIDTH", 80)
    found, text = doctor.diagnose(), dsx("doctor").stdout
    assert all(cell_len(line.rstrip()) <= 80 for line in text.splitlines())
    names = [package["name"] for package in found["packages"]]
    versions = [package["version"] for package in found["packages"] if package["version"]]
    for word in (*names, *versions, *doctor.TARGETS):
        assert f" {word} " in text, word


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "放不下"),
        (1234567.0, "1,300,000 token/s"),
        (1200.0, "1,200 token/s"),
        (1201.0, "1,300 token/s"),
        (99.2, "100 token/s"),
        (12.3, "13 token/s"),
        (7.0, "7 token/s"),
        (3.14, "3.2 token/s"),
        (0.0421, "0.043 token/s"),
        (0.0, "0 token/s"),
    ],
)
def test_plan_prints_the_digits_it_knows(value, shown):
    """估算的上界只有两位可信，往上取。"""
    assert plan.speed(value) == shown


def _case(name: str, **fields: object) -> Case:
    return Case(level="block", name=name, passed=False, **fields)


def test_a_failing_report_names_level_case_and_coordinate(monkeypatch):
    """``dsx verify`` 印出、``--json`` 写出报告里的不通过，退出码 1；报告是给好的，只看怎么写。"""
    bad = _case(
        "layers.1.mlp",
        measure=Measure(0.5, (0, 3, 7), 1e-3, 1.01, 1.0, 64, 1.75, 1.25),
        tolerance=TOLERANCES["block", "float32"],
        near_ties=2,
        note="最大差在 [0, 3, 7]",
    )
    report = ParityReport(
        bundle="OUT",
        checkpoint="CKPT",
        profile="mla",
        target="portable",
        dtype="float32",
        oracle="transformers",
        environment={},
        levels=["op", "block"],
        cases=[bad],
        notes=["op 层没有可比的"],
        polygraphy="polygraphy run OUT/model.onnx",
    )
    monkeypatch.setattr(api, "verify", lambda *_, **__: report)
    process = dsx("verify", "OUT", "--json")
    assert process.returncode == 1
    assert last_json(process)["levels"][1] == {
        "level": "block",
        "cases": 1,
        "failed": 1,
        "near_ties": 2,
        "max_abs": 0.5,
        "calc_diff": 1e-3,
        "norm_ratio": 1.01,
    }
    process = dsx("verify", "OUT")
    assert process.returncode == 1
    for expected in (
        "不通过",
        "没有可比的",
        "layers.1.mlp",
        "[0, 3, 7]",
        "OUT/reports/parity.json",
        "polygraphy run",
    ):
        assert expected in process.stdout


@pytest.fixture
def culprit_rows(monkeypatch):
    """``dsx compare`` 在「第一个不对的节点」之下印的各行；报告是给好的。"""

    def rows(**fields: object) -> list[tuple[str, str]]:
        block, command = "layers.1.mlp", "polygraphy run OUT/bisect/graph.onnx"
        common = {"graph": "model.onnx", "block": block, "phase": "decode"}
        report = ComparisonReport(
            bundle="OUT",
            checkpoint="CKPT",
            profile="mla",
            target="portable",
            dtype="float32",
            backends=["ort"],
            environment={},
            folder="SAVED",
            commands={"model.onnx": "polygraphy run SAVED/model.onnx"},
            cases=[BlockCase(backend="ort", **common, case=_case(block))],
            culprit=Culprit(**common, checked=14, command=command, **fields),
        )
        monkeypatch.setattr(api, "compare", lambda *_, **__: report)
        process = dsx("compare", "OUT")
        assert process.returncode == 1
        assert f"逐节点  {command}" in process.stdout
        _, _, below = process.stdout.partition("第一个不对的节点")
        lines = below.partition("\n\n")[0].split("\n")[1:]
        return [tuple(re.split(r"\s{2,}", line.strip(), maxsplit=1)) for line in lines]

    return rows


def test_a_culprit_without_a_node_says_so(culprit_rows):
    rows = dict(culprit_rows())
    assert "layers.1.mlp (decode) 里的 14 个值" in rows["比过"]
    assert "每个值单独算都对" in rows["节点"]


def test_a_culprit_in_a_lowered_segment_names_both_ends(culprit_rows):
    case = _case("layers.1/moe_experts (decode)", note="形状是 [1]，应为 [2]")
    nodes = [NodeEntry(name=f"n{i}", op="Mul", inputs=[], attributes={}) for i in range(9)]
    rows = culprit_rows(value="layers.1/moe_experts", nodes=nodes, case=case)
    assert ("节点", "n8（Mul）") in rows
    assert ("同一段", "n0 到 n7，共 8 个节点") in rows
    assert ("说明", "形状是 [1]，应为 [2]") in rows
    assert rows[-1][1].startswith("权重、属性、常量、接线都与捕获时相同")
    rows = culprit_rows(value="y", nodes=nodes[:2], case=case, causes=["甲", "乙"])
    assert ("同一段", "n0（Mul）") in rows
    assert rows[-3:] == [("说明", "形状是 [1]，应为 [2]"), ("原因", "甲"), ("原因", "乙")]


def test_cpu_flags_are_read_and_may_be_absent(tmp_path):
    path = tmp_path / "cpuinfo"
    path.write_text("processor : 0\nflags\t\t: fpu avx2 amx_tile\n")
    assert machine.cpu_flags(path) == {"fpu", "avx2", "amx_tile"}
    assert machine.cpu_flags(tmp_path / "none") is None
    path.write_text("")
    assert machine.cpu_flags(path) is None


def test_doctor_lists_the_flags_of_this_processor(monkeypatch):
    """CPU-25：ARM 上列的是 ARM 的标志；不认识的处理器一个也不列。"""
    monkeypatch.setattr(doctor, "cpu_flags", lambda: {"fp", "asimddp", "bf16"})
    monkeypatch.setattr(doctor.platform, "machine", lambda: "aarch64")
    assert doctor.diagnose()["cpu"]["flags"] == {"asimddp": True, "i8mm": False, "bf16": True}
    process = dsx("doctor")
    assert re.search("核；asimddp 有 +i8mm 无 +bf16 有", process.stdout)
    monkeypatch.setattr(doctor.platform, "machine", lambda: "riscv64")
    assert doctor.diagnose()["cpu"]["flags"] == {}


@pytest.mark.heavy
def test_doctor_reports_missing_and_old_packages(monkeypatch):
    def version(name):
        if name.startswith("tensorrt") or name == "transformers":
            raise metadata.PackageNotFoundError(name)
        return "2.1.0+cpu" if name == "torch" else "99"

    monkeypatch.setattr(metadata, "version", version)
    process = dsx("doctor", "--json")
    assert process.returncode == 1
    found = last_json(process)
    status = {package["name"]: package["status"] for package in found["packages"]}
    assert (status["torch"], status["tensorrt"], status["onnx"]) == ("old", "missing", "ok")
    assert {"polygraphy", "triton", "cuda_bindings"} <= set(status)
    assert not found["ok"]
    assert found["targets"]["portable"] == {"export": ["torch"], "build": None, "run": []}
    process = dsx("doctor")
    assert process.returncode == 1
    assert "太旧" in process.stdout
    assert "deepseek-export[hf]" in process.stdout


def test_doctor_is_content_with_the_runtime_alone(monkeypatch):
    """只装了运行的那一半：退出码 0，说导出缺什么、装哪一组；连 onnxruntime 也没有才是 1。"""
    present = {"onnxruntime", "deepseek-export"}

    def version(name):
        if name not in present:
            raise metadata.PackageNotFoundError(name)
        return "99"

    monkeypatch.setattr(metadata, "version", version)
    process = dsx("doctor")
    assert process.returncode == 0
    assert "能运行；导出缺 torch、onnx、onnxscript、polygraphy" in process.stdout
    assert "deepseek-export[export]" in process.stdout
    assert "缺少" not in process.stdout
    present.clear()
    process = dsx("doctor")
    assert process.returncode == 1
    assert "缺少" in process.stdout


_SMI = """#!/bin/sh
echo "580.65.06, 9.0, 81559, NVIDIA H100 80GB HBM3"
echo "580.65.06, 9.0, 81559, NVIDIA H100 80GB HBM3"
"""


def _path_with(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str | None) -> None:
    """``PATH`` 上只有这一个 ``nvidia-smi``，或者没有。"""
    monkeypatch.setenv("PATH", str(folder))
    if script is not None:
        (folder / "nvidia-smi").write_text(script)
        (folder / "nvidia-smi").chmod(0o755)


@pytest.mark.heavy
def test_doctor_says_how_far_each_target_gets_here(monkeypatch, tmp_path):
    """没有装 TensorRT、没有 GPU：能导出，不说可用；有了就是。"""

    def version(name):
        if name.startswith("tensorrt") and not installed:
            raise metadata.PackageNotFoundError(name)
        return "99"

    installed = False
    monkeypatch.setattr(metadata, "version", version)
    _path_with(tmp_path, monkeypatch, None)
    found = doctor.diagnose()
    assert found["ok"]
    assert found["gpu"] == {"driver": None, "gpus": [], "problem": None}
    assert found["targets"]["ort-cpu"] == {"export": [], "build": None, "run": []}
    assert found["targets"]["tensorrt"] == {
        "export": [],
        "build": ["tensorrt", "GPU"],
        "run": ["tensorrt", "GPU"],
    }
    assert found["targets"]["tensorrt-rtx"]["build"] == ["tensorrt_rtx"]
    text = dsx("doctor").stdout
    assert "没有 NVIDIA 驱动" in text
    assert "能导出；建引擎缺 tensorrt、GPU；运行缺 tensorrt、GPU" in text
    installed = True
    assert doctor.diagnose()["targets"]["tensorrt-rtx"] == {"export": [], "build": [], "run": ["GPU"]}
    _path_with(tmp_path, monkeypatch, _SMI)
    found = doctor.diagnose()
    assert found["targets"]["tensorrt"] == {"export": [], "build": [], "run": []}
    assert found["gpu"]["gpus"][0] == {
        "name": "NVIDIA H100 80GB HBM3",
        "sm": 90,
        "memory_bytes": 81559 << 20,
    }
    text = dsx("doctor").stdout
    assert "2 × NVIDIA H100 80GB HBM3（sm90，79.6 GiB），驱动 580.65.06" in text
    assert "能导出、建引擎、运行" in text


@pytest.mark.parametrize(
    ("script", "problem"),
    [
        ("#!/bin/sh\necho 'driver/library version mismatch'; exit 18", "driver/library version mismatch"),
        ("#!/bin/sh\nexit 9", "退出码是 9"),
        ("#!/bin/sh\necho '580, [N/A], x'", "看不懂"),
        ("#!/no/such/shell", None),
    ],
)
def test_a_driver_that_does_not_answer(monkeypatch, tmp_path, script, problem):
    _path_with(tmp_path, monkeypatch, script)
    found = machine.nvidia()
    assert found.gpus == ()
    assert (found.problem is None) if problem is None else (problem in str(found.problem))


def test_doctor_without_installed_metadata(monkeypatch):
    """没有安装信息就不知道最低版本：只看有没有装。"""

    def nothing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "requires", nothing)
    process = dsx("doctor", "--json")
    assert process.returncode == 0
    assert {package["required"] for package in last_json(process)["packages"]} == {None}


def test_home_moves_the_demo_and_the_caches(monkeypatch, tmp_path):
    monkeypatch.setenv("DSX_HOME", str(tmp_path))
    assert demo.home() == tmp_path
    assert DiskCache("traces").directory == tmp_path / "traces"
    assert doctor.diagnose()["trace_cache"] == str(tmp_path / "traces")
    monkeypatch.delenv("DSX_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert demo.home() == tmp_path / "cache/dsx"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert demo.home() == tmp_path / ".cache/dsx"


def _drain(terminal: int) -> str:
    """伪终端一次只给一小段，读到空为止。"""
    os.set_blocking(terminal, False)
    parts = []
    with contextlib.suppress(BlockingIOError):
        while part := os.read(terminal, 1 << 16):
            parts.append(part)
    return b"".join(parts).decode()


def test_rich_progress_on_a_terminal(monkeypatch, tmp_path):
    """真的伪终端：做完的阶段留下 ✓ 与用时，没做完的标中止。"""
    primary, secondary = os.openpty()
    with os.fdopen(secondary, "w") as terminal:
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        assert isinstance(progress.open_progress(as_json=False), progress.RichProgress)
        with progress.open_progress(as_json=False) as bars:
            bars.start("读检查点")
            bars.start("写权重", 1 << 20)
            bars.advance(1 << 19, "model.norm.weight")
            bars.note("退回 naive")
        with contextlib.suppress(KeyError), progress.open_progress(as_json=False) as interrupted:
            interrupted.start("校验 block", 6)
            interrupted.advance(2)
            raise KeyError
        terminal.flush()
        text = _drain(primary)
    os.close(primary)
    for expected in ("✓", "读检查点", "写权重", "退回 naive", "中止"):
        assert expected in text


def test_long_work_without_a_terminal_says_where_it_is(capsys):
    """每隔几秒一行：做到哪里、正在做什么；阶段里不报进度的也有。"""
    with progress.PlainProgress(every=0.05) as plain:
        plain.start("写权重", 4 << 30, "bytes")
        plain.advance(1 << 30, "model.norm.weight")
        _wait_for(capsys, "写权重：1.00 GiB / 4.00 GiB（model.norm.weight）")
        plain.start("校验 tokens", 7)
        plain.advance(2, "batch 2")
        _wait_for(capsys, "校验 tokens：2 / 7（batch 2）")
        plain.start("加载模型")
        _wait_for(capsys, "加载模型……")
    assert not any(thread.name == "dsx-progress" for thread in threading.enumerate())


def _wait_for(capsys: pytest.CaptureFixture[str], line: str) -> None:
    """等到这一行印出来；不看用了多久。"""
    shown = ""
    for _ in range(3000):
        shown += capsys.readouterr().err
        if line in shown:
            return
        time.sleep(0.01)
    pytest.fail(f"没有印出 {line!r}：{shown}")


def test_plain_and_silent_progress(capsys):
    with progress.PlainProgress() as plain:
        plain.start("写权重", 1 << 20, "bytes")
        plain.advance(1 << 20, "x")
    with progress.open_progress(as_json=True) as silent:
        silent.start("写权重", 1 << 20, "bytes")
        silent.note("退回 naive")
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line.partition("] ")[2] for line in captured.err.splitlines()] == [
        "写权重（1.00 MiB）",
        "完成",
        "",
    ]
    assert captured.err.endswith("注意：退回 naive\n")
