"""发布用的 wheel：构建，装进全新的环境，跑起来。"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest

import deepseek_export
from deepseek_export.version import __version__
from tests.cpu_build import builder

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).resolve().parents[2]
#: 指令集写错时，只有真的要用库才会拒绝：证明走的是库的 kernel。
NOT_AN_ISA = "sse9"
#: ELF 文件头里 aarch64 的编号。
EM_AARCH64 = 183


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """``make wheel`` 的产物：后缀 → 路径。"""
    if not (shutil.which("cmake") and shutil.which("c++")):
        pytest.skip("没有 cmake 或 C++ 编译器，构建不了 wheel")
    return _packages(tmp_path_factory.mktemp("dist"))


def _packages(out: Path, *arguments: str) -> dict[str, Path]:
    """构建在 ``out`` 里的：后缀 → 路径；没有头文件就跳过。"""
    if not sys.platform.startswith("linux"):
        pytest.skip("manylinux 的 wheel 只能在 Linux 上构建")
    try:
        builder().pinned_header()
    except builder().Unavailable as reason:
        pytest.skip(str(reason))
    command = [sys.executable, "-m", "tools.make_wheel", "--out", str(out), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    paths = [Path(line) for line in done.stdout.splitlines()]
    assert all(path.parent == out for path in paths)
    return {path.suffix: path for path in paths}


@pytest.fixture(scope="module")
def environment(packages: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """全新的环境的 bin/，里面只装了这个 wheel；用完就删，几百 MB 不留给 pytest 的旧目录。"""
    folder = tmp_path_factory.mktemp("clean")
    venv.create(folder, with_pip=True)
    command: list[str | Path] = [folder / "bin/python", "-m", "pip", "install", "--quiet", packages[".whl"]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=_clean())
    assert done.returncode == 0, done.stderr
    yield folder / "bin"
    shutil.rmtree(folder)


def _clean(**variables: str) -> dict[str, str]:
    """不指向检出、不改算子库的环境变量。"""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("PYTHON", "COV", "DSX_")) and name not in ("FORCE_COLOR", "COLUMNS")
    }
    return {**kept, **variables}


def _run(command: list[str | Path], folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=folder, env=_clean(**variables), capture_output=True, text=True, check=False, timeout=300
    )


def test_what_is_inside(packages: dict[str, Path]) -> None:
    """CPU-20：wheel 带库、演示检查点，标签至多 manylinux_2_28；元数据的版本只有一处，没有网址；sdist 带得全源码。"""
    name = packages[".whl"].name
    assert re.fullmatch(rf"deepseek_export-{re.escape(__version__)}-py3-none-.*manylinux_2_28_\w+\.whl", name)
    with zipfile.ZipFile(packages[".whl"]) as wheel:
        names = wheel.namelist()
        (metadata,) = (entry for entry in names if entry.endswith(".dist-info/METADATA"))
        fields = Parser().parsestr(wheel.read(metadata).decode("utf-8"))
    assert {"deepseek_export/_native/libdsx_cpu.so", "deepseek_export/demo_checkpoint/config.json"} <= set(
        names
    )
    assert {entry.split("/")[0].split("-")[0] for entry in names} == {"deepseek_export"}
    assert fields["Version"] == __version__
    assert not {"Home-page", "Project-URL", "Download-URL"} & set(fields)
    with tarfile.open(packages[".gz"]) as sdist:
        inside = {entry.partition("/")[2] for entry in sdist.getnames()}
    assert {
        "plugins/cpu/build.py",
        "plugins/ops.h",
        "hatch_build.py",
        "tests/conftest.py",
        "LICENSE",
    } <= inside


def test_aarch64_is_cross_compiled(tmp_path: Path) -> None:
    """CPU-20、CPU-25：交叉编译的 wheel 标着 aarch64，里面的库是 aarch64 的；没有编译器就失败，不装成纯 Python。"""
    _, compiler, package = builder().TARGETS["aarch64"]
    if shutil.which("cmake") is None or shutil.which(compiler) is None:
        pytest.skip(f"没有 {compiler}：apt-get install {package}")
    wheel = _packages(tmp_path, "--target", "aarch64")[".whl"]
    assert re.fullmatch(
        rf"deepseek_export-{re.escape(__version__)}-py3-none-manylinux_2_2\d_aarch64\.whl", wheel.name
    )
    with zipfile.ZipFile(wheel) as opened:
        (library,) = (name for name in opened.namelist() if name.endswith("libdsx_cpu.so"))
        header = opened.read(library)[:20]
    assert library == "deepseek_export/_native/libdsx_cpu.so"
    assert (header[:4], int.from_bytes(header[18:20], "little")) == (b"\x7fELF", EM_AARCH64)
    command = [sys.executable, "-m", "tools.make_wheel", "--out", str(tmp_path), "--target", "riscv64"]
    refused = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 1
    assert "不会为 riscv64 交叉编译" in refused.stderr


def test_installs_and_runs_without_a_compiler(environment: Path, demo: Path, tmp_path: Path) -> None:
    """CPU-20：全新的环境里导入、doctor、generate；结果与检出里的相同，走的是库的 kernel；没有 torch。"""
    show = "import importlib.util as u, deepseek_export as d; print(d.__version__, u.find_spec('torch'), d.__file__)"
    done = _run([environment / "python", "-c", show], tmp_path)
    assert done.returncode == 0, done.stderr
    version, torch, where = done.stdout.split()
    assert (version, torch) == (__version__, "None")
    assert Path(where).is_relative_to(environment.parent)

    done = _run([environment / "dsx", "doctor"], tmp_path)
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if "C++ 算子库" in line)
    assert line.partition("C++ 算子库")[2].strip().startswith("有：")

    bundle = deepseek_export.export(demo, tmp_path / "out", "mla+moe", target="ort-cpu").path
    generate: list[str | Path] = [environment / "dsx", "generate", bundle, "-P", "春"]
    generate += ["--max-new-tokens", "16"]
    done = _run(generate, tmp_path)
    assert done.returncode == 0, done.stderr
    text = deepseek_export.load(bundle).generate("春", 16).text
    assert text is not None
    assert done.stdout.rstrip("\n") == text[0].rstrip("\n")
    refused = _run(generate, tmp_path, DSX_CPU_ISA=NOT_AN_ISA)
    assert refused.returncode == 1
    assert "\nDSX-E521 " in f"\n{refused.stderr}"
