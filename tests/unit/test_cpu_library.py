"""C++ 算子库：逐指令集、逐 dtype 与参考实现相同；不读长度之外的内存；拒绝而不崩溃；找得到、关得掉。"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnxruntime as ort
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import deepseek_export
from deepseek_export.backend.ort.runner import OrtRunner
from deepseek_export.cpu_library import CpuLibrary, find_library, library_for
from deepseek_export.errors import DsxError
from deepseek_export.machine import cpu_flags
from deepseek_export.ops.mla_attention import mla_attention, read_weight
from deepseek_export.parity.measures import measure
from deepseek_export.parity.tolerances import TOLERANCES, coarser
from deepseek_export.runtime import ModelSession
from tests.cpu_build import SOURCES, builder
from tests.integration.cli import dsx
from tools.cpu_node import CACHES, COMPUTES, ODD, SCALE, WIDE, call, make_inputs, make_session

pytestmark = pytest.mark.unit

ISAS = ("plain", "avx2", "avx_vnni", "avx512", "avx512_bf16")
#: (S, H, T, past_lens)：空缓存、长度悬殊的解码（分段合并）、多 token 验证、跨多块的 prefill。
SHAPES = ((1, 4, 8, (0,)), (1, 4, 300, (299, 17)), (5, 4, 40, (0, 1, 35)), (70, 3, 200, (100,)))


@functools.cache
def session_for(library: CpuLibrary, *arguments) -> ort.InferenceSession:
    return make_session(library, *arguments)


def reference(inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    def tensor(array: np.ndarray) -> torch.Tensor:
        if array.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    made = {name: tensor(array) for name, array in inputs.items()}
    made["w_kv_b"] = read_weight(made["w_kv_b"], inputs["c_kv"].shape[-1]).to(made["q_nope"].dtype)
    o, cache = mla_attention(**made, scale=SCALE, form="absorb")
    return o.float().numpy(), cache.float().numpy()


def check(
    library: CpuLibrary,
    isa: str,
    form: str,
    dtype: str,
    cache_dtype: str,
    inputs,
    weight_dtype: str | None = None,
) -> None:
    """结果在容差之内，缓存逐位相同；长度之外填 NaN（int8 填任意字节）、换成不原地，结果一位不变。"""
    session = session_for(library, dtype, cache_dtype, isa, form, 1, weight_dtype)
    rounded = CpuLibrary(library.path, library.isas, isa).factors(cache_dtype)
    got = call(session, inputs)
    assert_attends(got, inputs, rounded)
    assert_same_rows(call(session, poisoned(inputs), in_place=False), got, inputs)


def assert_attends(got: Sequence[np.ndarray], inputs: dict[str, np.ndarray], rounded: str | None) -> None:
    """``o`` 在容差之内，缓存逐位相同；``rounded`` 是乘数舍入成什么。"""
    want, want_cache = reference(inputs)
    weight = "int8" if inputs["w_kv_b"].dtype == np.int8 else None
    limit = TOLERANCES["op", coarser(coarser(inputs["q_nope"].dtype.name, rounded), weight)]
    found = measure(got[0].astype(np.float32), want)
    assert limit.accepts(found), found
    assert np.array_equal(got[1].astype(np.float32), want_cache)


def poisoned(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """``past_lens`` 之后的缓存填 NaN，int8 填任意字节。"""
    cache = inputs["kv_cache"].copy()
    for b, past in enumerate(inputs["past_lens"]):
        rows = cache[b, :, past:]
        rows[...] = (
            np.nan if cache.dtype != np.int8 else np.random.default_rng(1).integers(-128, 128, rows.shape)
        )
    return inputs | {"kv_cache": cache}


def assert_same_rows(again: Sequence[np.ndarray], got: Sequence[np.ndarray], inputs) -> None:
    """``o`` 逐位相同，缓存里有用的行也是。"""
    assert again[0].tobytes() == got[0].tobytes()
    for b, past in enumerate(inputs["past_lens"]):
        end = past + inputs["q_nope"].shape[1]
        assert again[1][b, :, :end].tobytes() == got[1][b, :, :end].tobytes()


@pytest.mark.parametrize("form", ["absorb", "naive"])
@pytest.mark.parametrize("isa", ISAS)
def test_every_isa_and_dtype_matches_the_reference(library, isa: str, form: str):
    """CPU-1、CPU-2：每种计算 dtype 与缓存 dtype 的组合、两种形式、各种形状；每个指令集都强制跑到。"""
    if isa not in library.isas:
        pytest.skip(f"这台机器没有 {isa}")
    for dtype in COMPUTES:
        for cache_dtype in CACHES:
            for S, H, T, past in SHAPES:
                for widths in (ODD, WIDE):
                    inputs = make_inputs(dtype, cache_dtype, S, H, T, past, **widths)
                    check(library, isa, form, dtype, cache_dtype, inputs)


def test_the_integer_instructions_of_client_cores_are_listed(library):
    """CPU-1、CPU-12：处理器有 AVX-VNNI 的，库列得出 ``avx_vnni``，排在 ``avx2`` 前面、AVX-512 后面；没有的不列。"""
    flags = cpu_flags() or set()
    if "avx_vnni" not in library.isas:
        assert "avx_vnni" not in flags, "编译器太旧，没有 -mavxvnni，或检测错了"
        return
    assert "avx_vnni" in flags
    order = [isa for isa in library.isas if isa in ("avx512", "avx_vnni", "avx2")]
    assert order == [isa for isa in ("avx512", "avx_vnni", "avx2") if isa in order]


@st.composite
def cases(draw):
    """任意宽度、头数、token 数、容量，每个序列的长度从 0 到容量用满。"""
    widths = {name: draw(st.integers(1, 70)) for name in ("dn", "dr", "dv", "r")}
    if draw(st.booleans()):
        widths |= {"dr": 32 * draw(st.integers(1, 2)), "r": 32 * draw(st.integers(1, 3))}
    S, H, extra = draw(st.integers(1, 20)), draw(st.integers(1, 9)), draw(st.integers(0, 400))
    past = draw(st.lists(st.integers(0, extra), min_size=1, max_size=3))
    # 只有几个数的输出可能是抵消剩下的零头，bfloat16 的参照自己就差几个末位，相对误差没有意义。
    assume(len(past) * S * H * widths["dv"] >= 16)
    dtypes = draw(st.sampled_from(sorted(COMPUTES))), draw(st.sampled_from(sorted(CACHES)))
    return *dtypes, S, H, S + extra, past, widths, draw(st.sampled_from(["absorb", "naive", "auto"]))


@given(case=cases(), data=st.data())
@settings(max_examples=150, deadline=None)
def test_any_shape(library, case, data):
    """CPU-1、CPU-2：随机形状、长度、dtype（w_kv_b 另可以是 bfloat16）、形式、指令集。"""
    dtype, cache_dtype, S, H, T, past, widths, form = case
    isa = data.draw(st.sampled_from(library.isas))
    weight_dtype = data.draw(st.sampled_from([None, "bfloat16"])) if dtype == "float32" else None
    inputs = make_inputs(dtype, cache_dtype, S, H, T, past, weight_dtype=weight_dtype, **widths)
    check(library, isa, form, dtype, cache_dtype, inputs, weight_dtype)


@pytest.mark.parametrize("form", ["absorb", "naive"])
@pytest.mark.parametrize("isa", ISAS)
def test_int8_weights(library, isa: str, form: str):
    """CPU-16：int8 的 w_kv_b 与还原的同一份权重在容差之内，每种块、每种缓存，一到三行（不展宽）与更多行；r 不是向量长度的倍数、行多得不整段留着也行。"""
    if isa not in library.isas:
        pytest.skip(f"这台机器没有 {isa}")
    for block, r in ((32, 96), (64, 64), (128, 128)):
        for cache_dtype in CACHES:
            given = {**WIDE, "dn": 6, "dv": 5, "r": r, "weight_dtype": "int8", "weight_block": block}
            inputs = make_inputs("float32", cache_dtype, 3, 2, 80, (0, 70), **given)
            check(library, isa, form, "float32", cache_dtype, inputs, "int8")
        for S, past in ((1, (70,)), (1, (0, 70)), (3, (70,))):
            inputs = make_inputs("float32", "bfloat16", S, 2, 80, past, **given)
            check(library, isa, form, "float32", "bfloat16", inputs, "int8")
    long = make_inputs("float32", "bfloat16", 2, 1, 17000, (16990,), **WIDE, weight_dtype="int8")
    check(library, isa, form, "float32", "bfloat16", long, "int8")


@pytest.mark.parametrize("isa", ISAS)
def test_few_rows_read_int8_weights_as_they_multiply(library, isa: str):
    """CPU-16：行少时边读边展宽，行多时先展宽一遍：同一个序列在 1 行与 9 行的 batch 里逐位相同。"""
    if isa not in library.isas:
        pytest.skip(f"这台机器没有 {isa}")
    session = session_for(library, "float32", "bfloat16", isa, "absorb", 1, "int8")
    for block, widths in ((32, {"dn": 21, "dv": 6, "r": 96}), (64, {"dn": 5, "dv": 9, "r": 576})):
        given = {**WIDE, **widths, "weight_dtype": "int8", "weight_block": block}
        many = make_inputs("float32", "bfloat16", 1, 3, 60, (59, *range(8)), **given)
        few = {name: array if name == "w_kv_b" else array[:1] for name, array in many.items()}
        assert call(session, few)[0].tobytes() == call(session, many)[0][:1].tobytes()


@pytest.mark.parametrize("width", [64, 65, 70, 72])
def test_int8_weights_of_another_width_are_refused(library, width: int):
    """CPU-4、CPU-16：int8 的 w_kv_b 的一行是码与 scale，宽度不符就拒绝。"""
    inputs = make_inputs("float32", "float32", 1, 2, 8, (0,), **WIDE, weight_dtype="int8")
    inputs["w_kv_b"] = np.zeros((len(inputs["w_kv_b"]), width), np.int8)
    with pytest.raises(Exception, match=f"w_kv_b 是 .*{width}.*int8 的一行应是 r=64 个码"):
        call(session_for(library, "float32", "float32", "", "", 1, "int8"), inputs)


def test_empty_batch(library):
    """B=0 合法，什么也不做。"""
    inputs = make_inputs("float32", "float32", 2, 3, 8, (), **ODD)
    o, cache = call(session_for(library, "float32", "float32"), inputs)
    assert (o.shape, cache.shape) == ((0, 2, 3, 5), (0, 1, 8, 24))


def test_int8_rows_are_the_same_bytes(library):
    """CPU-1、MLA-7：各种大小的行（零、非规格化、饱和、±inf）写进 int8 缓存，字节与参考实现相同。"""
    inputs = make_inputs("float32", "int8", 400, 1, 400, (0,), **ODD)
    rng = np.random.default_rng(0)
    for name in ("c_kv", "k_pe"):
        inputs[name] *= np.exp2(rng.uniform(-160, 127, (1, 400, 1))).astype(np.float32)
        inputs[name][0, :3] = [[0], [1e-45], [3e38]]
        inputs[name][0, 3:40, 0] = np.exp2(np.arange(-20, 17)) * 127
        inputs[name][0, 40, 0] = -np.inf
    (_, cache), (_, want) = call(session_for(library, "float32", "int8"), inputs), reference(inputs)
    assert np.array_equal(cache.astype(np.float32), want)


def test_long_prefill_in_slabs(library):
    """absorb 一次放不下的行分批处理，与一次 naive 的结果相同。"""
    inputs = make_inputs("float32", "float32", 700, 8, 720, (20,), **ODD)
    absorb, naive = (
        call(session_for(library, "float32", "float32", "", form), inputs)[0] for form in ("absorb", "naive")
    )
    assert TOLERANCES["op", "float32"].accepts(measure(absorb, naive))


@pytest.mark.parametrize("form", ["absorb", "naive"])
def test_result_does_not_depend_on_the_number_of_threads(library, form: str):
    """CPU-3：怎么切只看形状，1 个与 3 个线程的结果逐位相同。"""
    inputs = make_inputs("float32", "bfloat16", 2, 4, 900, (890, 3), **WIDE)
    one, three = (
        call(session_for(library, "float32", "bfloat16", "", form, threads), inputs) for threads in (1, 3)
    )
    assert one[0].tobytes() == three[0].tobytes()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("q_pe", lambda a: a[:, :, :2], "q_pe 是 [2, 3, 2, 4]，应为 [2, 3, 4, 4]"),
        ("c_kv", lambda a: a[:, :2], "c_kv 是 [2, 2, 20]，应为 [2, 3, 20]"),
        ("k_pe", lambda a: a[..., :3], "k_pe 是 [2, 3, 3]，应为 [2, 3, 4]"),
        ("kv_cache", lambda a: a[..., :-1], "kv_cache 是 [2, 1, 16, 23]，应为 [2, 1, 16, 24]"),
        ("kv_cache", lambda a: a[:1], "kv_cache 是 [1, 1, 16, 24]，应为 [2, 1, 16, 24]"),
        ("past_lens", lambda a: a[:1], "past_lens 是 [1]，应为 [2]"),
        ("past_lens", lambda a: a + 9, "past_lens[1] = 14，加 S=3 个新位置放不进容量 T=16"),
        ("past_lens", lambda a: a - 1, "past_lens[0] = -1"),
        ("w_kv_b", lambda a: a[:-1], "w_kv_b 是 [43, 20]，行数应为 H*(dn+dv)"),
        ("w_kv_b", lambda a: a[:24], "w_kv_b 是 [24, 20]，行数应为 H*(dn+dv)"),
        ("w_kv_b", lambda a: a[:, :-1], "w_kv_b 是 [44, 19]，应为 [44, 20]"),
    ],
)
def test_wrong_shapes_are_refused(library, name: str, change, message: str):
    """CPU-4：形状不符、长度越界，说明是哪个输入、应是什么；进程不崩。"""
    inputs = make_inputs("float32", "float32", 3, 4, 16, (0, 5), **ODD)
    inputs[name] = np.ascontiguousarray(change(inputs[name]))
    feeds = {key: ort.OrtValue.ortvalue_from_numpy(value) for key, value in inputs.items()}
    with pytest.raises(Exception, match=re.escape(message)):
        session_for(library, "float32", "float32").run_with_ort_values(None, feeds)


def test_int8_rows_of_another_width_are_refused(library):
    """CPU-4：int8 缓存的宽度由 r 与 dr 决定，不是 r+dr。"""
    inputs = make_inputs("float32", "int8", 1, 2, 8, (0,), **ODD)
    feeds = {key: ort.OrtValue.ortvalue_from_numpy(value) for key, value in inputs.items()}
    feeds["kv_cache"] = ort.OrtValue.ortvalue_from_numpy(inputs["kv_cache"][..., :24].copy())
    with pytest.raises(Exception, match=re.escape("kv_cache 是 [1, 1, 8, 24]，应为 [1, 1, 8, 34]")):
        session_for(library, "float32", "int8").run_with_ort_values(None, feeds)


def test_wrong_dtypes_and_isas_are_refused_when_the_session_is_made(library):
    """CPU-4：没有 kernel 的 dtype、不认识的指令集与形式，建会话时就拒绝。"""
    with pytest.raises(Exception, match="MlaAttention"):
        make_session(library, "float64", "float32")
    with pytest.raises(Exception, match=r"DSX_CPU_ISA=sse9 不可用，这台机器能用：.*plain"):
        make_session(library, "float32", "float32", "sse9")
    with pytest.raises(Exception, match="DSX_CPU_MLA_FORM=fast 不可用"):
        make_session(library, "float32", "float32", "", "fast")


def test_one_bundle_with_and_without_the_library(library, exported, monkeypatch):
    """CPU-5：同一个 ort-cpu bundle，有库走 kernel、没有库走函数体，greedy 输出相同；manifest 记下导出时用的哪个。"""
    bundle = exported("v3-yarn", "mla+moe", "ort-cpu")
    assert bundle.manifest.cpu_library == library.isa
    assert bundle.manifest.fallbacks == []
    rows = [[1, 2, 3], [4]]
    with_library = deepseek_export.load(bundle.path, threads=1).generate(rows, 8).token_ids
    # 只有真的建了 kernel，才会去看指令集：证明库优先于函数体。
    monkeypatch.setenv("DSX_CPU_ISA", "sse9")
    with pytest.raises(DsxError, match="DSX_CPU_ISA=sse9") as caught:
        ModelSession(OrtRunner(bundle.model_path, max_positions=64, library=library))
    assert caught.value.code == "DSX-E507"
    monkeypatch.setenv("DSX_CPU_LIBRARY", "off")
    assert deepseek_export.load(bundle.path, threads=1).generate(rows, 8).token_ids == with_library
    assert library_for("ort-cpu") is None


@pytest.mark.heavy
def test_export_without_the_library_says_so(saved, tmp_path, monkeypatch):
    """CPU-5：没有库时照样导出，图相同，manifest 里有一行说明。"""
    monkeypatch.setenv("DSX_CPU_LIBRARY", "off")
    checkpoint = saved("v3-yarn")[1].path
    bundle = deepseek_export.export(checkpoint, tmp_path / "out", "mla+moe", target="ort-cpu")
    assert bundle.manifest.cpu_library is None
    (line,) = bundle.manifest.fallbacks
    assert "make plugins" in line


@pytest.mark.parametrize("cache_dtype", ["bfloat16", "int8"])
def test_narrow_cache_verifies(library, exported, cache_dtype: str):
    """CPU-1：窄缓存的 bundle 走 kernel，每一级仍在容差之内。"""
    bundle = exported("v3-yarn", "mla+moe", "ort-cpu", "float32", (f"mla.cache_dtype={cache_dtype}",))
    report = deepseek_export.verify(bundle.path, steps=16)
    assert report.passed, report.first_failure


def doctor_line() -> str:
    """``dsx doctor`` 怎么说这台机器的算子库；用不了也不是失败。"""
    process = dsx("doctor")
    assert process.returncode == 0, process.stderr
    (line,) = (line for line in process.stdout.splitlines() if "C++ 算子库" in line)
    return line.partition("C++ 算子库")[2].strip()


def test_library_is_found_refused_and_switched_off(library, tmp_path, monkeypatch):
    """CPU-6：路径不对是 DSX-E520，指令集不对是 DSX-E521；doctor 把原因写在一行里，不算失败。"""
    assert doctor_line().startswith(f"有：{library.isa}")
    assert library_for("portable") is None
    monkeypatch.setenv("DSX_CPU_ISA", "plain")
    assert find_library() == CpuLibrary(library.path, library.isas, "plain")
    monkeypatch.setenv("DSX_CPU_ISA", "sse9")
    with pytest.raises(DsxError) as caught:
        find_library()
    assert (caught.value.code, "plain" in caught.value.todo) == ("DSX-E521", True)
    junk = tmp_path / "libdsx_cpu.so"
    junk.write_bytes(b"not a library")
    monkeypatch.setenv("DSX_CPU_LIBRARY", str(junk))
    with pytest.raises(DsxError) as caught:
        find_library()
    assert caught.value.code == "DSX-E520"
    assert doctor_line().startswith("用不了：DSX-E520")
    monkeypatch.setenv("DSX_CPU_LIBRARY", "off")
    assert find_library() is None
    assert "函数体" in doctor_line()


@pytest.fixture
def small_sources(tmp_path, monkeypatch):
    """一份只有一个文件的源码，用真的 CMake 与编译器构建；返回（构建一次，说了什么）。"""
    sources, include = tmp_path / "sources", tmp_path / "include"
    sources.mkdir()
    include.mkdir()
    (include / builder().HEADER).touch()
    (sources / "one.cc").write_text('extern "C" int one() { return 1; }\n')
    (sources / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.20)\nproject(small LANGUAGES CXX)\n"
        "add_library(dsx_cpu MODULE one.cc)\ninstall(TARGETS dsx_cpu LIBRARY DESTINATION .)\n"
    )
    for name, value in (("SOURCES", sources), ("BUILD", tmp_path / "build"), ("INSTALLED", tmp_path / "out")):
        monkeypatch.setattr(builder(), name, value)
    monkeypatch.setenv("ORT_INCLUDE_DIR", str(include))
    monkeypatch.setenv("DSX_HOME", str(tmp_path / "home"))
    monkeypatch.delenv("DSX_NO_CACHE", raising=False)

    def build() -> tuple[bytes, str]:
        said: list[str] = []
        path = builder().build(say=said.append)
        content = path.read_bytes()
        path.unlink()
        return content, "\n".join(said)

    return build


def test_what_was_compiled_once_is_kept(small_sources, tmp_path, monkeypatch):
    """CPU-36：编译时说到哪个文件；另一次不再编译；坏了的、源码变了的重新编译。"""
    content, said = small_sources()
    assert "one.cc" in said
    again, said = small_sources()
    assert again == content
    assert "one.cc" not in said
    shutil.rmtree(tmp_path / "build")
    (entry,) = (tmp_path / "home/cpu-library").iterdir()
    entry.write_bytes(entry.read_bytes()[:-1] + b"?")
    again, said = small_sources()
    assert again == content
    assert "one.cc" in said
    monkeypatch.setenv("DSX_NO_CACHE", "1")
    (tmp_path / "sources/one.cc").touch()
    assert "one.cc" in small_sources()[1]
    monkeypatch.delenv("DSX_NO_CACHE")
    (tmp_path / "sources/one.cc").write_text('extern "C" int one() { return 2; }\n')
    changed, said = small_sources()
    assert changed != content
    assert "one.cc" in said


def test_build_says_what_is_missing(tmp_path, monkeypatch, capsys):
    """CPU-6：缺头文件、缺 CMake 都说明原因，退出码 0，dsx 照常可用。"""
    monkeypatch.setattr(sys, "argv", ["build.py"])
    monkeypatch.setenv("ORT_INCLUDE_DIR", str(tmp_path))
    if shutil.which("cmake") and shutil.which("c++"):
        assert builder().main() == 0
        assert "libonnxruntime-dev" in capsys.readouterr().out
    monkeypatch.setenv("PATH", str(tmp_path))
    assert builder().main() == 0
    assert "没有 cmake" in capsys.readouterr().out


def test_pinned_headers_are_checked_by_content(tmp_path, monkeypatch, capsys):
    """CPU-20：发布用的头文件按内容核对；给的不是那一版就拒绝，不换成别的；没有也取不到时说明原因，退出码 1。"""
    monkeypatch.setattr(sys, "argv", ["build.py", "--headers"])
    for name in builder().PINNED:
        (tmp_path / name).write_text("// 不是那一版\n", encoding="utf-8")
    monkeypatch.setenv("ORT_INCLUDE_DIR", str(tmp_path))
    assert builder().main() == 1
    assert f"ORT_INCLUDE_DIR={tmp_path} 里不是钉住的" in capsys.readouterr().err
    monkeypatch.delenv("ORT_INCLUDE_DIR")
    monkeypatch.setattr(builder(), "ROOT", tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert builder().main() == 1
    assert "也取不到" in capsys.readouterr().err


@pytest.mark.slow
def test_under_sanitizers(library, tmp_path):
    """CPU-4：AddressSanitizer 与 UBSan 下每个指令集、形式、dtype 各跑一遍，没有越界与未定义行为。"""
    if shutil.which("g++") is None:
        pytest.skip("没有 g++，找不到它的 AddressSanitizer 运行库")
    # ONNX Runtime 抛 C++ 异常，而 python 自己不链接 libstdc++：两个都要先装载。
    preload = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    built = builder().build(directory=tmp_path / "build", out=tmp_path / "out", sanitize="address,undefined")
    environment = os.environ | {
        "LD_PRELOAD": " ".join(map(str.strip, preload)),
        "ASAN_OPTIONS": "detect_leaks=0",
    }
    command = [sys.executable, "-m", "tests.cpu_sanitize", str(built)]
    done = subprocess.run(
        command, env=environment, cwd=SOURCES.parents[1], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout) == (0, "clean\n"), done.stderr[-4000:]
