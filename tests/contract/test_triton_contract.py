"""specs/serving 的 SERVE-56：Triton Inference Server 的模型仓库。"""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

import deepseek_export
from deepseek_export import api
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.engine.record import EngineEntry, EngineRecord
from deepseek_export.engine.shapes import ProfileShapes
from deepseek_export.errors import DsxError
from tests.triton_server import Sequence, read_config, type_name

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

PROMPT = "And it came to pass"
#: ONNX 的 elem_type → Triton 的。
TYPES = {
    onnx.TensorProto.FLOAT: "TYPE_FP32",
    onnx.TensorProto.FLOAT16: "TYPE_FP16",
    onnx.TensorProto.INT64: "TYPE_INT64",
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    """打包的 mla+moe。"""
    return deepseek_export.export(
        CHECKPOINT, tmp_path_factory.mktemp("triton") / "OUT", "mla+moe", target="ort-cpu"
    ).path


@pytest.fixture(scope="module")
def naive(tmp_path_factory) -> Path:
    """逐头缓存、带草稿的 float16：另一种缓存，图里多几个输入输出。"""
    out = tmp_path_factory.mktemp("triton-mtp") / "OUT"
    return deepseek_export.export(CHECKPOINT, out, "moe+mtp", dtype="float16").path


@pytest.mark.parametrize("which", ["bundle", "naive"])
def test_the_config_names_what_the_graph_has(which: str, request, tmp_path: Path):
    """SERVE-56：每个输入输出恰在一处，dtype 与形状对得上；缓存不在客户端收发的里面。"""
    source: Path = request.getfixturevalue(which)
    model = api.pack_triton(source, tmp_path / "repository", "demo", context=512, slots=3)
    config = read_config(model.path)
    assert (config.name, model.path.name) == ("demo", "demo")
    assert config.platform == "onnxruntime_onnx"
    assert config.max_batch_size == 1
    assert config.sequence_batching.oldest.max_candidate_sequences == 3
    graph = onnx.load(model.path / "1" / config.default_model_filename, load_external_data=False).graph
    states = config.sequence_batching.state
    for ports, listed, names in (
        (graph.input, config.input, [state.input_name for state in states]),
        (graph.output, config.output, [state.output_name for state in states]),
    ):
        assert [port.name for port in ports] == [*(port.name for port in listed), *names]
        types = {port.name: port.type.tensor_type for port in ports}
        for port in listed:
            shape = types[port.name].shape.dim
            dims = list(port.reshape.shape if port.HasField("reshape") else port.dims)
            assert dims == [dim.dim_value or -1 for dim in shape][1:]
            assert type_name(port.data_type) == TYPES[types[port.name].elem_type]
        for name, state in zip(names, states, strict=True):
            shape = types[name].shape.dim
            assert list(state.dims) == [dim.dim_value or 512 for dim in shape][1:]
            assert list(state.initial_state[0].dims) == list(state.dims)
            assert state.initial_state[0].zero_data
            assert type_name(state.data_type) == TYPES[types[name].elem_type]
    assert states
    assert model.cache_bytes == 512 * deepseek_export.load(source).manifest.cache.bytes_per_token


def test_stepping_as_the_config_says_equals_the_generator(bundle: Path, tmp_path: Path):
    """SERVE-56：只用 ONNX Runtime 与 config.pbtxt，prefill 一次、以后一个一个，token 与生成器相同。"""
    loaded = deepseek_export.load(bundle, threads=1)
    prompt = loaded.encode(PROMPT)
    want = loaded.generate([prompt], max_new_tokens=24, ignore_eos=True).token_ids[0]
    sequence = Sequence(api.pack_triton(bundle, tmp_path / "repository").path)
    got, new, past = list[int](), prompt, 0
    while len(got) < len(want):
        answer = sequence.step(
            input_ids=np.array([new], np.int64),
            past_lens=np.array([past], np.int64),
            logits_positions=np.array([[len(new) - 1]], np.int64),
        )
        past += len(new)
        new = [int(answer["logits"][0, 0].argmax())]
        got += new
    assert got == want


def test_what_triton_does_not_do_is_in_the_file(bundle: Path, tmp_path: Path):
    """SERVE-56：容量也写明；没有给就是 4096 与模型长度里小的那个。"""
    model = api.pack_triton(bundle, tmp_path / "repository")
    text = (model.path / "config.pbtxt").read_text(encoding="utf-8")
    assert "Triton 不做的" in text
    assert f"不超过 {model.context}" in text
    assert model.context == 2048
    assert model.path.name == "OUT"


def test_refusals_leave_nothing(bundle: Path, tmp_path: Path):
    """SERVE-56：写不成的按码拒绝，仓库里没有半个模型。"""
    repository = tmp_path / "repository"
    for options, code in (
        ({"name": "a/b"}, "DSX-E734"),
        ({"name": ""}, "DSX-E734"),
        ({"name": 'a"'}, "DSX-E734"),
        ({"context": 4096}, "DSX-E734"),
        ({"engine": "tensorrt-sm89"}, "DSX-E734"),
    ):
        with pytest.raises(DsxError, match=code):
            api.pack_triton(bundle, repository, **options)
    referenced = api.export(CHECKPOINT, tmp_path / "REF", "mla+moe", weights="reference", target="ort-cpu")
    with pytest.raises(DsxError, match="DSX-E734"):
        api.pack_triton(referenced.path, repository)
    assert not repository.exists()
    api.pack_triton(bundle, repository)
    with pytest.raises(DsxError, match="DSX-E401"):
        api.pack_triton(bundle, repository)
    api.pack_triton(bundle, repository, overwrite=True, context=64)
    assert sorted(path.name for path in repository.iterdir()) == ["OUT"]


def with_engine(bundle: Path, folder: Path, flavour: str) -> Path:
    """带着一个引擎目录的副本；引擎的内容不要紧，Triton 才打开它。"""
    out = folder / "OUT"
    shutil.copytree(bundle, out)
    directory = out / "engines" / f"{flavour}-sm89"
    directory.mkdir(parents=True)
    (directory / "model.plan").write_bytes(b"plan")
    entry = EngineEntry(
        graph="model.onnx",
        role="main",
        bytes=4,
        sha256="0" * 64,
        profiles={"decode": {"P": (1, 1, 1)}, "prefill": {"P": (1, 512, 1024)}},
        layers={},
        fused_attention=0,
        unfused_attention=[],
        seconds=0,
        best=True,
    )
    record = EngineRecord(
        schema_version=1,
        dsx_version="0.1.0",
        flavour=flavour,  # type: ignore[arg-type]
        version="11",
        sm=89,
        toolkit="13.0",
        bundle_sha256="0" * 64,
        shapes=ProfileShapes(capacity=1024),
        plans={"model.plan": entry},
        peak_rss_bytes=0,
    )
    (directory / "engine.json").write_text(record.model_dump_json(), encoding="utf-8")
    return out


def test_an_engine_instead_of_onnx(bundle: Path, tmp_path: Path):
    """SERVE-56：容量由引擎定，缓存原地更新，优化配置都列上；TensorRT-RTX 的 Triton 跑不了。"""
    out = with_engine(bundle, tmp_path, "tensorrt")
    model = api.pack_triton(out, tmp_path / "repository", engine="tensorrt-sm89")
    config = read_config(model.path)
    assert config.platform == "tensorrt_plan"
    assert sorted(path.name for path in (model.path / "1").iterdir()) == [config.default_model_filename]
    assert list(config.instance_group[0].profile) == ["0", "1"]
    (span,) = (port for port in config.input if port.name == "key_span")
    assert (type_name(span.data_type), list(span.dims)) == ("TYPE_INT8", [-1])
    assert "key_span" in (model.path / "config.pbtxt").read_text(encoding="utf-8").partition("name:")[0]
    added = {port.name: type_name(port.data_type) for port in config.output if port.name.startswith("best_")}
    assert added == {"best_id": "TYPE_INT64", "best_logit": "TYPE_FP32"}
    states = config.sequence_batching.state
    assert all(state.use_same_buffer_for_input_output and state.dims[1] == 1024 for state in states)
    with pytest.raises(DsxError, match="DSX-E734"):
        api.pack_triton(out, tmp_path / "repository", "x", engine="tensorrt-sm89", context=512)
    rtx = with_engine(bundle, tmp_path / "rtx", "rtx")
    with pytest.raises(DsxError, match="DSX-E734"):
        api.pack_triton(rtx, tmp_path / "repository", "x", engine="rtx-sm89")
