"""``examples/`` 里的每一个都真的跑（要 GPU 的只编译），结果与 dsx 自己的相同。"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import onnxruntime
import pytest

import deepseek_export
from tests.cpu_build import builder
from tests.integration.cli import environment

pytestmark = pytest.mark.integration

EXAMPLES = Path(__file__).parents[2] / "examples"
#: 头文件里的警告不归例子管，所以用 -isystem。
COMPILE = ("g++", "-std=c++17", "-Wall", "-Wextra", "-Werror")
IDS = [5, 9, 23, 100]


def run(name: str, *arguments: object, code: int = 0) -> subprocess.CompletedProcess[str]:
    """跑一个 Python 的例子。"""
    command = [sys.executable, str(EXAMPLES / name), *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(), timeout=300, check=False
    )
    assert done.returncode == code, done.stderr
    return done


def test_the_readme_names_every_example():
    """README 的表里，每个文件都有，没有别的。"""
    text = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    named = {line.split("`")[1] for line in text.splitlines() if line.startswith("| `")}
    assert named == {path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".cc")}


@pytest.mark.parametrize("name", ["onnxruntime_decode.py", "polygraphy_session.py"])
def test_plain_examples_do_not_import_dsx(name: str):
    """说了不要 dsx 的，真的不导入。"""
    assert "deepseek_export" not in (EXAMPLES / name).read_text(encoding="utf-8")


def test_plain_onnxruntime_decodes_without_a_warning(demo_bundle):
    """逐 token 与 dsx 相同；缓存原地更新，一条 TensorScatter 的警告也没有。"""
    done = run("onnxruntime_decode.py", demo_bundle, "床前明月光", "--tokens", 24)
    assert "TensorScatter" not in done.stderr
    assert done.stdout == deepseek_export.load(demo_bundle).generate("床前明月光", 24).text[0] + "\n"


@pytest.fixture(scope="module")
def decoder(tmp_path_factory) -> Path:
    """编译好的 ``onnxruntime_decode.cc``，链接 Python 轮子里的 ONNX Runtime。"""
    headers = builder().find_header()
    if shutil.which("g++") is None or headers is None:
        pytest.skip("没有 g++ 或 ONNX Runtime 的头文件，不编译 C++ 的例子")
    installed = Path(onnxruntime.__file__).parent / "capi"
    shared = next(installed.glob("libonnxruntime.so.1*"), None)
    if shared is None:
        pytest.skip(f"{installed} 里没有 libonnxruntime.so，不能链接 C++ 的例子")
    folder = tmp_path_factory.mktemp("decoder")
    library = folder / "libonnxruntime.so.1"
    library.symlink_to(shared)
    binary = folder / "decode"
    source = EXAMPLES / "onnxruntime_decode.cc"
    link = [library, f"-Wl,-rpath,{folder}", "-o", binary]
    subprocess.run([*COMPILE, "-O2", "-isystem", headers, source, *link], check=True)
    return binary


@pytest.mark.parametrize("dtype", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_cpp_decodes_the_same_tokens(decoder: Path, demo: Path, library, tmp_path: Path, dtype: str):
    """C++ 的循环逐 token 与 dsx 相同，走函数体、走算子库都是；没有 TensorScatter 的警告。"""
    bundle = deepseek_export.export(demo, tmp_path / "out", "mla+moe", target="ort-cpu", dtype=dtype)
    want = deepseek_export.load(bundle.path).generate([IDS], 24, ignore_eos=True).token_ids[0]
    command = [decoder, bundle.path / "model.onnx", "24", ",".join(map(str, IDS))]
    done = subprocess.run([*command, library.path], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == ",".join(map(str, want)) + "\n"
    refused = subprocess.run(
        [*command, library.path], env={**os.environ, "DSX_CPU_ISA": "sse9"}, capture_output=True, check=False
    )
    assert refused.returncode == 1  # 只有真的建了 kernel，才会去看指令集
    if dtype == "float32":  # float16 的末位随 kernel 变，greedy 可以不同
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.stdout == ",".join(map(str, want)) + "\n"


def test_cpp_says_what_is_wrong(decoder: Path, tmp_path: Path):
    """参数不够是用法，退出码 2；图不在是一行原因，退出码 1。"""
    done = subprocess.run([decoder], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.startswith("用法：")) == (2, True)
    command = [decoder, tmp_path / "none.onnx", "1", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "none.onnx" in done.stderr


def test_tensorrt_program_compiles(tmp_path: Path):
    """有头文件就编译；跑它要 GPU，见 examples/README.md。"""
    root, triton = os.environ.get("TENSORRT_ROOT"), importlib.util.find_spec("triton")
    if not root:
        pytest.skip("没有设 TENSORRT_ROOT（含 NvInfer.h 的目录），不编译 TensorRT 的例子")
    if shutil.which("g++") is None or triton is None:
        pytest.skip("没有 g++，或没有 triton 带的 cuda.h，不编译 TensorRT 的例子")
    headers = [
        next(Path(root).rglob("NvInfer.h")).parent,
        Path(triton.origin).parent / "backends/nvidia/include",
    ]
    include = [part for folder in headers for part in ("-isystem", folder)]
    command = [*COMPILE, *include, "-O2", "-c", EXAMPLES / "tensorrt_decode.cc", "-o", tmp_path / "decode.o"]
    subprocess.run(command, check=True)


def test_polygraphy_compares_two_bundles(demo: Path, demo_bundle: Path, tmp_path: Path):
    """换一个方案，两张图一致，返回 0；容差收到零，返回 1，点名输出。"""
    other = deepseek_export.export(demo, tmp_path / "baseline", "baseline").path
    golden = tmp_path / "golden.json"
    run("polygraphy_session.py", demo_bundle, "--save", golden)
    assert "All outputs matched" in run("polygraphy_session.py", other, "--against", golden).stdout
    done = run("polygraphy_session.py", other, "--against", golden, "--atol", 0, code=1)
    assert "FAILED | Output: 'logits'" in done.stdout + done.stderr


def test_pipeline_writes_what_generate_writes(demo_bundle: Path):
    """transformers 的 pipeline 与 dsx 自己的 greedy 相同；beam search 也跑得通。"""
    want = deepseek_export.load(demo_bundle).generate("And God said", 16).text[0]
    done = run("transformers_pipeline.py", demo_bundle, "And God said", "--tokens", 16)
    assert done.stdout == want + "\n"
    assert run("transformers_pipeline.py", demo_bundle, "And God said", "--tokens", 8, "--beams", 3).stdout


def test_two_profiles_side_by_side(demo: Path, tmp_path: Path):
    """导出两份，输出相同才测；表印出来，报告里两个都在。"""
    done = run("ab_profiles.py", demo, tmp_path, "--context", 128, "--runs", 1)
    assert "b：mla+moe，缓存每个 token 1280 字节" in done.stdout
    assert "比值（小于 1 是前者快）" in done.stdout
    report = json.loads((tmp_path / "b/reports/bench.json").read_text(encoding="utf-8"))
    assert {subject["profile"] for subject in report["subjects"].values()} == {"baseline", "mla+moe"}
