"""流水线的参数：几个小批，各种等待的上限。"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from deepseek_export.cluster.tls import TlsFiles
from deepseek_export.errors import DsxError


@dataclass(frozen=True)
class ClusterSettings:
    """每一种等待都有上限。

    Args:
        ray: 用 Ray 起，连哪个：``auto`` 连已经在跑的，``HOST:PORT`` 连那一个，``local`` 在本进程里起一个，``inside`` 见
            :class:`~deepseek_export.cluster.ray_launcher.RayLauncher`；``None`` 在本机上起，不要 Ray。
        strategy: 用 Ray 起时，``pack`` 尽量放在一起，``spread`` 尽量分开。
        cpus: 用 Ray 起时，每个 stage 要几个 CPU。
        tls: 用 Ray 起时，各台机器之间的信道用哪些证书加密，见 :mod:`.tls`；``None`` 不加密。
        micro_batches: 一次调用的各行至多分成几个小批，依次进流水线，几个 stage 于是同时在算；不超过行数。1 不分。M 个小批过 S 个 stage，
            每个 stage 在 M + S - 1 份时间里忙 M 份。分了之后每次调用的行数变少，最后几位随之不同（SERVE-1 说的那样）。
        silence_s: 一条信道上这么多秒没有一个字节（心跳也没有），就当对方不在了。
        start_s: 各 stage 加载权重至多多少秒。
        step_s: 一次模型调用至多多少秒。
        retry_s: 起不来时隔多久再试；每次加倍，到 ``retry_max_s`` 为止。
        retry_max_s: 同上。

    Raises:
        DsxError: ``DSX-E740``，不是正数；``DSX-E756``，给了证书而不用 Ray：本机的 stage 不经过网络。
    """

    micro_batches: int = 1
    ray: str | None = None
    strategy: Literal["pack", "spread"] = "pack"
    cpus: int = 1
    tls: TlsFiles | None = None
    silence_s: float = 5.0
    start_s: float = 900.0
    step_s: float = 600.0
    retry_s: float = 0.5
    retry_max_s: float = 30.0

    def __post_init__(self) -> None:
        if self.strategy not in ("pack", "spread"):
            raise DsxError("DSX-E740", f"strategy={self.strategy!r}", "写 pack 或 spread")
        if self.tls is not None and self.ray is None:
            todo = "加 --ray，或去掉证书：本机的 stage 用继承来的套接字，不经过网络"
            raise DsxError("DSX-E756", f"给了 {self.tls.cert}，而没有用 Ray", todo)
        for key, value in vars(self).items():
            if key in ("ray", "strategy", "tls"):
                continue
            whole = key in ("micro_batches", "cpus")
            right = isinstance(value, int) if whole else isinstance(value, int | float)
            if isinstance(value, bool) or not right or not value > 0:
                what = "正整数" if whole else "大于 0 的秒数"
                raise DsxError("DSX-E740", f"{key}={value!r}", f"把 {key} 设为{what}")
