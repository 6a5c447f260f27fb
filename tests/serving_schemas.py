"""约束输出与工具的测试共用的 schema、请求与读法。"""

from __future__ import annotations

from pydantic import BaseModel, Field

from deepseek_export.serving.http.schemas import ChatRequest

#: 参数都短：小模型会一直写下去。
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "一个城市的天气",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "enum": ["杭州", "北京"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 7},
            },
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"enum": ["孔子", "孟子"]},
        "age": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


class Person(BaseModel):
    """给 LangChain 与 ``parse`` 的。"""

    name: str = Field(pattern="^[a-z]{1,4}$")
    age: int = Field(ge=0, le=99)


def called(message: dict) -> list[dict]:
    return [call["function"] for call in message.get("tool_calls", ())]


def chat_request(body: dict) -> ChatRequest:
    return ChatRequest.model_validate(body)
