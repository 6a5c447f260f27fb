"""bundle 里的 tokenizer：编码、解码、流式解码、聊天模板。"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from tokenizers.decoders import DecodeStream

from deepseek_export.errors import DsxError
from deepseek_export.formats.dsml_prompt import render_dsml
from deepseek_export.formats.markup_calls import DSML_TOKEN
from deepseek_export.paths import MAX_LARGE_TEXT, optional_file, read_text
from deepseek_export.runtime.chat_template import render_chat_template
from deepseek_export.runtime.token_bytes import TokenBytes

_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


class TokenStream:
    """一行输出的流式解码器。一个字符可能跨几个 token，凑齐之前 ``step`` 返回空串。

    Args:
        tokenizer: Hugging Face tokenizers 的对象。
        dropped: 不算文本的特殊 token。
    """

    def __init__(self, tokenizer: Tokenizer, dropped: Set[int]) -> None:
        self._tokenizer, self._dropped = tokenizer, dropped
        self._stream = DecodeStream(skip_special_tokens=False)

    def step(self, token_id: int) -> str:
        """送入下一个 token，返回因此能确定下来的文本，可能为空串。"""
        if token_id in self._dropped:
            return ""
        return self._stream.step(self._tokenizer, token_id) or ""


class BundleTokenizer:
    """由 ``tokenizer.json`` 和 ``tokenizer_config.json`` 构成，不依赖 transformers。

    Args:
        tokenizer: Hugging Face tokenizers 的对象。
        config: ``tokenizer_config.json`` 的内容。
        chat_template: 聊天模板原文；``None`` 表示没有。

    Attributes:
        special_tokens: ``bos_token`` 等的字符串，缺的不列。
        bos_id: bos 的 id；没有 bos 时为 ``None``。
        special_ids: 解码时去掉的 token：文本 → id。
        chat_template: 聊天模板原文；没有就是 ``None``。
        source: Hugging Face tokenizers 的对象。
        bytes_of: 一个 token 是哪几个字节。
    """

    def __init__(self, tokenizer: Tokenizer, config: Mapping[str, Any], chat_template: str | None) -> None:
        self.source = self._tokenizer = tokenizer
        self.chat_template = chat_template
        self.special_ids: Mapping[str, int] = {
            token.content: number
            for number, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        # 缺这个键时以 tokenizer.json 的后处理器为准，所以要区分「缺」和 false。
        self._add_bos: bool | None = config.get("add_bos_token")
        contents = {key: _token_content(config.get(key)) for key in _SPECIAL_TOKENS}
        self.special_tokens = {key: text for key, text in contents.items() if text is not None}
        bos = self.special_tokens.get("bos_token")
        self.bos_id: int | None = None if bos is None else tokenizer.token_to_id(bos)
        self.bytes_of = TokenBytes(tokenizer)

    @classmethod
    def load(cls, directory: str | os.PathLike[str]) -> BundleTokenizer | None:
        """从目录读取。

        Returns:
            没有 ``tokenizer.json`` 时返回 ``None``。

        Raises:
            DsxError: ``DSX-E501``，文件存在但读不了，或不是普通文件。
        """
        folder = Path(directory)
        path = folder / "tokenizer.json"
        if not optional_file(path, "DSX-E501"):
            return None
        try:
            tokenizer = Tokenizer.from_str(read_text(path, MAX_LARGE_TEXT))
        except Exception as error:  # tokenizers 的 Rust 层只抛裸的 Exception
            raise _unreadable(path, error) from error
        config = _read_config(folder / "tokenizer_config.json")
        template = _read_chat_template(folder, config)
        try:
            return cls(tokenizer, config, template)
        except UnicodeEncodeError as error:
            raise _unreadable(folder / "tokenizer_config.json", error) from error

    def encode(self, text: str) -> list[int]:
        """编码成 token id。

        ``add_bos_token`` 为真时开头恰有一个 bos：文本（例如套过模板的）已经以 bos 开头就不再加。

        Raises:
            DsxError: ``DSX-E702``，文本不是合法的 Unicode（有落单的代理项）；``DSX-E501``，tokenizer.json 读得了却编码不了。
        """
        bos = self.special_tokens.get("bos_token")
        has_bos = bool(bos) and text.startswith(bos or "")
        let_postprocess = not has_bos and self._add_bos is not False
        try:
            text.encode()
            ids: list[int] = self._tokenizer.encode(text, add_special_tokens=let_postprocess).ids
        except UnicodeEncodeError as error:
            raise DsxError(
                "DSX-E702", f"提示词不是合法的 Unicode 文本：{error.reason}", "用 UTF-8 编码给出提示词"
            ) from error
        except Exception as error:  # tokenizers 的 Rust 层只抛裸的 Exception
            raise DsxError(
                "DSX-E501", f"tokenizer.json 编码不了：{error}", "重新下载这个文件，确认它是这个模型的"
            ) from error
        if self._add_bos and self.bos_id is not None and ids[:1] != [self.bos_id]:
            ids.insert(0, self.bos_id)
        return ids

    def decode(self, ids: Iterable[int], kept: Iterable[str] = ()) -> str:
        """解码成文本，去掉特殊 token，``kept`` 里的留着。"""
        dropped = self._dropped(kept)
        return self._tokenizer.decode([one for one in ids if one not in dropped], skip_special_tokens=False)

    def stream(self, kept: Iterable[str] = ()) -> TokenStream:
        """给一行输出新建一个流式解码器，``kept`` 里的特殊 token 留着。"""
        return TokenStream(self._tokenizer, self._dropped(kept))

    def has_token(self, text: str) -> bool:
        """词表里有没有这个 token。"""
        return self._tokenizer.token_to_id(text) is not None

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        tools: Sequence[Mapping[str, Any]] = (),
        extra: Mapping[str, Any] | None = None,
    ) -> str:
        """把对话套进聊天模板；结果可以直接交给 :meth:`encode`，bos 不会加两次。

        没有模板而词表里有 ``｜DSML｜`` 的是 DeepSeek-V3.2：用 :mod:`deepseek_export.formats.dsml_prompt` 的编码。

        Args:
            messages: ``{"role": ..., "content": ...}`` 的序列。
            add_generation_prompt: 是否在末尾加上助手回合的开头。
            tools: OpenAI 写法的 ``tools``。
            extra: 另给模板的变量；V3.2 的编码认得 ``thinking`` 与 ``enable_thinking``。

        Raises:
            DsxError: ``DSX-E502``，没有聊天模板；``DSX-E503``，渲染失败；``DSX-E764``，工具的结果对不上调用。
        """
        if self.chat_template is None and self.has_token(DSML_TOKEN):
            given = extra or {}
            thinking = bool(given.get("thinking", given.get("enable_thinking", False)))
            return render_dsml(messages, tools, thinking, add_generation_prompt)
        if self.chat_template is None:
            raise DsxError(
                "DSX-E502",
                "tokenizer_config.json 没有 chat_template，目录里也没有 chat_template.jinja",
                "用不套模板的原始提示词，或把模型的 chat_template.jinja 放进 bundle",
            )
        return render_chat_template(
            self.chat_template, messages, self.special_tokens, add_generation_prompt, tools, extra
        )

    def _dropped(self, kept: Iterable[str]) -> frozenset[int]:
        names = frozenset(kept)
        return frozenset(number for text, number in self.special_ids.items() if text not in names)


def _token_content(value: Any) -> str | None:
    """特殊 token 有两种写法：字符串，或 ``{"content": ..., "lstrip": ...}``。"""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_config(path: Path) -> Mapping[str, Any]:
    if not optional_file(path, "DSX-E501"):
        return {}
    try:
        config = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise _unreadable(path, error) from error
    if not isinstance(config, dict):
        raise _unreadable(path, f"最外层是 {type(config).__name__}，应为 object")
    return config


def _read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """独立的 ``chat_template.jinja`` 优先；配置里可以是一个字符串，也可以是带名字的一组，取 default。"""
    path = folder / "chat_template.jinja"
    if optional_file(path, "DSX-E501"):
        try:
            return read_text(path)
        except (OSError, ValueError) as error:
            raise _unreadable(path, error) from error
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [
            entry.get("template")
            for entry in template
            if isinstance(entry, dict) and entry.get("name") == "default"
        ]
        template = named[-1] if named else None
    return template if isinstance(template, str) else None


def _unreadable(path: Path, reason: object) -> DsxError:
    if isinstance(reason, OSError):
        return DsxError("DSX-E501", f"打不开 {path}：{reason.strerror}", "检查权限；要的是普通文件")
    return DsxError("DSX-E501", f"{path}：{reason}", "重新下载这个文件，确认没有被截断")
