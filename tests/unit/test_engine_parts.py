"""engine/：发行的选择、符号链接、形状、层的解析、引擎的记录；都不建引擎。"""

from __future__ import annotations

import json
import signal
import threading
from pathlib import Path

import pytest

from deepseek_export.backend.tensorrt.engine import select_profile
from deepseek_export.engine import flavour as flavours
from deepseek_export.engine.flavour import FLAVOURS, ensure_library_link, library_link_missing, parse_arch
from deepseek_export.engine.interrupts import deferred_interrupts
from deepseek_export.engine.layers import (
    EngineLayer,
    copied_caches,
    layer_counts,
    missing_plugins,
    parse_layers,
    unfused_attention,
)
from deepseek_export.engine.record import RECORD_FILE, EngineEntry, EngineRecord
from deepseek_export.engine.shapes import ProfileShapes, span_of
from deepseek_export.errors import DsxError
from deepseek_export.profile import resolve_profile

pytestmark = pytest.mark.unit


def refused(code: str, call, *arguments) -> DsxError:
    with pytest.raises(DsxError) as caught:
        call(*arguments)
    assert caught.value.code == code
    return caught.value


def test_missing_flavour_names_the_install_command(monkeypatch):
    monkeypatch.setattr(flavours.Flavour, "version", lambda self: None)
    error = refused("DSX-E910", flavours.choose, None)
    assert "deepseek-export[rtx]" in error.todo
    assert "deepseek-export[tensorrt]" in error.todo
    assert refused("DSX-E910", flavours.choose, "tensorrt").what == "没有安装 tensorrt"


def test_signals_are_delivered_after_the_callbacks():
    """TRT-14：其间的信号只记下；离开时恢复原来的处理者再交给它，期间的异常让位；原来忽略的仍旧忽略。"""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("信号只到主线程")

    def stop(number, frame):
        raise InterruptedError(number)

    def build():
        with deferred_interrupts() as interrupted:
            signal.raise_signal(signal.SIGINT)
            assert not interrupted()
            signal.raise_signal(signal.SIGTERM)
            assert interrupted()
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "再来一次立即结束"
            raise ValueError("构建被叫停")

    before = signal.signal(signal.SIGTERM, stop), signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with pytest.raises(InterruptedError):
            build()
        assert signal.getsignal(signal.SIGTERM) is stop
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGTERM, before[0])
        signal.signal(signal.SIGINT, before[1])


def test_library_link_is_repaired_once(tmp_path: Path):
    """TRT-5：轮子只带 libtensorrt_rtx.so.1；补上链接，已有则不动，补不上则报码。"""
    refused("DSX-E911", ensure_library_link, tmp_path)
    (tmp_path / "libtensorrt_rtx.so.1").write_bytes(b"")
    assert library_link_missing(tmp_path)
    ensure_library_link(tmp_path)
    ensure_library_link(tmp_path)
    assert (tmp_path / "libtensorrt_rtx.so").readlink() == Path("libtensorrt_rtx.so.1")
    assert not library_link_missing(tmp_path)
    ensure_library_link(None)


@pytest.mark.parametrize(("text", "sm"), [("sm89", 89), ("SM120", 120), (" sm_80 ", 80), ("89", 89)])
def test_arch(text, sm):
    assert parse_arch(text) == sm


@pytest.mark.parametrize("text", ["8", "sm", "1e9", "sm8.9", "ada", ""])
def test_bad_arch(text):
    refused("DSX-E912", parse_arch, text)


def test_profile_shapes():
    """TRT-3：decode 至多 8 个 token，prefill 从 9 个起；absorb 没有 prefill。"""
    shapes = ProfileShapes.parse("B=1:2:4, S=64:256,T=1024", 4096)
    assert (shapes.batch, shapes.prefill, shapes.capacity) == ((1, 2, 4), (64, 256), 1024)
    profiles = shapes.profiles(resolve_profile("mla"), key_span=True)
    assert list(profiles) == ["decode", "prefill"]
    assert profiles["decode"]["S"] == (1, 1, 8)
    assert profiles["prefill"]["S"] == (9, 64, 256)
    assert (profiles["decode"]["P"], profiles["prefill"]["P"]) == ((1, 1, 1), (1, 256, 1024))
    naive = shapes.profiles(resolve_profile("mla", ["mla.form=naive"]), key_span=True)
    assert naive["decode"]["P"] == (1, 256, 1024), "解码也走这条路"
    absorb = shapes.profiles(resolve_profile("mla", ["mla.form=absorb"]), key_span=False)
    assert list(absorb) == ["decode"]
    assert "P" not in absorb["decode"]
    assert not any("P" in dims for dims in shapes.profiles(resolve_profile("baseline"), False).values())
    assert ProfileShapes.parse("", 256) == ProfileShapes(prefill=(128, 256), capacity=256)


def test_the_span_follows_the_length():
    """TRT-15：P 够长，凑整的不到四分之一（很短的不到 64 行），不出范围；几千个长度只有几十种形状。"""
    allowed = (1, 512, 5000)
    spans = [span_of(longest, allowed) for longest in range(1, 5001)]
    assert all(longest <= span < longest * 1.25 + 64 for longest, span in enumerate(spans, 1))
    assert spans == sorted(spans)
    assert spans[-1] == 5000
    assert len(set(spans)) < 30
    assert span_of(5000, (1, 1, 1)) == 1


@pytest.mark.parametrize(
    "text",
    ["B=1", "B=2:1:4", "S=4:8", "S=300:9999", "T=8", "T=9999", "X=1", "B=0:1:1", "B=1:1:65536", "T=64,T=64"],
)
def test_bad_profile_shapes(text):
    refused("DSX-E919", ProfileShapes.parse, text, 4096)


LISTING = """Layers:
Name: a/LatentAttention_U3_myl0_1, LayerType: custom_layer, Inputs: [], Metadata: [ONNX Layer: a/LatentAttention]
Name: b/MatMul+c/MatMul_myl0_2, LayerType: gemm, Inputs: [], Metadata: [ONNX Layer: b/MatMul][ONNX Layer: c/MatMul]
Name: x_myl0_3, LayerType: signal, Inputs: [], Metadata: 
Name: [ShapeHostToDeviceCopy 0] [profile 1], LayerType: ShapeHostToDevice, Inputs: [], Metadata: 
Name: a/LatentAttention [profile 1]_myl3_0, LayerType: custom_layer, Inputs: [], Metadata: [ONNX Layer: a/LatentAttention [profile 1]]
Name: _gemm_mha_v2_myl3_1, LayerType: kgen, Inputs: [], Metadata: [ONNX Layer: a/Attention]

I/O Tensors:
 Name: q, IOMode: Input, DataType: Half
"""  # noqa: W291  末尾的空格是原样的


def test_layers_are_parsed_per_profile():
    plugins = {"a/LatentAttention": "LatentAttention", "d/MoeExperts": "MoeExperts"}
    found = parse_layers(LISTING, ["decode", "prefill"], plugins)
    assert found["decode"] == [
        EngineLayer(
            name="a/LatentAttention", kind="custom_layer", onnx=["a/LatentAttention"], op="LatentAttention"
        ),
        EngineLayer(name="b/MatMul+c/MatMul", kind="gemm", onnx=["b/MatMul", "c/MatMul"]),
    ]
    assert [layer.name for layer in found["prefill"]] == ["a/LatentAttention", "_gemm_mha_v2"]
    assert missing_plugins(found["decode"], plugins) == ["d/MoeExperts"]
    assert layer_counts(found["decode"]) == {"dsx::LatentAttention": 1, "gemm": 1}
    assert unfused_attention(found["prefill"], ["a/Attention", "b/Attention"]) == ["b/Attention"]


def copy_layer(dims: str) -> str:
    return f"Name: c_myl0_4, LayerType: copy, Inputs: [ {{ Name: x, Dimensions: [{dims}], Strides: [1] }}], Metadata: "


def test_copies_are_listed():
    """TRT-3：编译器加的拷贝也是每一步要做的事，记在层里、算进个数。"""
    found = parse_layers(copy_layer("-1,64"), ["decode"], {})
    assert layer_counts(found["decode"]) == {"copy": 1}


@pytest.mark.parametrize(
    ("dims", "copied"),
    [("-1,1,256,80", True), ("-1,256,80", True), ("4,256,80", True), ("256,80", False), ("-1,8,80", False)],
)
def test_a_copied_cache_is_found(dims, copied):
    """TRT-3：拷贝的形状除批之外与缓存的相同，就是把整块缓存抄了一遍；别的拷贝、不是拷贝的层不算。"""
    other = copy_layer("-1,1,256,80").replace("LayerType: copy", "LayerType: kgen")
    text = "\n".join(("Layers:", other, copy_layer(dims)))
    assert copied_caches(text, [(1, 256, 80)]) == (["c_myl0_4"] if copied else [])


def test_plugin_layers_of_tensorrt_10():
    """TensorRT 10 的 inspector 把插件层叫 PluginV3。"""
    line = "Name: a/MoeExperts, LayerType: PluginV3, Inputs: [], Metadata: [ONNX Layer: a/MoeExperts]"
    found = parse_layers(line, ["decode"], {"a/MoeExperts": "MoeExperts"})
    assert layer_counts(found["decode"]) == {"dsx::MoeExperts": 1}


def record() -> EngineRecord:
    entry = EngineEntry(
        graph="model.onnx",
        role="main",
        bytes=3,
        sha256="",
        profiles={},
        layers={},
        fused_attention=0,
        unfused_attention=[],
        seconds=0.0,
    )
    return EngineRecord(
        schema_version=1,
        dsx_version="0",
        flavour="rtx",
        version="1.7",
        sm=89,
        toolkit="12.9",
        bundle_sha256="abc",
        shapes=ProfileShapes(),
        plans={"model.plan": entry},
        peak_rss_bytes=0,
    )


def test_engine_is_refused_where_it_does_not_match(tmp_path: Path):
    """TRT-6：版本、SM、bundle 的哈希、plan 的大小，任何一处不符都拒绝。"""
    (tmp_path / "model.plan").write_bytes(b"abc")
    (tmp_path / RECORD_FILE).write_text(record().model_dump_json())
    read = EngineRecord.read(tmp_path)
    assert read == record()
    assert read.directory == "rtx-sm89"
    read.check(tmp_path, "1.7", 89, "abc")
    for arguments in (("1.8", 89, "abc"), ("1.7", 80, "abc"), ("1.7", None, "abc"), ("1.7", 89, "abd")):
        refused("DSX-E917", read.check, tmp_path, *arguments)
    refused("DSX-E917", read.read_engine, tmp_path / "model.plan")
    (tmp_path / "model.plan").write_bytes(b"ab")
    refused("DSX-E917", read.check, tmp_path, "1.7", 89, "abc")
    (tmp_path / RECORD_FILE).write_text(json.dumps({"schema_version": 2}))
    assert "：schema_version：" in refused("DSX-E917", EngineRecord.read, tmp_path).what
    (tmp_path / RECORD_FILE).write_text("[" * 100_000)
    refused("DSX-E917", EngineRecord.read, tmp_path)
    (tmp_path / RECORD_FILE).unlink()
    refused("DSX-E917", EngineRecord.read, tmp_path)


def test_the_driver_must_be_of_the_toolkit_or_newer(tmp_path: Path):
    """TRT-6：编译 kernel 的 CUDA 与驱动比主版本：同一个主版本之内都行，驱动更新也行。"""
    for driver in ((12, 0), (12, 9), (13, 0)):
        record().check_driver(tmp_path, driver)
    error = refused("DSX-E923", record().check_driver, tmp_path, (11, 8))
    assert "CUDA 12.9" in error.what
    assert "CUDA 11.8" in error.what


def test_full_tensorrt_builds_only_for_the_present_gpu(monkeypatch):
    monkeypatch.setattr(flavours, "device_sm", lambda: None)
    error = refused("DSX-E912", flavours.check_arch, FLAVOURS["tensorrt"], None, 90)
    assert "没有 GPU" in error.what
    monkeypatch.setattr(flavours, "device_sm", lambda: 90)
    flavours.check_arch(FLAVOURS["tensorrt"], None, 90)
    refused("DSX-E912", flavours.check_arch, FLAVOURS["tensorrt"], None, 89)
    refused("DSX-E901", flavours.check_arch, FLAVOURS["tensorrt"], None, 75)


def test_shapes_choose_the_profile():
    """TRT-9：放得下的第一个配置；哪个都放不下就拒绝，列出允许的范围。"""
    entry = (
        record()
        .plans["model.plan"]
        .model_copy(
            update={
                "profiles": {
                    "decode": {"B": (1, 1, 4), "S": (1, 1, 8)},
                    "prefill": {"B": (1, 1, 4), "S": (9, 64, 128)},
                }
            }
        )
    )
    assert select_profile(entry, {"B": 2, "S": 8}) == "decode"
    assert select_profile(entry, {"B": 2, "S": 9}) == "prefill"
    error = refused("DSX-E921", select_profile, entry, {"B": 5, "S": 1})
    assert "B=1..4" in error.what
