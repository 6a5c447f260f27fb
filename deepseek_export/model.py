"""加载好的模型：``dsx.load`` 给出的对象，生成、流式、对话、logits 都从它开始。"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from hashlib import sha256
from typing import Any, Self, TypedDict, Unpack
from weakref import WeakSet

import numpy as np

from deepseek_export.backend import backend_named
from deepseek_export.backend.base import Backend
from deepseek_export.bundle import Bundle, BundleWeights, Manifest
from deepseek_export.checkpoint import stop_token_ids
from deepseek_export.errors import DsxError
from deepseek_export.runtime import (
    BundleTokenizer,
    GenerationResult,
    Generator,
    SamplingParams,
    TextStream,
    open_session,
    open_speculative,
)
from deepseek_export.runtime.generate import check_positive
from deepseek_export.runtime.prompts import prompt_row, prompt_rows
from deepseek_export.runtime.stop import stop_list
from deepseek_export.serving import Conversation, Engine, EngineSettings


class SamplingOptions(TypedDict, total=False):
    """``generate``、``stream``、``chat`` 的采样参数：就是 :class:`~deepseek_export.runtime.SamplingParams` 的字段，都可以不给。"""

    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int | None
    presence_penalty: float
    frequency_penalty: float
    repetition_penalty: float
    min_tokens: int
    logit_bias: Mapping[int, float]
    allowed_token_ids: Sequence[int] | None
    logprobs: int | None


class CompiledModel:
    """加载好的 bundle。

    用完可以 :meth:`close`，也可以写成 ``with``；不关的，没有人用了就放掉。几个线程、几段对话、几个流可以一起用，一次走一步。

    Attributes:
        bundle: 打开的 bundle；``trt`` 时是引擎由之建成的那个，见 :mod:`deepseek_export.engine.derived`。
        tokenizer: 没有 tokenizer 的检查点为 ``None``。
        session: 主模型的会话。
        generator: 逐个 token 解码的生成器。
        speculative: 投机解码的生成器，与 ``generator`` 共用主模型；bundle 没有草稿模型时为 ``None``。
    """

    def __init__(
        self,
        bundle: Bundle,
        threads: int | None = None,
        backend: str | Backend = "ort",
        speculative_floor: bool = True,
    ) -> None:
        if threads is not None:
            check_positive("threads", threads)
        chosen = backend_named(backend) if isinstance(backend, str) else backend
        self.bundle = bundle = chosen.prepared(bundle)
        self._backend, self._engines = chosen.name, WeakSet[Engine]()
        with bundle.steady():
            eos = stop_token_ids(bundle.path, bundle.manifest.model)
            self.tokenizer = BundleTokenizer.load(bundle.path)
            weights = BundleWeights(bundle)
            self.session = open_session(chosen, bundle, weights, threads)
            self.generator = Generator(self.session, self.tokenizer, eos, self.session.limits.prefill_chunk)
            self.speculative = open_speculative(
                chosen, bundle, weights, self.session, self.tokenizer, threads, speculative_floor
            )

    @property
    def manifest(self) -> Manifest:
        """bundle 的 manifest。"""
        return self.bundle.manifest

    def encode(self, text: str, chat: bool = False) -> list[int]:
        """文本 → token id。

        Raises:
            DsxError: ``DSX-E514``，bundle 没有 tokenizer；``DSX-E502``，没有聊天模板而 ``chat=True``。
        """
        tokenizer = self._needs_tokenizer("直接给 token id（--ids 1,2,3）")
        if chat:
            text = tokenizer.apply_chat_template([{"role": "user", "content": text}])
        return tokenizer.encode(text)

    def generate(
        self,
        prompts: str | Sequence[str] | Sequence[Sequence[int]],
        max_new_tokens: int = 64,
        *,
        n: int = 1,
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool = False,
        chat: bool = False,
        on_token: Callable[[int, int], None] | None = None,
        speculative: bool | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> GenerationResult:
        """生成。

        Args:
            prompts: 一条文本、多条文本，或多条 token id 序列（长度可以不等）。
            max_new_tokens: 每条至多生成多少个 token。
            n: 每条提示词要几个回答：第 i 条的回答是结果的第 ``i*n`` 到 ``i*n+n-1`` 行，种子各不相同。
            stop: 停止串，一个或几个：一行的文本里出现任何一个就停，文本到它之前为止。
            ignore_eos: 遇到 EOS 不停。
            chat: 套用聊天模板；只能套在文本上，每条是用户的一句话。
            on_token: 每个新 token 回调 ``(行号, token id)``。
            speculative: 是否投机解码；``None`` 表示 bundle 带草稿模型就投机，``False`` 表示逐个 token 解码。
            **sampling: 温度、惩罚、对数概率……，见 :class:`~deepseek_export.runtime.SamplingParams`；缺省为 greedy。

        Raises:
            DsxError: 5xx；``prompts`` 的写法不对为 ``DSX-E702``；``speculative=True`` 而 bundle 没有草稿模型为 ``DSX-E517``。
        """
        check_positive("n", n)
        generator = self._generator(speculative)
        ids = [self._ids(row, chat) for row in prompt_rows(prompts, chat)]
        return generator.generate(
            [row for row in ids for _ in range(n)],
            max_new_tokens,
            SamplingParams(**sampling),
            on_token=on_token,
            ignore_eos=ignore_eos,
            stop=stop_list(stop),
        )

    def stream(
        self,
        prompt: str | Sequence[int],
        max_new_tokens: int = 64,
        *,
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool = False,
        chat: bool = False,
        speculative: bool | None = None,
        **sampling: Unpack[SamplingOptions],
    ) -> TextStream:
        """一条提示词的文本，边生成边给：``for piece in model.stream("床前明月光"): ...``。

        参数现在就核对，取第一段的时候才开始算；不再取就不再算。取完之后 ``result`` 是整个结果，与 :meth:`generate` 的相同。

        Args:
            prompt: 一条文本，或一串 token id。
            max_new_tokens, stop, ignore_eos, chat, speculative, **sampling: 同 :meth:`generate`。

        Raises:
            DsxError: 同 :meth:`generate`；``DSX-E514``，bundle 没有 tokenizer。
        """
        tokenizer = self._needs_tokenizer("用 generate，它给 token id")
        params, stops = SamplingParams(**sampling), stop_list(stop)
        ids = self._ids(prompt_row(prompt, chat), chat)
        steps = self._generator(speculative).steps(
            [ids], max_new_tokens, params, ignore_eos=ignore_eos, stop=stops
        )
        return TextStream(steps, tokenizer, stops, params.min_tokens)

    def chat(
        self,
        system: str | None = None,
        *,
        max_new_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        ignore_eos: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> Chat:
        """开始一段对话：记着说过的话，上文的缓存不重算。用完要关，也可以写成 ``with``。

        Args:
            system: 系统提示词，没有就不给。
            max_new_tokens: 一个回答至多几个新 token；``None`` 到上下文用完为止。
            stop, ignore_eos, **sampling: 同 :meth:`generate`。

        Raises:
            DsxError: ``DSX-E514``，没有 tokenizer；``DSX-E502`` / ``DSX-E503``，没有聊天模板，或渲染不了；``DSX-E504``、``DSX-E512``，
                参数不对；``DSX-E522``，模型关了。
        """
        if max_new_tokens is not None:
            check_positive("max_new_tokens", max_new_tokens)
        tokenizer = self._needs_tokenizer("用带 tokenizer.json 的检查点导出")
        params, stops = SamplingParams(**sampling), stop_list(stop)
        engine = self.engine(EngineSettings(slots=1))
        try:
            return Chat(
                engine,
                tokenizer=tokenizer,
                sampling=params,
                max_new_tokens=max_new_tokens,
                stops=stops,
                ignore_eos=ignore_eos,
                system=system,
            )
        except BaseException:
            engine.close(drain=False)
            raise

    def logits(self, prompt: str | Sequence[int]) -> np.ndarray:
        """每个位置的 logits，不生成。

        Args:
            prompt: 一条文本，或一串 token id。

        Returns:
            ``[n, V]`` float32；第 i 行预测第 i+1 个 token。

        Raises:
            DsxError: ``DSX-E510`` / ``DSX-E511`` / ``DSX-E509``，没有 token、过长、token id 越界；``DSX-E702``，写法不对。
        """
        return self.generator.logits([self._ids(prompt_row(prompt, False), False)])[0]

    def hidden(self, prompt: str | Sequence[int]) -> np.ndarray:
        """每个位置过了末尾归一化的 hidden，乘上输出层就是 logits。

        Args:
            prompt: 一条文本，或一串 token id。

        Returns:
            ``[n, D]`` float32。

        Raises:
            DsxError: ``DSX-E519``，图里没有它：带草稿模型（MTP）的 bundle 才有；其余同 :meth:`logits`。
        """
        return self.generator.hidden([self._ids(prompt_row(prompt, False), False)])[0]

    def engine(self, settings: EngineSettings | None = None) -> Engine:
        """服务引擎：同时服务许多请求，各得各的 token 流；用完要关，模型关的时候也一起关。

        有草稿模型就投机，token 与不投机的相同。

        Raises:
            DsxError: ``DSX-E532``，参数与模型、后端不合；``DSX-E919``，TensorRT 引擎的 T 使一行没有对齐；``DSX-E522``，模型关了。
        """
        one = self.speculative
        engine = Engine(
            self.session,
            self.generator.eos_token_ids,
            settings,
            () if one is None else one.drafts,
            0 if one is None else one.num_draft_tokens,
            sha256(self.manifest.model_dump_json().encode()).hexdigest(),
        )
        self._engines.add(engine)
        return engine

    def close(self) -> None:
        """放掉权重与缓存；对话与引擎先停下，没有做完的不做了。之后再用是 ``DSX-E522``；可以调几次。"""
        for engine in list(self._engines):
            engine.close(drain=False)
        for session in (self.session, *(self.speculative.drafts if self.speculative else ())):
            session.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        made, model = self.manifest, self.manifest.model
        kind = (
            f"{model.family} {model.num_hidden_layers} 层，{made.profile.name}，{made.target}，{made.dtype}"
        )
        drafts = "" if self.speculative is None else f"，每次至多 {self.speculative.num_draft_tokens} 个草稿"
        return f"<CompiledModel {self.bundle.path}：{kind}，后端 {self._backend}{drafts}>"

    def _ids(self, row: str | list[int], chat: bool) -> list[int]:
        return self.encode(row, chat) if isinstance(row, str) else row

    def _needs_tokenizer(self, todo: str) -> BundleTokenizer:
        if self.tokenizer is None:
            raise DsxError("DSX-E514", f"{self.bundle.path} 没有 tokenizer", todo)
        return self.tokenizer

    def _generator(self, speculative: bool | None) -> Generator:
        if speculative is False or (speculative is None and self.speculative is None):
            return self.generator
        if self.speculative is None:
            raise DsxError(
                "DSX-E517",
                f"{self.bundle.path} 没有草稿模型",
                "用 --set mtp.enabled=true 重新导出，或去掉 speculative=True",
            )
        return self.speculative


class Chat(Conversation):
    """:meth:`CompiledModel.chat` 给出的对话：``say`` 问一句、等整个答案，``ask`` 边生成边给。用完要关，也可以写成 ``with``。

    Args:
        engine: 只给这段对话用的引擎，一起关。
        **options: 见 :class:`~deepseek_export.serving.Conversation`。
    """

    def __init__(self, engine: Engine, **options: Any) -> None:
        super().__init__(engine, **options)
        self._own = engine

    def say(self, text: str) -> str:
        """问一句，等它答完；答案里没有思考。

        Raises:
            DsxError: 同 :meth:`~deepseek_export.serving.Conversation.ask`。
        """
        return "".join(parts.content for parts in self.ask(text))

    def close(self) -> None:
        """放掉缓存，之后不能再问（``DSX-E531``）；说过的话还在 ``messages`` 里。可以调几次。"""
        self._own.close(drain=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<Chat：说过 {len(self.messages)} 句>"
