"""GPU 的规格：只有数据。

容量按厂商的十进制 GB 计，几处不一致时取小的一边；带宽与算力是上界，取大的一边。算力是稠密、FP32 累加的峰值，
不含 2:4 稀疏：``source`` 里写着“稀疏”的，厂商只给了稀疏的数，这里已经除以 2。
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True)
class Gpu:
    """一种 GPU。

    Attributes:
        title: 全名。
        memory: 显存（字节）。
        bandwidth: 显存带宽（字节每秒）。
        flops: FP16 稠密峰值（次每秒）。
        fp8_flops: FP8 稠密峰值；没有 FP8 的是 None。
        source: 数据出处。
    """

    title: str
    memory: float
    bandwidth: float
    flops: float
    fp8_flops: float | None
    source: str


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "a100-40": Gpu("A100 40GB SXM", 40e9, 1.555e12, 312e12, None, "NVIDIA A100 datasheet"),
        "a100": Gpu("A100 80GB SXM", 80e9, 2.039e12, 312e12, None, "NVIDIA A100 datasheet"),
        # A800、H800 与 A100、H100 只差 NVLink（400 GB/s）与 FP64，不影响这里的数。
        "a800": Gpu(
            "A800 80GB SXM", 80e9, 2.039e12, 312e12, None, "NVIDIA A100 datasheet，A800 的这几项相同"
        ),
        "h100-pcie": Gpu("H100 80GB PCIe", 80e9, 2.0e12, 756e12, 1513e12, "NVIDIA H100 datasheet（稀疏）"),
        "h100": Gpu("H100 80GB SXM5", 80e9, 3.35e12, 989e12, 1979e12, "NVIDIA H100 datasheet（稀疏）"),
        "h800": Gpu("H800 80GB SXM5", 80e9, 3.35e12, 989e12, 1979e12, "NVIDIA H800 GPU datasheet（稀疏）"),
        "h200": Gpu("H200 141GB SXM5", 141e9, 4.8e12, 989e12, 1979e12, "NVIDIA H200 datasheet（稀疏）"),
        # NVIDIA 的网站没有 H20、L20 的页面，取渠道商转发的规格表；几份公开的转录一致。
        "h20": Gpu("H20 96GB SXM5", 96e9, 4.0e12, 148e12, 296e12, "NVIDIA H20 规格表（稠密）"),
        "h20-141": Gpu("H20 141GB SXM5", 141e9, 4.8e12, 148e12, 296e12, "NVIDIA H20 规格表（稠密）"),
        # DGX B200 的 8 卡合计 64 TB/s；Blackwell Architecture Technical Brief 的单卡表写 7.7 TB/s。
        "b200": Gpu(
            "B200 180GB SXM",
            180e9,
            8.0e12,
            2250e12,
            4500e12,
            "NVIDIA DGX B200 datasheet（8 卡的数除以 8）；算力 NVIDIA HGX B200（稀疏，8 卡）",
        ),
        # 有的资料写 8 卡合计 2.1 TB，那是 2.1 TiB，与 8 × 288 GB 相同。
        "b300": Gpu(
            "B300 288GB SXM",
            288e9,
            8.0e12,
            2250e12,
            4500e12,
            "NVIDIA DGX B300 User Guide；带宽 NVIDIA GB300 NVL72（576 TB/s 除以 72）；算力 NVIDIA HGX B300（稀疏，8 卡）",
        ),
        "l4": Gpu("L4 24GB", 24e9, 0.3e12, 121e12, 242e12, "NVIDIA L4 datasheet（稀疏）"),
        "l20": Gpu("L20 48GB", 48e9, 0.864e12, 119.5e12, 239e12, "NVIDIA L20 规格表（稠密）"),
        "l40s": Gpu("L40S 48GB", 48e9, 0.864e12, 362e12, 733e12, "NVIDIA L40S datasheet"),
        "rtx3090": Gpu("GeForce RTX 3090", 24e9, 0.936e12, 71e12, None, "NVIDIA Ampere GA102 whitepaper"),
        "rtx4090": Gpu("GeForce RTX 4090", 24e9, 1.008e12, 165e12, 330e12, "NVIDIA Ada whitepaper"),
        "rtx5090": Gpu("GeForce RTX 5090", 32e9, 1.792e12, 209e12, 419e12, "NVIDIA RTX Blackwell whitepaper"),
        "rtx-pro-6000": Gpu(
            "RTX PRO 6000 Blackwell Workstation",
            96e9,
            1.792e12,
            503.8e12,
            1007.6e12,
            "NVIDIA RTX Blackwell PRO whitepaper",
        ),
    }
)
