"""解码一步的 CUDA graph：同一次 :class:`~deepseek_export.backend.tensorrt.engine.Call` 连着出现两次就录下，以后重放。

照 NVIDIA 的说明（TensorRT 文档 CUDA Graphs 一节）：

1. 换过形状之后的头一次执行要更新上下文的内部状态，不能录。所以先照常执行一次，结果就用它的，紧接着录，不启动。
2. graph 与录它的上下文绑在一起，那个上下文再改动，重放就没有定义。所以每种形状一个专用的上下文，只在重录之前改动。
3. 录不了不影响结果：说明原因（``notes``），以后都照常执行。
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from deepseek_export.errors import DsxError

if TYPE_CHECKING:
    from deepseek_export.backend.tensorrt.engine import Call, LoadedEngine

_PROFILE = "decode"


@dataclass
class _Slot:
    """一种形状：上一次是哪次调用；录了没有、录的是哪次、用的哪个上下文。"""

    last: Call | None = None
    captured: Call | None = None
    graph: Any = None
    context: Any = None


class Replayer:
    """按 :class:`~deepseek_export.backend.tensorrt.engine.Call` 执行一个引擎；解码配置的能重放就重放。

    Args:
        engine: 加载好的引擎；它的 ``contexts`` 用来照常执行。

    Attributes:
        notes: CUDA graph 用不了时的一句说明。
    """

    def __init__(self, engine: LoadedEngine) -> None:
        self._engine = engine
        self._slots: dict[tuple, _Slot] = {}
        self.notes: tuple[str, ...] = ()

    def run(self, call: Call) -> None:
        """在流上执行一次，不等它做完。

        Raises:
            DsxError: ``DSX-E914`` / ``DSX-E916``，执行失败。
        """
        if call.profile != _PROFILE or self.notes:
            self._engine.run(self._engine.contexts[call.profile], call)
            return
        slot = self._slots.setdefault(call.shapes, _Slot())
        repeated, slot.last = slot.last == call, call
        if slot.captured == call:
            self._engine.cuda.launch(slot.graph)
        elif repeated:
            self._capture(slot, call)
        else:
            self._engine.run(self._engine.contexts[call.profile], call)

    def _capture(self, slot: _Slot, call: Call) -> None:
        """照常执行一次，再录下同样的一次。"""
        try:
            slot.context = slot.context or self._engine.create_context(call.profile, fixed_kernels=True)
        except DsxError as error:
            self._give_up(error)
            self._engine.run(self._engine.contexts[call.profile], call)
            return
        self._discard(slot)
        self._engine.run(slot.context, call)
        try:
            slot.graph, slot.captured = self._engine.capture(slot.context, call.profile), call
        except DsxError as error:
            self._give_up(error)

    def _give_up(self, error: DsxError) -> None:
        self.notes = (f"没有用 CUDA graph，解码较慢：{error.what}（{error.todo}）",)
        for slot in self._slots.values():
            self._discard(slot)
        self._slots.clear()

    def _discard(self, slot: _Slot) -> None:
        if slot.captured is not None:
            self._engine.cuda.discard(slot.graph)
            slot.graph = slot.captured = None

    def __del__(self) -> None:
        for slot in self._slots.values():
            self._discard(slot)
