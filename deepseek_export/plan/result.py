"""``dsx plan`` 的结果：只有数据。"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

WeightKind = Literal["stored", "float32", "float16", "int8", "int4"]
Split = Literal["single", "tensor", "expert", "pipeline"]
Bound = Literal["memory", "compute"]
#: 集群上把什么加倍最见效：内存带宽、算力、网络带宽、网络延迟。
ClusterBound = Literal["memory", "compute", "network", "latency"]


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
    """导出要多少磁盘与内存；``mode`` 同 ``dsx export --weights``，``dtype`` 的 int8、int4、checkpoint 是 ``--quant``（``ort-cpu``）。"""

    mode: Literal["packed", "reference"]
    dtype: Literal["float32", "float16", "int8", "int4", "checkpoint"]
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


class StagePlan(_Entry):
    """一个 stage：第几层到第几层（含），放多少。"""

    first_layer: int
    last_layer: int
    weight_bytes: int
    cache_bytes: int


class LayoutPlan(_Entry):
    """一种分法：几个 stage 连成一条流水线，几条同样的；放不下的没有速度。

    Attributes:
        stages: 一条流水线几个 stage，各占一台。
        replicas, idle: 几条；剩几台用不上。
        batch: 一条流水线上同时生成几条序列，最多的那条。
        micro_batches: 一步分成几个小批，最快的分法。
        cuts: 写给 ``dsx split --stages`` 的。
        stage_plans: 每个 stage。
        single_tokens_per_second, single_bound: 只有一条序列时，与把什么加倍最见效。
        full_tokens_per_second, full_bound: 各条流水线都满时，合计；同上。
        busiest: 满的时候最忙的那个 stage 有几分之几的时间在算，其余是流水线的空泡与等网络。
        first_token_s: 空着的时候，一条提示词等第一个 token；没有写算力的不估。
    """

    stages: int
    replicas: int
    idle: int
    batch: int
    micro_batches: int
    cuts: str
    stage_plans: list[StagePlan]
    fits: bool
    single_tokens_per_second: float | None
    single_bound: ClusterBound | None
    full_tokens_per_second: float | None
    full_bound: ClusterBound | None
    busiest: float | None
    first_token_s: float | None


class ParallelEstimate(_Entry):
    """不模拟、只估的一种切法：全部机器一起做张量或专家并行。

    ``bound_tokens_per_second`` 不计通信，``tokens_per_second`` 另加通信的时间（不与计算重叠）。
    """

    split: Split
    machines: int
    weight_bytes: int
    cache_bytes: int
    fits: bool
    bound_tokens_per_second: float | None
    tokens_per_second: float | None


class ModelError(_Entry):
    """模拟对照过的一格：预测的时间与量到的之比，中位数、最小、最大。"""

    case: str
    median: float
    low: float
    high: float


class Validation(_Entry):
    """模拟对照测量的结果；``errors`` 是空的就是还没有对照过。"""

    measured: str = ""
    machine: str = ""
    errors: list[ModelError] = []


class ClusterPlan(_Entry):
    """``--cluster`` 的估算。

    Attributes:
        text: 原话。
        machine, count, usable_bytes: 什么机器，几台，每台能放多少。
        memory_bandwidth, flops: 一台的；没有写算力的是 ``None``，只按带宽估。
        link_bandwidth, link_latency: 网络；只有一台的是 ``None``。
        prompt: 等第一个 token 的那条提示词有多长。
        smallest: 至少几台放得下；有一层自己就放不下的是 ``None``。
        layouts: 各种分法，stage 少的在前；一种都放不下是空的。
        best: ``layouts`` 里满的时候最快的。
        estimates: 张量并行、专家并行：没有模拟，没有对照过测量。
        validation: 模拟对照测量的结果。
    """

    text: str
    machine: str
    count: int
    usable_bytes: int
    memory_bandwidth: float
    flops: float | None
    link_bandwidth: float | None
    link_latency: float | None
    prompt: int
    smallest: int | None
    layouts: list[LayoutPlan]
    best: int | None
    estimates: list[ParallelEstimate]
    validation: Validation
    assumptions: list[str]


class Plan(_Entry):
    """全部估算；``int4`` 是 4 位的检查点的说明，不是 4 位的为 ``None``。"""

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
    int4: str | None
    weight_bytes: dict[WeightKind, int]
    cache: CachePlan
    export: list[ExportPlan]
    build: BuildPlan
    gpus: list[GpuPlan]
    cluster: ClusterPlan | None
    assumptions: list[str]
