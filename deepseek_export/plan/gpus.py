"""GPU 的规格：只有数据。

容量按厂商的十进制 GB 计（驱动报告的略多，取小的一边）；算力是 FP16 稠密、FP32 累加的峰值，不含 2:4 稀疏。
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
        source: 数据出处。
    """

    title: str
    memory: float
    bandwidth: float
    flops: float
    source: str


GPUS: Mapping[str, Gpu] = MappingProxyType(
    {
        "a100-40": Gpu("A100 40GB SXM", 40e9, 1.555e12, 312e12, "NVIDIA A100 datasheet"),
        "a100": Gpu("A100 80GB SXM", 80e9, 2.039e12, 312e12, "NVIDIA A100 datasheet"),
        "h100-pcie": Gpu("H100 80GB PCIe", 80e9, 2.0e12, 756e12, "NVIDIA H100 datasheet"),
        "h100": Gpu("H100 80GB SXM5", 80e9, 3.35e12, 989e12, "NVIDIA H100 datasheet"),
        "h200": Gpu("H200 141GB SXM5", 141e9, 4.8e12, 989e12, "NVIDIA H200 datasheet"),
        "b200": Gpu("B200 180GB SXM", 180e9, 7.7e12, 2250e12, "NVIDIA DGX B200 datasheet（8 卡的数除以 8）"),
        "l4": Gpu("L4 24GB", 24e9, 0.3e12, 121e12, "NVIDIA L4 datasheet（稀疏峰值除以 2）"),
        "l40s": Gpu("L40S 48GB", 48e9, 0.864e12, 362e12, "NVIDIA L40S datasheet"),
        "rtx3090": Gpu("GeForce RTX 3090", 24e9, 0.936e12, 71e12, "NVIDIA Ampere GA102 whitepaper"),
        "rtx4090": Gpu("GeForce RTX 4090", 24e9, 1.008e12, 165e12, "NVIDIA Ada whitepaper"),
        "rtx5090": Gpu("GeForce RTX 5090", 32e9, 1.792e12, 209e12, "NVIDIA RTX Blackwell whitepaper"),
    }
)
