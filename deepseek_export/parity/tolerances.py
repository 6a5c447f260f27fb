"""容差表：唯一允许写容差数字的地方，每一行都写明理由。

键是（量，dtype）。``max_abs`` 以参照值的均方根为尺：通过的条件是 ``max_abs <= 容差 * max(1, rms(want))``。
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Literal

from deepseek_export.parity.measures import Measure

if TYPE_CHECKING:
    from deepseek_export.checkpoint.weight_only import QuantKind

Quantity = Literal[
    "op",
    "selection",
    "selection_loss",
    "index_loss",
    "block",
    "narrow_cache",
    "logits",
    "logits_narrow_cache",
    "logits_after_near_tie",
    "cache_loss",
    "loss",
    "loss_all",
]
Dtype = Literal["float32", "float16", "bfloat16", "int8"]
#: 容差表的键：量、dtype、权重量化。
Key = tuple[Quantity, Dtype, "QuantKind | None"]


@dataclass(frozen=True)
class Tolerance:
    """一行容差。

    Attributes:
        max_abs: 见模块说明。
        calc_diff: 余弦型差异的上限。
        norm: ``|norm_ratio - 1|`` 的上限。
        reason: 为什么是这个数。
    """

    max_abs: float
    calc_diff: float
    norm: float
    reason: str

    def limit(self, scale: float) -> float:
        """最大绝对差的上限；``scale`` 是参照值的均方根。"""
        return self.max_abs * max(1.0, scale)

    def accepts(self, m: Measure) -> bool:
        """三个量都在限内。"""
        return (
            m.max_abs <= self.limit(m.scale)
            and m.calc_diff <= self.calc_diff
            and abs(m.norm_ratio - 1) <= self.norm
        )


TOLERANCES: Mapping[tuple[Quantity, Dtype], Tolerance] = MappingProxyType(
    {
        ("op", "float32"): Tolerance(
            1e-5, 1e-10, 1e-5, "同一公式、不同求和次序：float32 单个算子约 1e-6，留十倍余量"
        ),
        ("op", "float16"): Tolerance(
            1e-2, 1e-5, 2e-3, "输出舍入到 float16（相对 2^-11），矩阵乘中间结果再舍入两到三次"
        ),
        ("op", "bfloat16"): Tolerance(
            8e-2, 1e-4, 1.6e-2, "尾数比 float16 少三位，幅度放宽 2^3 倍；calc_diff 是平方量，只放宽十倍"
        ),
        ("op", "int8"): Tolerance(
            2e-4,
            1e-8,
            1e-4,
            "float32 的模型，乘数拆成两个 int8 平面，约 15 位：int8 缓存的 query 与概率（CPU-17），int8 的 w_kv_b 展开的 latent（CPU-16）",
        ),
        **{
            ("selection", dtype): Tolerance(
                0.0, 0.0, 0.0, "选中的 key 是集合：并列带（SELECTION_BAND）之内换过的先还原，剩下的必须全同"
            )
            for dtype in ("float32", "float16", "bfloat16", "int8")
        },
        ("selection_loss", "int8"): Tolerance(
            float("inf"),
            5e-2,
            1e-5,
            "int8 的索引 key 对没有舍入的：Dice 距离，即换掉的份额；随机数上实测至多 5e-3（8192 个里选 2048 个也是），留十倍",
        ),
        ("index_loss", "int8"): Tolerance(
            float("inf"), 1e-1, 1e-1, "int8 的索引 key 换了分数接近的 key，那几行合理地不同；只防整体跑偏"
        ),
        ("block", "float32"): Tolerance(2e-5, 1e-10, 1e-5, "一个注意力或前馈块：三到五次矩阵乘，约 2e-6"),
        ("block", "float16"): Tolerance(
            2e-2, 2e-5, 4e-3, "一个块内的 float16 舍入累计；残差流的均方根约为 1"
        ),
        ("block", "bfloat16"): Tolerance(
            1.6e-1,
            2e-4,
            3.2e-2,
            "缓存是 bfloat16 且算子库直接乘 bfloat16 的注意力块：相对 float16 同 op 一行那样放宽",
        ),
        ("narrow_cache", "float16"): Tolerance(
            5e-3,
            1e-6,
            1e-4,
            "float32 模型的 float16 缓存：几乎相等的数舍入到相邻两值，差 2^-10 乘以均方根的几倍",
        ),
        ("narrow_cache", "bfloat16"): Tolerance(
            4e-2,
            2e-5,
            4e-3,
            "bfloat16 缓存：同上，相邻两值差 2^-7 乘以均方根的几倍；也容得下 float16 模型的舍入",
        ),
        ("narrow_cache", "int8"): Tolerance(
            8e-2,
            2e-5,
            4e-3,
            "int8 缓存：一个码差一，即行内最大值的 1/125，约 3e-2 个均方根；旋转部分是 16 位",
        ),
        ("logits", "float32"): Tolerance(1e-4, 1e-9, 1e-4, "整个模型逐层累计；发布承诺 1e-4，实测约 5e-6"),
        ("logits", "float16"): Tolerance(
            1e-1, 1e-3, 2e-2, "float16 误差逐层累计；两个 float16 实现之间的差与各自到 float32 的差同量级"
        ),
        ("logits", "bfloat16"): Tolerance(
            3e-1,
            1e-3,
            2e-2,
            "尾数少三位；路由没有翻转时，两个 bfloat16 实现在 2、3 层的模型上实测差 7e-2（calc_diff 8e-5、norm 1e-3），留四倍",
        ),
        ("logits_narrow_cache", "float16"): Tolerance(
            5e-3,
            1e-6,
            1e-4,
            "float32 模型、float16 缓存，参照用同样的缓存：末位之差舍入到相邻两值，逐层传开；24 层实测 1.3e-3",
        ),
        ("logits_narrow_cache", "bfloat16"): Tolerance(
            4e-2,
            2e-5,
            4e-3,
            "同上，邻值差 2^-7；算子库还把乘数舍入到 bfloat16，实测 1e-2（不经它时 2 层约 1e-5，24 层 8e-3）",
        ),
        ("logits_narrow_cache", "int8"): Tolerance(4e-2, 2e-5, 4e-3, "同上，一个码差一，逐层传开"),
        ("cache_loss", "float16"): Tolerance(
            1e-2,
            1e-6,
            5e-4,
            "float16 缓存对没有舍入的缓存：每个 latent 相对 2^-11；2、3 层实测 1.6e-3（calc_diff 3.4e-8），24 层 4.7e-3",
        ),
        ("cache_loss", "bfloat16"): Tolerance(
            8e-2,
            2e-5,
            4e-3,
            "bfloat16 缓存少三位，幅度是上一行的八倍；2、3 层实测 1.8e-2（calc_diff 2e-6）",
        ),
        ("cache_loss", "int8"): Tolerance(
            1.6e-1,
            1e-4,
            4e-3,
            "int8 缓存：latent 像正态分布时相对误差约 6e-3，calc_diff 是它平方的一半；2、3 层实测 4.2e-2（calc_diff 2.5e-5），留四倍",
        ),
        ("logits_after_near_tie", "float32"): Tolerance(
            1e-4, 1e-9, 1e-4, "float32 的近平局判据只有 1e-6，之后的行仍按正常容差要求"
        ),
        ("logits_after_near_tie", "float16"): Tolerance(
            float("inf"),
            1e-1,
            1e-1,
            "路由近平局处换了一个分数几乎相等的专家，输出合理地不同；只防整体跑偏",
        ),
        ("logits_after_near_tie", "bfloat16"): Tolerance(
            float("inf"), 1e-1, 1e-1, "同上：换了专家之后差多少，与是谁的舍入引起的无关"
        ),
        ("logits_after_near_tie", "int8"): Tolerance(float("inf"), 1e-1, 1e-1, "同上"),
    }
)

_INT8_ACTIVATIONS = "参照用同样的量化权重，差只来自 onnxruntime 的 kernel 把激活也逐块量化到 int8（算子库的留约 15 位，差小得多）"

#: 只量化权重的 bundle。``op``、``block``、``logits`` 的参照用量化再还原的同一份权重，比的是图对不对；``loss`` 的参照没有量化，比的是量化
#: 的代价：``loss`` 只看路由分叉之前的 token，``loss_all`` 看全部。``calc_diff`` 约为相对误差平方的一半。
QUANT_TOLERANCES: Mapping[tuple[Quantity, Dtype, QuantKind], Tolerance] = MappingProxyType(
    {
        ("op", "float32", "int8"): Tolerance(
            1e-1, 2e-4, 1e-2, f"{_INT8_ACTIVATIONS}：每次矩阵乘约 6e-3，专家内两次相乘再激活"
        ),
        ("op", "float32", "int4"): Tolerance(1e-1, 2e-4, 1e-2, f"{_INT8_ACTIVATIONS}，与权重的位数无关"),
        ("block", "float32", "int8"): Tolerance(
            2e-1, 5e-4, 2e-2, f"{_INT8_ACTIVATIONS}：一个块里三到五次矩阵乘，注意力的 softmax 会放大"
        ),
        ("block", "float32", "int4"): Tolerance(2e-1, 5e-4, 2e-2, f"{_INT8_ACTIVATIONS}，与权重的位数无关"),
        ("logits", "float32", "int8"): Tolerance(
            float("inf"), 2e-2, 5e-2, f"{_INT8_ACTIVATIONS}，逐层累计；逐元素的最大差由路由翻转主导，只看整体"
        ),
        ("logits", "float32", "int4"): Tolerance(
            float("inf"), 2e-2, 5e-2, f"{_INT8_ACTIVATIONS}，逐层累计；逐元素的最大差由路由翻转主导，只看整体"
        ),
        ("loss", "float32", "int8"): Tolerance(
            float("inf"),
            5e-4,
            2e-2,
            "演示检查点实测相对误差 5e-3，没有算子库时 8e-3（承诺 1e-2，由契约测试守着）；更深的模型逐层累计，留三倍",
        ),
        ("loss", "float32", "int4"): Tolerance(
            float("inf"),
            3e-2,
            1e-1,
            "4 位的权重误差约 1e-1，逐层累计；演示检查点实测 6e-2（python -m perf run quant）",
        ),
        ("loss_all", "float32", "int8"): Tolerance(
            float("inf"),
            5e-3,
            2e-2,
            "含路由翻到近平局另一侧的 token：换了专家，那一行合理地不同；只防整体跑偏",
        ),
        ("loss_all", "float32", "int4"): Tolerance(float("inf"), 2e-1, 3e-1, "同上；4 位的路由翻转多得多"),
        ("loss", "float16", "int8"): Tolerance(
            float("inf"), 5e-4, 2e-2, "同 float32：激活不舍入到 int8，但 float16 自己的误差与之同量级"
        ),
        ("loss", "float16", "int4"): Tolerance(float("inf"), 3e-2, 1e-1, "同 float32：由 4 位的权重误差主导"),
        ("loss_all", "float16", "int8"): Tolerance(float("inf"), 5e-3, 2e-2, "同 float32：只防整体跑偏"),
        ("loss_all", "float16", "int4"): Tolerance(float("inf"), 2e-1, 3e-1, "同 float32：只防整体跑偏"),
    }
)

#: 困惑度之比（量化 / 未量化）的上限。
PERPLEXITY_RATIO: Mapping[QuantKind, float] = MappingProxyType(
    {
        "int8": 1.02,  # 每个 token 的 logits 误差约 1e-2，一正一负相互抵消
        "int4": 1.2,  # 4 位、无校准的就近舍入；演示检查点实测 1.03
    }
)


def tolerance(quantity: Quantity, dtype: Dtype, quant: QuantKind | None = None) -> Tolerance:
    """查表；``quant`` 是 bundle 的权重量化，没有就是 ``None``。"""
    return TOLERANCES[quantity, dtype] if quant is None else QUANT_TOLERANCES[quantity, dtype, quant]


def coarser(dtype: Dtype, other: Dtype | None) -> Dtype:
    """两个 dtype 里 ``op`` 一行容差较宽的；没有 ``other`` 就是 ``dtype``。"""
    order: tuple[Dtype, ...] = ("float32", "int8", "float16", "bfloat16")
    return dtype if other is None else max(dtype, other, key=order.index)


#: 路由的近平局判据：第 k 名与第 k+1 名（或组的对应名次）的分数差小于它，换专家不算错。单位是打分（概率）。
ROUTER_MARGIN: Mapping[Dtype, float] = MappingProxyType(
    {
        "float32": 1e-6,  # float32 的 sigmoid/softmax 末位误差
        "float16": 4e-3,  # router 的输入是 float16，logit 误差约 1e-2，sigmoid 斜率至多 1/4
        "bfloat16": 1.6e-2,  # bfloat16 的缓存或模型：router 的 logit 误差约 4e-2，斜率同上，留余量
        "int8": 1.6e-2,  # 与 bfloat16 的缓存相同
    }
)


#: 稀疏注意力选 key 的近平局判据：第 topk 名与另一个 key 的分数之差除以这一行分数的最大绝对值，小于它，换一个不算错。
SELECTION_BAND: Mapping[Dtype, float] = MappingProxyType(
    {
        "float32": 2e-6,  # 几十个头、几十个通道的 float32 点积换一种求和次序，相对误差约 5e-7
        "float16": 8e-3,  # q、k 各舍入到 float16，relu 之后几十个头相加，误差不相抵时约 2e-3
        "bfloat16": 6.4e-2,  # 尾数少三位
        # int8 的潜缓存：x 受前面各层的影响，与 bfloat16 的缓存同量级。int8 的索引 key：末位之差换一个码，一个头差 1/127，各头相抵之后小得多
        "int8": 6.4e-2,
    }
)


def token_margin(key: Key, scale: float) -> float:
    """greedy 的近平局判据：两个候选的 logit 差不超过 logits 容差的两倍时，换 token 不算错。

    Args:
        key: logits 的容差。
        scale: logits 的均方根。
    """
    return 2 * tolerance(*key).limit(scale)
