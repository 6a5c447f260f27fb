"""正在服务的模型，以及服务走到了哪一步：加载中、就绪、停了。"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from deepseek_export.errors import DsxError
from deepseek_export.formats.grammar import Grammar
from deepseek_export.runtime import BundleTokenizer, ModelSession
from deepseek_export.runtime.generate import checked_prompt
from deepseek_export.serving import Engine
from deepseek_export.serving.http.formats import ModelFormats, Reading
from deepseek_export.serving.http.problems import ApiError
from deepseek_export.serving.http.schemas import ChatRequest, CompletionRequest, Message, Sampled
from deepseek_export.serving.http.turn import Order

#: 试跑的那个请求不与别人共用前缀。
_WARM_UP_SALT = "dsx:warm-up"


@dataclass(frozen=True)
class ServedModel:
    """一个加载好、引擎已经开着的模型。

    Attributes:
        name: 请求里的 ``model``。
        tokenizer: 分词器。
        session: 主模型；归引擎用，这里只看它的长度与词表。
        engine: 服务引擎。
        formats: 提示词与回答的格式。
        created: 开始服务的 Unix 时间，秒。
    """

    name: str
    tokenizer: BundleTokenizer
    session: ModelSession
    engine: Engine
    formats: ModelFormats
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def open(
        cls,
        name: str,
        tokenizer: BundleTokenizer | None,
        session: ModelSession,
        engine: Engine,
        tool_parser: str | None = None,
    ) -> ServedModel:
        """试跑一个 token：之后才算就绪；不成就关掉引擎。

        Raises:
            DsxError: ``DSX-E514``，bundle 没有 tokenizer；模型跑不了的原因。
        """
        try:
            if tokenizer is None:
                what = "bundle 没有 tokenizer，不能收发文本"
                raise DsxError("DSX-E514", what, "用带 tokenizer.json 的检查点导出")
            request = engine.submit(
                [tokenizer.bos_id or 0], max_new_tokens=1, ignore_eos=True, cache_salt=_WARM_UP_SALT
            )
            request.result()
        except BaseException:
            engine.close(drain=False)
            raise
        formats = ModelFormats(tokenizer, session.vocab_size, engine.eos_token_ids, tool_parser)
        return cls(name, tokenizer, session, engine, formats)

    @property
    def context(self) -> int:
        """提示词加新 token 至多几个。"""
        return self.engine.settings.context

    def completion_orders(self, body: CompletionRequest) -> list[Order]:
        """``/v1/completions`` 要的回答：每条提示词依次 ``n`` 个。要分词，会占住线程。

        Raises:
            DsxError: 提示词为空、过长、token id 越界。
            ApiError: 400，采样参数不对，或一次要得太多。
        """
        prompts = [
            self.tokenizer.encode(prompt) if isinstance(prompt, str) else prompt for prompt in body.prompts
        ]
        grammar = self.formats.grammar(body.constraint(), None, "")
        return self._orders(body, prompts, body.budget, None, grammar)

    def chat_orders(self, body: ChatRequest) -> list[Order]:
        """``/v1/chat/completions`` 要的 ``n`` 个回答。要套模板、分词，会占住线程。

        Raises:
            DsxError: 模板渲染不了，或提示词过长。
            ApiError: 400，采样参数不对，或用到还没有做的字段。
        """
        text = self.formats.text(body)
        prompts, budget = [self.tokenizer.encode(text)], body.budget or self.context
        grammar = self.formats.grammar(body.constraint(), body, text)
        return self._orders(body, prompts, budget, self.formats.reading(body, text), grammar)

    def chat_text(self, messages: list[Message]) -> str:
        """对话套上模板。

        Raises:
            DsxError: ``DSX-E502`` / ``DSX-E503``，没有聊天模板，或渲染失败。
        """
        return self.formats.text(ChatRequest(messages=messages))

    def _orders(
        self,
        body: Sampled,
        prompts: list[list[int]],
        budget: int,
        reading: Reading | None,
        grammar: Grammar | None,
    ) -> list[Order]:
        if not prompts:
            raise DsxError("DSX-E510", "prompt 是空的列表", "至少给一条提示词")
        # 全部核对过才交给引擎：有一条太长，别的也一个 token 都不算。
        for number, prompt in enumerate(prompts):
            checked_prompt(self.session, prompt, f"第 {number} 条提示词", self.context)
        for token in body.stop_token_ids or ():
            if token >= self.session.vocab_size:
                what = f"stop_token_ids 里的 {token} 不在词表里，词表有 {self.session.vocab_size} 个"
                raise ApiError(400, what, param="stop_token_ids")
        wanted, settings = len(prompts) * body.choices, self.engine.settings
        if wanted > settings.queue:
            what = f"一个请求要 {wanted} 个回答，排队的上限是 {settings.queue}：分成几个请求"
            raise ApiError(400, what, param="n" if body.choices > 1 else "prompt")
        return [
            Order(
                prompt=prompt,
                sampling=sampling,
                max_new_tokens=budget,
                stops=body.stops,
                stop_token_ids=body.stop_token_ids or (),
                ignore_eos=bool(body.ignore_eos),
                cache_salt=body.cache_salt or "",
                copy=copy,
                reading=reading,
                grammar=grammar,
            )
            for prompt in prompts
            for copy, sampling in enumerate(body.sampling())
        ]


class Service:
    """HTTP 这一层看到的服务。

    Attributes:
        model: 就绪了的模型；加载中为 ``None``。
    """

    def __init__(self) -> None:
        self.model: ServedModel | None = None

    def ready(self) -> ServedModel:
        """就绪了的模型。

        Raises:
            ApiError: 503，还在加载。
        """
        if self.model is None:
            # 一个字不差：llama.cpp 的客户端与探针认得这个回答。
            raise ApiError(503, "Loading model", code=503)
        return self.model

    def healthy(self) -> ServedModel:
        """就绪而且引擎活着的模型。

        Raises:
            ApiError: 503，还在加载，或引擎不行了。
        """
        model = self.ready()
        if not model.engine.healthy:
            failure = model.engine.failure
            # 探针不要密钥：只说是哪一种，不说内部错误的原文。
            kind = failure.code if isinstance(failure, DsxError) else type(failure).__name__
            reason = "已经关闭" if failure is None else f"出错：{kind}"
            raise ApiError(503, f"服务引擎{reason}", code="engine_dead")
        return model

    def named(self, name: str | None) -> ServedModel:
        """请求里 ``model`` 指的那个；没有给就是唯一的那个。

        Raises:
            ApiError: 404，没有这个模型；503，还在加载。
        """
        model = self.ready()
        if name is not None and name != model.name:
            what = f"没有模型 {name!r}，这里只有 {model.name!r}"
            raise ApiError(404, what, param="model", code="model_not_found")
        return model

    def close(self, timeout: float | None = None) -> None:
        """关掉引擎，没有做完的都取消；至多等 ``timeout`` 秒。"""
        if self.model is not None:
            self.model.engine.close(drain=False, timeout=timeout)
