"""一整套 stage 进程：发出去、等回来，看着它们，断了就整套重起。

一个线程（:class:`_Keeper`）起进程、发心跳、听对方还在不在；算一步的线程自己收自己的回答，中间没有别的线程转手。任何一处断了，整套都杀掉重起：
各 stage 的缓存要么都在，要么都没有。``generation`` 每次重起加一，缓存凭它知道内容还在不在。
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Protocol

from deepseek_export.backend.base import CachesLost
from deepseek_export.cluster.settings import ClusterSettings
from deepseek_export.cluster.wire import BEAT_S, Channel, ChannelClosed, Frame, check_size
from deepseek_export.errors import ERRORS, DsxError

#: 服务的日志里也要有，所以在它的名下。
logger = logging.getLogger("dsx.serve.cluster")

#: 加载时第一个 stage 退了，等它说的错误码多久，秒。
_TELLING_S = 10.0
#: 等一个刚断了的环里的进程结束，好说清是谁，秒。
_LAST_WORDS_S = 1.0


class Member(Protocol):
    """一个 stage 进程，在哪里都行。"""

    @property
    def ended(self) -> str | None:
        """怎么结束的；还活着为 ``None``。不等待。"""

    def kill(self) -> None:
        """杀掉；停着的也杀得掉。"""


@dataclass(frozen=True)
class Started:
    """起好的一套：往第一个发、从最后一个收的两条信道，与各个进程。"""

    to_first: Channel
    from_last: Channel
    members: tuple[Member, ...]


class Launcher(Protocol):
    """起一套 stage 的办法。"""

    def start(self, settings: ClusterSettings) -> Started:
        """起全部进程，不等它们加载。"""


class Gang:
    """一套在跑的 stage；没有人用了就自己停。

    Args:
        launcher: 怎么起。
        settings: 各种等待的上限。

    Raises:
        DsxError: 第一次就起不来：stage 自己的错误码，或 ``DSX-E744``。
    """

    def __init__(self, launcher: Launcher, settings: ClusterSettings | None = None) -> None:
        self._keeper = _Keeper(launcher, settings or ClusterSettings())
        self._calling = threading.Lock()
        self._discarded: deque[tuple[str, int]] = deque()
        self._keeper.start()
        weakref.finalize(self, self._keeper.close)

    @property
    def generation(self) -> int:
        """第几次起的；正在重起时是下一次的。"""
        return self._keeper.generation

    @property
    def failure(self) -> DsxError | None:
        """现在为什么用不了；用得了为 ``None``。"""
        return self._keeper.failure

    @property
    def stages(self) -> list[dict[str, Any]]:
        """各 stage 起好时报的：进程号、内存、能力、要说的话。"""
        return self._keeper.stages

    def call(self, frames: Sequence[Frame], generation: int | None = None) -> list[Frame]:
        """几帧依次发出去，等它们都绕环一圈回来；在环里的有几帧，就有几个 stage 同时在算。

        Args:
            frames: 要发的。
            generation: 只在这一次起的那一套上做。

        Raises:
            DsxError: ``DSX-E743`` 正在重起，``DSX-E742`` 做到一半断了，都可以过一会儿再试；``DSX-E747`` 已经不是那一套了；``DSX-E745`` 一次要过信道的太多；stage 拒绝的，是它的错误码。
        """
        for frame in frames:
            check_size(frame)
        with self._calling:
            first, *rest = frames
            told = Frame({**first.meta, **self._thrown_away()}, first.arrays)
            return self._keeper.exchange([told, *rest], generation)

    def discard(self, what: str, number: int) -> None:
        """各 stage 上不要了的编号：``free`` 一个缓存，``forget`` 存下的一行；随下一次调用告诉它们。

        回收内存时会调到它，所以不加锁、不发送，在哪个线程里都可以。
        """
        self._discarded.append((what, number))

    def close(self) -> None:
        """停掉全部进程；可以调几次。"""
        self._keeper.close()

    def _thrown_away(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        while self._discarded:
            what, number = self._discarded.popleft()
            found.setdefault(what, []).append(number)
        return found


class _RingError(DsxError):
    """环断了（``DSX-E742``）。"""


class _Ring:
    """起好的一次：两条信道与各个进程。

    Attributes:
        broken: 断了，或要停了；此后只等着被收走。
        reason: 为什么断了；好好停下的为 ``None``。
    """

    def __init__(self, started: Started, settings: ClusterSettings) -> None:
        self._started, self._settings = started, settings
        self._numbers = itertools.count(1)
        self._receiving = threading.Lock()
        self._most = 1
        self.broken = threading.Event()
        self.reason: DsxError | None = None

    def hello(self) -> list[dict[str, Any]]:
        """等全部加载好，返回各 stage 报的。

        Raises:
            DsxError: 起不来：stage 说了错误码就是它，否则 ``DSX-E744``。
        """
        self._start_clock(self._settings.start_s, "加载完")
        try:
            with suppress(ChannelClosed):  # 第一个已经退了：为什么，由后面的传过来
                self._started.to_first.send(Frame({"op": "hello", "n": 0, "stages": []}), self._loading)
            frame = self._started.from_last.receive(self._loading)
        except DsxError as error:
            what = self._last_words() or error.what
            raise DsxError("DSX-E744", what, "看 stage 进程印出的话；确认内存够用") from error
        if frame.meta["op"] != "hello":
            raise _told(frame)
        self._started.from_last.silence_s = self._settings.silence_s
        stages: list[dict[str, Any]] = frame.meta["stages"]
        self._most = len(stages)
        return stages

    def exchange(self, frames: Sequence[Frame]) -> list[Frame]:
        """见 :meth:`Gang.call`。"""
        with self._receiving:
            self._start_clock(self._settings.step_s, "算完一步")
            try:
                found = self._around(frames)
            except DsxError as error:
                raise self.fail(error) from error
            except BaseException:  # Ctrl-C：环里还有没有收的，不能再用
                self.fail(_lost("发起的一端中断了这一步"))
                raise
        for frame in found:
            if frame.meta["op"] == "failed":
                raise _told(frame)
        return found

    def _around(self, frames: Sequence[Frame]) -> list[Frame]:
        """各绕环一圈；在环里的不超过 stage 的个数，再多，发的与收的可能互相等。"""
        numbers = [next(self._numbers) for _ in frames]
        found: list[Frame] = []
        for position, (number, frame) in enumerate(zip(numbers, frames, strict=True)):
            if position - len(found) == self._most:
                found.append(self._reply(numbers[len(found)]))
            self._started.to_first.send(Frame({**frame.meta, "n": number}, frame.arrays), self._waiting)
        return found + [self._reply(number) for number in numbers[len(found) :]]

    def watch(self) -> None:
        """发一次心跳，听一次；断了就记下。"""
        try:
            self._started.to_first.beat()
            if self._receiving.acquire(blocking=False):
                try:
                    told = self._started.from_last.drain()
                finally:
                    self._receiving.release()
                if told:
                    raise _lost(str(told[0].meta.get("what", "没有人问的回答")))
            if (ended := self._ended()) is not None:
                raise _lost(ended)
        except DsxError as error:
            self.fail(error)

    def fail(self, error: DsxError) -> DsxError:
        """记下为什么断了，第一个算数；返回要抛的。"""
        if self.reason is None:
            ended = self._last_words() if isinstance(error, ChannelClosed) else None
            self.reason = _lost(error.what if ended is None else f"{ended}；{error.what}")
        self.broken.set()
        return self.reason

    def stop(self) -> None:
        """杀掉全部进程，关掉信道；正在收的人先出来，它的文件描述符不能被别人重新用上。"""
        self.broken.set()
        for member in self._started.members:
            try:
                member.kill()
            except Exception:  # 一个停不下（Ray 没有了……），别的照样停，之后照样重起
                logger.exception("停不下一个 stage")
        with self._receiving:
            self._started.to_first.close()
            self._started.from_last.close()

    def _start_clock(self, seconds: float, what: str) -> None:
        self._limit, self._until, self._doing = seconds, time.monotonic() + seconds, what

    def _waiting(self) -> None:
        """等的时候：还该不该等。"""
        if self.broken.is_set():
            raise self.reason or _lost("已经停了")
        self._started.to_first.beat()
        if time.monotonic() > self._until:
            raise _lost(f"{self._limit:g} 秒还没有{self._doing}")

    def _loading(self) -> None:
        """同上，还在加载：第一个退了，先等一会儿，它说的错误码要经过后面的才到这里。"""
        try:
            self._waiting()
        except ChannelClosed:
            self._until = min(self._until, time.monotonic() + _TELLING_S)
            if time.monotonic() >= self._until:
                raise

    def _reply(self, number: int) -> Frame:
        frame = self._started.from_last.receive(self._waiting)
        if frame.meta["op"] == "fatal":  # 说的多半是邻居不在了：是谁，看进程
            raise ChannelClosed("DSX-E742", str(frame.meta["what"]), _lost("").todo)
        if frame.meta.get("n") != number:
            raise _lost(f"回答的次序不对：等的是第 {number} 个，来的是第 {frame.meta.get('n')} 个")
        return frame

    def _ended(self) -> str | None:
        """已经结束的进程里，说得最清楚的那个：先说被杀的。"""
        told = [how for member in self._started.members if (how := _how(member)) is not None]
        return next((how for how in told if "信号" in how), told[0] if told else None)

    def _last_words(self) -> str | None:
        """信道断了，进程多半正在死：等一小会儿，好说清是谁。"""
        until = time.monotonic() + _LAST_WORDS_S
        while (ended := self._ended()) is None and time.monotonic() < until:
            time.sleep(0.02)
        return ended


class _Keeper:
    """起、看、重起的那个线程；不引用 :class:`Gang`，它没有人用了才停得下来。"""

    def __init__(self, launcher: Launcher, settings: ClusterSettings) -> None:
        self._generation = 1
        self._down: DsxError | None = _restarting("正在加载")
        self.stages: list[dict[str, Any]] = []
        self._launcher, self._settings = launcher, settings
        self._ring: _Ring | None = None  # 加载好了、能用的
        self._starting: _Ring | None = None
        self._closing = threading.Event()
        self._first = threading.Event()
        self._refused: Exception | None = None
        # 进程退出时不等它：它一停，内核按登记的杀掉各 stage。
        self._thread = threading.Thread(target=self._keep, name="dsx-gang", daemon=True)

    @property
    def generation(self) -> int:
        """见 :attr:`Gang.generation`；断了的那一刻就算下一次，不等线程看到。"""
        ring, now = self._ring, self._generation
        return now + 1 if ring is not None and ring.broken.is_set() else now

    @property
    def failure(self) -> DsxError | None:
        """见 :attr:`Gang.failure`。"""
        ring = self._ring
        if ring is not None and ring.broken.is_set():
            return _restarting("已经停了" if ring.reason is None else ring.reason.what)
        return self._down

    def start(self) -> None:
        """起第一次，等它加载好；起不来就抛它的错误，不再试。"""
        self._thread.start()
        try:
            self._first.wait()
        except BaseException:  # Ctrl-C
            self.close()
            raise
        if self._refused is not None:
            self._thread.join()
            raise self._refused

    def exchange(self, frames: Sequence[Frame], generation: int | None) -> list[Frame]:
        """见 :meth:`Gang.call`。"""
        ring = self._ring
        if ring is None or ring.broken.is_set():
            raise self.failure or _restarting("正在加载")
        if generation is not None and generation != self.generation:
            what, todo = "那一套 stage 断了，缓存没有了", "重新提交：同一个请求得到同样的 token"
            raise CachesLost("DSX-E747", what, todo)
        return ring.exchange(frames)

    def close(self) -> None:
        """停下，等线程结束。"""
        self._closing.set()
        for ring in (self._ring, self._starting):
            if ring is not None:
                ring.broken.set()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def _keep(self) -> None:
        pause = self._settings.retry_s
        while not self._closing.is_set():
            try:
                ring = self._up()
            except Exception as error:
                what = error.what if isinstance(error, DsxError) else repr(error)
                self._down = _restarting(f"上一次起不来：{what}")
                if not self._first.is_set():
                    self._refused = error
                    break
                logger.warning("整套 stage 起不来，%.1f 秒之后再试：%s", pause, what)
                self._closing.wait(pause)
                pause = min(pause * 2, self._settings.retry_max_s)
                continue
            pause = self._settings.retry_s
            if self._first.is_set():
                logger.warning("整套 stage 又起来了")
            self._first.set()
            while not ring.broken.wait(BEAT_S / 2):
                ring.watch()
            self._down = self.failure
            if ring.reason is not None:
                logger.warning("流水线断了，整套重启：%s", ring.reason.what)
            self._ring = None
            self._generation += 1
            ring.stop()
        self._first.set()

    def _up(self) -> _Ring:
        """起一次，等到加载好。"""
        ring = self._starting = _Ring(self._launcher.start(self._settings), self._settings)
        try:
            if self._closing.is_set():
                raise _lost("已经停了")
            self.stages = ring.hello()
        except BaseException:
            ring.stop()
            raise
        self._ring, self._down, self._starting = ring, None, None
        return ring


def _how(member: Member) -> str | None:
    """怎么结束的；问都问不了（Ray 没有了……）也算结束了：看着的线程不能随它一起没有。"""
    try:
        return member.ended
    except Exception as error:
        return f"问不了一个 stage 怎样了：{error!r}"


def _lost(what: str) -> _RingError:
    return _RingError("DSX-E742", what, "过一会儿再来：整套 stage 自己重启")


def _restarting(what: str) -> DsxError:
    return DsxError("DSX-E743", what, "过一会儿再来；一直不好就看 stage 进程印出的话")


def _told(frame: Frame) -> DsxError:
    """stage 说的错误。"""
    code, what = frame.meta.get("code"), str(frame.meta["what"])
    if not isinstance(code, str) or code not in ERRORS:
        return DsxError("DSX-E744", what, "看 stage 进程印出的话")
    return DsxError(code, what, str(frame.meta["todo"]))
