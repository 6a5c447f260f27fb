"""``dsx plan --cluster`` 的写法：几台什么样的机器，之间的网络多快。

8x h100 80GB, 400Gb/s
4x cpu 256GB 300GB/s, 10Gb/s 50us
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from deepseek_export.errors import DsxError, did_you_mean
from deepseek_export.plan.gpus import GPUS, Gpu

GRAMMAR = (
    "写成“个数x 名字 [内存] [内存带宽] [算力], 网络 [延迟]”，例如 8x h100 80GB, 400Gb/s，"
    "或 4x cpu 256GB 300GB/s 2TFLOP/s, 10Gb/s 50us；内存 GB、TB，带宽 GB/s、TB/s，算力 GFLOP/s、TFLOP/s，"
    "网络 Gb/s、Mb/s（位）或 GB/s（字节），延迟 us、ms"
)
#: 没有写延迟时的，秒：一条以太网上的 TCP。
DEFAULT_LATENCY = 50e-6
MAX_MACHINES = 65536
_CPU = "cpu"

#: 单位 → 是什么、乘多少。
_UNITS = {
    "GB": ("memory", 1e9),
    "TB": ("memory", 1e12),
    "GB/s": ("bandwidth", 1e9),
    "TB/s": ("bandwidth", 1e12),
    "GFLOP/s": ("flops", 1e9),
    "TFLOP/s": ("flops", 1e12),
}
_LINK_UNITS = {
    "Mb/s": ("bandwidth", 1e6 / 8),
    "Gb/s": ("bandwidth", 1e9 / 8),
    "GB/s": ("bandwidth", 1e9),
    "us": ("latency", 1e-6),
    "µs": ("latency", 1e-6),
    "ms": ("latency", 1e-3),
}
_NAMES = {"memory": "内存", "bandwidth": "带宽", "flops": "算力", "latency": "延迟"}
_AMOUNT = re.compile(r"(\d{1,9}(?:\.\d{1,9})?)([A-Za-zµ/]+)", re.ASCII)
_HEAD = re.compile(r"(\d{1,9})\s*x\s*([A-Za-z][\w-]*)\s*(.*)", re.ASCII | re.DOTALL)


@dataclass(frozen=True)
class Link:
    """两台机器之间的网络。

    Attributes:
        bandwidth: 字节每秒。
        latency: 秒。
        assumed: 延迟没有写，取的缺省。
    """

    bandwidth: float
    latency: float
    assumed: bool


@dataclass(frozen=True)
class Cluster:
    """一样的几台机器。

    Attributes:
        text: 原话。
        machine: 一台的规格；CPU 没有写算力就是无穷大，只按带宽估。
        count: 几台。
        link: 之间的网络；只有一台时没有。
    """

    text: str
    machine: Gpu
    count: int
    link: Link | None

    @property
    def knows_flops(self) -> bool:
        """算力是知道的。"""
        return self.machine.flops != float("inf")


def parse_cluster(text: str) -> Cluster:
    """读 ``--cluster`` 的值。

    Raises:
        DsxError: ``DSX-E766``，写得不对；``DSX-E703``，不认识的 GPU。
    """
    what, _, network = text.partition(",")
    found = _HEAD.fullmatch(what.strip())
    if found is None:
        raise _bad(text, f"{what.strip()!r} 不是“个数x 名字”")
    count, name, rest = int(found[1]), found[2].lower(), found[3]
    if not 1 <= count <= MAX_MACHINES:
        raise _bad(text, f"{count} 台；要 1 到 {MAX_MACHINES} 台")
    given = _amounts(text, rest, _UNITS)
    link = _link(text, network) if network.strip() else None
    if link is None and count > 1:
        raise _bad(text, f"{count} 台机器之间的网络没有写")
    return Cluster(text.strip(), _machine(text, name, given), count, link)


def _machine(text: str, name: str, given: dict[str, float]) -> Gpu:
    if name == _CPU:
        if missing := [_NAMES[key] for key in ("memory", "bandwidth") if key not in given]:
            raise _bad(text, f"cpu 没有写{'、'.join(missing)}")
        flops = given.get("flops", float("inf"))
        return Gpu("CPU", given["memory"], given["bandwidth"], flops, None, "命令行上写的")
    if name not in GPUS:
        todo = f"{did_you_mean(name, GPUS)}认识的：cpu、{'、'.join(GPUS)}"
        raise DsxError("DSX-E703", f"没有叫 {name!r} 的 GPU", todo)
    known = GPUS[name]
    return replace(
        known,
        memory=given.get("memory", known.memory),
        bandwidth=given.get("bandwidth", known.bandwidth),
        flops=given.get("flops", known.flops),
        # 另给的算力是哪种精度说不清：两种都用它。
        fp8_flops=None if "flops" in given else known.fp8_flops,
    )


def _link(text: str, network: str) -> Link:
    given = _amounts(text, network, _LINK_UNITS)
    if "bandwidth" not in given:
        raise _bad(text, "网络没有写带宽")
    return Link(given["bandwidth"], given.get("latency", DEFAULT_LATENCY), "latency" not in given)


def _amounts(text: str, words: str, units: dict[str, tuple[str, float]]) -> dict[str, float]:
    """``80GB 300GB/s`` → 各是多少；次序随意，各至多一次。"""
    given: dict[str, float] = {}
    for word in words.split():
        found = _AMOUNT.fullmatch(word)
        if found is None or found[2] not in units:
            raise _bad(text, f"看不懂 {word!r}，这里的单位有 {'、'.join(units)}")
        key, factor = units[found[2]]
        if key in given:
            raise _bad(text, f"{_NAMES[key]}写了两次：{word!r}")
        given[key] = float(found[1]) * factor
        if given[key] <= 0 and key != "latency":
            raise _bad(text, f"{word!r} 不大于 0")
    return given


def _bad(text: str, what: str) -> DsxError:
    return DsxError("DSX-E766", f"--cluster {text!r}：{what}", GRAMMAR)
