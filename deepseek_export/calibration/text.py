"""校准的文本：一个 UTF-8 文件，编码之后切成等长的窗。"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from deepseek_export.errors import DsxError
from deepseek_export.paths import path_kind, read_regular

#: 文件至多这么大；再多也只取其中的 :data:`MAX_WINDOWS` 窗。
MAX_BYTES = 64 << 20
#: 一窗多少个 token；模型的最大长度更短就用它。
WINDOW = 512
#: 至多这么多窗，多的均匀地取：文件里先后是几种文本的，每种都取到。
MAX_WINDOWS = 128
#: 至少这么多 token：再少，连最窄的矩阵也估不准。
MIN_TOKENS = 512

_ADVICE = "给一段与用途相近的 UTF-8 文本，几万个 token 为好"


@dataclass(frozen=True)
class CalibrationText:
    """编码好的校准文本。

    Attributes:
        file: 文件名，不带目录。
        sha256: 整个文件的。
        windows: 各窗的 token，[S] int64。
    """

    file: str
    sha256: str
    windows: tuple[Tensor, ...]

    @property
    def tokens(self) -> int:
        """一共多少个 token。"""
        return sum(len(window) for window in self.windows)


def read_calibration(
    path: Path, encode: Callable[[str], Sequence[int]], bos: int | None, vocab: int, longest: int
) -> CalibrationText:
    """读、编码、切窗；每窗以 bos 开头（有的话），最后不满一窗的不要。

    Args:
        path: 文本文件。
        encode: 文本 → token。
        bos: bos 的 id；没有就是 ``None``。
        vocab: 模型的词表有多大。
        longest: 模型的最大长度。

    Raises:
        DsxError: ``DSX-E661`` 文件没有、读不了、太大、是空的、不是文本；``DSX-E662`` token 太少；``DSX-E663`` 编码出了词表之外的 token。
    """
    raw, text = _read(path)
    ids = list(encode(text))
    start = [] if bos is None else [bos]
    if start and ids[:1] == start:
        ids = ids[1:]
    if ids and max(ids) >= vocab:
        raise DsxError(
            "DSX-E663",
            f"{path} 编码出 token {max(ids)}，模型的词表只有 {vocab} 个",
            "tokenizer 与模型不配：换成这个模型自己的 tokenizer.json",
        )
    size = min(WINDOW, longest)
    step = size - len(start)
    if len(ids) < MIN_TOKENS or step < 1:
        raise DsxError("DSX-E662", f"{path} 只有 {len(ids)} 个 token，至少要 {MIN_TOKENS} 个", _ADVICE)
    starts = list(range(0, len(ids) - step + 1, step))
    if len(starts) > MAX_WINDOWS:
        starts = [starts[index * len(starts) // MAX_WINDOWS] for index in range(MAX_WINDOWS)]
    windows = tuple(torch.tensor(start + ids[at : at + step]) for at in starts)
    return CalibrationText(path.name, hashlib.sha256(raw).hexdigest(), windows)


def _read(path: Path) -> tuple[bytes, str]:
    if path_kind(path, "DSX-E661") == "missing":
        raise DsxError("DSX-E661", f"{path} 不存在", "确认 --calibrate 的路径")
    try:
        raw = read_regular(path, MAX_BYTES)
        text = raw.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        what = f"{path} 读不了：{getattr(error, 'strerror', None) or error}"
        raise DsxError("DSX-E661", what, _ADVICE) from error
    if "\0" in text:
        raise DsxError("DSX-E661", f"{path} 里有空字符，不像文本", _ADVICE)
    if not text.strip():
        raise DsxError("DSX-E661", f"{path} 是空的", _ADVICE)
    return raw, text
