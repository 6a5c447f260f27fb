"""stage 进程：打开自己的 bundle，从上一个收、算、交给下一个。

    python -m deepseek_export.cluster.stage SPEC

SPEC 是 :class:`StageSpec` 的 JSON，由起它的那一端给；两条信道是继承来的套接字。上一个不在了、下一个关了、收到的帧不对，就留下原因退出：环断了，整套
重来，没有半死不活的。
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_export.backend import backend_named
from deepseek_export.backend.base import Caches, Runner, SavedRow
from deepseek_export.bundle import Bundle, BundleWeights
from deepseek_export.cluster.tls import TlsFiles, secured
from deepseek_export.cluster.wire import BEAT_S, Channel, ChannelClosed, Frame, check_size
from deepseek_export.errors import DsxError
from deepseek_export.machine import process_memory

#: 这一端的正常结束：环关了。
CLOSED = 3
_PR_SET_PDEATHSIG = 1
#: 认得的消息，各有一个同名的方法。
_OPERATIONS = frozenset({"hello", "run", "new", "ensure", "copy", "clear", "save", "fetch", "restore"})
#: 后面的 stage 用不着的输入。
_SPENT = {"input_ids", "hidden_in"}


@dataclass(frozen=True)
class StageSpec:
    """起一个 stage 要知道的。

    Attributes:
        bundle: 它的目录。
        index, count: 第几个，一共几个。
        backend, threads: 在哪里跑，几个线程。
        silence_s, start_s: 见 :class:`~deepseek_export.cluster.settings.ClusterSettings`。
        upstream, downstream: 两条信道的文件描述符。
        parent: 起它的进程；那个进程死了它也死。
        tls: 两条信道的证书、私钥、CA，见 :class:`~deepseek_export.cluster.tls.TlsFiles`；``None`` 不加密。
    """

    bundle: str
    index: int
    count: int
    backend: str
    threads: int | None
    silence_s: float
    start_s: float
    upstream: int
    downstream: int
    parent: int
    tls: Sequence[str] | None = None

    def connected(self) -> tuple[socket.socket, socket.socket]:
        """上下游的两条连接，要加密的握过手：先上游后下游，从发起的一端起一个接一个。

        Raises:
            DsxError: ``DSX-E749`` / ``DSX-E756``，没有握成。
        """
        files = None if self.tls is None else TlsFiles(*self.tls)
        coming = secured(socket.socket(fileno=self.upstream), files, True, self.start_s)
        return coming, secured(socket.socket(fileno=self.downstream), files, False, self.start_s)


class StageWorker:
    """一个 stage 的图与缓存；消息怎么到的它不管。

    Args:
        bundle: stage 的目录。
        index: 第几个。
        backend: 在哪里跑。
        threads: 线程数。

    Raises:
        DsxError: bundle 打不开，或模型加载不了。
    """

    def __init__(self, bundle: Path, index: int, backend: str, threads: int | None) -> None:
        chosen = backend_named(backend)
        opened = chosen.prepared(Bundle.open(bundle))
        with opened.steady():
            weights = BundleWeights(opened)
            self.runners: dict[str, Runner] = {
                graph.file: chosen.open(opened, graph, weights, threads) for graph in opened.manifest.graphs
            }
        self.index = index
        self._caches: dict[int, Caches] = {}
        self._kept: dict[int, SavedRow] = {}

    def answer(self, frame: Frame) -> Frame:
        """做完自己的那一份，返回要交给下一个的。

        Raises:
            DsxError: 这一步做不成；缓存照样还在。
        """
        meta = dict(frame.meta)
        for number in meta.pop("free", ()):
            self._caches.pop(number, None)
        for number in meta.pop("forget", ()):
            self._kept.pop(number, None)
        if meta["op"] not in _OPERATIONS:
            raise DsxError("DSX-E745", f"没有 {meta['op']!r} 这种消息", "两端用同一个版本的 dsx")
        handle = getattr(self, f"_{meta['op']}")
        made: Frame = handle(meta, frame.arrays)
        freed = {key: frame.meta[key] for key in ("free", "forget") if key in frame.meta}
        return Frame({**made.meta, **freed}, made.arrays)

    def _hello(self, meta: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Frame:
        memory = process_memory()
        mine = {
            "pid": os.getpid(),
            "resident": None if memory is None else memory.resident,
            "limits": {file: asdict(runner.limits) for file, runner in self.runners.items()},
            "notes": [note for runner in self.runners.values() for note in runner.notes],
        }
        return Frame({**meta, "stages": [*meta["stages"], mine]})

    def _run(self, meta: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Frame:
        runner = self.runners.get(meta["graph"])
        if runner is None:
            return Frame(meta, arrays)
        contract, caches = runner.contract, self._caches[meta["caches"]].rows(meta["start"], meta["count"])
        inner = "hidden_out" in contract.outputs
        outputs = ("hidden_out",) if inner else tuple(meta["outputs"])
        got = runner.run({name: arrays[name] for name in contract.inputs}, outputs, caches)
        if not inner:
            return Frame(meta, got)
        rest = {name: array for name, array in arrays.items() if name not in _SPENT}
        return Frame(meta, {**rest, "hidden_in": got["hidden_out"]})

    def _new(self, meta: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Frame:
        runner = self.runners.get(meta["graph"])
        if runner is None:
            return Frame(meta)
        made = self._caches[meta["caches"]] = runner.new_caches(meta["batch"], meta["needed"])
        return Frame({**meta, "capacity": made.capacity})

    def _ensure(self, meta: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Frame:
        caches = self._caches.get(meta["caches"])
        if caches is None:
            return Frame(meta)
        caches.ensure(meta["needed"])
        return Frame({**meta, "capacity": caches.capacity})

    def _copy(self, meta: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Frame:
        caches, origin = (self._caches.get(meta[key]) for key in ("caches", "origin"))
        if caches is not None and origin is not None:
            caches.copy_row(meta["source"], meta["target"], meta["length"], origin)
        return Frame(meta)

    def _clear(self, meta: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Frame:
        if (caches := self._caches.get(meta["caches"])) is not None:
            caches.clear_row(meta["row"])
        return Frame(meta)

    def _save(self, meta: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Frame:
        if (caches := self._caches.get(meta["caches"])) is not None:
            self._kept[meta["kept"]] = caches.save_row(meta["row"], meta["length"])
        return Frame(meta)

    def _fetch(self, meta: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Frame:
        mine = self._kept.get(meta["kept"], {})  # 别的图的缓存不在这个 stage
        return Frame(meta, {**arrays, **mine})

    def _restore(self, meta: dict[str, Any], arrays: Mapping[str, np.ndarray]) -> Frame:
        caches = self._caches.get(meta["caches"])
        if caches is None:
            return Frame(meta, arrays)
        own = {tensor.name for tensor in caches.spec.tensors}
        given = {name: array for name, array in arrays.items() if name in own}
        caches.restore_row(meta["row"], self._kept[meta["kept"]] if "kept" in meta else given)
        return Frame(meta, {name: array for name, array in arrays.items() if name not in own})


def serve(upstream: Channel, downstream: Channel, worker: StageWorker, silence_s: float) -> None:
    """一帧一帧地做，直到环断了。

    Raises:
        ChannelClosed: 上一个或下一个不在了。
        DsxError: ``DSX-E745``，上一个发来的帧不对。
    """
    while True:
        frame = upstream.receive()
        if frame.meta["op"] in ("failed", "fatal"):
            downstream.send(frame)
            continue
        try:
            made = worker.answer(frame)
            check_size(made)
        except DsxError as error:
            made = _refusal("failed", error, frame.meta.get("n"), worker.index)
        downstream.send(made)
        upstream.silence_s = silence_s  # 第一帧传到这里，前面的就都加载好了


def main(argv: list[str] | None = None) -> int:
    """进程的入口；返回退出码。"""
    spec = StageSpec(**json.loads((argv or sys.argv)[1]))
    _die_with(spec.parent)
    for number in (signal.SIGINT, signal.SIGTERM):  # 发给整个组的：由起它的那一端决定什么时候停
        signal.signal(number, signal.SIG_IGN)
    before = "发起的一端" if spec.index == 0 else f" stage {spec.index - 1} "
    after = "发起的一端" if spec.index == spec.count - 1 else f" stage {spec.index + 1} "
    try:
        coming, going = spec.connected()
    except DsxError as error:
        print(f"stage {spec.index}：{error}", file=sys.stderr, flush=True)
        return CLOSED
    upstream = Channel(coming, before, spec.start_s + spec.silence_s)
    downstream = Channel(going, after, spec.silence_s)
    threading.Thread(target=_beat, args=(downstream,), daemon=True).start()
    return run_stage(spec, upstream, downstream)


def run_stage(spec: StageSpec, upstream: Channel, downstream: Channel) -> int:
    """打开 bundle，一直做到环断了；为什么断的告诉下一个。返回退出码。"""
    try:
        worker = StageWorker(Path(spec.bundle), spec.index, spec.backend, spec.threads)
        serve(upstream, downstream, worker, spec.silence_s)
    except DsxError as error:
        _tell(downstream, _refusal("fatal", error, None, spec.index))
        return CLOSED
    except BaseException as error:
        _tell(downstream, Frame({"op": "fatal", "what": f"stage {spec.index}：{error!r}"}))
        raise
    return 0


def _refusal(op: str, error: DsxError, number: Any, index: int) -> Frame:
    what = f"stage {index}：{error.what}"
    return Frame({"op": op, "n": number, "code": error.code, "what": what, "todo": error.todo})


def _tell(downstream: Channel, frame: Frame) -> None:
    with contextlib.suppress(ChannelClosed):
        downstream.send(frame)


def _beat(channel: Channel) -> None:
    try:
        while True:
            channel.beat()
            time.sleep(BEAT_S / 2)
    except ChannelClosed:
        os._exit(CLOSED)  # 下一个不在了：正在算的也没有人要了


def _die_with(parent: int) -> None:
    """起它的线程一死，内核就杀掉这个进程，哪怕它停着（SIGSTOP）；别的系统没有这个调用，靠信道断了。"""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # 还没登记它就死了
        sys.exit(CLOSED)


if __name__ == "__main__":
    sys.exit(main())
