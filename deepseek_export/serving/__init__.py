"""服务：调度、连续批处理、前缀复用；从 Python 里用，HTTP 是它外面的一层薄壳。"""

from deepseek_export.serving.conversation import AnswerStats, Conversation
from deepseek_export.serving.engine import Engine
from deepseek_export.serving.request import EndReason, Request, RequestResult, Timeline
from deepseek_export.serving.settings import EngineSettings
from deepseek_export.serving.slots import SlotState
from deepseek_export.serving.stats import EngineStats

__all__ = [
    "AnswerStats",
    "Conversation",
    "EndReason",
    "Engine",
    "EngineSettings",
    "EngineStats",
    "Request",
    "RequestResult",
    "SlotState",
    "Timeline",
]
