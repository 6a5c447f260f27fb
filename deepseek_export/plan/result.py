"""``dsx plan`` 的结果：只有数据。"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

WeightKind = Literal["stored", "float32", "float16", "int8", "int4"]
Split = Literal["single", "tensor", "expert", "pipeline"]
Bound = Literal["memory", "compute"]


class _Entry(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class StoredWeights(_Entry):
    """检查点里一种 dtype 的张量。"""

    dtype: str
    tensors: int
    bytes: int


class CachePlan(_Entry):
    """KV 缓存：潜向量与展开的各多大；``used`` 是方案实际用的那一种。"""

    dtype: str
    used: Literal["latent", "expanded"]
    latent_bytes_per_token: int
    expanded_bytes_per_token: int
    latent_bytes: int
    expanded_bytes: int


class ExportPlan(_Entry):
    """导出要多少磁盘与内存；``mode`` 同 ``dsx export --weights``。"""

    mode: Literal["packed", "reference"]
    dtype: Literal["float32", "float16"]
    disk_bytes: int
    peak_ram_bytes: int


class BuildPlan(_Entry):
    """由 float16 的 bundle 建一个 TensorRT 引擎（一种 SM）要多少磁盘与内存。"""

    disk_bytes: int
    peak_ram_bytes: int


class SplitPlan(_Entry):
    """``gpus`` 块卡按一种方式切：最满的那块卡放多少，放不放得下；放得下时解码速度的上界。"""

    split: Split
    gpus: int
    weight_bytes: int
    cache_bytes: int
    fits: bool
    decode_tokens_per_second: float | None
    decode_bound: Bound | None


class GpuPlan(_Entry):
    """在一种 GPU 上：请求的卡数怎么切得下，至少要几块，速度的上界（解码取放得下的切法里最快的）。

    ``no_split`` 在请求的卡数没有一种切法时写明原因，这时 ``requested`` 是空的。
    """

    gpu: str
    title: str
    usable_bytes: int
    requested: list[SplitPlan]
    no_split: str | None
    smallest: SplitPlan | None
    decode_split: Split | None
    decode_tokens_per_second: float | None
    decode_bound: Bound | None
    prefill_tokens_per_second: float | None


class Plan(_Entry):
    """全部估算。"""

    checkpoint: str
    family: str
    layers: int
    moe_layers: int
    mtp_modules: int
    profile: str
    weights: WeightKind
    batch: int
    context: int
    parameters: int
    active_parameters: int
    stored: list[StoredWeights]
    weight_bytes: dict[WeightKind, int]
    cache: CachePlan
    export: list[ExportPlan]
    build: BuildPlan
    gpus: list[GpuPlan]
    assumptions: list[str]
