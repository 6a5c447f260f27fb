"""checkpoint/store.py：文件头核对、索引核对、惰性读取。"""

from __future__ import annotations

import contextlib
import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from deepseek_export.checkpoint import TensorStore
from deepseek_export.checkpoint.fingerprint import Fingerprint
from deepseek_export.errors import DsxError
from tests.odd_files import KINDS, make_odd
from tests.permissions import permissions_apply

pytestmark = pytest.mark.unit


def write_raw(directory: Path, header: Any, data: bytes = b"", name: str = "model.safetensors") -> Path:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    (directory / name).write_bytes(struct.pack("<Q", len(raw)) + raw + data)
    return directory


def entry(dtype: Any = "F32", shape: Any = (2,), offsets: Any = (0, 8)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


def write_index(directory: Path, weight_map: Any) -> Path:
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def refused(code: str, directory: Path) -> DsxError:
    with pytest.raises(DsxError) as err:
        TensorStore.open(directory)
    assert err.value.code == code, err.value
    return err.value


def test_reads_what_safetensors_wrote(tmp_path: Path):
    arrays = {
        "a": np.arange(6, dtype=np.float32).reshape(2, 3),
        "b": np.arange(5).astype(ml_dtypes.bfloat16),
        "c": np.array(7, dtype=np.float16),
        "d": np.zeros((0, 4), np.float32),
    }
    save_file(arrays, tmp_path / "model.safetensors")
    store = TensorStore.open(tmp_path)
    assert (store.names, len(store), "a" in store, "z" in store) == (("a", "b", "c", "d"), 4, True, False)
    assert list(store) == list(store.names)
    for name, array in arrays.items():
        got = store.read(name)
        assert (got.dtype, got.shape) == (array.dtype, array.shape)
        assert np.array_equal(got, array)
        assert not got.flags.writeable
    assert (store["b"].dtype, store["b"].nbytes) == ("BF16", 10)
    assert np.shares_memory(store.read("a"), store.read("a"))


def test_stacked_experts_are_read_one_by_one(tmp_path: Path):
    """叠放的专家按逐个专家的名字给出：gate 在前、up 在后，值逐个相同。"""
    both, down = (
        np.arange(n, dtype=np.float32).reshape(shape) for n, shape in ((60, (3, 4, 5)), (30, (3, 5, 2)))
    )
    head = "model.layers.1.mlp.experts."
    save_file({head + "gate_up_proj": both, head + "down_proj": down}, tmp_path / "model.safetensors")
    store = TensorStore.open(tmp_path)
    want = {}
    for e in range(3):
        want[f"{head}{e}.gate_proj.weight"], want[f"{head}{e}.up_proj.weight"] = both[e, :2], both[e, 2:]
        want[f"{head}{e}.down_proj.weight"] = down[e]
    assert set(store.names) == set(want)
    for name, array in want.items():
        assert (store[name].name, store[name].shape) == (name, array.shape)
        assert np.array_equal(store.read(name), array)
        assert np.array_equal(store.read_rows(name, 1, 2), array[1:2])


@pytest.mark.parametrize("shape", [(3, 5, 2), (3, 4), (1 << 14, 2, 1), (0, 4, 5)])
def test_stacks_that_do_not_split_keep_their_name(tmp_path: Path, shape):
    """奇数行、不是三维、专家多得离谱、一个专家也没有：原样留着，由 Checkpoint 当作多出来的张量拒绝。"""
    name = "model.layers.1.mlp.experts.gate_up_proj"
    save_file({name: np.zeros(shape, np.float32)}, tmp_path / "model.safetensors")
    assert TensorStore.open(tmp_path).names == (name,)


def test_an_expert_stored_twice_is_refused(tmp_path: Path):
    head, weight = "model.layers.1.mlp.experts.", np.zeros((2, 5, 2), np.float32)
    arrays = {head + "down_proj": weight, head + "1.down_proj.weight": weight[1]}
    save_file(arrays, tmp_path / "model.safetensors")
    assert "experts.1.down_proj.weight" in str(refused("DSX-E110", tmp_path))


def test_fingerprint_sees_headers_not_timestamps(tmp_path: Path):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    first = TensorStore.open(tmp_path).fingerprint()
    assert Fingerprint.model_validate_json(first.model_dump_json()) == first
    (tmp_path / "model.safetensors").touch()
    assert TensorStore.open(tmp_path).fingerprint() == first
    save_file({"b": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    assert TensorStore.open(tmp_path).fingerprint() != first


@pytest.mark.parametrize(("size", "at"), [(1000, 0), (1000, 500), (1000, 999), (24, 11), (24, 12)])
def test_fingerprint_samples_every_tensor(tmp_path: Path, size: int, at: int):
    """每个张量的开头、正中、末尾都取样，不大的整个都算；别处的不看。"""
    arrays = {"a": np.zeros(size, np.float32), "b": np.zeros(size, np.float32), "empty": np.zeros(0, np.int8)}
    save_file(arrays, tmp_path / "model.safetensors")
    first = TensorStore.open(tmp_path).fingerprint().files[0]
    for name in ("a", "b"):
        changed = arrays[name].copy()
        changed[at] = 1.0
        save_file({**arrays, name: changed}, tmp_path / "model.safetensors")
        second = TensorStore.open(tmp_path).fingerprint().files[0]
        assert second.header_sha256 == first.header_sha256
        assert second.samples_sha256 != first.samples_sha256
    elsewhere = arrays["a"].copy()
    elsewhere[size // 3] = 1.0
    save_file({**arrays, "a": elsewhere}, tmp_path / "model.safetensors")
    same = TensorStore.open(tmp_path).fingerprint().files[0] == first
    assert same == (size == 1000)


def test_shards_and_index_wins(tmp_path: Path):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "1.safetensors")
    save_file({"b": np.ones(2, np.float32)}, tmp_path / "2.safetensors")
    save_file({"x": np.ones(2, np.float32)}, tmp_path / "model.safetensors")
    write_index(tmp_path, {"a": "1.safetensors", "b": "2.safetensors"})
    store = TensorStore.open(tmp_path)
    assert store.names == ("a", "b")
    assert store["b"].file.name == "2.safetensors"
    assert len(store.fingerprint().files) == 2


def test_no_weights_or_only_pickle(tmp_path: Path):
    refused("DSX-E101", tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    assert "pickle" in refused("DSX-E101", tmp_path).what


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"", b""),
        (b"{", b""),
        (b"[]", b""),
        (b"\xff\xff", b""),
        (b"[" * 100_000, b""),
        ({"__metadata__": 1}, b""),
        ({"a": entry()}, bytes(7)),
        ({"a": entry()}, bytes(9)),
        ({"a": entry(dtype="F7")}, bytes(8)),
        ({"a": entry(dtype=["F32"])}, bytes(8)),
        ({"a": entry(shape=(3,))}, bytes(8)),
        ({"a": entry(shape=(-2,))}, bytes(8)),
        ({"a": entry(shape=(True, 2))}, bytes(8)),
        ({"a": entry(shape=(2.0,))}, bytes(8)),
        ({"a": entry(shape=(0, 1 << 62), offsets=(0, 0))}, b""),
        ({"a": entry(offsets=(8, 0))}, bytes(8)),
        ({"a": entry(offsets=(0, 8, 8))}, bytes(8)),
        ({"a": entry(offsets=(4, 12))}, bytes(12)),
        ({"a": entry(), "b": entry()}, bytes(8)),
        ({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        ({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)),
        ({"a": {"dtype": "F32", "shape": [2]}}, bytes(8)),
        ({"a": entry() | {"extra": 1}}, bytes(8)),
        ({"a": 1}, b""),
        (b'{"a":%b,"a":%b}' % ((json.dumps(entry()).encode(),) * 2), bytes(8)),
    ],
)
def test_bad_header(tmp_path: Path, header, data):
    refused("DSX-E110", write_raw(tmp_path, header, data))


@pytest.mark.parametrize(
    "raw", [b"", b"\x01", struct.pack("<Q", 1 << 63), struct.pack("<Q", 200 << 20) + b"{}"]
)
def test_bad_prefix(tmp_path: Path, raw):
    (tmp_path / "model.safetensors").write_bytes(raw)
    refused("DSX-E110", tmp_path)


def test_file_shrinks_after_open(tmp_path: Path):
    write_raw(tmp_path, {"a": entry()}, bytes(8))
    store = TensorStore.open(tmp_path)
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(DsxError) as err:
        store.read("a")
    assert err.value.code == "DSX-E110"


@pytest.mark.parametrize("size", [0, 5])
def test_a_file_too_short_for_a_header_says_so(tmp_path: Path, size: int):
    (tmp_path / "model.safetensors").write_bytes(bytes(size))
    what = refused("DSX-E110", tmp_path).what
    assert f"只有 {size} 字节，太短" in what
    assert "-1" not in what.removeprefix(str(tmp_path))


def test_a_file_that_may_not_be_read_is_not_called_broken(tmp_path: Path):
    """没有权限：说权限，不叫人重新下载；索引、放在别处的分片也一样。"""
    blobs = tmp_path / "blobs"
    blobs.mkdir()
    save_file({"a": np.zeros(2, np.float32)}, blobs / "1.safetensors")
    write_index(tmp_path, {"a": "1.safetensors"})
    (tmp_path / "1.safetensors").symlink_to(blobs / "1.safetensors")
    for closed in (blobs, blobs / "1.safetensors", tmp_path / "model.safetensors.index.json"):
        mode = closed.stat().st_mode
        closed.chmod(0)
        with permissions_apply():
            error = refused("DSX-E101", tmp_path)
        closed.chmod(mode)
        assert "Permission denied" in error.what
        assert "下载" not in error.todo
    TensorStore.open(tmp_path)


def test_tensor_in_two_shards(tmp_path: Path):
    for name in ("1.safetensors", "2.safetensors"):
        save_file({"a": np.zeros(2, np.float32), name: np.zeros(2, np.float32)}, tmp_path / name)
    names = {"a": "1.safetensors", "1.safetensors": "1.safetensors", "2.safetensors": "2.safetensors"}
    refused("DSX-E110", write_index(tmp_path, names))


@pytest.mark.parametrize(
    "weight_map",
    [
        {},
        [],
        {"a": 1},
        {"a": "../1.safetensors"},
        {"a": "/tmp/1.safetensors"},
        {"a": "sub\\1.safetensors"},
        {"a": "1.bin"},
        {"a": "missing.safetensors"},
        {"b": "1.safetensors"},
        {"a": "1.safetensors", "b": "1.safetensors"},
    ],
)
def test_bad_index(tmp_path: Path, weight_map):
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "1.safetensors")
    refused("DSX-E118", write_index(tmp_path, weight_map))


@pytest.mark.parametrize("text", ["", "[1]", '{"weight_map":{"a":"x","a":"y"}}'])
def test_unreadable_index(tmp_path: Path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    refused("DSX-E118", tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_an_index_that_is_no_file_is_not_taken_for_absent(tmp_path: Path, kind):
    """旁边有完整的 model.safetensors 也不当作没有索引：它多半是别的分片没有下完。"""
    save_file({"a": np.zeros(2, np.float32)}, tmp_path / "model.safetensors")
    make_odd(tmp_path / "model.safetensors.index.json", kind)
    with pytest.raises(DsxError) as error:
        TensorStore.open(tmp_path)
    assert error.value.code in ("DSX-E101", "DSX-E118")
    assert "index.json" in error.value.what


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300, deadline=None)
@given(data=st.data())
def test_any_header_byte_flip_is_refused_or_harmless(tmp_path: Path, data):
    file = tmp_path / "model.safetensors"
    arrays = {"w": np.arange(4, dtype=np.float32), "x": np.zeros((2, 3), np.float16)}
    save_file(arrays, file, metadata={"k": "v"})
    raw = bytearray(file.read_bytes())
    position = data.draw(st.integers(0, 7 + struct.unpack("<Q", raw[:8])[0]))
    raw[position] ^= data.draw(st.integers(1, 255))
    file.write_bytes(raw)
    with contextlib.suppress(DsxError):
        store = TensorStore.open(tmp_path)
        for name in store.names:
            assert store.read(name).nbytes == store[name].nbytes
