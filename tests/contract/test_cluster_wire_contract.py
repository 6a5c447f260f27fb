"""specs/cluster 的 CLUSTER-6：帧与信道。"""

from __future__ import annotations

import socket
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_export.cluster.settings import ClusterSettings
from deepseek_export.cluster.wire import Channel, Frame
from deepseek_export.dtypes import DTYPES
from tests.engines import refused

pytestmark = pytest.mark.contract

SILENCE_S = 0.6


@pytest.fixture
def pair() -> Iterator[tuple[socket.socket, Channel]]:
    """一头是裸的套接字，一头是信道。"""
    raw, other = socket.socketpair()
    channel = Channel(other, " 对面", SILENCE_S)
    yield raw, channel
    raw.close()
    channel.close()


def encoded(frame: Frame) -> bytes:
    """一帧在线上的样子。"""
    left, right = socket.socketpair()
    sender, found = Channel(left, "", 1), bytearray()
    thread = threading.Thread(target=lambda: (sender.send(frame), sender.close()))
    thread.start()
    while block := right.recv(1 << 16):
        found += block
    thread.join()
    right.close()
    return bytes(found)


def every_dtype() -> Frame:
    rng = np.random.default_rng(0)
    names = [name for name in DTYPES if name != "int4"]
    arrays = {n: rng.integers(0, 2, (3, 1, 5)).astype(DTYPES[n].numpy) for n in names}
    big = {"big": rng.standard_normal((700, 300)).astype(np.float32), "empty": np.zeros((0, 4), np.int64)}
    return Frame({"op": "run", "n": 7, "名字": ["中文", 1.5, None]}, {**arrays, **big})


def test_frames_arrive_as_sent():
    """CLUSTER-6：每种 dtype、空的、大的、不连着的，原样到达；一个字节一个字节地到也一样；各帧的内存不共用。"""
    frame = every_dtype()
    turned = Frame({"op": "turned"}, {"x": np.arange(12).reshape(3, 4).T})
    bits = encoded(frame) + encoded(turned)
    raw, other = socket.socketpair()
    channel = Channel(other, "", 5)

    def drip() -> None:
        for start in range(0, 600):
            raw.sendall(bits[start : start + 1])
        raw.sendall(bits[600:])

    thread = threading.Thread(target=drip)
    thread.start()
    got, second = channel.receive(), channel.receive()
    thread.join()
    assert got.meta == frame.meta
    assert got.arrays.keys() == frame.arrays.keys()
    for name, array in frame.arrays.items():
        assert got.arrays[name].dtype == array.dtype
        assert got.arrays[name].shape == array.shape
        assert got.arrays[name].tobytes() == array.tobytes()
    assert second.arrays["x"].tolist() == turned.arrays["x"].tolist()
    assert second.arrays["x"].flags.writeable
    raw.close()
    channel.close()


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 10_000), flip=st.integers(1, 255))
def test_any_flipped_byte_is_refused(at, flip):
    """CLUSTER-6：改了哪个字节都收不下，错误码是 DSX-E745，不会分配它自称的那么多。"""
    bits = bytearray(encoded(Frame({"op": "run", "n": 1}, {"x": np.arange(40, dtype=np.int64)})))
    bits[at % len(bits)] ^= flip
    raw, other = socket.socketpair()
    raw.sendall(bits)
    raw.shutdown(socket.SHUT_WR)
    channel = Channel(other, "", SILENCE_S)
    refused("DSX-E745", channel.receive)
    raw.close()
    channel.close()


def test_sizes_are_checked_before_anything_is_allocated(pair):
    """CLUSTER-6：自称几百 GB 的帧（校验和都对）当场拒绝。"""
    raw, channel = pair
    head = struct.pack("<4sIIQI", b"DSXP", 1, 16, 1 << 39, 0)
    raw.sendall(head + zlib.crc32(head).to_bytes(4, "little"))
    tracemalloc.start()
    error = refused("DSX-E745", channel.receive)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert str(1 << 39) in error.what
    assert peak < 1 << 20


@pytest.mark.parametrize(
    "meta",
    [
        b"[]",
        b"not json",
        b'{"op":"run"}',
        b'{"op":"run","arrays":[["x","int64",[-1]]]}',
        b'{"op":"run","arrays":[["x","int64",[1000000]]]}',
        b'{"op":"run","arrays":[["x","object",[1]]]}',
        b'{"op":"run","arrays":[]}',
        b'{"op":"run","arrays":[["x"]]}',
        b"[" * 200_000,
    ],
)
def test_contents_that_do_not_hold_are_refused(pair, meta):
    """CLUSTER-6：校验和都对而内容不成立的，也拒绝。"""
    raw, channel = pair
    payload = bytes(8)
    head = struct.pack("<4sIIQI", b"DSXP", 1, len(meta), len(payload), zlib.crc32(meta + payload))
    sent = head + zlib.crc32(head).to_bytes(4, "little") + meta + payload
    thread = threading.Thread(target=raw.sendall, args=(sent,))
    thread.start()
    refused("DSX-E745", channel.receive)
    thread.join()


def test_another_version_is_refused(pair):
    """CLUSTER-6：别的版本、别的协议，说这里是哪一版。"""
    raw, channel = pair
    head = struct.pack("<4sIIQI", b"DSXP", 99, 0, 0, 0)
    raw.sendall(head + zlib.crc32(head).to_bytes(4, "little"))
    assert "99" in refused("DSX-E745", channel.receive).what


def test_a_closed_peer_is_told_at_once(pair):
    """CLUSTER-6：对方关了，收与发都立刻知道。"""
    raw, channel = pair
    raw.close()
    refused("DSX-E742", channel.receive)
    refused("DSX-E742", channel.send, Frame({"op": "x"}))


def test_silence_ends_the_wait_and_beats_keep_it(pair):
    """CLUSTER-6：久久没有一个字节就当对方不在了；心跳算，心跳自己不当作一帧。"""
    raw, channel = pair
    sender = Channel(raw.dup(), "", 5)
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(0.05):
            sender.beat()

    thread = threading.Thread(target=beat)
    thread.start()
    answered = threading.Timer(3 * SILENCE_S, sender.send, [Frame({"op": "late"})])
    answered.start()
    assert channel.receive().meta == {"op": "late"}
    stop.set()
    thread.join()
    assert channel.drain() == []
    before = time.monotonic()
    refused("DSX-E742", channel.receive)
    assert time.monotonic() - before >= SILENCE_S
    sender.close()


@pytest.mark.parametrize(
    "bad",
    [{"silence_s": 0}, {"step_s": -1}, {"start_s": True}, {"retry_s": float("nan")}, {"micro_batches": 1.5}],
)
def test_limits_are_positive(bad):
    """CLUSTER-6：每种等待的上限都要是正数。"""
    refused("DSX-E740", lambda: ClusterSettings(**bad))
