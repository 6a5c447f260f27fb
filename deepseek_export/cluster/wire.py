"""帧与信道：一条字节流上一帧一帧地收发。

一帧是定长的头（标记、版本、种类、两段的长度、校验和），一段 JSON，一段数组的原始字节。长度在分配内存之前就核对；数组的 dtype、形状写在 JSON 里，
没有 pickle，收到的东西不会被执行。没有话要说时隔一会儿发一个空的心跳帧，所以“久久没有一个字节”就是对方不在了，不必等 TCP 自己发现。
"""

from __future__ import annotations

import json
import math
import select
import socket
import ssl
import struct
import threading
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from deepseek_export.dtypes import DTYPES, by_numpy
from deepseek_export.errors import DsxError

VERSION = 1
#: 标记、版本、JSON 的长度、数组的长度、两段连在一起的 CRC-32；其后是这些字节自己的 CRC-32。
_HEAD = struct.Struct("<4sIIQI")
_HEAD_SIZE = _HEAD.size + 4
_MAGIC = b"DSXP"
#: JSON 至多这么长。
MAX_META = 1 << 20
#: 数组至多这么长：几十行、每行几百个 token 的 hidden 也放得下。
MAX_PAYLOAD = 1 << 30
#: 没有话说时多久发一次心跳，秒。
BEAT_S = 0.5
_POLL_S = 0.2


@dataclass(frozen=True)
class Frame:
    """一帧。

    Attributes:
        meta: JSON 对象；心跳是空的。
        arrays: 名字 → 数组；收到的是新分配的内存，各帧不共用。
    """

    meta: Mapping[str, Any]
    arrays: Mapping[str, np.ndarray] = field(default_factory=dict)


BEAT = Frame({})


def check_size(frame: Frame) -> None:
    """发之前核对：对方收不下的不发，信道照样能用。

    Raises:
        DsxError: ``DSX-E745``，数组一共超过 :data:`MAX_PAYLOAD`。
    """
    total = sum(array.nbytes for array in frame.arrays.values())
    if total > MAX_PAYLOAD:
        raise DsxError(
            "DSX-E745",
            f"一次要过信道的有 {total} 字节，上限是 {MAX_PAYLOAD}",
            "一批少几行，一次少几个 token，或少要几行 logits",
        )


class ChannelClosed(DsxError):
    """对方关了，或不在了（``DSX-E742``）。"""


class Channel:
    """一条双向字节流的一端；发可以在几个线程里，收只在一个线程里。

    Args:
        stream: 连好的套接字，从此归它。
        peer: 对方叫什么，写进错误里。
        silence_s: 收的时候，这么多秒没有一个字节就当对方不在了。
        max_payload: 一帧的数组至多多少字节。

    Attributes:
        silence_s: 同参数；起动的时候可以宽一些，随时可改。
    """

    def __init__(
        self, stream: socket.socket, peer: str, silence_s: float, max_payload: int = MAX_PAYLOAD
    ) -> None:
        self.peer = peer
        self.silence_s = silence_s
        self._stream, self._max_payload = stream, max_payload
        #: 已经解了密、还没有取走的字节，``select`` 看不到。
        self._pending: Callable[[], int] = stream.pending if isinstance(stream, ssl.SSLSocket) else int
        stream.setblocking(False)
        if stream.family != socket.AF_UNIX:
            stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._sending = threading.Lock()
        self._sent_at = self._heard_at = time.monotonic()

    def send(self, frame: Frame, waiting: Callable[[], None] = lambda: None) -> None:
        """发一帧；对方收得慢就等。

        Args:
            frame: 要发的。
            waiting: 等的时候隔一会儿调用一次；可以抛异常来放弃，此后信道不能再用。

        Raises:
            ChannelClosed: 对方关了。
        """
        parts = _encoded(frame)
        with self._sending:
            for part in parts:
                self._push(memoryview(part), waiting)
            self._sent_at = time.monotonic()

    def beat(self) -> None:
        """久没有发就发一个心跳；别的线程正在发就不必。

        Raises:
            ChannelClosed: 对方关了。
        """
        if time.monotonic() - self._sent_at < BEAT_S or not self._sending.acquire(blocking=False):
            return
        try:
            for part in _encoded(BEAT):
                self._push(memoryview(part), lambda: None)
            self._sent_at = time.monotonic()
        finally:
            self._sending.release()

    def receive(self, waiting: Callable[[], None] = lambda: None) -> Frame:
        """收下一帧；心跳自己吞掉，不返回。

        Args:
            waiting: 等的时候隔一会儿调用一次；可以抛异常来放弃，此后信道不能再用。

        Raises:
            ChannelClosed: 对方关了，或 ``silence_s`` 秒没有一个字节。
            DsxError: ``DSX-E745``，帧不对：标记、版本、长度、校验和或内容；此后信道不能再用。
        """
        self._heard_at = time.monotonic()
        while True:
            frame = self._frame(waiting)
            if frame.meta:
                return frame

    def drain(self) -> list[Frame]:
        """已经到了的帧都收下，不等；心跳自己吞掉。没有人在 :meth:`receive` 时用它来听对方还在不在。

        Raises:
            ChannelClosed: 对方关了，或 ``silence_s`` 秒没有一个字节。
            DsxError: ``DSX-E745``。
        """
        found: list[Frame] = []
        while self._readable(0):
            try:
                frame = self._frame(lambda: None)
            except ChannelClosed:
                if found:  # 关掉之前说的要先给出来：多半就是为什么关；下一次再说关了
                    return found
                raise
            if frame.meta:
                found.append(frame)
        self._check_silence()
        return found

    def close(self) -> None:
        """关掉；可以调几次。"""
        self._stream.close()

    def _frame(self, waiting: Callable[[], None]) -> Frame:
        head = self._pull(_HEAD_SIZE, waiting)
        magic, version, meta_size, payload_size, checksum = _HEAD.unpack(head[: _HEAD.size])
        if magic != _MAGIC or version != VERSION:
            raise self._bad(f"开头是 {magic!r}、版本 {version}，这里的版本是 {VERSION}")
        if zlib.crc32(head[: _HEAD.size]).to_bytes(4, "little") != head[_HEAD.size :]:
            raise self._bad("头的校验和不符")
        if meta_size > MAX_META or payload_size > self._max_payload:
            raise self._bad(f"自称有 {meta_size} + {payload_size} 字节")
        meta, payload = self._pull(meta_size, waiting), self._pull(payload_size, waiting)
        if zlib.crc32(payload, zlib.crc32(meta)) != checksum:
            raise self._bad("校验和不符")
        if not meta_size:
            return BEAT
        try:
            return _decoded(meta, payload)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._bad(f"内容不成立：{error}") from error

    def _pull(self, size: int, waiting: Callable[[], None]) -> bytearray:
        buffer = bytearray(size)
        left = memoryview(buffer)
        while left:
            try:
                got = self._stream.recv_into(left)
            except BlockingIOError:
                if not self._readable(_POLL_S):
                    self._check_silence()
                    waiting()
                continue
            except OSError as error:
                raise self._gone(f"断了：{error.strerror}") from error
            if not got:
                raise self._gone("关了")
            self._heard_at = time.monotonic()
            left = left[got:]
        return buffer

    def _push(self, left: memoryview, waiting: Callable[[], None]) -> None:
        left = left.cast("B")
        while left:
            try:
                left = left[self._stream.send(left) :]
            except BlockingIOError:
                if not select.select([], [self._stream], [], _POLL_S)[1]:
                    waiting()
            except (OSError, ValueError) as error:
                raise self._gone(f"断了：{error}") from error

    def _readable(self, seconds: float) -> bool:
        try:
            return bool(self._pending() or select.select([self._stream], [], [], seconds)[0])
        except (OSError, ValueError) as error:
            raise self._gone(f"断了：{error}") from error

    def _check_silence(self) -> None:
        if (silent := time.monotonic() - self._heard_at) > self.silence_s:
            raise self._gone(f"{silent:.1f} 秒没有一个字节，心跳也没有")

    def _gone(self, how: str) -> ChannelClosed:
        return ChannelClosed("DSX-E742", f"与{self.peer}的信道{how}", "过一会儿再来：流水线自己重启")

    def _bad(self, what: str) -> DsxError:
        return DsxError(
            "DSX-E745", f"{self.peer}发来的帧不对：{what}", "两端用同一个版本的 dsx；网络不可靠就换一条"
        )


def _encoded(frame: Frame) -> list[Any]:
    if not frame.meta:
        return [_head(0, 0, 0)]
    arrays = {name: np.ascontiguousarray(array) for name, array in frame.arrays.items()}
    listed = [[name, by_numpy(array.dtype).name, list(array.shape)] for name, array in arrays.items()]
    meta = json.dumps({**frame.meta, "arrays": listed}, separators=(",", ":")).encode()
    blocks = [array.reshape(-1).view(np.uint8).data for array in arrays.values() if array.size]
    checksum = zlib.crc32(meta)
    for block in blocks:
        checksum = zlib.crc32(block, checksum)
    total = sum(block.nbytes for block in blocks)
    head = _head(len(meta), total, checksum)
    small = total <= 1 << 16  # 小的合成一次发送
    return [head + meta + b"".join(block.tobytes() for block in blocks)] if small else [head + meta, *blocks]


def _head(meta_size: int, payload_size: int, checksum: int) -> bytes:
    head = _HEAD.pack(_MAGIC, VERSION, meta_size, payload_size, checksum)
    return head + zlib.crc32(head).to_bytes(4, "little")


def _decoded(meta: bytearray, payload: bytearray) -> Frame:
    fields = json.loads(meta)
    arrays, offset = {}, 0
    for name, dtype, shape in fields.pop("arrays"):
        if not all(type(size) is int and size >= 0 for size in shape):
            raise ValueError(f"{name} 的形状是 {shape}")
        kind, count = DTYPES[dtype].numpy, math.prod(shape)
        end = offset + count * kind.itemsize
        if end > len(payload):
            raise ValueError(f"{name} 超出了数组那一段")
        arrays[name] = (
            np.frombuffer(payload, kind, count, offset).reshape(shape) if count else np.empty(shape, kind)
        )
        offset = end
    if offset != len(payload) or not fields:
        raise ValueError("数组那一段多出了字节")
    return Frame(fields, arrays)
