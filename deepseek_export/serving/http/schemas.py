"""请求的字段。没有写在这里的都留在 ``model_extra``，由 :mod:`.unsupported` 决定拒绝还是不理会。"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt

from deepseek_export.errors import DsxError
from deepseek_export.runtime import SamplingParams
from deepseek_export.runtime.sampling import MAX_LOGPROBS
from deepseek_export.serving.http.problems import ApiError
from deepseek_export.serving.http.structured import Structured
from deepseek_export.serving.http.tools import CalledTool, Tooled
from deepseek_export.serving.http.unsupported import MESSAGE_FIELDS, REQUEST_FIELDS, refuse_unsupported

#: ``/v1/completions`` 没有给 ``max_tokens`` 时，与 OpenAI 相同。
COMPLETION_TOKENS = 16
#: 一个请求至多几个停止串、几个回答。
MAX_STOPS, MAX_CHOICES = 64, 128

TokenId = Annotated[StrictInt, Field(ge=0, lt=1 << 31)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
#: JSON 的键总是字符串。
TokenKey = Annotated[int, Field(ge=0, lt=1 << 31)]
TopCount = Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)]


#: 与 :class:`SamplingParams` 同名、同样缺省的字段，给了就照给的。
_AS_GIVEN = (
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "min_tokens",
    "logit_bias",
    "allowed_token_ids",
)


class StreamOptions(BaseModel):
    """``stream_options``。"""

    include_usage: StrictBool | None = None


class Sampled(Structured):
    """两个生成的端点共有的字段；``None`` 与没有给一样。"""

    model_config = ConfigDict(extra="allow")

    model: str | None = None
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    temperature: Number | None = None
    top_p: Number | None = None
    top_k: StrictInt | None = None
    min_p: Number | None = None
    presence_penalty: Number | None = None
    frequency_penalty: Number | None = None
    repetition_penalty: Number | None = None
    min_tokens: StrictInt | None = None
    logit_bias: dict[TokenKey, Number] | None = None
    allowed_token_ids: list[TokenId] | None = None
    seed: StrictInt | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    stop_token_ids: list[TokenId] | None = None
    ignore_eos: StrictBool | None = None
    n: Annotated[StrictInt, Field(ge=1, le=MAX_CHOICES)] | None = None
    stream: StrictBool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None
    cache_salt: str | None = None

    @property
    def stops(self) -> list[str]:
        """停止串。"""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []

    @property
    def choices(self) -> int:
        """每条提示词要几个回答。"""
        return self.n or 1

    @property
    def scored(self) -> int | None:
        """每个 token 另要最可能的几个的对数概率；``None`` 不要。"""
        return None

    @property
    def token_fields(self) -> Mapping[str, Iterable[int]]:
        """写着 token id 的字段。"""
        fields = {"stop_token_ids": self.stop_token_ids, "logit_bias": self.logit_bias}
        return {
            name: ids or () for name, ids in (*fields.items(), ("allowed_token_ids", self.allowed_token_ids))
        }

    @property
    def include_usage(self) -> bool:
        """流式的最后要不要另发一块用量。"""
        return bool(self.stream_options and self.stream_options.include_usage)

    def sampling(self) -> list[SamplingParams]:
        """每个回答的采样参数：第 i 个的种子是 ``seed + i``，与批量生成的第 i 行相同。

        没有给的照 OpenAI 的缺省：``temperature`` 与 ``top_p`` 都是 1。

        Raises:
            ApiError: 400，取值不在允许范围内。
        """
        given = {name: value for name in _AS_GIVEN if (value := getattr(self, name)) is not None}
        try:
            return [
                SamplingParams(
                    temperature=1.0 if self.temperature is None else self.temperature,
                    top_k=0 if self.top_k in (None, -1) else self.top_k,  # vLLM 的客户端用 -1 表示不限
                    seed=None if self.seed is None else self.seed + index,
                    logprobs=self.scored,
                    **given,
                )
                for index in range(self.choices)
            ]
        except DsxError as error:
            raise ApiError.of(error) from error

    def checked(self) -> Self:
        """还没有做的字段有没有给。

        Raises:
            ApiError: 400。
        """
        refuse_unsupported(self.model_extra or {}, REQUEST_FIELDS)
        if self.stream_options is not None and not self.stream:
            raise ApiError(400, "stream_options 只能与 stream=true 一起给", param="stream_options")
        return self


class CompletionRequest(Sampled):
    """``POST /v1/completions``。"""

    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    logprobs: TopCount | None = None
    echo: StrictBool | None = None

    @property
    def scored(self) -> int | None:
        """``logprobs`` 就是要几个。"""
        return self.logprobs

    def checked(self) -> Self:
        """另外，提示词自己的对数概率还没有。"""
        if self.echo and self.logprobs is not None:
            raise ApiError(400, "echo 与 logprobs 不能一起给：没有提示词的对数概率", param="echo")
        return super().checked()

    @property
    def prompts(self) -> list[str | list[int]]:
        """一条一条的提示词。"""
        if isinstance(self.prompt, str):
            return [self.prompt]
        ids = [part for part in self.prompt if isinstance(part, int)]
        return [ids] if ids else [part for part in self.prompt if not isinstance(part, int)]

    @property
    def budget(self) -> int:
        """至多几个新 token。"""
        return self.max_tokens or COMPLETION_TOKENS


class TextPart(BaseModel):
    """消息里的一段文字；图片、声音的段不认得，会被拒绝。"""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    """一条消息。"""

    model_config = ConfigDict(extra="allow")

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    tool_calls: list[CalledTool] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None

    @property
    def text(self) -> str:
        """``content`` 的文字；几段各占一行。"""
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""

    def as_template(self, where: str) -> dict[str, Any]:
        """聊天模板里的样子。``developer`` 是 OpenAI 给 ``system`` 的新名字；思考的两个名字都认。

        Raises:
            ApiError: 400，用到还没有做的字段；不是助手而没有 ``content``。
        """
        refuse_unsupported(self.model_extra or {}, MESSAGE_FIELDS, where)
        if self.content is None and self.role != "assistant":
            raise ApiError(400, f"{where}content 没有给", param=f"{where}content")
        role = "system" if self.role == "developer" else self.role
        made = {**(self.model_extra or {}), "role": role, "content": self.text}
        # 模板以“有没有这个键”来分：没有的不给。
        if self.tool_calls and role == "assistant":
            made["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id is not None:
            made["tool_call_id"] = self.tool_call_id
        if thought := self.reasoning_content or self.reasoning:
            made |= {"reasoning_content": thought, "reasoning": thought}
        return made


Messages = Annotated[list[Message], Field(min_length=1)]


def as_template(messages: list[Message]) -> list[dict[str, Any]]:
    """一组消息在聊天模板里的样子。

    Raises:
        ApiError: 400，同 :meth:`Message.as_template`。
    """
    return [message.as_template(f"messages.{at}.") for at, message in enumerate(messages)]


#: 聊天模板自己的变量，不能由请求给。
_OWN_VARIABLES = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


class ChatRequest(Tooled, Sampled):
    """``POST /v1/chat/completions``。"""

    messages: Messages
    max_completion_tokens: Annotated[StrictInt, Field(ge=1)] | None = None
    logprobs: StrictBool | None = None
    top_logprobs: TopCount | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    reasoning_effort: str | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool | None = None

    @property
    def scored(self) -> int | None:
        """``logprobs`` 要不要，``top_logprobs`` 要几个。"""
        return (self.top_logprobs or 0) if self.logprobs else None

    def checked(self) -> Self:
        """见 :meth:`Sampled.checked`；另看几个字段合不合。

        Raises:
            ApiError: 400。
        """
        super().checked()
        if self.top_logprobs and not self.logprobs:
            raise ApiError(400, "top_logprobs 只能与 logprobs=true 一起给", param="top_logprobs")
        self.checked_tools()
        _ = self.forced
        if self.continue_final_message and self.add_generation_prompt:
            what = "continue_final_message 与 add_generation_prompt 不能都是 true"
            raise ApiError(400, what, param="continue_final_message")
        own = _OWN_VARIABLES & set(self.chat_template_kwargs or ())
        if own:
            what = f"chat_template_kwargs 里不能有 {'、'.join(sorted(own))}"
            raise ApiError(400, what, param="chat_template_kwargs")
        return self

    @property
    def budget(self) -> int | None:
        """至多几个新 token；``None`` 是到模型的最大长度为止。"""
        return self.max_completion_tokens or self.max_tokens


class TokenizeRequest(BaseModel):
    """``POST /tokenize``：文本，或者对话。"""

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None


class DetokenizeRequest(BaseModel):
    """``POST /detokenize``。"""

    model: str | None = None
    tokens: list[TokenId]
