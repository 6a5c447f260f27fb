"""``/metrics``：Prometheus 的指标，名字的后半与 vLLM 相同，仪表板改个前缀就能用。"""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from deepseek_export.serving import EngineStats
from deepseek_export.serving.http.service import Service
from deepseek_export.serving.http.turn import Piece

#: 秒。从小模型的一步到大模型的长提示词。
_FIRST_TOKEN_S = (0.001, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_NEXT_TOKEN_S = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.4, 1, 2, 5, 10)
_REQUEST_S = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 40, 60, 120, 240, 480, 960, 1920)
#: 回答结束的原因；``abort`` 是客户端走了或服务停了。
REASONS = ("stop", "length", "abort", "error")


class Metrics:
    """一个服务的指标，各有各的登记处：同一进程里可以有几个服务。

    Args:
        service: 引擎的读数由它来，抓取时才读。
    """

    def __init__(self, service: Service) -> None:
        self._registry = CollectorRegistry()
        self._registry.register(_EngineReadings(service))
        self._first = self._histogram("time_to_first_token_seconds", "提交到第一个 token", _FIRST_TOKEN_S)
        self._next = self._histogram("inter_token_latency_seconds", "相邻两个 token 之间", _NEXT_TOKEN_S)
        self._whole = self._histogram("e2e_request_latency_seconds", "请求从收到到答完", _REQUEST_S)
        self._ended = Counter(
            "dsx:request_success", "结束了的回答", ["finished_reason"], registry=self._registry
        )
        for reason in REASONS:
            self._ended.labels(reason)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        return Histogram(f"dsx:{name}", text, buckets=buckets, registry=self._registry)

    def saw(self, piece: Piece) -> None:
        """来了一段。一段里有几个 token，就算它们隔得一样远。"""
        later = piece.tokens
        if piece.first:
            self._first.observe(piece.waited)
            later = 0
        for _ in range(later):
            self._next.observe(piece.waited / later)

    def ended(self, reason: str) -> None:
        """一个回答结束了；``reason`` 是 :data:`REASONS` 里的。"""
        self._ended.labels(reason).inc()

    def answered(self, seconds: float) -> None:
        """一个请求答完了。"""
        self._whole.observe(seconds)

    def text(self) -> bytes:
        """抓取的回答。"""
        return generate_latest(self._registry)


class _EngineReadings:
    """引擎自己的累计与读数，不另记一份。"""

    def __init__(self, service: Service) -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        """加载中什么也没有。"""
        if self._service.model is None:
            return
        stats = self._service.model.engine.stats
        yield GaugeMetricFamily("dsx:num_requests_running", "已经开始的请求数", stats.running)
        yield GaugeMetricFamily("dsx:num_requests_waiting", "排队的请求数", stats.waiting)
        yield GaugeMetricFamily("dsx:kv_cache_bytes", "分配的缓存字节数", stats.cache_bytes)
        yield CounterMetricFamily("dsx:prompt_tokens", "开始了的请求的提示词 token 数", stats.prompt_tokens)
        yield CounterMetricFamily("dsx:generation_tokens", "给出的新 token 数", stats.generated_tokens)
        yield CounterMetricFamily("dsx:prefix_cache_queries", "查过前缀的 token 数", stats.prompt_tokens)
        yield CounterMetricFamily("dsx:prefix_cache_hits", "缓存现成的 token 数", stats.hit_tokens)
        yield from _speculation(stats)


def _speculation(stats: EngineStats) -> Iterator[Metric]:
    """没有草稿模型也有，都是 0：仪表板不必分两种。"""
    yield CounterMetricFamily("dsx:spec_decode_num_drafts", "起草的次数，一行一步算一次", stats.drafts)
    yield CounterMetricFamily("dsx:spec_decode_num_draft_tokens", "提出的草稿数", sum(stats.proposed))
    yield CounterMetricFamily("dsx:spec_decode_num_accepted_tokens", "接受的草稿数", sum(stats.accepted))
    by_position = CounterMetricFamily(
        "dsx:spec_decode_num_accepted_tokens_per_pos", "第几个草稿（从 0 数）接受的次数", labels=["position"]
    )
    for position, count in enumerate(stats.accepted):
        by_position.add_metric([str(position)], count)
    yield by_position
