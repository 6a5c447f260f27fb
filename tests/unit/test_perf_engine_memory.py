"""perf/workload/engine_memory：大块内存真的在文件里；随机的权重各不相同；几个字节数怎样加起来。"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from deepseek_export.capture import capture_model
from deepseek_export.checkpoint import parse_model_config
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.passes import lower
from deepseek_export.profile import resolve_profile
from perf.suites import engine_memory as suite
from perf.workload import engine_memory
from perf.workload.workspace import workspace
from tools.make_engine_graphs import WIDE

pytestmark = pytest.mark.unit

BLOCKS = """
import ctypes
from pathlib import Path

libc = ctypes.CDLL(None)
for name in ("malloc", "calloc", "realloc", "memalign"):
    getattr(libc, name).restype = ctypes.c_void_p
libc.malloc.argtypes = [ctypes.c_size_t]
libc.calloc.argtypes = libc.memalign.argtypes = [ctypes.c_size_t, ctypes.c_size_t]
libc.realloc.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
BIG = 9 << 20


def in_file(at):
    return any(
        "deleted" in line and int(line.split("-")[0], 16) == at for line in Path("/proc/self/maps").open()
    )


for small in (24, 1000, 7 << 20):
    at = libc.malloc(small)
    assert not in_file(at)
    ctypes.memset(at, 7, small)
    grown = libc.realloc(at, BIG)
    assert in_file(grown)
    assert ctypes.string_at(grown, small) == b"\\7" * small
    again = libc.realloc(grown, small)
    assert not in_file(grown)
    assert ctypes.string_at(again, small) == b"\\7" * small
    libc.free(again)
zeros, aligned = libc.calloc(BIG, 1), libc.memalign(64, BIG)
assert in_file(zeros) and in_file(aligned)
assert ctypes.string_at(zeros, BIG) == bytes(BIG)
libc.free(zeros)
libc.free(aligned)
assert not in_file(zeros)
assert libc.malloc(1 << 60) is None
print("ok")
"""


@pytest.mark.skipif(shutil.which("gcc") is None, reason="没有 gcc")
def test_large_blocks_live_in_files(tmp_path: Path):
    """TRT-18：8 MiB 起的内存在文件里，变大变小内容都在，放手就没有；放不下是分配失败；文件没有名字，不留下。"""
    library = engine_memory.blocks_library(tmp_path)
    (blocks := tmp_path / "blocks").mkdir()
    environment = {**os.environ, "LD_PRELOAD": str(library), "DSX_BLOCKS": str(blocks)}
    command = [sys.executable, "-c", BLOCKS]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr
    assert list(blocks.iterdir()) == []


def test_random_weights_differ_and_are_as_large_as_the_real_ones():
    """TRT-18：每个权重的字节数同配方的，两两不同，浮点的都有限，不论几层只占一池。"""
    config, profile = parse_model_config(WIDE, "WIDE"), resolve_profile("mla+moe")
    captured = capture_model(config, profile, "bfloat16")
    lowered = lower(
        captured,
        config=config,
        profile=profile,
        dtype="bfloat16",
        target="tensorrt-rtx",
        quantization=Quantization(kind="int8"),
    )
    made = engine_memory.weights_like(lowered.weights)
    assert {name: array.nbytes for name, array in made.items()} == {
        name: recipe.nbytes for name, recipe in lowered.weights.items()
    }
    assert len({array.tobytes() for array in made.values()}) == len(made)
    for name, recipe in lowered.weights.items():
        if recipe.dtype == "bfloat16":
            bits = made[name].view(np.uint16)
            assert ((bits & 0x7F80) != 0x7F80).all(), name


def test_the_sum_is_weights_intermediates_and_caches(monkeypatch: pytest.MonkeyPatch):
    """TRT-18：三者之和对 24 GB；中间值取两个配置里大的。"""
    found = {
        "weights": 18_000_000_000,
        "workspace": {"decode": 1_000_000_000, "prefill": 2_000_000_000},
        "caches": 1_000_000_000,
        "plan_bytes": 5,
        "given": 4,
        "shapes": {},
        "engine_layers": {},
    }
    asked = []

    def call(function, environment, **arguments):
        assert {"DSX_BLOCKS", "LD_PRELOAD"} <= environment.keys()
        asked.append(arguments["layers"])
        return found

    monkeypatch.setattr(suite.isolate, "call", call)
    monkeypatch.setattr(suite.engine_memory, "blocks_library", lambda folder: folder / "x.so")
    monkeypatch.setattr(suite.FLAVOURS["rtx"].__class__, "version", lambda self: "1.7")
    with workspace() as folder:
        result = suite.run(folder, quick=False, threads=1)
    assert asked == [3, 27]
    (ratio,) = {case.ratios["显存/24 GB"].median for case in result.cases}
    assert ratio == pytest.approx(21 / 24)
    monkeypatch.setattr(suite.FLAVOURS["rtx"].__class__, "version", lambda self: None)
    with workspace() as folder, pytest.raises(ImportError, match="tensorrt_rtx"):
        suite.run(folder, quick=True, threads=1)
