"""EXPORT-26：坏的、被截断的、故意做坏的检查点要么按码拒绝，要么读出来的与文件头说的一致，绝不抛别的异常。"""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

from deepseek_export.checkpoint import Checkpoint, TensorStore, expected_tensors, stop_token_ids
from deepseek_export.checkpoint.store import INDEX_NAME
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.dtypes import BY_SAFETENSORS
from deepseek_export.errors import DsxError
from tests.models import build_model, save_checkpoint
from tests.odd_files import KINDS, make_odd
from tests.unit.test_checkpoint import TINY
from tests.unit.test_fp8 import FP8

pytestmark = pytest.mark.unit

fuzz = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200, deadline=None)

SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
JSON = st.recursive(
    SCALARS, lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3)
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory) -> Path:
    """FP8 检查点，三个分片；只读。"""
    return write_checkpoint(tmp_path_factory.mktemp("good"), FP8, mtp=True, shards=3)


def copied(checkpoint: Path, out: Path) -> Path:
    """可以弄坏的副本；``out`` 里原来的先清掉。"""
    shutil.rmtree(out, ignore_errors=True)
    return shutil.copytree(checkpoint, out)


def refused(code: str, path: Path) -> DsxError:
    with pytest.raises(DsxError) as err:
        Checkpoint.open(path)
    assert err.value.code == code, err.value
    return err.value


def open_or_refuse(path: Path) -> None:
    """打得开就必须处处自洽；打不开就必须是带码的错误。"""
    with contextlib.suppress(DsxError):
        opened = Checkpoint.open(path)
        store = opened.store
        assert set(expected_tensors(opened.config)) <= set(store)
        for name in store:
            spec = store[name]
            assert spec.nbytes == math.prod(spec.shape) * BY_SAFETENSORS[spec.dtype].numpy.itemsize
            assert 8 <= spec.offset <= spec.offset + spec.nbytes <= spec.file.stat().st_size
            assert spec.file.parent == path


@fuzz
@given(data=st.data())
def test_interrupted_download(checkpoint: Path, tmp_path: Path, data):
    """任何一个分片断在任何地方：DSX-E110，点名那个文件。"""
    path = copied(checkpoint, tmp_path / "x")
    shard = data.draw(st.sampled_from(sorted(path.glob("*.safetensors"))))
    shard.write_bytes(shard.read_bytes()[: data.draw(st.integers(0, shard.stat().st_size - 1))])
    assert shard.name in refused("DSX-E110", path).what


def test_missing_shard(checkpoint: Path, tmp_path: Path):
    path = copied(checkpoint, tmp_path / "x")
    shard = sorted(path.glob("*.safetensors"))[1]
    shard.unlink()
    assert shard.name in refused("DSX-E118", path).what


def test_shards_of_two_versions(checkpoint: Path, tmp_path: Path):
    """分片拿错了版本：索引对不上。"""
    path = copied(checkpoint, tmp_path / "x")
    first, second, _ = sorted(path.glob("*.safetensors"))
    shutil.copyfile(first, second)
    assert refused("DSX-E110", path).what.count(".safetensors") >= 2


@fuzz
@given(data=st.data())
def test_any_byte_of_any_header(checkpoint: Path, tmp_path: Path, data):
    """文件头里任何一个字节翻掉。"""
    path = copied(checkpoint, tmp_path / "x")
    shard = data.draw(st.sampled_from(sorted(path.glob("*.safetensors"))))
    raw = bytearray(shard.read_bytes())
    raw[data.draw(st.integers(0, 7 + struct.unpack("<Q", raw[:8])[0]))] ^= data.draw(st.integers(1, 255))
    shard.write_bytes(raw)
    open_or_refuse(path)


@fuzz
@given(data=st.data())
def test_any_change_to_a_header_entry(checkpoint: Path, tmp_path: Path, data):
    """语法合法的文件头：换 dtype、形状、偏移，调换两个张量，改名，重叠，指到文件外。"""
    path = copied(checkpoint, tmp_path / "x")
    shard = data.draw(st.sampled_from(sorted(path.glob("*.safetensors"))))
    raw = shard.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = json.loads(raw[8 : 8 + length])
    names = sorted(header.keys() - {"__metadata__"})
    name, other = data.draw(st.sampled_from(names)), data.draw(st.sampled_from(names))
    size = st.integers(-1, 1 << 70) | st.integers(0, len(raw))
    change: Any = data.draw(
        st.one_of(
            st.builds(lambda dtype: ("dtype", dtype), st.sampled_from(sorted(BY_SAFETENSORS)) | JSON),
            st.builds(lambda shape: ("shape", shape), st.lists(size, max_size=3) | JSON),
            st.builds(
                lambda offsets: ("data_offsets", offsets), st.lists(size, min_size=2, max_size=2) | JSON
            ),
            st.builds(lambda value: ("entry", value), JSON),
            st.builds(lambda new: ("rename", new), st.text(max_size=5) | st.just("../../etc/passwd")),
            st.just(("swap", None)),
        )
    )
    key, value = change
    if key == "entry":
        header[name] = value
    elif key == "rename":
        header[value] = header.pop(name)
    elif key == "swap":
        header[name], header[other] = header[other], header[name]
    else:
        header[name][key] = value
    text = json.dumps(header).encode()
    shard.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    open_or_refuse(path)


@fuzz
@given(value=st.dictionaries(st.text(max_size=8), JSON, max_size=3) | JSON, nested=st.booleans())
@example(value={"a": "../../../etc/passwd.safetensors"}, nested=True)
@example(value={"a": "x" * 300 + ".safetensors"}, nested=True)
@example(value={"a": "\ud800.safetensors"}, nested=True)
@example(value={"a": "..safetensors"}, nested=True)
@example(value={"a": "config.json"}, nested=True)
def test_any_index(checkpoint: Path, tmp_path: Path, value: Any, nested: bool):
    """索引是任意 JSON：DSX-E118；分片名绝不会离开检查点目录。"""
    path = copied(checkpoint, tmp_path / "x")
    index = {"metadata": {}, "weight_map": value} if nested else value
    (path / INDEX_NAME).write_text(json.dumps(index))
    refused("DSX-E118", path)


@pytest.mark.parametrize(
    "name",
    ["../a.safetensors", "/a.safetensors", "b/../../a.safetensors", "b\\a.safetensors", "a\0.safetensors"],
)
def test_escaping_shard_names(checkpoint: Path, tmp_path: Path, name: str):
    """目录外真有那个文件，也不读。"""
    path = copied(checkpoint, tmp_path / "x")
    shutil.copyfile(next(path.glob("*.safetensors")), tmp_path / "a.safetensors")
    (path / INDEX_NAME).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    assert "同目录" in refused("DSX-E118", path).what


@fuzz
@given(data=st.data())
def test_any_edit_to_config_bytes(checkpoint: Path, tmp_path: Path, data):
    """config.json 的字节：删一段、插一段、翻一个。"""
    path = copied(checkpoint, tmp_path / "x")
    raw = (path / "config.json").read_bytes()
    start = data.draw(st.integers(0, len(raw)))
    stop = data.draw(st.integers(start, min(start + 40, len(raw))))
    inserted = data.draw(
        st.binary(max_size=8) | st.sampled_from([b"null", b"-1", b"1e999", b"NaN", b'""', b"[]"])
    )
    (path / "config.json").write_bytes(raw[:start] + inserted + raw[stop:])
    open_or_refuse(path)


@fuzz
@given(data=st.data())
def test_any_value_anywhere_in_config(checkpoint: Path, tmp_path: Path, data):
    """config.json 里任何一个键（含 rope_scaling、quantization_config 里面的）换成任意 JSON，或多一个键。"""
    path = copied(checkpoint, tmp_path / "x")
    config = json.loads((path / "config.json").read_text())
    tables = [config, config["rope_scaling"], config["quantization_config"]]
    table = data.draw(st.sampled_from(tables))
    table[data.draw(st.sampled_from(sorted(table)) | st.text(max_size=6))] = data.draw(JSON)
    (path / "config.json").write_text(json.dumps(config))
    open_or_refuse(path)


@fuzz
@given(header=JSON | st.dictionaries(st.text(max_size=4), JSON, max_size=3), tail=st.binary(max_size=16))
def test_any_header(tmp_path: Path, header: Any, tail: bytes):
    """单个文件：文件头是任意 JSON，后面跟任意字节。"""
    text = json.dumps(header).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + tail)
    with contextlib.suppress(DsxError):
        TensorStore.open(tmp_path)


@fuzz
@given(raw=st.binary(max_size=64))
def test_any_bytes(tmp_path: Path, raw: bytes):
    (tmp_path / "model.safetensors").write_bytes(raw)
    with contextlib.suppress(DsxError):
        TensorStore.open(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_only_regular_files(checkpoint: Path, tmp_path: Path, kind: str):
    """每个文件换成目录、管道、设备、断了的链接、大得离谱的：按码拒绝，不等、不读。"""
    shards = sorted(path.name for path in checkpoint.glob("*.safetensors"))
    for name in ("config.json", INDEX_NAME, shards[1]):
        path = copied(checkpoint, tmp_path / "x")
        make_odd(path / name, kind)
        with pytest.raises(DsxError) as err:
            Checkpoint.open(path)
        assert err.value.code in ("DSX-E101", "DSX-E102", "DSX-E110", "DSX-E118")
    path = copied(checkpoint, tmp_path / "x")
    make_odd(path / "generation_config.json", kind)
    with pytest.raises(DsxError, match="generation_config") as err:
        stop_token_ids(path, Checkpoint.open(path).config)
    assert err.value.code == "DSX-E121"


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-8-sig"])
def test_a_header_is_utf8(tmp_path: Path, encoding: str):
    """Python 的 json 猜得出 UTF-16、UTF-32，safetensors 不认，我们也不认。"""
    text = '{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'.encode(encoding)
    assert "UTF-8" in header_refused(tmp_path, text).what


@pytest.mark.parametrize("metadata", ['{"a":1}', '{"a":null}', '{"a":{}}', "[]", '"a"', '{"a":"\\ud800"}'])
def test_metadata_is_text_to_text(tmp_path: Path, metadata: str):
    text = f'{{"__metadata__":{metadata},"a":{{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}}}'
    header_refused(tmp_path, text.encode())


def header_refused(folder: Path, header: bytes) -> DsxError:
    """dsx 与 safetensors 都不收这个文件头。"""
    path = folder / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + b"\0\0\0\0")
    with pytest.raises(SafetensorError):
        safe_open(path, "np")
    with pytest.raises(DsxError) as err:
        TensorStore.open(folder)
    assert err.value.code == "DSX-E110"
    return err.value


@fuzz
@given(data=st.data())
def test_what_dsx_accepts_safetensors_accepts(tmp_path: Path, data):
    """任意近似合法的文件头：dsx 收下的，safetensors 也收，张量与形状都相同。"""
    size = st.integers(0, 3) | st.sampled_from([-1, 1.0, True, None, "1"])
    entry = st.fixed_dictionaries(
        {
            "dtype": st.sampled_from(["F32", "U8", "BF16", "F4", 1]),
            "shape": st.lists(size, max_size=3),
            "data_offsets": st.lists(st.sampled_from([0, 0, 1, 2, 4, 8, 12]), min_size=2, max_size=2),
        }
    )
    header = data.draw(st.dictionaries(st.sampled_from(["a", "b", "é", "\ud800"]), entry, max_size=2))
    metadata = data.draw(st.dictionaries(st.text(max_size=2), st.text(max_size=2) | JSON, max_size=2) | JSON)
    if data.draw(st.booleans()):
        header["__metadata__"] = metadata
    text = json.dumps(header, ensure_ascii=data.draw(st.booleans())).encode("utf-8", "surrogatepass")
    tail = bytes(data.draw(st.sampled_from([0, 4, 8, 12])))
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + tail)
    with contextlib.suppress(DsxError):
        store = TensorStore.open(tmp_path)
        with safe_open(tmp_path / "model.safetensors", "np") as file:
            assert sorted(file.keys()) == list(store.names)
            assert all(tuple(file.get_slice(n).get_shape()) == store[n].shape for n in store)


@pytest.mark.parametrize("family", ["v2-greedy", "v3"])
def test_transformers_own_empty_shared_experts(tmp_path: Path, family: str):
    """``n_shared_experts`` 为 0 时 transformers 照样存下宽度为 0 的共享专家：收下；多一个数、多一层都不收。"""
    path = save_checkpoint(build_model(family, n_shared_experts=0), tmp_path / "x")
    opened = Checkpoint.open(path)
    prefix = "model.layers.1.mlp.shared_experts."
    assert opened.store[prefix + "up_proj.weight"].shape[0] == 0
    assert {prefix + f"{name}_proj.weight" for name in ("gate", "up", "down")} <= set(opened.ignored)
    tensors = load_file(path / "model.safetensors")
    wrong = [
        ({prefix + "up_proj.weight": np.zeros((1, opened.config.hidden_size), np.float32)}, "DSX-E113"),
        ({prefix + "up_proj.bias": np.zeros(0, np.float32)}, "DSX-E112"),
        ({"model.layers.0.mlp.shared_experts.up_proj.weight": np.zeros(0, np.float32)}, "DSX-E112"),
    ]
    for change, code in wrong:
        save_file({**tensors, **change}, path / "model.safetensors")
        refused(code, path)
    save_file({k: v for k, v in tensors.items() if "shared_experts" not in k}, path / "model.safetensors")
    assert Checkpoint.open(path).config == opened.config


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.1.mlp.gate.weight"])
def test_truncated_after_open_is_refused_while_reading(tmp_path: Path, name: str):
    """导出到一半检查点被截断：读行时按码拒绝，而不是读出零。"""
    path = write_checkpoint(tmp_path / "x", TINY)
    store = Checkpoint.open(path).store
    spec = store[name]
    with spec.file.open("r+b") as file:
        file.truncate(spec.offset + spec.nbytes - 1)
    with pytest.raises(DsxError, match=name) as err:
        store.read_rows(name, 0, spec.shape[0])
    assert err.value.code == "DSX-E110"
    spec.file.unlink()
    with pytest.raises(DsxError, match=name) as err:
        store.read_rows(name, 0, 1)
    assert err.value.code == "DSX-E101"
