"""specs/cluster 的 CLUSTER-6：帧与信道。"""

from __future__ import annotations

import socket
import struct
import threading
import time
import tracemalloc
import zlib
from collections.abc import Iterator
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deepseek_export.cluster.handshake import accept, connect, listen
from deepseek_export.cluster.settings import ClusterSettings
from deepseek_export.cluster.wire import Channel, Frame, check_size
from deepseek_export.dtypes import DTYPES
from deepseek_export.errors import DsxError
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


def test_what_was_said_before_closing_is_heard_first(pair):
    """CLUSTER-6：对方说完就关了：话先给出来，再说关了。"""
    raw, channel = pair
    sender = Channel(raw.dup(), "", 5)
    sender.send(Frame({"op": "fatal", "what": "为什么"}))
    sender.close()
    raw.close()
    assert [frame.meta["what"] for frame in channel.drain()] == ["为什么"]
    refused("DSX-E742", channel.drain)


@pytest.mark.parametrize(
    "bad",
    [{"silence_s": 0}, {"step_s": -1}, {"start_s": True}, {"retry_s": float("nan")}, {"micro_batches": 1.5}],
)
def test_limits_are_positive(bad):
    """CLUSTER-6：每种等待的上限都要是正数。"""
    refused("DSX-E740", lambda: ClusterSettings(**bad))


class Served:
    """在回环上等一个连上来的。"""

    def __init__(self, secret: bytes, seconds: float = 5.0) -> None:
        self.listening = listen("127.0.0.1", secret)
        self.address = self.listening.getsockname()
        self._found: list[socket.socket | DsxError] = []
        self._thread = threading.Thread(target=self._run, args=(secret, seconds))
        self._thread.start()

    def _run(self, secret: bytes, seconds: float) -> None:
        try:
            self._found.append(accept(self.listening, secret, seconds))
        except DsxError as error:
            self._found.append(error)

    def result(self) -> socket.socket | DsxError:
        self._thread.join()
        self.listening.close()
        return self._found[0]


def test_what_the_peer_would_refuse_is_not_sent():
    """CLUSTER-6：超过上限的不发出去，按码拒绝，信道不因此作废。"""
    big = np.broadcast_to(np.zeros(1, np.float32), (1 << 29,))
    assert "2147483648" in refused("DSX-E745", check_size, Frame({"op": "run"}, {"x": big})).what
    check_size(every_dtype())


def test_both_ends_prove_the_secret():
    """CLUSTER-15：密钥相同就连上，之后照常收发；密钥不上线。"""
    served = Served(b"secret of the house")
    mine = Channel(connect(served.address, b"secret of the house", 5), "", 5)
    stream = served.result()
    assert isinstance(stream, socket.socket)
    theirs = Channel(stream, "", 5)
    frame = every_dtype()
    thread = threading.Thread(target=mine.send, args=(frame,))
    thread.start()
    assert theirs.receive().meta == frame.meta
    thread.join()
    mine.close()
    theirs.close()


def test_a_wrong_secret_is_refused_and_the_right_one_still_gets_in():
    """CLUSTER-15：密钥不对、不说话、乱说的，断开，接着等；对的还进得来。"""
    served = Served(b"right", 20)
    refused("DSX-E749", connect, served.address, b"wrong", 5)
    with socket.create_connection(served.address) as noise:
        noise.sendall(bytes(64))
        assert len(noise.recv(1024)) == 37
        assert noise.recv(1024) == b""
    connect(served.address, b"right", 5).close()
    assert isinstance(served.result(), socket.socket)


def test_a_false_server_is_refused():
    """CLUSTER-15：对面不是 stage，或不知道密钥而装作知道，连的一方也不信。"""
    for said in (b"HTTP/1.1 400 Bad Request\r\n" + bytes(64), b"DSXA\x01" + bytes(32) + bytes(32), b"DSXA"):
        with socket.create_server(("127.0.0.1", 0)) as listening:

            def lie(said: bytes = said, listening: socket.socket = listening) -> None:
                stream, _ = listening.accept()
                with stream, suppress(OSError):  # 连的一方一看不对就断
                    stream.sendall(said)
                    stream.shutdown(socket.SHUT_WR)
                    stream.settimeout(5)
                    stream.recv(1024)

            thread = threading.Thread(target=lie)
            thread.start()
            refused("DSX-E749", connect, listening.getsockname(), b"secret", 5)
            thread.join()


def test_other_machines_need_a_secret():
    """CLUSTER-15：不是回环的地址没有密钥，不听也不连；没有人来、连不上，限时说清。"""
    for host in ("0.0.0.0", "192.0.2.1", "stage-host"):
        refused("DSX-E749", listen, host, b"")
        refused("DSX-E749", connect, (host, 1), b"", 1)
    assert isinstance(Served(b"", 0.2).result(), DsxError)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        address = closed.getsockname()
    refused("DSX-E749", connect, address, b"", 1)
