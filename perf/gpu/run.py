"""在一张 NVIDIA 卡上核对并测量插件的 kernel：先与 torch 参考实现比，再计时（KERNEL-7）。

    python perf/gpu/run.py [--out perf/results] [--budget 450] [--bundle OUT]

一条命令，不联网，8 分钟之内；只要 Python 3.11+、torch、triton、cuda-bindings、numpy。给了 ``--bundle``（要装 dsx 与能用的 TensorRT）
再建它的引擎，逐层校验、生成一段，不在 8 分钟之内；没有跑引擎时报告里有一行说明为什么。写出 ``gpu-<卡>-<日期>.json`` 与同名的
``.md``。任何一项核对不过就不计时，退出码 1；要求了引擎而没有跑成或校验不过，退出码也是 1；没有 GPU 时只说一行。时间用完时剩下的点记为未测。

启动走的就是插件的路径：提前编译的 :class:`Program` 与 :class:`Launcher`，不经过 Triton 的运行时。输入每次随机（种子印在报告里），
输出与 workspace 预先填满 NaN。计时在 CUDA graph 里，每次之前冲掉 L2；上限是同一张卡当场测得的拷贝带宽与方阵乘法速率。
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import secrets
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from datetime import date
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # 不要求安装 dsx

LATENT, ROPE, SCALE = 512, 64, 0.1147
#: 专家的形状：名字 → (E, k, D, I)。
EXPERTS = {"V3": (256, 8, 7168, 2048), "V2-Lite": (64, 6, 2048, 1408)}
BANDWIDTH_TARGET, MATMUL_TARGET = 0.8, 0.6


def main() -> int:
    """解析参数，核对，计时，写报告。"""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parents[1] / "results")
    parser.add_argument("--budget", type=float, default=450, help="整个命令的秒数上限")
    parser.add_argument("--bundle", type=Path, help="另用这个 bundle 建引擎、校验、生成")
    options = parser.parse_args()
    missing = [name for name in ("torch", "triton", "cuda.bindings", "numpy") if not _installed(name)]
    if missing:
        print(f"缺少 {'、'.join(missing)}", file=sys.stderr)
        return 1
    import torch

    if not torch.cuda.is_available():
        print("没有可用的 NVIDIA GPU，什么也没有测", file=sys.stderr)
        return 1
    session = Session(options.budget)
    correctness = session.check_everything()
    failed = [row for row in correctness if not row["ok"]]
    report: dict[str, Any] = {"environment": session.environment, "correctness": correctness}
    if not failed:
        from perf.gpu.engine import run_engine

        report |= session.measure_everything()
        report["engine"] = run_engine(options.bundle, session.sm)
    report["seconds"] = round(session.elapsed(), 1)
    card = re.sub(r"\W+", "-", session.environment["card"]).strip("-").lower()
    stem = options.out / f"gpu-{card}-{session.environment['date']}"
    options.out.mkdir(parents=True, exist_ok=True)
    stem.with_suffix(".json").write_text(
        json.dumps(report, ensure_ascii=False, indent=1) + "\n", encoding="utf-8"
    )
    from perf.gpu.report import markdown

    text = markdown(report)
    stem.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)
    return 1 if failed or not report["engine"].get("verified", options.bundle is None) else 0


def _installed(name: str) -> bool:
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:
        return False


class Session:
    """一张卡上的一次运行。"""

    def __init__(self, budget: float) -> None:
        import torch

        self._start, self._budget = time.monotonic(), budget
        major, minor = torch.cuda.get_device_capability()
        self.sm = major * 10 + minor
        properties = torch.cuda.get_device_properties(0)
        self.seed = secrets.randbelow(2**31)
        self.environment: dict[str, Any] = {
            "card": properties.name,
            "sm": self.sm,
            "multiprocessors": properties.multi_processor_count,
            "memory_gib": round(properties.total_memory / 2**30, 1),
            "date": date.today().isoformat(),
            "python": platform.python_version(),
            **{name: version(name) for name in ("torch", "triton", "cuda-bindings")},
            "cuda": torch.version.cuda,
            "seed": self.seed,
        }
        self._generator = torch.Generator("cuda").manual_seed(self.seed)

    def elapsed(self) -> float:
        """已经用了多少秒。"""
        return time.monotonic() - self._start

    # ------------------------------------------------------------ 输入

    def _randn(self, *shape: int, dtype, scale: float = 1.0):
        import torch

        return torch.randn(*shape, generator=self._generator, device="cuda", dtype=dtype) * scale

    def attention_inputs(self, B: int, S: int, H: int, T: int, past, dtype):
        """``past`` 之后、看不见的缓存行是 NaN。"""
        import torch

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
        import torch

        E, k, D, _ = EXPERTS[shape]
        scores = torch.rand(N, experts or E, generator=self._generator, device="cuda")
        ids = scores.topk(k, dim=-1).indices.to(torch.int32)
        weights = torch.rand(N, k, generator=self._generator, device="cuda")
        return self._randn(N, D, dtype=dtype), ids, weights

    # ------------------------------------------------------------ 程序

    def attention_program(self, H: int, dtype):
        """H 个头的注意力程序。"""
        from deepseek_export.kernels.compile import compile_plan
        from deepseek_export.kernels.latent_attention_plan import latent_attention_plan

        plan = latent_attention_plan(self.sm, H, LATENT, ROPE, SCALE, _name(dtype))
        return compile_plan(plan)

    def experts_program(self, shape: str, dtype):
        """一种形状的专家程序。"""
        from deepseek_export.kernels.compile import compile_plan
        from deepseek_export.kernels.grouped_swiglu_plan import grouped_swiglu_plan

        return compile_plan(grouped_swiglu_plan(self.sm, *EXPERTS[shape], _name(dtype)))

    # ------------------------------------------------------------ 核对

    def check_everything(self) -> list[dict[str, Any]]:
        """全部核对，每项一行。"""
        import torch

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
        import torch

        from deepseek_export.parity.measures import measure
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
        m = measure(results[0].float().cpu().numpy(), reference().float().cpu().numpy())
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

    def measure_everything(self) -> dict[str, Any]:
        """上限与全部计时；时间用完后的点只有 ``"skipped": True``。"""
        import torch

        from perf.gpu.harness import copy_bandwidth, matmul_rate

        dtype = torch.bfloat16
        ceilings = {"copy_gb_s": copy_bandwidth(), "matmul_tflop_s": matmul_rate(dtype)}
        attention = [
            self._measure_attention(H, B, S, T, ceilings)
            for H, B, S, T in (
                *((H, B, 1, T) for H in (16, 128) for B in (1, 16, 128) for T in (1024, 8192, 32768)),
                (128, 16, 4, 8192),  # 投机解码一次校验 4 个 token
            )
        ]
        experts = []
        for shape in EXPERTS:
            weights = self.experts_weights(shape, dtype)
            program = self.experts_program(shape, dtype)
            for N in (1, 16, 128, 1024, 4096):
                experts.append(self._measure_experts(shape, N, program, weights, ceilings))
        return {"ceilings": ceilings, "attention": attention, "experts": experts}

    def _measure_attention(self, H: int, B: int, S: int, T: int, ceilings) -> dict[str, Any]:
        import torch

        from perf.gpu.harness import Runner, time_graph

        row: dict[str, Any] = {"H": H, "B": B, "S": S, "T": T}
        if self.elapsed() > self._budget:
            return row | {"skipped": True}
        inputs = self.attention_inputs(B, S, H, T, [T - S] * B, torch.bfloat16)
        output = torch.empty(B, S, H, LATENT, dtype=torch.bfloat16, device="cuda")
        runner = Runner(self.attention_program(H, torch.bfloat16), inputs)
        timing = time_graph(lambda: runner(inputs, output))
        traffic = sum(t.numel() * t.element_size() for t in (*inputs, output))
        flops = 2 * B * S * H * T * (2 * LATENT + ROPE)
        return row | _rates(timing, traffic, flops, ceilings)

    def _measure_experts(self, shape: str, N: int, program, weights, ceilings) -> dict[str, Any]:
        import torch

        from perf.gpu.harness import Runner, time_call, time_graph

        row: dict[str, Any] = {"shape": shape, "N": N}
        if self.elapsed() > self._budget:
            return row | {"skipped": True}
        _, k, D, inner = EXPERTS[shape]
        tokens = self.experts_tokens(shape, N, torch.bfloat16)
        inputs, output = (*tokens, *weights), torch.empty_like(tokens[0])
        runner = Runner(program, inputs)
        timing = time_graph(lambda: runner(inputs, output))
        active = int(tokens[1].unique().numel())
        traffic = active * 3 * D * inner * 2 + 2 * tokens[0].numel() * 2
        row |= {"active_experts": active, **_rates(timing, traffic, 6 * N * k * D * inner, ceilings)}
        baseline = time_call(_torch_experts(*tokens, *weights))
        return row | {"torch": asdict(baseline), "speedup": baseline.median / timing.median}


def _torch_experts(x, ids, weights, w_gate, w_up, w_down):
    """对照：排序好之后逐专家三次 matmul；每个专家的 token 数事先取到主机，不计入时间。"""
    import torch
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


def _rates(timing, traffic: int, flops: int, ceilings) -> dict[str, Any]:
    """GB/s、TFLOP/s 与相对上限的比例；限制在哪一边由两个上限下的理论时间决定。"""
    bandwidth, rate = traffic / timing.median / 1e3, flops / timing.median / 1e6
    share = {"memory": bandwidth / ceilings["copy_gb_s"], "compute": rate / ceilings["matmul_tflop_s"]}
    bound = max(share, key=share.__getitem__)
    target = BANDWIDTH_TARGET if bound == "memory" else MATMUL_TARGET
    return {
        "time_us": asdict(timing),
        "gb_s": bandwidth,
        "tflop_s": rate,
        "bound": bound,
        "share": share[bound],
        "target": target,
    }


def _name(dtype) -> Literal["float16", "bfloat16"]:
    return cast(Any, str(dtype).removeprefix("torch."))


if __name__ == "__main__":
    sys.exit(main())
