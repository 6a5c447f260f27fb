"""后端是什么：``Backend`` 打开一张图得到 ``Runner``，``Runner`` 分配 ``Caches``，能力都写在 ``Limits`` 里。

会话、草稿、生成、对齐校验只认这四样，从不问后端是哪一个。加一个后端是加一个文件夹，再在 :mod:`deepseek_export.backend` 的表里写一行。
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from deepseek_export.backend.capacity import bucket_capacity
from deepseek_export.backend.contract import CacheSpec, GraphContract
from deepseek_export.bundle import Bundle, BundleWeights
from deepseek_export.bundle.manifest import GraphEntry
from deepseek_export.errors import DsxError

if TYPE_CHECKING:
    import onnx

#: 一行缓存存到主机上：张量名 → ``[heads, length, width]``。
SavedRow = Mapping[str, np.ndarray]
#: 一次前向的输入或输出：名字 → 数组。
Arrays = Mapping[str, np.ndarray]
#: ``(ONNX 文件, 每次的输入) -> 每次的输出``。
Run = Callable[[Path, Sequence[Arrays]], list[dict[str, np.ndarray]]]


class CachesLost(DsxError):
    """这个 ``Runner`` 分配过的缓存，内容全没有了；缓存与它的视图还能用，等于刚分配的。"""


@dataclass(frozen=True)
class Limits:
    """一个后端在一张图上做得到什么。

    Attributes:
        max_positions: 一行至多多长。
        prefill_chunk: prefill 每块宜取的长度，也是一次至多几个新 token（后端有上限时）。
        logits_rows: 一次调用至多能要几行 logits（此时新 token 也不能更多）；``None`` 不限。
        max_batch: 一次调用至多几行；``None`` 不限。
        dtypes: 能执行哪些模型 dtype。
        block_outputs: 图的中间值取不取得到；取不到的只能整个模型地比。
        grows: 缓存随长度逐档变大；不会的一开始就有 ``max_positions`` 个位置。
    """

    max_positions: int
    prefill_chunk: int = 512
    logits_rows: int | None = None
    max_batch: int | None = None
    dtypes: tuple[str, ...] = ("float32", "float16")
    block_outputs: bool = True
    grows: bool = False

    def capacity(self, needed: int) -> int:
        """放得下 ``needed`` 个位置的缓存，每行实际有几个位置。

        Raises:
            DsxError: ``DSX-E506``，``needed`` 超过 ``max_positions``。
        """
        return bucket_capacity(needed, self.max_positions) if self.grows else self.max_positions


class Caches(ABC):
    """一个批次的缓存：每种缓存一个张量 ``[B, heads, T, width]``，由图原地更新；按行与位置寻址。

    Attributes:
        spec: 有哪些张量。
        batch: 行数 B。
    """

    def __init__(self, spec: CacheSpec, batch: int) -> None:
        self.spec, self.batch = spec, batch
        self._views: dict[tuple[int, int], Caches] = {}

    @property
    @abstractmethod
    def capacity(self) -> int:
        """当前的 T。"""

    @property
    def nbytes(self) -> int:
        """这些行占用的字节数。"""
        return self.batch * self.capacity * self.spec.bytes_per_token

    @abstractmethod
    def ensure(self, needed: int) -> bool:
        """保证每行放得下 ``needed`` 个位置；放不下就升档，内容不变。

        Returns:
            是否重新分配了。

        Raises:
            DsxError: ``DSX-E506``，超过上限；此时缓存原样不动。
        """

    def rows(self, start: int, count: int) -> Caches:
        """从第 ``start`` 行起 ``count`` 行的视图，不复制；同样的参数得到同一个对象。视图里的行号从 0 数。

        Raises:
            DsxError: 后端放不下这样的视图（TensorRT 的一行没有对齐），说明怎么办。
        """
        if (start, count) == (0, self.batch):
            return self
        check_rows(start, count, self.batch)
        if (start, count) not in self._views:
            self._views[start, count] = self.view(start, count)
        return self._views[start, count]

    def first(self, rows: int) -> Caches:
        """前 ``rows`` 行的视图，见 :meth:`rows`。"""
        return self.rows(0, rows)

    @abstractmethod
    def view(self, start: int, count: int) -> Caches:
        """连着的几行，共用这里的内存；每次都是新的，平时用 :meth:`rows`。"""

    @abstractmethod
    def copy_row(self, source: int, target: int, length: int, origin: Caches | None = None) -> None:
        """把第 ``source`` 行的前 ``length`` 个位置复制到第 ``target`` 行；其余位置不动。

        Args:
            source, target: 行号。
            length: 多少个位置。
            origin: 从哪个缓存复制，要同一个 ``Runner`` 分配的；缺省是自己。
        """

    @abstractmethod
    def clear_row(self, row: int) -> None:
        """清零一整行。"""

    @abstractmethod
    def save_row(self, row: int, length: int) -> SavedRow:
        """把一行的前 ``length`` 个位置复制到主机。"""

    @abstractmethod
    def restore_row(self, row: int, saved: SavedRow) -> None:
        """:meth:`save_row` 的逆；``saved`` 里有哪些张量、多长，就写哪些、多少个位置。"""

    def taken(self, fresh: Caches, rows: Sequence[int], length: int) -> Caches:
        """``fresh`` 的第 i 行换成这里第 ``rows[i]`` 行的前 ``length`` 个位置；返回 ``fresh``。"""
        for target, source in enumerate(rows):
            fresh.copy_row(int(source), target, length, self)
        return fresh


def check_rows(start: int, count: int, batch: int) -> None:
    """``batch`` 行里没有从 ``start`` 起的 ``count`` 行，就是调用方的缺陷（``ValueError``）。"""
    if start < 0 or count < 1 or start + count > batch:
        raise ValueError(f"要第 {start} 行起的 {count} 行，一共 {batch} 行")


class Runner(ABC):
    """加载好的一张图；没有状态，序列的状态全在 :class:`Caches` 里。

    Attributes:
        contract: 图的约定。
        limits: 做得到什么。
    """

    contract: GraphContract
    limits: Limits

    @property
    def notes(self) -> tuple[str, ...]:
        """要告诉用户的话，例如退回了较慢的执行方式；不断变长，说过的不再消失。"""
        return ()

    @property
    def failure(self) -> DsxError | None:
        """现在为什么跑不了；跑得了为 ``None``。在别处跑的（一套 stage）才会不行，自己恢复。"""
        return None

    @property
    def generation(self) -> int:
        """第几次起的。变了，此前分配的缓存里就什么也没有了：要用就重新分配。"""
        return 0

    def close(self) -> None:
        """放手别处的进程；此后不能再用。没有这样的东西就什么也不做。"""

    @abstractmethod
    def new_caches(self, batch: int, needed: int = 1) -> Caches:
        """给一个新批次分配清零的缓存，至少放得下 ``needed`` 个位置。

        Raises:
            DsxError: ``DSX-E506``，``needed`` 超过 ``limits.max_positions``。
        """

    @abstractmethod
    def run(
        self, inputs: Mapping[str, np.ndarray], outputs: tuple[str, ...], caches: Caches
    ) -> dict[str, np.ndarray]:
        """跑一次，``caches`` 原地更新。

        Args:
            inputs: 缓存以外的全部输入，名字 → 数组；dtype 不同的会转换。
            outputs: 要取回主机的输出；没列出的不拷贝。
            caches: 这个 ``Runner`` 分配的，或它的视图。

        Returns:
            名字 → 数组，图里的 dtype。内存归后端，同一个 ``caches`` 的下一次 ``run`` 会覆盖它。

        Raises:
            DsxError: 执行失败，附后端的原话。
        """


@dataclass(frozen=True)
class CutRunner:
    """把断开的图（``dsx compare``）跑起来的办法；图由谁断开见 :mod:`deepseek_export.parity.subgraph`。

    Attributes:
        graph: 从哪张图断开：``(entry, 缓存容量) -> 图``；``None`` 就是 bundle 里的那个文件。
        run: 怎么跑断开之后存成的文件。
        suffix: 断开的图存进 ``<图名><suffix>/``。
    """

    graph: Callable[[GraphEntry, int], onnx.ModelProto | None]
    run: Run
    suffix: str = ""


class Backend(ABC):
    """一个后端。

    Attributes:
        name: ``--backend`` 的值。
    """

    name: str

    def prepared(self, bundle: Bundle) -> Bundle:
        """在这个后端上实际运行的 bundle；缺省就是它自己。

        Raises:
            DsxError: 这台机器、这个 bundle 上用不了。
        """
        return bundle

    @abstractmethod
    def limits(self, bundle: Bundle, graph: GraphEntry | None = None) -> Limits:
        """不加载模型就知道的能力；``graph`` 缺省是主模型。"""

    @abstractmethod
    def open(
        self, bundle: Bundle, graph: GraphEntry, weights: BundleWeights, threads: int | None = None
    ) -> Runner:
        """加载一张图。

        Args:
            bundle: 打开的 bundle，先过 :meth:`prepared`。
            graph: 哪一张图。
            weights: 它的权重；几张图用同一个，共有的权重只占一份内存。
            threads: 线程数；有的后端没有这一项。
        """

    @abstractmethod
    def cut_runner(self, bundle: Bundle) -> CutRunner:
        """断开的图在这里怎么跑。

        Raises:
            DsxError: 跑不了，说明原因。
        """
