"""哪些 token 结束生成：``generation_config.json`` 与 ``config.json`` 各写了什么。"""

from __future__ import annotations

from pathlib import Path

from deepseek_export.checkpoint.config import ModelConfig
from deepseek_export.checkpoint.fields import parse_json, shown
from deepseek_export.errors import DsxError
from deepseek_export.paths import optional_file, read_text

FILE = "generation_config.json"


def stop_token_ids(directory: Path, config: ModelConfig) -> tuple[int, ...]:
    """任何一个都结束一行；空的就是永不停。

    ``generation_config.json`` 写了 ``eos_token_id`` 就以它为准，没有写（或没有这个文件）才看 ``config.json`` 的。

    Args:
        directory: 检查点或 bundle 的目录。
        config: 那里的 ``config.json``。

    Raises:
        DsxError: ``DSX-E121``，不是普通文件，不是合法的 JSON 对象，或 id 不是词表里的整数。
    """
    path, written = directory / FILE, None
    if optional_file(path, "DSX-E121"):
        written = _read(path)
    ids = config.eos_token_ids if written is None else written if isinstance(written, list) else [written]
    if not ids and written is not None:
        raise _bad(path, "eos_token_id 是空列表")
    for token in ids:
        if type(token) is not int or not 0 <= token < config.vocab_size:
            where = directory / "config.json" if written is None else path
            raise _bad(where, f"eos_token_id 里有 {shown(token)}，应为 0 到 {config.vocab_size - 1} 的整数")
    return tuple(ids)


def _read(path: Path) -> object:
    """``eos_token_id`` 的原值；没有写就是 ``None``。"""
    try:
        data = parse_json(read_text(path))
    except OSError as error:
        raise _bad(path, f"打不开：{error.strerror}") from error
    except ValueError as error:
        raise _bad(path, f"不是合法的 JSON：{error}") from error
    if not isinstance(data, dict):
        raise _bad(path, f"顶层是 {type(data).__name__}，应为对象")
    return data.get("eos_token_id")


def _bad(path: Path, what: str) -> DsxError:
    return DsxError("DSX-E121", f"{path}：{what}", f"改正或重新下载；不需要的 {FILE} 也可以删掉")
