"""启动表：每个插件算子在每种形状与 SM 上用哪些 kernel、多大的块、怎样的网格、多少 workspace。

:func:`latent_attention_plan` 与 :func:`grouped_swiglu_plan` 只查表、拼算式，不导入 Triton；
:func:`~deepseek_export.kernels.compile.compile_plan` 把结果编译成 :class:`~deepseek_export.kernels.program.Program`。
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from deepseek_export.errors import DsxError
from deepseek_export.kernels.expression import Expression, symbol
from deepseek_export.kernels.program import Argument, Tensor
from deepseek_export.ops.table import LATENT_ATTENTION, MOE_EXPERTS, OpSpec

KernelDtype = Literal["float16", "bfloat16"]

_BYTES: Mapping[str, int] = MappingProxyType({"float16": 2, "bfloat16": 2, "float32": 4, "int32": 4})
#: dtype → Triton 签名里的写法。
_POINTERS: Mapping[str, str] = MappingProxyType(
    {"float16": "*fp16", "bfloat16": "*bf16", "float32": "*fp32", "int32": "*i32", "int64": "*i64"}
)


@dataclass(frozen=True, slots=True)
class Sm:
    """一种 SM。

    Attributes:
        shared: 一个线程块最多能用的共享内存，字节（CUDA C++ Programming Guide，Compute Capabilities）。
        count: 参考卡的 SM 个数；只用来决定把 KV 切成几段，别的卡上结果不变。
        card: 参考卡。
    """

    shared: int
    count: int
    card: str


SMS: Mapping[int, Sm] = MappingProxyType(
    {
        80: Sm(163 << 10, 108, "A100"),
        86: Sm(99 << 10, 84, "A40"),
        89: Sm(99 << 10, 128, "RTX 4090"),
        90: Sm(227 << 10, 132, "H100"),
        100: Sm(227 << 10, 148, "B200"),
        120: Sm(99 << 10, 170, "RTX 5090"),
        121: Sm(99 << 10, 48, "GB10"),
    }
)


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """一个待编译的 kernel。

    Attributes:
        module: ``deepseek_export.kernels`` 下的模块名。
        function: 模块里的函数名。
        signature: 运行时形参 → Triton 类型，次序同函数；指针都按 16 字节对齐编译。
        constants: 编译期常数。
        num_warps, num_stages: 线程块的 warp 数、软件流水的级数。
    """

    module: str
    function: str
    signature: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, int], ...]
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class PlannedLaunch:
    """一次启动；见 :class:`~deepseek_export.kernels.program.Launch`。"""

    kernel: KernelSpec
    grid: tuple[Expression, Expression, Expression]
    arguments: tuple[Argument, ...]


@dataclass(frozen=True, slots=True)
class PlannedVariant:
    """适用于一段尺寸的一串启动；见 :class:`~deepseek_export.kernels.program.Variant`。"""

    when: Expression
    workspace: Expression
    launches: tuple[PlannedLaunch, ...]


@dataclass(frozen=True, slots=True)
class LaunchPlan:
    """一个算子的启动计划；见 :class:`~deepseek_export.kernels.program.Program`。"""

    op: str
    sm: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    variants: tuple[PlannedVariant, ...]


def check_sm(sm: int) -> Sm:
    """这种 SM 在表里吗。

    Raises:
        DsxError: ``DSX-E901``。
    """
    if sm not in SMS:
        known = "、".join(f"sm{known}" for known in SMS)
        raise DsxError("DSX-E901", f"sm{sm} 没有启动表", f"可用的有 {known}")
    return SMS[sm]


# ---------------------------------------------------------------- LatentAttention


@dataclass(frozen=True, slots=True)
class AttentionTile:
    """``latent_attention_partial`` 的块。

    Attributes:
        rows: ``BLOCK_M``，(s, h) 合并后的行。
        keys: ``BLOCK_N``。
        num_warps, num_stages: 见 :class:`KernelSpec`。
    """

    rows: int
    keys: int
    num_warps: int
    num_stages: int


#: 共享内存上限 → 各变体的块，行数升序；按 r=512、dr=64、两字节的缓存定的，编译测试核对每个都放得下。Hopper 起的 64 行是
#: 一个 wgmma 的高度；更早的卡上 64 行的累加器会溢出寄存器，所以用 32 行。级数按共享内存取得
#: 尽量多：一段 KV 在算的时候，下一段已经在路上。
_ATTENTION_TILES: Mapping[int, tuple[AttentionTile, ...]] = MappingProxyType(
    {
        99 << 10: (AttentionTile(16, 32, 4, 3), AttentionTile(32, 32, 8, 2)),
        163 << 10: (AttentionTile(16, 32, 4, 4), AttentionTile(32, 32, 8, 4)),
        227 << 10: (AttentionTile(16, 64, 4, 3), AttentionTile(64, 64, 8, 2)),
    }
)
#: ``latent_attention_reduce`` 的块：一次几段、几列，几个 warp。
_REDUCE_SPLITS, _REDUCE_COLUMNS, _REDUCE_WARPS = 64, 128, 4
_ALIGNMENT = 256  # TensorRT 的 workspace 也是这个对齐


def latent_attention_plan(
    sm: int,
    num_heads: int,
    kv_lora_rank: int,
    qk_rope_head_dim: int,
    scale: float,
    dtype: KernelDtype,
    cache_dtype: str | None = None,
) -> LaunchPlan:
    """``dsx::LatentAttention`` 的启动计划。

    Args:
        sm: 计算能力。
        num_heads: H。
        kv_lora_rank, qk_rope_head_dim: r、dr。
        scale: softmax 缩放。
        dtype: ``q`` 与输出的 dtype。
        cache_dtype: 缓存的 dtype；``None`` 表示同 ``dtype``。

    Raises:
        DsxError: ``DSX-E901`` 没有这种 SM；``DSX-E903`` dtype 不支持，或 r、dr 太大。
    """
    limits, cache_dtype = check_sm(sm), cache_dtype or dtype
    _check_dtype(LATENT_ATTENTION, "q", dtype, ("float16", "bfloat16"))
    _check_dtype(LATENT_ATTENTION, "kv_cache", cache_dtype, ("float16", "bfloat16", "float32"))
    r, dr = kv_lora_rank, qk_rope_head_dim
    if r > 512 or dr > 64:
        raise DsxError("DSX-E903", f"kv_lora_rank={r}、qk_rope_head_dim={dr}", "kernel 支持到 512 与 64")
    B, S, T = symbol("B"), symbol("S"), symbol("T")
    rows = S * num_heads
    blocks = {"R": r, "BLOCK_R": _block(r)}
    tiles, columns = _ATTENTION_TILES[limits.shared], min(_block(r), _REDUCE_COLUMNS)
    # 行数刚够一个小块时用小块，否则用最大的块，让同一段 KV 少读几遍。
    variants = []
    for tile in tiles:
        keys = tile.keys * 2 // _BYTES[cache_dtype]  # float32 的缓存每个 key 占两倍共享内存
        row_blocks = rows.ceil(tile.rows)
        # 每个 SM 一个线程块，一轮跑完；至少一段，不超过容量里的块数。max(1) 也顾及 B 或 S 为 0。
        splits = (Expression.of(limits.count) // (B * row_blocks).max(1)).max(1).min(T.ceil(keys))
        partial_bytes = (B * splits * rows * (4 * r)).align(_ALIGNMENT)
        # B*splits*row_blocks 不超过 max(SM 数, B*row_blocks)：这个上界随尺寸单调，段数却不是。
        slots = (B * row_blocks).max(limits.count) * tile.rows
        workspace = (slots * (4 * r)).align(_ALIGNMENT) + slots * 4
        sizes = {"S": S, "H": Expression.of(num_heads), "T": T, "num_splits": splits}
        integers = tuple((name, "i32") for name in sizes)
        partial_signature = (
            ("q", _POINTERS[dtype]),
            ("kv_cache", _POINTERS[cache_dtype]),
            ("past_lens", _POINTERS["int64"]),
            ("context", _POINTERS[dtype]),
            ("partial", _POINTERS["float32"]),
            ("lse", _POINTERS["float32"]),
            ("scale", "fp32"),
            *integers,
        )
        constants = {
            **blocks,
            "P": dr,
            "BLOCK_P": _block(dr),
            "BLOCK_M": tile.rows,
            "BLOCK_N": keys,
        }
        pointers = (
            Argument("input", 2),
            Argument("output", 0),
            Argument("workspace", Expression.of(0)),
            Argument("workspace", partial_bytes),
        )
        integer_arguments = tuple(Argument("int32", value) for value in sizes.values())
        one = Expression.of(1)
        partial = PlannedLaunch(
            _kernel(
                "latent_attention",
                "latent_attention_partial",
                partial_signature,
                constants,
                tile.num_warps,
                tile.num_stages,
            ),
            (row_blocks, splits, B),
            (
                Argument("input", 0),
                Argument("input", 1),
                *pointers,
                Argument("float32", scale),
                *integer_arguments,
            ),
        )
        reduce = PlannedLaunch(
            _kernel(
                "latent_attention",
                "latent_attention_reduce",
                (*partial_signature[2:6], *integers),
                {"R": r, "BLOCK_R": columns, "BLOCK_S": _REDUCE_SPLITS, "BLOCK_N": keys},
                _REDUCE_WARPS,
                1,
            ),
            # 只有一段时 partial 直接写了结果，不必启动；段少时活也少，一个程序做几块列。
            (rows, B, Expression.of(2).at_most(splits) * splits.min(math.ceil(r / columns))),
            (*pointers, *integer_arguments),
        )
        when = one if tile is tiles[-1] else rows.at_most(tile.rows)
        variants.append(PlannedVariant(when, workspace, (partial, reduce)))
    width = str(r + dr)
    return LaunchPlan(
        LATENT_ATTENTION.name,
        sm,
        (
            Tensor(dtype, ("B", "S", str(num_heads), width)),
            Tensor(cache_dtype, ("B", "1", "T", width)),
            Tensor("int64", ("B",)),
        ),
        (Tensor(dtype, ("B", "S", str(num_heads), str(r))),),
        tuple(variants),
    )


# ---------------------------------------------------------------- MoeExperts


@dataclass(frozen=True, slots=True)
class ExpertsTile:
    """``gate_up`` 与 ``down`` 的块。

    Attributes:
        rows: ``BLOCK_M``，同一专家的 token。
        columns: ``BLOCK_N``；``gate_up`` 同时算两个矩阵，用它的一半。
        inner: ``BLOCK_K``。
        num_warps, num_stages: 见 :class:`KernelSpec`。
    """

    rows: int
    columns: int
    inner: int
    num_warps: int
    num_stages: int


#: 共享内存上限 → 各变体的块，行数升序。
_EXPERTS_TILES: Mapping[int, tuple[ExpertsTile, ...]] = MappingProxyType(
    {
        99 << 10: (ExpertsTile(16, 64, 128, 4, 3), ExpertsTile(64, 128, 64, 4, 3)),
        163 << 10: (ExpertsTile(16, 64, 128, 4, 4), ExpertsTile(128, 128, 64, 8, 3)),
        227 << 10: (ExpertsTile(16, 64, 128, 4, 5), ExpertsTile(128, 256, 64, 8, 3)),
    }
)
_SORT_BLOCK = 1024
_GROUP = 8
_COMBINE_BLOCK = 1024


def grouped_swiglu_plan(
    sm: int,
    num_experts: int,
    top_k: int,
    hidden_size: int,
    moe_intermediate_size: int,
    dtype: KernelDtype,
) -> LaunchPlan:
    """``dsx::MoeExperts`` 的启动计划。

    Args:
        sm: 计算能力。
        num_experts, top_k: E、k。
        hidden_size, moe_intermediate_size: D、I。
        dtype: ``x``、权重与输出的 dtype。

    Raises:
        DsxError: ``DSX-E901`` 没有这种 SM；``DSX-E903`` dtype 不支持。
    """
    limits = check_sm(sm)
    _check_dtype(MOE_EXPERTS, "x", dtype, ("float16", "bfloat16"))
    E, k, D, inner = num_experts, top_k, hidden_size, moe_intermediate_size
    N, one = symbol("N"), Expression.of(1)
    pairs = N * k
    T, i32 = _POINTERS[dtype], _POINTERS["int32"]
    # workspace：排序后的对、各专家的起点、SwiGLU 的中间结果、各对的输出，依次排列。
    offsets_at = (pairs * 4).align(_ALIGNMENT)
    hidden_at = offsets_at + Expression.of((E + 1) * 4).align(_ALIGNMENT)
    expert_out_at = hidden_at + (pairs * (inner * _BYTES[dtype])).align(_ALIGNMENT)
    workspace = expert_out_at + pairs * (D * _BYTES[dtype])
    sorted_pairs, offsets = Argument("workspace", Expression.of(0)), Argument("workspace", offsets_at)
    hidden, expert_out = Argument("workspace", hidden_at), Argument("workspace", expert_out_at)
    x, ids, weights, w_gate, w_up, w_down = (Argument("input", index) for index in range(6))
    y, top_k_argument = Argument("output", 0), Argument("int32", Expression.of(k))

    sort = PlannedLaunch(
        _kernel(
            "grouped_swiglu",
            "sort_pairs",
            (("topk_ids", i32), ("sorted_pairs", i32), ("offsets", i32), ("pairs", "i32"), ("E", "i32")),
            {"BLOCK": _SORT_BLOCK},
            4,
            1,
        ),
        (Expression.of(E + 1), one, one),
        (ids, sorted_pairs, offsets, Argument("int32", pairs), Argument("int32", Expression.of(E))),
    )
    combine_block = min(_COMBINE_BLOCK, _block(D))
    combine = PlannedLaunch(
        _kernel(
            "grouped_swiglu",
            "combine",
            (
                ("expert_out", T),
                ("topk_ids", i32),
                ("topk_weights", _POINTERS["float32"]),
                ("y", T),
                ("top_k", "i32"),
            ),
            {"D": D, "E": E, "BLOCK_D": combine_block},
            4,
            1,
        ),
        (N, Expression.of(D).ceil(combine_block), one),
        (expert_out, ids, weights, y, top_k_argument),
    )

    variants = []
    tiles = _EXPERTS_TILES[limits.shared]
    for tile in tiles:
        # 每个有 token 的专家至多一个不满的行块，所以行块数有这个上界；多出来的程序立即退出。
        row_tiles = pairs // tile.rows + pairs.min(E)
        common = {"D": D, "INNER": inner, "E": E, "BLOCK_E": _block(E), "BLOCK_M": tile.rows, "GROUP": _GROUP}
        half = min(tile.columns // 2, _block(inner))
        full = min(tile.columns, _block(D))
        rows_argument = Argument("int32", row_tiles)
        gate_up = PlannedLaunch(
            _kernel(
                "grouped_swiglu",
                "gate_up",
                (
                    ("x", T),
                    ("w_gate", T),
                    ("w_up", T),
                    ("sorted_pairs", i32),
                    ("offsets", i32),
                    ("hidden", T),
                    ("top_k", "i32"),
                    ("row_tiles", "i32"),
                ),
                {**common, "BLOCK_N": half, "BLOCK_K": min(tile.inner, _block(D))},
                tile.num_warps,
                tile.num_stages,
            ),
            (row_tiles * math.ceil(inner / half), one, one),
            (x, w_gate, w_up, sorted_pairs, offsets, hidden, top_k_argument, rows_argument),
        )
        down = PlannedLaunch(
            _kernel(
                "grouped_swiglu",
                "down",
                (
                    ("hidden", T),
                    ("w_down", T),
                    ("sorted_pairs", i32),
                    ("offsets", i32),
                    ("expert_out", T),
                    ("row_tiles", "i32"),
                ),
                {**common, "BLOCK_N": full, "BLOCK_K": min(tile.inner, _block(inner))},
                tile.num_warps,
                tile.num_stages,
            ),
            (row_tiles * math.ceil(D / full), one, one),
            (hidden, w_down, sorted_pairs, offsets, expert_out, rows_argument),
        )
        # 平均每个专家分到的 token 装不满一个大块时用小块：这时受限于读权重，大块只是空算。
        when = one if tile is tiles[-1] else pairs.at_most(2 * tile.rows * E)
        variants.append(PlannedVariant(when, workspace, (sort, gate_up, down, combine)))
    shape_w = {"gate": (E, inner, D), "up": (E, inner, D), "down": (E, D, inner)}
    return LaunchPlan(
        MOE_EXPERTS.name,
        sm,
        (
            Tensor(dtype, ("N", str(D))),
            Tensor("int32", ("N", str(k))),
            Tensor("float32", ("N", str(k))),
            *(Tensor(dtype, tuple(map(str, shape))) for shape in shape_w.values()),
        ),
        (Tensor(dtype, ("N", str(D))),),
        tuple(variants),
    )


def _kernel(
    module: str,
    function: str,
    signature: tuple[tuple[str, str], ...],
    constants: Mapping[str, int],
    num_warps: int,
    num_stages: int,
) -> KernelSpec:
    return KernelSpec(module, function, signature, tuple(constants.items()), num_warps, num_stages)


def _check_dtype(op: OpSpec, port: str, dtype: str, allowed: tuple[str, ...]) -> None:
    if dtype not in allowed:
        what = f"{op.name} 的 {port} 是 {dtype}"
        raise DsxError("DSX-E903", what, f"kernel 支持 {'、'.join(allowed)}；换一个 --dtype 导出")


def _block(size: int) -> int:
    """不小于 ``size`` 的 2 的幂；``tl.dot`` 的每一维至少 16。"""
    return max(16, 1 << (size - 1).bit_length())
