"""``cuda.py`` 与 ``replay.py`` 在真的驱动上：引擎是替身，它的一次执行是流上的一次设备内拷贝。"""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from deepseek_export.backend.tensorrt.cuda import Cuda
from deepseek_export.backend.tensorrt.replay import Replayer

_STEPS, _SIZE = 6, 4096


class _Call(NamedTuple):
    """重放认的是它相不相等：见 :class:`~deepseek_export.backend.tensorrt.engine.Call`。"""

    profile: str
    shapes: tuple[tuple[str, tuple[int, ...]], ...]
    addresses: tuple[tuple[str, int], ...]


class _Engine:
    """一个引擎要有的几样。"""

    def __init__(self, cuda: Cuda) -> None:
        self.cuda, self.contexts = cuda, {"decode": SimpleNamespace(call=None)}
        self.executed = 0

    def create_context(self, profile: str, *, fixed_kernels: bool) -> Any:
        """一个专用的上下文。"""
        return SimpleNamespace(call=None, profile=profile, fixed_kernels=fixed_kernels)

    def run(self, context: Any, call: _Call) -> None:
        """照常执行。"""
        context.call = call
        self.executed += 1
        self._execute(call)

    def capture(self, context: Any, profile: str) -> Any:
        """录下刚执行过的那一次。"""
        assert context.profile == profile
        return self.cuda.capture(lambda: self._execute(context.call))

    def _execute(self, call: _Call) -> None:
        addresses = dict(call.addresses)
        self.cuda.copy(addresses["source"], addresses["target"], _SIZE)


def replay_on_two_threads() -> dict[str, Any]:
    """同一次调用走几步，内容步步不同，结果须步步跟上；后几步在另一个线程。执行两次之后都是重放。

    Returns:
        ``ok``、照常执行了几次、录不了的说明。
    """
    cuda = Cuda()
    engine: Any = _Engine(cuda)
    replayer = Replayer(engine)
    source, target = cuda.allocate(_SIZE), cuda.allocate(_SIZE)
    call: Any = _Call("decode", (("source", (_SIZE,)),), (("source", source), ("target", target)))
    right: list[int] = []

    def step(number: int) -> None:
        sent, got = np.full(_SIZE, number + 1, np.uint8), np.zeros(_SIZE, np.uint8)
        cuda.upload(source, sent)
        cuda.clear(target, _SIZE)
        replayer.run(call)
        cuda.download(got, target)
        cuda.synchronize()
        if np.array_equal(sent, got):
            right.append(number)

    for number in range(_STEPS // 2):
        step(number)
    other = threading.Thread(target=lambda: list(map(step, range(_STEPS // 2, _STEPS))))
    other.start()
    other.join()
    notes, executed = list(replayer.notes), engine.executed
    cuda.free(source)
    cuda.free(target)
    ok = right == list(range(_STEPS)) and not notes and executed == 2
    return {"ok": ok, "right_steps": right, "executed": executed, "notes": notes}
