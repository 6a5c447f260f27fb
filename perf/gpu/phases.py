"""一次验收分哪几步，各做什么。一步一个进程；一步里一项一项地做，哪一项不成都不妨碍别的。"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

import torch

from perf.gpu import points
from perf.gpu.card import Card
from perf.gpu.points import Experts, Point
from perf.gpu.sources import Source, scribble

Row: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class Item:
    """一项。

    Attributes:
        name: 名字。
        work: 做它；返回的写进这一行，有 ``ok`` 而为假就是不过。
        needs: 要几字节显存，空着的不够就跳过。
        about: 不论成败都写进这一行的。
    """

    name: str
    work: Callable[[], Row]
    needs: int = 0
    about: Row | None = None


@dataclass(frozen=True)
class Phase:
    """一步。

    Attributes:
        name: 名字。
        title: 做什么，给人看。
        items: 各项。
        limit: 至多几秒。
        wrapper: 在这个工具下跑。``{folder}`` 换成结果的目录。
        environment: 另加的环境变量。
        tool: 要的另一个工具；它或 ``wrapper`` 的不在就跳过，写明。
    """

    name: str
    title: str
    items: Callable[[Card, Path], Iterator[Item]]
    limit: float
    wrapper: tuple[str, ...] = ()
    environment: tuple[tuple[str, str], ...] = ()
    tool: str = ""

    @property
    def tools(self) -> tuple[str, ...]:
        """要哪几个工具。"""
        return tuple(filter(None, (*self.wrapper[:1], self.tool)))


def _environment(card: Card, _: Path) -> Iterator[Item]:
    yield Item("card", card.facts)

    def compile_all() -> Row:
        tables = [point.table(card.sm) for point in points.EVERY]
        return {"kernels": card.compile(dict.fromkeys(tables))}

    yield Item("compile", compile_all)


def _checks(chosen: Sequence[Point]) -> Callable[[Card, Path], Iterator[Item]]:
    def items(card: Card, _: Path) -> Iterator[Item]:
        for point in chosen:
            yield Item(
                point.name,
                partial(_check, card, point),
                point.needs(reference=True),
                {"check": point.program},
            )

    return items


def _check(card: Card, point: Point) -> Row:
    """与参考比；再录进 CUDA graph 重放一遍，须逐位相同，workspace 末尾的哨兵完好。"""
    from deepseek_export.parity.tolerances import TOLERANCES

    source = Source(card.device)
    inputs = point.inputs(source)
    runner, outputs = card.runner(point.table(card.sm), inputs), point.outputs(inputs)
    results = []

    def call() -> None:
        runner(inputs, outputs)

    for way in (lambda: call, lambda: card.graph(call)):
        runner.poison()
        for output in outputs:
            scribble(output)
        way()()
        card.synchronize()
        results.append(tuple(output.clone() for output in outputs))
    m = point.measure(inputs, results[0])
    repeatable, intact = all(map(torch.equal, *results)), runner.intact()
    return {
        "ok": bool(TOLERANCES["op", point.dtype].accepts(m)) and repeatable and intact,
        "seed": source.seed,
        "repeatable": repeatable,
        "guard_intact": intact,
        **asdict(m),
    }


def _times(chosen: Sequence[Point]) -> Callable[[Card, Path], Iterator[Item]]:
    def items(card: Card, _: Path) -> Iterator[Item]:
        for point in chosen:
            yield Item(
                point.name,
                partial(_time, card, point),
                point.needs(reference=False),
                {"time": point.program, "point": points.to_row(point)},
            )

    return items


def _time(card: Card, point: Point) -> Row:
    """在 CUDA graph 里，不含 Python 与启动的开销。"""
    source = Source(card.device)
    inputs = point.inputs(source)
    runner, outputs = card.runner(point.table(card.sm), inputs), point.outputs(inputs)

    def call() -> None:
        runner(inputs, outputs)

    call()
    card.synchronize()
    seconds = card.seconds(card.graph(call))
    traffic, flops = point.work(inputs)
    row = {"seed": source.seed, "seconds": seconds, "traffic": traffic, "flops": flops}
    if isinstance(point, Experts):
        row["torch_seconds"] = card.seconds(_torch_experts(*inputs))
    return row


def _torch_experts(x, ids, weights, w_gate, w_up, w_down) -> Callable[[], None]:
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


def _ceilings(card: Card, _: Path) -> Iterator[Item]:
    """上限，同一张卡当场测得：启动一次最少多久，拷贝的带宽，方阵乘法的速率。"""
    n, nbytes = 8192, 1 << 30

    def launch() -> Row:
        one = torch.zeros(1, device=card.device)

        def call() -> None:
            one.add_(1)

        call()
        return {"ceiling": "launch", "seconds": card.seconds(card.graph(call))}

    def copy() -> Row:
        """大块设备内拷贝，读加写。"""
        source = torch.empty(nbytes, dtype=torch.uint8, device=card.device)
        target = torch.empty_like(source)
        return {
            "ceiling": "copy",
            "seconds": card.seconds(lambda: target.copy_(source)),
            "amount": 2 * nbytes,
        }

    def matmul() -> Row:
        a, b, out = (torch.ones(n, n, device=card.device, dtype=torch.bfloat16) for _ in range(3))
        for one in (a, b):
            one.normal_()
        seconds = card.seconds(lambda: torch.matmul(a, b, out=out))
        return {"ceiling": "matmul", "seconds": seconds, "amount": 2 * n**3}

    yield Item("launch", launch)
    yield Item("copy", copy, 2 * nbytes)
    yield Item("matmul", matmul, 3 * 2 * n * n)


def _once(chosen: Sequence[Point]) -> Callable[[Card, Path], Iterator[Item]]:
    """只执行一次，给外面的工具看。"""

    def items(card: Card, _: Path) -> Iterator[Item]:
        for point in chosen:
            yield Item(point.name, partial(_execute, card, point), point.needs(reference=False))

    return items


def _execute(card: Card, point: Point) -> Row:
    inputs = point.inputs(Source(card.device))
    card.runner(point.table(card.sm), inputs)(inputs, point.outputs(inputs))
    card.synchronize()
    return {}


def _launcher(card: Card, folder: Path) -> Iterator[Item]:
    """C++ 启动器与 Python 的逐位相同。"""
    from perf.gpu.native import compare_launchers

    for point in points.TINY:
        yield Item(point.name, partial(compare_launchers, card, point, folder))


def _runtime(_: Card, __: Path) -> Iterator[Item]:
    from perf.gpu.runtime import replay_on_two_threads

    yield Item("replay", replay_on_two_threads)


def _rest(card: Card, folder: Path) -> Iterator[Item]:
    yield from _checks(points.REST)(card, folder)


_SANITIZED = (("PYTORCH_NO_CUDA_MEMORY_CACHING", "1"),)  # 缓存的分配器会把越界藏在大块里
_SANITIZER = ("compute-sanitizer", "--error-exitcode", "86", "--tool")
_NCU = ("ncu", "--set", "basic", "--kernel-name", "regex:latent_attention_partial|gate_up|down")
_NCU_OUT = ("--launch-count", "3", "--csv", "--force-overwrite", "--log-file", "{folder}/ncu.csv")

#: 按次序；先做的更要紧，后面的可能没有时间。
PHASES: tuple[Phase, ...] = (
    Phase("environment", "卡与库；并行编译全部 kernel", _environment, 180),
    Phase("smoke", "各个算子，很小的形状", _checks(points.TINY), 60),
    Phase(
        "memcheck", "sanitizer：越界与没有对齐", _once(points.TINY), 90, (*_SANITIZER, "memcheck"), _SANITIZED
    ),
    Phase(
        "racecheck",
        "sanitizer：共享内存的竞争",
        _once(points.TINY),
        90,
        (*_SANITIZER, "racecheck"),
        _SANITIZED,
    ),
    Phase("checks", "主要形状的核对", _checks(points.CHECKED), 90),
    Phase("ceilings", "启动、拷贝、方阵乘法", _ceilings, 60),
    Phase("headline", "主要形状的计时", _times(points.HEADLINE), 120),
    Phase("awkward", "不凑整的批、长短不齐、128k 的计时", _times(points.AWKWARD), 90),
    Phase("ncu", "Nsight Compute 看三个 kernel", _once(points.PROFILED), 90, (*_NCU, *_NCU_OUT)),
    Phase("launcher", "C++ 启动器", _launcher, 60, tool="g++"),
    Phase("runtime", "cuda.py 与重放，用替身的引擎，真的驱动", _runtime, 45),
    Phase("rest", "其余的核对", _rest, 240),
)
