"""``/metrics``：Prometheus 的指标，名字的后半与 vLLM 相同，仪表板改个前缀就能用。"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families

from deepseek_export.serving import EngineStats
from deepseek_export.serving.http.service import Service
from deepseek_export.serving.http.turn import Piece

#: 秒。从小模型的一步到大模型的长提示词。
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_NEXT_TOKEN_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 1, 2, 5, 10)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 240, 480, 960, 1920)
#: 回答结束的原因；``abort`` 是客户端走了或服务停了。
REASONS = ("stop", "length", "tool_calls", "abort", "error")
_LABEL = "model_name"
#: 引擎的读数：种类、名字、说明、怎么读。
_READINGS: tuple[
    tuple[type[GaugeMetricFamily | CounterMetricFamily], str, str, Callable[[EngineStats], int]], ...
]
_READINGS = (
    (GaugeMetricFamily, "num_requests_running", "已经开始的请求数", lambda stats: stats.running),
    (GaugeMetricFamily, "num_requests_waiting", "排队的请求数", lambda stats: stats.waiting),
    (GaugeMetricFamily, "kv_cache_bytes", "分配的缓存字节数", lambda stats: stats.cache_bytes),
    (
        CounterMetricFamily,
        "prompt_tokens",
        "开始了的请求的提示词 token 数",
        lambda stats: stats.prompt_tokens,
    ),
    (CounterMetricFamily, "generation_tokens", "给出的新 token 数", lambda stats: stats.generated_tokens),
    (CounterMetricFamily, "prefix_cache_queries", "查过前缀的 token 数", lambda stats: stats.prompt_tokens),
    (CounterMetricFamily, "prefix_cache_hits", "缓存现成的 token 数", lambda stats: stats.hit_tokens),
    # 没有草稿模型也有，都是 0：仪表板不必分两种。
    (
        CounterMetricFamily,
        "spec_decode_num_drafts",
        "起草的次数，一行一步算一次",
        lambda stats: stats.drafts,
    ),
    (
        CounterMetricFamily,
        "spec_decode_num_draft_tokens",
        "提出的草稿数",
        lambda stats: sum(stats.proposed),
    ),
    (
        CounterMetricFamily,
        "spec_decode_num_accepted_tokens",
        "接受的草稿数",
        lambda stats: sum(stats.accepted),
    ),
)


class Metrics:
    """一个服务的指标，各有各的登记处：同一进程里可以有几个服务。每一项都带着 ``model_name``。

    Args:
        service: 引擎的读数由它来，抓取时才读。
    """

    def __init__(self, service: Service) -> None:
        self._service = service
        self._registry = CollectorRegistry()
        self._registry.register(_EngineReadings(service))
        self._first = self._histogram("time_to_first_token_seconds", "提交到第一个 token", _FIRST_TOKEN_S)
        self._next = self._histogram("inter_token_latency_seconds", "相邻两个 token 之间", _NEXT_TOKEN_S)
        self._whole = self._histogram("e2e_request_latency_seconds", "请求从收到到答完", _REQUEST_S)
        self._ended = Counter(
            "dsx:request_success", "结束了的回答", [_LABEL, "finished_reason"], registry=self._registry
        )

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"dsx:{name}", text, [_LABEL], buckets=buckets, registry=self._registry)

    def of(self, model: str) -> ModelMetrics:
        """一个模型的那几项；从此抓取的回答里有它们，没有动过的是零。"""
        reasons = {reason: self._ended.labels(model, reason) for reason in REASONS}
        first, later, whole = (one.labels(model) for one in (self._first, self._next, self._whole))
        return ModelMetrics(first, later, whole, reasons)

    def text(self) -> bytes:
        """抓取的回答。"""
        for model in self._service.models:
            self.of(model)
        return generate_latest(self._registry)


@dataclass(frozen=True)
class ModelMetrics:
    """一个模型的指标，一边答一边记。"""

    first: Histogram
    later: Histogram
    whole: Histogram
    reasons: Mapping[str, Counter]

    def saw(self, piece: Piece) -> None:
        """来了一段。一段里有几个 token，就算它们隔得一样远。"""
        later = piece.tokens
        if piece.first:
            self.first.observe(piece.waited)
            later = 0
        for _ in range(later):
            self.later.observe(piece.waited / later)

    def ended(self, reason: str) -> None:
        """一个回答结束了；``reason`` 是 :data:`REASONS` 里的。"""
        self.reasons[reason].inc()

    def answered(self, seconds: float) -> None:
        """一个请求答完了。"""
        self.whole.observe(seconds)


class _EngineReadings:
    """引擎自己的累计与读数，不另记一份。"""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """加载中什么也没有。"""
        stats = {name: model.engine.stats for name, model in self._service.models.items()}
        if not stats:
            return
        for kind, name, text, read in _READINGS:
            family = kind(f"dsx:{name}", text, labels=[_LABEL])
            for model, one in stats.items():
                family.add_metric([model], read(one))
            yield family
        by_position = CounterMetricFamily(
            "dsx:spec_decode_num_accepted_tokens_per_pos",
            "第几个草稿（从 0 数）接受的次数",
            labels=[_LABEL, "position"],
        )
        for model, one in stats.items():
            for position, count in enumerate(one.accepted):
                by_position.add_metric([model, str(position)], count)
        yield by_position


def merged(texts: Mapping[str, bytes], label: str) -> bytes:
    """几处的抓取合成一份，每个样本多一个标签，说是哪一处的。

    Args:
        texts: 名字 → 抓取的回答。
        label: 标签名。
    """
    families: dict[str, Metric] = {}
    for name, text in texts.items():
        for one in text_string_to_metric_families(text.decode()):
            family = families.setdefault(one.name, Metric(one.name, one.documentation, one.type))
            for sample in one.samples:
                family.add_sample(sample.name, {label: name, **sample.labels}, sample.value)
    registry = CollectorRegistry()
    registry.register(_Collected(list(families.values())))
    return generate_latest(registry)


class _Collected:
    """现成的几族。"""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterator[Metric]:
        """原样给出。"""
        yield from self._families
