"""正在服务的模型，以及服务走到了哪一步：加载中、就绪、停了。"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field

from deepseek_export.errors import DsxError
from deepseek_export.formats.grammar import Grammar
from deepseek_export.runtime import BundleTokenizer, ModelSession
from deepseek_export.runtime.generate import checked_prompt
from deepseek_export.serving import Engine
from deepseek_export.serving.http.formats import ModelFormats, Reading
from deepseek_export.serving.http.health import Pulse
from deepseek_export.serving.http.problems import ApiError
from deepseek_export.serving.http.schemas import ChatRequest, CompletionRequest, Message, Sampled
from deepseek_export.serving.http.turn import Order


@dataclass(frozen=True)
class ServedModel:
    """一个加载好、引擎已经开着的模型。

    Attributes:
        name: 请求里的 ``model``。
        tokenizer: 分词器。
        session: 主模型；归引擎用，这里只看它的长度与词表。
        engine: 服务引擎。
        formats: 提示词与回答的格式。
        pulse: 引擎还行不行。
        created: 开始服务的 Unix 时间，秒。
    """

    name: str
    tokenizer: BundleTokenizer
    session: ModelSession
    engine: Engine
    formats: ModelFormats
    pulse: Pulse
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
        """试跑过：之后才算就绪；不成就关掉引擎。

        Raises:
            DsxError: ``DSX-E514``，bundle 没有 tokenizer；模型跑不了的原因。
        """
        try:
            if tokenizer is None:
                what = "bundle 没有 tokenizer，不能收发文本"
                raise DsxError("DSX-E514", what, "用带 tokenizer.json 的检查点导出")
            pulse = Pulse(engine, [tokenizer.bos_id or 0])
            pulse.try_out().result()
        except BaseException:
            engine.close(drain=False)
            raise
        formats = ModelFormats(tokenizer, session.vocab_size, engine.eos_token_ids, tool_parser)
        return cls(name, tokenizer, session, engine, formats, pulse)

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
        return self._orders(body, prompts, body.budget, None, grammar, echo=bool(body.echo))

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
        echo: bool = False,
    ) -> list[Order]:
        if not prompts:
            raise DsxError("DSX-E510", "prompt 是空的列表", "至少给一条提示词")
        # 全部核对过才交给引擎：有一条太长，别的也一个 token 都不算。
        for number, prompt in enumerate(prompts):
            checked_prompt(self.session, prompt, f"第 {number} 条提示词", self.context)
        for name, tokens in body.token_fields.items():
            for token in tokens:
                if token >= self.session.vocab_size:
                    what = f"{name} 里的 {token} 不在词表里，词表有 {self.session.vocab_size} 个"
                    raise ApiError(400, what, param=name)
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
                echo=self.tokenizer.decode(prompt) if echo else "",
            )
            for prompt in prompts
            for copy, sampling in enumerate(body.sampling())
        ]


class Service:
    """HTTP 这一层看到的服务。

    Attributes:
        models: 名字 → 模型；加载中是空的，全部就绪了一起放进来。
    """

    def __init__(self) -> None:
        self.models: Mapping[str, ServedModel] = {}

    def ready(self) -> Mapping[str, ServedModel]:
        """就绪了的模型。

        Raises:
            ApiError: 503，还在加载。
        """
        if not self.models:
            # 一个字不差：llama.cpp 的客户端与探针认得这个回答。
            raise ApiError(503, "Loading model", code=503)
        return self.models

    def healthy(self) -> None:
        """全部就绪，引擎都好好的；见 :class:`~deepseek_export.serving.http.health.Pulse`。

        Raises:
            ApiError: 503，还在加载，或有一个引擎不行了。
        """
        troubles = {name: model.pulse.trouble() for name, model in self.ready().items()}
        bad = [f"{name!r} {trouble}" for name, trouble in troubles.items() if trouble is not None]
        if bad:
            raise ApiError(503, f"服务引擎 {'；'.join(bad)}", code="engine_dead")

    def named(self, name: str | None) -> ServedModel:
        """请求里 ``model`` 指的那个；没有给就是唯一的那个。

        Raises:
            ApiError: 404，没有这个模型；400，没有给而有好几个；503，还在加载。
        """
        models = self.ready()
        if name is None:
            if len(models) > 1:
                what = f"没有给 model，而这里有 {'、'.join(map(repr, models))}：写上是哪一个"
                raise ApiError(400, what, param="model")
            return next(iter(models.values()))
        if name not in models:
            what = f"没有模型 {name!r}，这里只有 {'、'.join(map(repr, models))}"
            raise ApiError(404, what, param="model", code="model_not_found")
        return models[name]

    def close(self, timeout: float | None = None) -> None:
        """关掉全部的引擎，没有做完的都取消；每个至多等 ``timeout`` 秒。"""
        for model in self.models.values():
            model.engine.close(drain=False, timeout=0)  # 先都说一声，再一个一个地等
        for model in self.models.values():
            model.engine.close(drain=False, timeout=timeout)
