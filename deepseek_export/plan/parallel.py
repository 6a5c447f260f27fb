"""张量并行、专家并行：不模拟，只在 roofline 的界上另加通信，结果标明是估计。"""

from __future__ import annotations

import math

from deepseek_export.plan.machines import Cluster
from deepseek_export.plan.result import ParallelEstimate, SplitPlan
from deepseek_export.plan.roofline import Estimate


def parallel_estimates(cluster: Cluster, estimate: Estimate, hidden_bytes: float) -> list[ParallelEstimate]:
    """全部机器一起做张量、专家并行；切不开的不列。

    Args:
        cluster: 什么机器，什么网络。
        estimate: 整个模型的 roofline。
        hidden_bytes: hidden 里一个数几个字节。
    """
    if cluster.link is None:
        return []
    plans = estimate.splits(cluster.machine, cluster.count)
    return [
        _estimated(plan, cluster, estimate, hidden_bytes)
        for plan in plans
        if plan.split in ("tensor", "expert")
    ]


def _estimated(
    plan: SplitPlan, cluster: Cluster, estimate: Estimate, hidden_bytes: float
) -> ParallelEstimate:
    bound = plan.decode_tokens_per_second
    with_network = None
    if bound is not None:
        step = estimate.batch / bound + _communication(plan, cluster, estimate, hidden_bytes)
        with_network = estimate.batch / step
    return ParallelEstimate(
        split=plan.split,
        machines=plan.gpus,
        weight_bytes=plan.weight_bytes,
        cache_bytes=plan.cache_bytes,
        fits=plan.fits,
        bound_tokens_per_second=bound,
        tokens_per_second=with_network,
    )


def _communication(plan: SplitPlan, cluster: Cluster, estimate: Estimate, hidden_bytes: float) -> float:
    """一步的通信，秒。

    张量并行每层两次 all-reduce：每台收发 2(n-1)/n 份 hidden，来回 2·log2(n) 跳。专家并行每个 MoE 层两次 all-to-all：每台把自己那几条的 hidden
    按选中的专家各送一份，一跳。
    """
    assert cluster.link is not None
    config, n = estimate.shape.config, plan.gpus
    if plan.split == "tensor":
        times, hops = 2 * estimate.shape.cached_layers, 2 * math.ceil(math.log2(n))
        copies = 2 * (n - 1) / n * estimate.batch
    else:
        times, hops = 2 * config.num_moe_layers, 1
        copies = math.ceil(estimate.batch / n) * config.num_experts_per_tok * (n - 1) / n
    sent = copies * config.hidden_size * hidden_bytes
    return times * (sent / cluster.link.bandwidth + hops * cluster.link.latency)
