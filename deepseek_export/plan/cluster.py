"""``dsx plan --cluster``：切成几个 stage，几条流水线，每台放多少，模拟出来多快。"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

from deepseek_export.errors import DsxError
from deepseek_export.plan.balance import Span, balanced, fewest
from deepseek_export.plan.gpus import Gpu
from deepseek_export.plan.machines import Cluster, Link
from deepseek_export.plan.parallel import parallel_estimates
from deepseek_export.plan.result import ClusterBound, ClusterPlan, LayoutPlan, StagePlan
from deepseek_export.plan.roofline import RESERVE, Estimate, usable_bytes
from deepseek_export.plan.simulate import Station, Work, chunked_prompt, ragged_steps, simulate
from deepseek_export.plan.stages import LayeredModel
from deepseek_export.plan.validation import simulation_error

#: 一步算提示词的几个 token，同 ``dsx serve`` 的缺省。
PREFILL_CHUNK = 128
#: 满的时候模拟几步。
_STEPS = 8
#: 等第一个 token 时至多算几块，均匀地挑，其余按平均。
_CHUNKS = 48
_LOGIT_BYTES = 4
#: 一条流水线至多模拟几条序列。
_MAX_ROWS = 16384

CLUSTER_ASSUMPTIONS = [
    f"集群：每台留出 {RESERVE:.0%} 的内存；一台一个 stage，权重与缓存（每条按 --context 的长度）都放得下才算；"
    "切在哪里由每一层的 roofline 时间定，放得下为限",
    "速度是离散事件模拟：小批依次走过各 stage 与各条边，一步的小批都回来才有下一步；stage 的时间是 roofline（上界），"
    "边上过 hidden，最后一个 stage 把 logits 交回；各条序列的长度在 --prompt 与 --context 之间均匀（种子固定），写满就换一条",
    f"等第一个 token：空着的流水线，每步 {PREFILL_CHUNK} 个 token；采样、HTTP、排队都不计",
    "“受限于”是把它加倍（延迟是减半）最见效的那一样",
    "张量并行、专家并行只是估计：没有模拟，dsx 也不这样跑；通信按 all-reduce、all-to-all 的字节数与跳数另加，不与计算重叠",
]


@dataclass(frozen=True)
class Ask:
    """要估的场景。

    Attributes:
        batch: 一共同时生成几条。
        context: 每条至多多长。
        prompt: 提示词多长。
        hidden_bytes: hidden 里一个数几个字节。
        stages: 只看切成这么多个的；``None`` 是各种都看。
    """

    batch: int
    context: int
    prompt: int
    hidden_bytes: float
    stages: int | None = None

    @property
    def depth(self) -> int:
        """正在生成的一条平均多长。"""
        return (self.prompt + self.context) // 2


@dataclass(frozen=True)
class _Ring:
    """一条流水线：切在哪里，跑在什么上。"""

    model: LayeredModel
    spans: Sequence[Span]
    machine: Gpu
    link: Link | None
    hidden_bytes: float

    def route(self) -> list[Station]:
        """各 stage 与它后面的边；发起的一端与第一个 stage 在一台上，只有一个 stage 就没有边。"""
        config, found = self.model.shape.config, list[Station]()
        for index, span in enumerate(self.spans):
            found.append(Station(f"stage {index}", self.model.cost(span, self.machine).seconds))
            if len(self.spans) == 1 or self.link is None:
                continue
            last = index == len(self.spans) - 1
            each = config.vocab_size * _LOGIT_BYTES if last else config.hidden_size * self.hidden_bytes
            found.append(
                Station(f"edge {index}", _sending(each, last, self.link.bandwidth), self.link.latency)
            )
        return found

    def seconds(self, steps: Sequence[Sequence[Work]]) -> float:
        """模拟这几步，一共几秒。"""
        return simulate(self.route(), steps, len(self.spans)).seconds

    def bound(self, steps: Sequence[Sequence[Work]]) -> ClusterBound:
        """加倍哪一样最见效；一样见效的取先写的。"""
        machine, link = self.machine, self.link
        faster = machine.fp8_flops and machine.fp8_flops * 2
        tried: dict[ClusterBound, _Ring] = {
            "memory": replace(self, machine=replace(machine, bandwidth=machine.bandwidth * 2)),
            "compute": replace(self, machine=replace(machine, flops=machine.flops * 2, fp8_flops=faster)),
        }
        if link is not None and len(self.spans) > 1:
            tried["network"] = replace(self, link=replace(link, bandwidth=link.bandwidth * 2))
            tried["latency"] = replace(self, link=replace(link, latency=link.latency / 2))
        return min(tried, key=lambda what: tried[what].seconds(steps))


def _sending(each: float, last: bool, bandwidth: float) -> Callable[[Work], float]:
    """一个小批过一条边占多久：hidden 每个 token 一份，logits 每条一份。"""
    return lambda work: each * (work.rows if last else work.tokens) / bandwidth


def plan_cluster(cluster: Cluster, model: LayeredModel, estimate: Estimate, ask: Ask) -> ClusterPlan:
    """估算。

    Args:
        cluster: 什么机器，什么网络。
        model: 模型的每一层。
        estimate: 整个模型的 roofline，张量、专家并行用它的界。
        ask: 场景。

    Raises:
        DsxError: ``DSX-E767``，``ask.stages`` 比机器、比层数还多，或 ``ask.batch`` 多得模拟不了。
    """
    planner = _Planner(cluster, model, ask)
    layouts = planner.layouts()
    speeds = [layout.full_tokens_per_second or 0.0 for layout in layouts]
    return ClusterPlan(
        text=cluster.text,
        machine=cluster.machine.title,
        count=cluster.count,
        usable_bytes=planner.usable,
        memory_bandwidth=cluster.machine.bandwidth,
        flops=cluster.machine.flops if cluster.knows_flops else None,
        link_bandwidth=cluster.link and cluster.link.bandwidth,
        link_latency=cluster.link and cluster.link.latency,
        prompt=ask.prompt,
        smallest=planner.fewest(ask.batch),
        layouts=layouts,
        best=speeds.index(max(speeds)) if any(speeds) else None,
        estimates=parallel_estimates(cluster, estimate, ask.hidden_bytes),
        validation=simulation_error(),
        assumptions=CLUSTER_ASSUMPTIONS + planner.notes(),
    )


class _Planner:
    def __init__(self, cluster: Cluster, model: LayeredModel, ask: Ask) -> None:
        self._cluster, self._model, self._ask = cluster, model, ask
        self._layers = len(model.nbytes)
        self.usable = usable_bytes(cluster.machine)

    def notes(self) -> list[str]:
        """随写法而来的假设。"""
        found = []
        if self._cluster.link is not None and self._cluster.link.assumed:
            found.append(f"网络的延迟没有写，按 {self._cluster.link.latency * 1e6:.0f} us")
        if not self._cluster.knows_flops:
            found.append(
                "CPU 没有写算力：只按内存带宽，速度是更松的上界，等第一个 token 不估；写上例如 2TFLOP/s 就估"
            )
        return found

    def fewest(self, rows: int) -> int | None:
        """一条流水线、``rows`` 条序列，至少要几台。"""
        whole = [self._held((layer, layer + 1), rows) for layer in range(self._layers)]
        return fewest(whole, 0, 0, self.usable)

    def layouts(self) -> list[LayoutPlan]:
        return [self._layout(stages) for stages in self._candidates()]

    def _candidates(self) -> list[int]:
        """各种分法的 stage 数：放得下的最少的，与副本数减半、再减半的。"""
        most, asked = min(self._cluster.count, self._layers), self._ask.stages
        if asked is not None:
            if asked > most:
                what = f"--stages {asked}：{self._cluster.count} 台机器，模型有 {self._layers} 层"
                raise DsxError("DSX-E767", what, f"取 1 到 {most}，或加机器")
            return [asked]
        smallest = next((stages for stages in range(1, most + 1) if self._fits(stages)), None)
        if smallest is None:
            return []
        found, replicas = {smallest}, self._cluster.count // smallest
        while replicas > 1:
            replicas = (replicas + 1) // 2
            found.add(min(self._cluster.count // replicas, most))
        return sorted(found)

    def _rows(self, stages: int) -> int:
        """最多的那条流水线上几条序列。"""
        return math.ceil(self._ask.batch / (self._cluster.count // stages))

    def _fits(self, stages: int) -> bool:
        needed = self.fewest(self._rows(stages))
        return needed is not None and needed <= stages

    def _held(self, span: Span, rows: int) -> float:
        weights, cache = self._model.held(span)
        return weights + cache * rows * self._ask.context

    def _layout(self, stages: int) -> LayoutPlan:
        rows, replicas = self._rows(stages), self._cluster.count // stages
        spans = self._cut(stages, rows)
        ring = _Ring(self._model, spans, self._cluster.machine, self._cluster.link, self._ask.hidden_bytes)
        plans = [self._stage(span, rows) for span in spans]
        made = LayoutPlan(
            stages=stages,
            replicas=replicas,
            idle=self._cluster.count - stages * replicas,
            batch=rows,
            micro_batches=1,
            cuts=",".join(f"{begin}-{end - 1}" if end - begin > 1 else str(begin) for begin, end in spans),
            stage_plans=plans,
            fits=all(one.weight_bytes + one.cache_bytes <= self.usable for one in plans)
            and all(map(self._starts, spans)),
            single_tokens_per_second=None,
            single_bound=None,
            full_tokens_per_second=None,
            full_bound=None,
            busiest=None,
            first_token_s=None,
        )
        return self._timed(made, ring) if made.fits else made

    def _cut(self, stages: int, rows: int) -> list[Span]:
        """每一层的时间定切在哪里，放不下的不用；怎么切都放不下就按字节切，好看出差多少。"""
        work = Work(rows, rows, rows * self._ask.depth)
        layers, head = self._model.seconds(work, self._cluster.machine)

        def fits(span: Span) -> bool:
            return self._starts(span) and self._held(span, rows) <= self.usable

        spans = balanced(layers, 0, head, stages, fits)
        if spans:
            return spans
        sizes = [self._held((layer, layer + 1), rows) for layer in range(self._layers)]
        return balanced(sizes, 0, 0, stages, self._starts) or balanced(sizes, 0, 0, stages)

    def _starts(self, span: Span) -> bool:
        """``dsx split`` 从这里切得开吗：沿用选择的层要与前面排名的那一层在一起。"""
        return self._model.shape.config.chooser_of(span[0]) in (None, span[0])

    def _stage(self, span: Span, rows: int) -> StagePlan:
        weights, cache = self._model.held(span)
        return StagePlan(
            first_layer=span[0],
            last_layer=span[1] - 1,
            weight_bytes=math.ceil(weights),
            cache_bytes=math.ceil(cache * rows * self._ask.context),
        )

    def _timed(self, made: LayoutPlan, ring: _Ring) -> LayoutPlan:
        """模拟：单条的、满的、等第一个 token。"""
        ask, stages = self._ask, made.stages
        if made.batch > _MAX_ROWS:
            what = f"--batch {ask.batch}：一条流水线上有 {made.batch} 条，至多模拟 {_MAX_ROWS} 条"
            raise DsxError("DSX-E767", what, "减小 --batch，或加机器")
        lengths = (ask.prompt, ask.context)
        single = [[Work(1, 1, ask.depth)]]
        parts = min(
            _powers(min(made.batch, 4 * stages)),
            key=lambda count: ring.seconds(ragged_steps(made.batch, count, 1, lengths)),
        )
        steps = ragged_steps(made.batch, parts, _STEPS, lengths)
        full = simulate(ring.route(), steps, stages)
        return made.model_copy(
            update={
                "micro_batches": parts,
                "single_tokens_per_second": 1 / ring.seconds(single),
                "single_bound": ring.bound(single),
                "full_tokens_per_second": ask.batch * _STEPS / full.seconds,
                "full_bound": ring.bound(steps[:1]),
                "busiest": max(full.busy[f"stage {index}"] for index in range(stages)) / full.seconds,
                "first_token_s": self._first_token(ring) if self._cluster.knows_flops else None,
            }
        )

    def _first_token(self, ring: _Ring) -> float:
        chunks = chunked_prompt(self._ask.prompt, PREFILL_CHUNK)
        count = min(len(chunks), _CHUNKS)
        chosen = [chunks[(2 * index + 1) * len(chunks) // (2 * count)] for index in range(count)]
        return ring.seconds(chosen) * len(chunks) / count


def _powers(most: int) -> Iterator[int]:
    """1、2、4……，以及 ``most``。"""
    count = 1
    while count < most:
        yield count
        count *= 2
    yield most
