"""一个槽的文件：一段前缀的 token 与缓存，存到磁盘，以后（重启之后也行）接着用。

是一个标准的 safetensors：``about`` 是说明（JSON 的字节），``tokens`` 是 ``[n]`` int64，``main.<张量>``、``draft0.<张量>``…… 是缓存的
``[heads, n, width]``，都按字节存，元素类型以图的约定为准。只给同一个 bundle 用；读的时候核对大小、校验和与每个张量的形状，不对就一个字节也不用。
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from deepseek_export.backend.base import SavedRow
from deepseek_export.backend.contract import CacheSpec
from deepseek_export.bundle.disk import disk_errors
from deepseek_export.errors import DsxError
from deepseek_export.paths import read_regular

FORMAT, VERSION = "dsx-slot", 1

#: 张量之外至多这么多字节：safetensors 的文件头与说明，缓存张量再多也够。
_OVERHEAD = 8 << 20
_ABOUT, _TOKENS = "about", "tokens"


@dataclass(frozen=True)
class SavedSlot:
    """一个槽的内容。

    Attributes:
        bundle: 哪个 bundle 的，manifest 的 sha256。
        salt: 哪一家的，见 ``cache_salt``。
        tokens: ``[n]`` int64。
        caches: 主模型的在前，各草稿模型的在后；张量名 → ``[heads, n, width]``。
    """

    bundle: str
    salt: str
    tokens: np.ndarray
    caches: tuple[SavedRow, ...]


def write_slot(path: Path, slot: SavedSlot) -> int:
    """写成文件，返回字节数；写不完就不留文件，原来有的也还在。只有自己读得了：里面是别人说的话。

    Raises:
        DsxError: ``DSX-E404`` / ``DSX-E405``，写不了。
    """
    arrays = {_TOKENS: np.ascontiguousarray(slot.tokens, np.int64)}
    for graph, saved in zip(_names(len(slot.caches)), slot.caches, strict=True):
        for name, rows in saved.items():
            arrays[f"{graph}.{name}"] = np.ascontiguousarray(rows).view(np.uint8)
    about = {"format": FORMAT, "version": VERSION, "bundle": slot.bundle, "salt": slot.salt}
    about["sha256"] = _digest(about, arrays)
    arrays[_ABOUT] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    content = save(arrays)
    scratch = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with disk_errors(path):
        try:
            with open(os.open(scratch, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            scratch.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                scratch.unlink()
            raise
    return len(content)


def read_slot(path: Path, bundle: str, specs: Sequence[CacheSpec], context: int) -> tuple[SavedSlot, int]:
    """读一个文件，核对过的才给出；连同它有多少字节。

    Args:
        path: 文件。
        bundle: 正在用的 bundle，manifest 的 sha256。
        specs: 主模型的缓存与各草稿模型的；文件里多出来的草稿模型不要。
        context: 一行至多几个 token。

    Raises:
        DsxError: ``DSX-E533``，读不了、不是槽的文件、断了、改过、是另一个 bundle 的、太长，或没有要用的草稿模型。
    """
    largest = context * (8 + 4 * sum(spec.bytes_per_token for spec in specs)) + _OVERHEAD
    try:
        content = read_regular(path, largest)
        arrays = load(content)
        about = _about(arrays.pop(_ABOUT))
        recorded = about.pop("sha256")
        tokens, salt, owner = arrays[_TOKENS], about["salt"], about["bundle"]
    except OSError as error:
        raise _unusable(path, error.strerror or str(error)) from error
    except (SafetensorError, KeyError, ValueError, RecursionError) as error:
        raise _unusable(path, "不是槽的文件，或者断了") from error
    if about.get("format") != FORMAT or about.get("version") != VERSION:
        raise _unusable(
            path, f"格式是 {about.get('format')} {about.get('version')}，这里只认 {FORMAT} {VERSION}"
        )
    if recorded != _digest(about, arrays):
        raise _unusable(path, "校验和不符，内容改过")
    if owner != bundle:
        raise _unusable(path, "是另一个 bundle 的")
    if tokens.dtype != np.int64 or tokens.ndim != 1 or not 0 < len(tokens) <= context:
        raise _unusable(path, f"有 {tokens.size} 个 token，一行至多 {context} 个")
    graphs = zip(_names(len(specs)), specs, strict=True)
    caches = tuple(_rows(path, arrays, *one, len(tokens)) for one in graphs)
    return SavedSlot(bundle, str(salt), tokens, caches), len(content)


def _rows(path: Path, arrays: Mapping[str, np.ndarray], graph: str, spec: CacheSpec, length: int) -> SavedRow:
    found = {}
    for tensor in spec.tensors:
        rows, width = arrays.get(f"{graph}.{tensor.name}"), tensor.width * tensor.dtype.itemsize
        if rows is None:
            raise _unusable(path, f"没有 {graph} 的 {tensor.name}；存的时候没有投机，就只能给不投机的引擎用")
        if rows.dtype != np.uint8 or rows.shape != (tensor.heads, length, width):
            want = [tensor.heads, length, width]
            raise _unusable(path, f"{graph} 的 {tensor.name} 是 {list(rows.shape)}，应为 {want}")
        found[tensor.name] = rows.view(tensor.dtype)
    return found


def _names(count: int) -> list[str]:
    return ["main", *(f"draft{index}" for index in range(count - 1))]


def _about(content: np.ndarray) -> dict[str, Any]:
    about = json.loads(content.tobytes())
    if not isinstance(about, dict):
        raise ValueError(about)
    return about


def _digest(about: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(arrays):
        digest.update(f"\0{name}{arrays[name].shape}".encode())
        digest.update(np.ascontiguousarray(arrays[name]).data)
    return digest.hexdigest()


def _unusable(path: Path, why: str) -> DsxError:
    return DsxError(
        "DSX-E533", f"{path}：{why}", "用同一个 bundle、同样的投机设置存一次；前缀也可以重算，不必恢复"
    )
