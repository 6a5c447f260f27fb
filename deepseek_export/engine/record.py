"""引擎目录的自述 ``engine.json``：在哪种 TensorRT、哪种 SM 上、由哪个 bundle 建成；不符的拒绝加载。"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from deepseek_export.engine.flavour import FlavourName
from deepseek_export.engine.shapes import ProfileShapes, Range
from deepseek_export.errors import DsxError, first_invalid
from deepseek_export.paths import read_text

#: bundle 里放引擎的文件夹。
ENGINES = "engines"
RECORD_FILE, LAYERS_FILE = "engine.json", "layers.json"


class EngineEntry(BaseModel):
    """一个引擎（一个 ``.plan`` 文件）。

    Attributes:
        graph: bundle 里对应的 ONNX 文件。
        role: ``main`` 或 ``draft``。
        bytes, sha256: 文件的大小与哈希。
        profiles: 优化配置名 → 动态维 → 最小、最优、最大值；次序即编号。
        layers: 优化配置名 → 层的种类 → 个数。
        fused_attention: prefill 配置里融成一个原生核的注意力有几层。
        unfused_attention: 没有融合的，ONNX 节点名；结果一样对，但慢，缓存展开后的中间值也大。
        seconds: 解析与构建的用时。
        workspace: 优化配置名 → 中间值至多占几字节，按配置的上限，取自构建的日志；运行时按实际的形状要。日志里没有的、从前建的是空的。
        weights: 权重占几字节显存，取自构建的日志，几个配置共用；日志里没有的、从前建的没有。
        best: 另有输出选出每个位置最大的 token，见 :func:`~deepseek_export.engine.graph.give_best`；从前建的没有。
    """

    model_config = ConfigDict(extra="forbid")

    graph: str
    role: Literal["main", "draft"]
    bytes: int
    sha256: str
    profiles: dict[str, dict[str, Range]]
    layers: dict[str, dict[str, int]]
    fused_attention: int
    unfused_attention: list[str]
    seconds: float
    workspace: dict[str, int] = {}
    weights: int | None = None
    best: bool = False


class EngineRecord(BaseModel):
    """见模块说明。

    Attributes:
        flavour, version: 哪种 TensorRT、哪个版本。
        sm: 目标计算能力。
        toolkit: 插件的机器码由哪一版 CUDA 的 ptxas 编译，例如 ``13.4``。
        bundle_sha256: bundle 的 manifest.json 的 sha256；它含每个文件的哈希。
        shapes: 建的时候给的形状。
        plans: 文件名 → 说明。
        peak_rss_bytes: 建完时进程的峰值常驻内存。
    """

    model_config = ConfigDict(extra="forbid")

    schema_version: Literal[1]
    dsx_version: str
    flavour: FlavourName
    version: str
    sm: int
    toolkit: str
    bundle_sha256: str
    shapes: ProfileShapes
    plans: dict[str, EngineEntry]
    peak_rss_bytes: int

    @property
    def directory(self) -> str:
        """``engines/`` 下的目录名。"""
        return f"{self.flavour}-sm{self.sm}"

    @classmethod
    def read(cls, directory: Path) -> EngineRecord:
        """读 ``engine.json``。

        Raises:
            DsxError: ``DSX-E917``，读不了或不是这一版写的。
        """
        path = directory / RECORD_FILE
        try:
            return cls.model_validate(json.loads(read_text(path)))
        except OSError as error:
            raise DsxError(
                "DSX-E917", f"{path}：{error.strerror}", "检查权限，或用 dsx build 重建"
            ) from error
        except (ValueError, RecursionError) as error:
            reason = first_invalid(error) if isinstance(error, ValidationError) else error
            raise DsxError("DSX-E917", f"{path}：{reason}", "用 dsx build 重建") from error

    def check(self, directory: Path, version: str | None, sm: int | None, bundle_sha256: str) -> None:
        """能不能在这里加载；文件的内容在 :meth:`read_engine` 时核对。

        Args:
            directory: 引擎目录。
            version: 已装的那种 TensorRT 的版本。
            sm: 当前 GPU。
            bundle_sha256: 现在的 manifest.json 的 sha256。

        Raises:
            DsxError: ``DSX-E917``，列出第一处不符。
        """
        pairs = (
            ("TensorRT 的版本", self.version, version),
            ("SM", self.sm, sm),
            ("bundle 的哈希", self.bundle_sha256, bundle_sha256),
        )
        for name, built, here in pairs:
            if built != here:
                what = f"{directory}：{name}建的时候是 {built}，这里是 {here}"
                raise DsxError(
                    "DSX-E917", what, f"重建：dsx build {directory.parents[1]} --arch sm{sm or self.sm}"
                )
        for name, entry in self.plans.items():
            if not (directory / name).is_file() or (directory / name).stat().st_size != entry.bytes:
                raise DsxError("DSX-E917", f"{directory / name} 缺失或大小不符", "用 dsx build 重建")

    def check_driver(self, directory: Path, driver: tuple[int, int]) -> None:
        """驱动读不读得了插件的机器码：同一个主版本之内新旧都行，主版本更旧的驱动不认。

        Args:
            directory: 引擎目录。
            driver: 驱动支持到哪一版 CUDA，主、次版本号。

        Raises:
            DsxError: ``DSX-E923``。
        """
        wanted = int(self.toolkit.split(".")[0])
        if driver[0] < wanted:
            what = f"{directory} 的 kernel 由 CUDA {self.toolkit} 编译，驱动只支持到 CUDA {driver[0]}.{driver[1]}"
            raise DsxError("DSX-E923", what, f"升级驱动到支持 CUDA {wanted} 的版本")

    def read_engine(self, path: Path) -> bytes:
        """读一个引擎，核对哈希。

        Raises:
            DsxError: ``DSX-E917``，内容与建的时候不同。
        """
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.plans[path.name].sha256:
            raise DsxError("DSX-E917", f"{path} 的内容与建的时候不同", "文件损坏或改过：用 dsx build 重建")
        return content
