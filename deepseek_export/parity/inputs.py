"""拿什么去比：prompt、测困惑度的文本、逐块比较的随机 token、缓存。"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from torch import Tensor

from deepseek_export.bundle import Bundle, Manifest
from deepseek_export.capture import names
from deepseek_export.errors import DsxError
from deepseek_export.ops.int8_cache import padded_rows
from deepseek_export.parity.arrays import to_numpy
from deepseek_export.paths import MAX_LARGE_TEXT, read_text
from deepseek_export.runtime import BundleTokenizer

#: 有 tokenizer 时用真文本：中文、英文、代码，长度不等。
DEFAULT_PROMPTS = (
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "It is a truth universally acknowledged, that a single man in possession of a good fortune",
    "def fib(n):\n    return n if n < 2 else fib(n - 1) + fib(n - 2)",
)
_RANDOM_LENGTHS = (29, 16, 5)
_MAX_PROMPT = 96
_ROWS, _TOKENS = 2, 25


def prompt_rows(
    manifest: Manifest,
    tokenizer: BundleTokenizer | None,
    prompts: Sequence[str] | None,
    steps: int,
    seed: int,
) -> list[list[int]]:
    """各条 prompt 的 token，截到模型的最大长度以内；没有 tokenizer 时是随机的。

    Raises:
        DsxError: ``DSX-E604``，prompt 用不了，或续写 ``steps`` 个 token 放不下。
    """
    limit = min(_MAX_PROMPT, manifest.model.max_position_embeddings - steps)
    if limit < 1:
        raise DsxError(
            "DSX-E604",
            f"续写 {steps} 个 token 放不进 max_position_embeddings = {manifest.model.max_position_embeddings}",
            "减小 --steps",
        )
    if prompts and tokenizer is None:
        raise DsxError(
            "DSX-E604", "bundle 没有 tokenizer，用不了文本 prompt", "去掉 --prompt，用随机 token 校验"
        )
    if tokenizer is not None:
        rows = [tokenizer.encode(text)[:limit] for text in prompts or DEFAULT_PROMPTS]
    else:
        rng = np.random.default_rng(seed)
        lengths = [min(n, limit) for n in _RANDOM_LENGTHS]
        rows = [rng.integers(0, manifest.model.vocab_size, n).tolist() for n in lengths]
    if not all(rows):
        raise DsxError("DSX-E604", "有一条 prompt 编码后是空的", "换一条不为空的 --prompt")
    return rows


def read_passage(bundle: Bundle, tokenizer: BundleTokenizer | None, path: Path) -> tuple[str, list[int]]:
    """测困惑度、看激活范围的文本：文件名与 token。

    Raises:
        DsxError: ``DSX-E606``，bundle 用不到（没有量化，也不是 float16）、没有 tokenizer，或文件读不了、不到两个 token。
    """
    manifest = bundle.manifest
    if manifest.quantization is None and manifest.dtype != "float16":
        what = f"{bundle.path} 的权重没有量化，没有损失可量；不是 float16，激活不会溢出"
        raise DsxError("DSX-E606", what, "去掉 --text")
    if tokenizer is None:
        raise DsxError("DSX-E606", f"{bundle.path} 没有 tokenizer，用不了文本", "去掉 --text")
    try:
        text = read_text(path, MAX_LARGE_TEXT)
    except (OSError, UnicodeDecodeError) as error:
        what = f"{path} 读不了：{getattr(error, 'strerror', None) or error}"
        raise DsxError("DSX-E606", what, "给一个 UTF-8 编码的文本文件") from error
    ids = tokenizer.encode(text)
    if len(ids) < 2:
        raise DsxError(
            "DSX-E606", f"{path} 只有 {len(ids)} 个 token", "给长一些的文本，至少几百个 token 才有意义"
        )
    return str(path), ids


def cache_feeds(
    manifest: Manifest, layer: int, caches: Sequence[Tensor], index: int | None = None
) -> dict[str, np.ndarray]:
    """参考模型第 ``layer`` 层的缓存，作为图里编号 ``index``（缺省同层号）的那一层的输入；图里 int8 的行宽一些的，末尾补零。"""
    tensors = zip(manifest.cache.of_layer(layer), caches, strict=True)
    at = layer if index is None else index
    return {
        names.cache_input(tensor.name, at): to_numpy(padded_rows(cache, tensor.width))
        for tensor, cache in tensors
    }


def block_rows(manifest: Manifest, seed: int) -> list[list[int]]:
    """逐块比较用的等长随机 token 序列。"""
    rng = np.random.default_rng(seed)
    return rng.integers(0, manifest.model.vocab_size, (_ROWS, _TOKENS)).tolist()
