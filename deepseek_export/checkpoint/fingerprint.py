"""检查点的身份：每个文件的名字、大小、文件头，以及每个张量几处数据的 SHA-256；不含时间戳，拷贝之后不变。"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

from pydantic import BaseModel, ConfigDict

#: 每个张量的开头、正中、末尾各取这么多字节。重写过的张量总会露出来，只改别处几个字节的不会。
SAMPLE_BYTES = 32


class FileFingerprint(BaseModel):
    """一个 safetensors 文件的身份；读的是文件头与少量数据，不是整个文件。"""

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str
    size: int
    header_sha256: str
    samples_sha256: str


class Fingerprint(BaseModel):
    """一个检查点的身份。"""

    model_config = ConfigDict(frozen=True, extra="forbid")

    files: tuple[FileFingerprint, ...]


def sample_sha256(path: Path, tensors: Iterable[tuple[int, int]]) -> str:
    """每个张量几处数据的 SHA-256。

    Args:
        path: safetensors 文件。
        tensors: 每个张量的（起点、字节数），按起点的次序；不大的整个读。

    Raises:
        OSError: 读不了。
    """
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as stream:
        for start, count in tensors:
            if count <= 3 * SAMPLE_BYTES:
                digest.update(os.pread(stream.fileno(), count, start))
                continue
            for offset in (0, (count - SAMPLE_BYTES) // 2, count - SAMPLE_BYTES):
                digest.update(os.pread(stream.fileno(), SAMPLE_BYTES, start + offset))
    return digest.hexdigest()
