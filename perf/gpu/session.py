"""一张卡上的一次运行：先与 torch 参考实现比，再计时；结果是历史里 ``gpu`` 那一套的样子，都是普通的字典。

启动走的就是插件的路径：提前编译的 :class:`Program` 与 :class:`Launcher`，不经过 Triton 的运行时。输入每次随机（种子在结果里），
输出与 workspace 预先填满 NaN。计时在 CUDA graph 里，每次之前冲掉 L2；上限是同一张卡当场测得的拷贝带宽与方阵乘法速率。
只导入 torch 与标准库，以及不需要 dsx 其余依赖的模块：``python -m perf.gpu`` 靠这一点。
"""

from __future__ import annotations

import secrets
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any, Literal, cast

import torch

TITLE = "NVIDIA 卡上插件的 kernel"
LATENT, ROPE, SCALE = 512, 64, 0.1147
#: 专家的形状：名字 → (E, k, D, I)。
EXPERTS = {"V3": (256, 8, 7168, 2048), "V2-Lite": (64, 6, 2048, 1408)}
#: 离得更近的那个上限 → 显示名与要达到它的几成。
TARGETS = {"memory": ("带宽", 0.8), "compute": ("算力", 0.6)}


@dataclass(frozen=True)
class Scenario:
    """计时的点，bfloat16；核对总是全部。

    Attributes:
        attention: LatentAttention 的（H，B，S，T）；S=4 是投机解码一次校验 4 个 token。
        experts: MoeExperts 的形状与 token 数。
    """

    attention: tuple[tuple[int, int, int, int], ...] = (
        *((H, B, 1, T) for H in (16, 128) for B in (1, 16, 128) for T in (1024, 8192, 32768)),
        (128, 16, 4, 8192),
    )
    experts: tuple[tuple[str, int], ...] = tuple(
        (shape, N) for shape in EXPERTS for N in (1, 16, 128, 1024, 4096)
    )


FULL = Scenario()
QUICK = Scenario(attention=((16, 1, 1, 1024), (128, 16, 1, 8192)), experts=(("V2-Lite", 16),))


def measure(scenario: Scenario, budget: float, bundle: Path | None = None) -> dict[str, Any]:
    """核对，计时；给了 ``bundle`` 再跑它的引擎，是最后一格。

    Args:
        scenario: 计时哪些点。
        budget: 用了这么多秒就不再开始新的点。
        bundle: ``dsx build`` 收的 bundle。

    Returns:
        ``perf.results.SuiteResult`` 的字段。

    Raises:
        FileNotFoundError: 没有能用的 GPU。
        RuntimeError: 核对不过，带每一项的差；或者一个点也来不及测。
    """
    if not torch.cuda.is_available():
        raise FileNotFoundError("没有可用的 NVIDIA GPU，什么也没有测")
    session = Session(budget)
    checks = session.check_everything()
    if failed := [row for row in checks if not row["ok"]]:
        raise RuntimeError(
            "\n".join([f"{len(failed)} / {len(checks)} 项核对不过，没有计时", *map(failure, failed)])
        )
    cases = session.measure_everything(scenario)
    if len(cases) == 1:
        raise RuntimeError(f"核对用完了 {budget:.0f} 秒，一个点也没有测")
    cases[0]["facts"] |= {"checks": len(checks), "elapsed": session.elapsed()}
    if bundle is not None:
        from perf.gpu.engine import run_engine

        cases.append({"name": "引擎", "values": {}, "facts": run_engine(bundle, session.sm)})
    card = torch.cuda.get_device_name()
    return {"suite": "gpu", "title": TITLE, "scenario": asdict(scenario) | {"card": card}, "cases": cases}


def failure(row: dict[str, Any]) -> str:
    """一项不过的核对，一行。"""
    return (
        f"{row['case']}（{row['dtype']}）最大差 {row['max_abs']:.3g} 在 {row['coordinate']}，"
        f"calc_diff {row['calc_diff']:.2e}，可重复 {row['repeatable']}，哨兵完好 {row['guard_intact']}"
    )


def timed_case(
    name: str, seconds: Sequence[float], traffic: int, flops: int, ceilings: dict[str, float], **facts: Any
) -> dict[str, Any]:
    """一个计时的点；限制在哪一边由两个上限下的理论时间决定，比值是用时对那一边的目标时间。

    Args:
        name: 格子的名字。
        seconds: 每次的用时。
        traffic: 至少要读写的字节。
        flops: 浮点运算。
        ceilings: ``memory`` 是每秒几字节，``compute`` 是每秒几次运算。
        **facts: 另记的。
    """
    least = {"memory": traffic / ceilings["memory"], "compute": flops / ceilings["compute"]}
    bound = max(least, key=least.__getitem__)
    label, target = TARGETS[bound]
    share = least[bound] / median(seconds)
    print(f"{name}  {median(seconds) * 1e6:.1f} µs，{label}的 {share:.0%}", file=sys.stderr)
    return {
        "name": name,
        "values": {"dsx.seconds": spread(seconds)},
        "ratios": {"用时/目标": spread([sample * target / least[bound] for sample in seconds])},
        "facts": {"bound": label, "share": share, **facts},
    }


def spread(samples: Sequence[float]) -> dict[str, Any]:
    """``deepseek_export.benchmark.spread.Spread`` 的字段；它要 pydantic。"""
    return {"median": median(samples), "low": min(samples), "high": max(samples), "samples": list(samples)}


class Session:
    """一张卡上的一次运行。"""

    def __init__(self, budget: float) -> None:
        self._start, self._budget = time.monotonic(), budget
        major, minor = torch.cuda.get_device_capability()
        self.sm = major * 10 + minor
        self.seed = secrets.randbelow(2**31)
        self._generator = torch.Generator("cuda").manual_seed(self.seed)

    def elapsed(self) -> float:
        """已经用了多少秒。"""
        return time.monotonic() - self._start

    # ------------------------------------------------------------ 输入

    def _randn(self, *shape: int, dtype, scale: float = 1.0):
        return torch.randn(*shape, generator=self._generator, device="cuda", dtype=dtype) * scale

    def attention_inputs(self, B: int, S: int, H: int, T: int, past, dtype):
        """``past`` 之后、看不见的缓存行是 NaN。"""
        cache = self._randn(B, 1, T, LATENT + ROPE, dtype=dtype)
        for b, length in enumerate(past):
            cache[b, :, max(length, 0) + S :] = float("nan")
        q = self._randn(B, S, H, LATENT + ROPE, dtype=dtype)
        return q, cache, torch.tensor(past, device="cuda", dtype=torch.int64)

    def experts_weights(self, shape: str, dtype):
        """(w_gate, w_up, w_down)。"""
        E, _, D, inner = EXPERTS[shape]
        sizes = ((inner, D), (inner, D), (D, inner))
        return tuple(self._randn(E, *s, dtype=dtype, scale=s[1] ** -0.5) for s in sizes)

    def experts_tokens(self, shape: str, N: int, dtype, experts: int | None = None):
        """(x, topk_ids, topk_weights)；``experts`` 给出时只路由到前几个专家。"""
        E, k, D, _ = EXPERTS[shape]
        scores = torch.rand(N, experts or E, generator=self._generator, device="cuda")
        ids = scores.topk(k, dim=-1).indices.to(torch.int32)
        weights = torch.rand(N, k, generator=self._generator, device="cuda")
        return self._randn(N, D, dtype=dtype), ids, weights

    # ------------------------------------------------------------ 程序

    def attention_program(self, H: int, dtype):
        """H 个头的注意力程序。"""
        from deepseek_export.kernels.compile import compile_table
        from deepseek_export.kernels.latent_attention_launch import latent_attention_launch

        table = latent_attention_launch(self.sm, H, LATENT, ROPE, SCALE, _name(dtype))
        return compile_table(table)

    def experts_program(self, shape: str, dtype):
        """一种形状的专家程序。"""
        from deepseek_export.kernels.compile import compile_table
        from deepseek_export.kernels.grouped_swiglu_launch import grouped_swiglu_launch

        return compile_table(grouped_swiglu_launch(self.sm, *EXPERTS[shape], _name(dtype)))

    # ------------------------------------------------------------ 核对

    def check_everything(self) -> list[dict[str, Any]]:
        """全部核对，每项一行。"""
        rows: list[dict[str, Any]] = []
        for dtype in (torch.float16, torch.bfloat16):
            rows += self._check_attention(dtype)
            rows += self._check_experts(dtype)
        return rows

    def _check_attention(self, dtype) -> Iterator[dict[str, Any]]:
        from deepseek_export.ops.latent_attention import latent_attention

        for H in (16, 128):
            program = self.attention_program(H, dtype)
            for S, T, past in (
                (1, 1, [0]),
                (1, 4096, [0, 1, 63, 64, 65, 4095, 1000]),
                (2, 700, [0, 698, 33]),
                (5, 300, [295, 0]),
                (8, 2048, [2040, 0, 7, 511]),
                (1, 20000, [19999]),
            ):
                inputs = self.attention_inputs(len(past), S, H, T, past, dtype)

                def reference(inputs=inputs):
                    q, cache, past_lens = inputs
                    return latent_attention(q, cache.nan_to_num(0), past_lens, SCALE, LATENT)

                name = f"LatentAttention H={H} S={S} T={T} past={past}"
                yield self._check(name, program, inputs, (len(past), S, H, LATENT), reference)

    def _check_experts(self, dtype) -> Iterator[dict[str, Any]]:
        from deepseek_export.ops.moe_experts import moe_experts

        for shape in EXPERTS:
            program, weights = self.experts_program(shape, dtype), self.experts_weights(shape, dtype)
            k = EXPERTS[shape][1]
            # 最后两种把 token 挤到少数专家上：小块与大块的变体都走到，其余专家没有 token。
            for N, experts in ((1, None), (7, None), (300, None), (64, k), (3000, k + 1)):
                tokens = self.experts_tokens(shape, N, dtype, experts)
                inputs = (*tokens, *weights)
                name = f"MoeExperts {shape} N={N} 专家 {experts or EXPERTS[shape][0]} 个"
                yield self._check(name, program, inputs, tokens[0].shape, lambda i=inputs: moe_experts(*i))

    def _check(self, name: str, program, inputs, shape, reference) -> dict[str, Any]:
        """与参考比；再录进 CUDA graph 重放一遍，须逐位相同。"""
        from deepseek_export.parity import measures
        from deepseek_export.parity.tolerances import TOLERANCES
        from perf.gpu.harness import Runner

        dtype = inputs[0].dtype
        runner, output = Runner(program, inputs), torch.empty(shape, dtype=dtype, device="cuda")
        results = []
        graph = torch.cuda.CUDAGraph()
        for call in ("direct", "graph"):
            runner.poison()
            output.fill_(float("nan"))
            if call == "graph":
                with torch.cuda.graph(graph):
                    runner(inputs, output)
                graph.replay()
            else:
                runner(inputs, output)
            torch.cuda.synchronize()
            results.append(output.clone())
        m = measures.measure(results[0].float().cpu().numpy(), reference().float().cpu().numpy())
        repeatable = torch.equal(results[0], results[1])
        ok = TOLERANCES["op", _name(dtype)].accepts(m) and repeatable and runner.intact()
        row = {"case": name, "dtype": _name(dtype), "ok": bool(ok), "repeatable": repeatable}
        row |= {"guard_intact": runner.intact(), **asdict(m)}
        print(
            f"{'通过' if ok else '不过'}  {_name(dtype):9s} {name}  calc_diff={m.calc_diff:.2e}",
            file=sys.stderr,
        )
        return row

    # ------------------------------------------------------------ 计时

    def measure_everything(self, scenario: Scenario) -> list[dict[str, Any]]:
        """上限一格，再一个点一格；时间用完后的点记在第一格里。"""
        from perf.gpu.harness import copy_bandwidth, matmul_rate

        ceilings = {"memory": copy_bandwidth(), "compute": matmul_rate(torch.bfloat16)}
        values = {"copy.gb_s": ceilings["memory"] / 1e9, "matmul.tflop_s": ceilings["compute"] / 1e12}
        properties = torch.cuda.get_device_properties(0)
        facts: dict[str, Any] = {
            "sm": self.sm,
            "multiprocessors": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "versions": {name: version(name) for name in ("triton", "cuda-bindings")}
            | {"cuda": torch.version.cuda},
            "seed": self.seed,
            "skipped": [],
        }
        first = {
            "name": "上限",
            "values": {key: spread([value]) for key, value in values.items()},
            "facts": facts,
        }
        cases = [first]
        for point in scenario.attention:
            if self._late(facts, "LatentAttention", point):
                continue
            cases.append(self._measure_attention(*point, ceilings))
        weights: dict[str, Any] = {}
        for shape, N in scenario.experts:
            if self._late(facts, "MoeExperts", (shape, N)):
                continue
            if shape not in weights:
                weights.clear()  # 一种形状就有几十 GB
                weights[shape] = self.experts_weights(shape, torch.bfloat16)
            cases.append(self._measure_experts(shape, N, weights[shape], ceilings))
        return cases

    def _late(self, facts: dict[str, Any], name: str, point: tuple[Any, ...]) -> bool:
        if self.elapsed() <= self._budget:
            return False
        facts["skipped"].append(f"{name} {point}")
        return True

    def _measure_attention(
        self, H: int, B: int, S: int, T: int, ceilings: dict[str, float]
    ) -> dict[str, Any]:
        from perf.gpu.harness import Runner, time_graph

        inputs = self.attention_inputs(B, S, H, T, [T - S] * B, torch.bfloat16)
        output = torch.empty(B, S, H, LATENT, dtype=torch.bfloat16, device="cuda")
        runner = Runner(self.attention_program(H, torch.bfloat16), inputs)
        seconds = time_graph(lambda: runner(inputs, output))
        traffic = sum(t.numel() * t.element_size() for t in (*inputs, output))
        flops = 2 * B * S * H * T * (2 * LATENT + ROPE)
        return timed_case(f"LatentAttention H{H} B{B} S{S} T{T}", seconds, traffic, flops, ceilings)

    def _measure_experts(
        self, shape: str, N: int, weights: tuple[torch.Tensor, ...], ceilings: dict[str, float]
    ) -> dict[str, Any]:
        from perf.gpu.harness import Runner, time_call, time_graph

        _, k, D, inner = EXPERTS[shape]
        tokens = self.experts_tokens(shape, N, torch.bfloat16)
        inputs, output = (*tokens, *weights), torch.empty_like(tokens[0])
        runner = Runner(self.experts_program(shape, torch.bfloat16), inputs)
        seconds = time_graph(lambda: runner(inputs, output))
        active = int(tokens[1].unique().numel())
        traffic = active * 3 * D * inner * 2 + 2 * tokens[0].numel() * 2
        flops = 6 * N * k * D * inner
        case = timed_case(
            f"MoeExperts {shape} N{N}", seconds, traffic, flops, ceilings, active_experts=active
        )
        baseline = time_call(_torch_experts(*tokens, *weights))
        case["values"]["torch.seconds"] = spread(baseline)
        case["ratios"]["dsx/torch"] = spread([sample / median(baseline) for sample in seconds])
        return case


def _torch_experts(x, ids, weights, w_gate, w_up, w_down):
    """对照：排序好之后逐专家三次 matmul；每个专家的 token 数事先取到主机，不计入时间。"""
    import torch.nn.functional as F

    flat = ids.reshape(-1)
    order = flat.argsort(stable=True)
    counts = flat.bincount(minlength=w_gate.shape[0]).tolist()
    token = order // ids.shape[1]
    scale = weights.reshape(-1)[order].unsqueeze(-1)
    y = torch.empty(x.shape, dtype=torch.float32, device=x.device)

    def run() -> None:
        y.zero_()
        start = 0
        for expert, count in enumerate(counts):
            if count:
                rows = slice(start, start + count)
                a = x[token[rows]]
                hidden = F.silu(F.linear(a, w_gate[expert])) * F.linear(a, w_up[expert])
                y.index_add_(0, token[rows], F.linear(hidden, w_down[expert]).float() * scale[rows])
                start += count

    return run


def _name(dtype) -> Literal["float16", "bfloat16"]:
    return cast(Any, str(dtype).removeprefix("torch."))
