"""报告里的字：结果里的键 → 中文（没有登记的照写），数 → 带单位、不用指数的写法。"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from deepseek_export.benchmark.spread import Spread
from deepseek_export.units import size

_SERIES: Mapping[str, str] = MappingProxyType(
    {
        "plain": "普通解码",
        "speculative": "投机解码",
        "moe": "稀疏专家",
        "off": "每个专家都算",
        "dense": "稠密模型",
        "no-bias": "不更新偏置",
        "dsx reference": "dsx 按引用（不写权重）",
        "dsx packed": "dsx 打包（写权重）",
        "dsx split": "dsx split（按引用）",
        "dsx resumed": "杀掉几次，最后接着写完",
        "copy": "复制",
        "generator": "生成器的批次",
        "engine": "引擎",
        "http": "经 HTTP",
        "cold": "前缀重算",
        "warm": "前缀现成",
        "one": "一个进程",
        "stages": "一套 stage",
        "predicted": "预测的",
        "measured": "量到的",
        "matmul": "矩阵乘",
        "读内存": "这台机器读内存",
        "dsa": "收集（V3.2）",
        "dsa-int8": "收集，int8 索引 key",
        "dense-mla": "稠密 MLA（V3）",
        "transformers OnnxExporter": "transformers OnnxExporter（写权重）",
    }
)
_TIME = ((1.0, "s"), (1e-3, "ms"), (1e-6, "µs"))
_BYTES = ((float(1 << 30), "GiB"), (float(1 << 20), "MiB"), (float(1 << 10), "KiB"), (1.0, "B"))
_PLAIN = ((1.0, ""),)
#: 量 → 显示名与单位。
_FIELDS: Mapping[str, tuple[str, tuple[tuple[float, str], ...]]] = MappingProxyType(
    {
        "cache_computed": ("缓存，按形状算", _BYTES),
        "cache_resident": ("缓存，实测", _BYTES),
        "loaded": ("装载之后的内存", _BYTES),
        "resident": ("测完时的内存", _BYTES),
        "peak": ("内存峰值", _BYTES),
        "plan_bytes": ("plan 大小", _BYTES),
        "weights": ("权重", _BYTES),
        "workspace": ("中间值", _BYTES),
        "caches": ("缓存", _BYTES),
        "total": ("合计", _BYTES),
        "seconds": ("用时", _TIME),
        "step_s": ("一步", _TIME),
        "decode_s": ("解码共", _TIME),
        "token_s": ("每个 token", _TIME),
        "first_s": ("等第一个 token", _TIME),
        "gap_p50_s": ("两段之间", _TIME),
        "gap_p95_s": ("两段之间，95 分位", _TIME),
        "prefill_s": ("prefill", _TIME),
        "edge_s": ("每条边", _TIME),
        "added_s": ("一步多出", _TIME),
        "longest_s": ("等得最久的客户", _TIME),
        "restart_s": ("整套又起来", _TIME),
        "round_cost": ("一轮相当于几个普通步", _PLAIN),
        "tokens_per_second": ("token / 秒", _PLAIN),
        "held_loss": ("留出损失", _PLAIN),
        "cpu_seconds": ("CPU 用时", _TIME),
        "gb_s": ("GB/s", _PLAIN),
        "gflop_s": ("GFLOP/s", _PLAIN),
        "tflop_s": ("TFLOP/s", _PLAIN),
        "agreement": ("选中的集合一致的份额，各层", _PLAIN),
        "row_error": ("logits 每行相对误差的中位数", _PLAIN),
        "row_error_p99": ("99 分位", _PLAIN),
        "same_argmax": ("argmax 相同的比例", _PLAIN),
    }
)
_RATIOS: Mapping[str, str] = MappingProxyType(
    {
        "cache": "缓存 mla / baseline",
        "process": "进程峰值 mla / baseline",
        "time": "时间 投机 / 普通",
        "decode moe/off": "解码 稀疏 / 每个都算",
        "decode moe/dense": "解码 稀疏 / 稠密",
        "prefill moe/off": "prefill 稀疏 / 每个都算",
        "prefill moe/dense": "prefill 稀疏 / 稠密",
        "held loss moe/dense": "留出损失 稀疏 / 稠密",
        "capture": "捕获的时间 深 / 浅",
        "mla/transformers": "一步 apply 之后 / 原样",
        "int8/bfloat16": "误差 int8 / bfloat16",
        "dsa/dense-mla": "一步 收集 / 稠密",
        "dsa/transformers": "一步 收集 / transformers",
        "dsa/llama.cpp": "一步 收集 / llama.cpp",
        "dsa-int8/dsa": "一步 int8 索引 key / bfloat16",
        "dsa/字节": "一步 收集 / 读完要读的字节",
        "dsa/算术": "一步 收集 / 读与乘加里慢的",
        "prefill dsa/dense-mla": "prefill 收集 / 稠密",
        "peak dsa/dense-mla": "prefill 的内存峰值 收集 / 稠密",
        "engine/generator": "一步 引擎 / 生成器",
        "HTTP/engine": "每个 token 经 HTTP / 引擎",
        "warm/cold": "等第一个 token 前缀现成 / 重算",
    }
)
_SCENARIO: Mapping[str, str] = MappingProxyType(
    {
        "shape": "形状",
        "shapes": "形状",
        "models": "模型",
        "model": "模型",
        "kind": "权重的码",
        "batch": "batch",
        "batches": "batch",
        "dtypes": "dtype",
        "context": "上下文",
        "contexts": "上下文",
        "depths": "深度",
        "runs": "遍数",
        "prompt": "prefill token",
        "prompts": "prefill token",
        "prompt_len": "提示词 token",
        "tokens": "解码一个样本的 token",
        "slow_tokens": "其中 transformers 的",
        "new_tokens": "新 token",
        "draft_tokens": "草稿 token",
        "compile_s": "torch.compile 每种形状的时限（秒）",
        "sizes": "参数量",
        "peer_sizes": "其中 OnnxExporter 也导出的",
        "packed_sizes": "其中也打包的",
        "packed_runs": "打包的遍数",
        "engine_depths": "引擎的层数",
        "engine_runs": "建引擎的遍数",
        "steps": "步数",
        "peak_lr": "学习率峰值",
        "evaluations": "评估次数",
        "load_steps": "统计负载的步数",
        "windows": "每种语言的留出窗口",
        "seeds": "种子",
        "heads": "头",
        "prefills": "prefill 的 S 与已有的长度",
        "formats": "格式、块、保留浮点的",
        "calibrated": "校准的 int4，块与文本",
        "window": "一窗的 token",
        "sampled": "采样几条：校准、测困惑度",
        "layers": "层数",
        "packed_layers": "打包的层数",
        "kills": "杀几次",
        "slots": "槽",
        "requests": "请求",
        "loop_requests": "HTTP 对引擎的请求",
        "peer_runs": "对 llama-server 的遍数",
        "stages": "切成几个 stage",
        "rows": "填满时的行",
        "parts": "分成的小批",
        "full_runs": "填满时的遍数",
        "faults": "出的事",
        "clients": "客户",
        "fault_runs": "每种事几次",
        "prefix": "前缀 token",
        "tail": "前缀之后的 token",
        "steady": "满批次的提示词与步数",
        "peer_contexts": "transformers 也测的上下文",
        "peer_s": "等 transformers 一步的时限（秒）",
        "chunk": "prefill 每块",
        "prompt_runs": "prefill 的遍数",
        "quality_prompt": "比误差的 token",
    }
)


def series(key: str) -> str:
    """系列的显示名。"""
    return _SERIES.get(key, key)


def quantity(key: str) -> str:
    """``系列.量`` 的显示名。"""
    name, _, field = key.rpartition(".")
    return f"{series(name)}：{_FIELDS[field][0] if field in _FIELDS else field}"


def ratio(name: str) -> str:
    """比值的显示名。"""
    return f"比值 {_RATIOS.get(name, name)}"


def scenario(values: Mapping[str, Any]) -> str:
    """场景，一行。"""
    return "，".join(f"{_SCENARIO.get(key, key)} {_joined(value)}" for key, value in values.items())


def measured(key: str, spread: Spread) -> str:
    """一个量：中位数（最小–最大）与单位；单位按中位数挑，三个数用同一个。"""
    units = _FIELDS.get(key.rpartition(".")[2], ("", _PLAIN))[1]
    factor, unit = next((u for u in units if spread.median >= u[0]), units[-1])
    text = _span(spread.scaled(1 / factor), number)
    return text + unit if text.endswith("）") else f"{text} {unit}".rstrip()


def share(spread: Spread) -> str:
    """一个比值：中位数（最小–最大），三位小数，不到 0.1 的三位有效数字。"""
    return _span(spread, lambda value: f"{value:.3f}" if value >= 0.1 else f"{value:#.3g}")


def _span(spread: Spread, shown: Callable[[float], str]) -> str:
    """写出来都一样就只写一个。"""
    middle, low, high = map(shown, (spread.median, spread.low, spread.high))
    return middle if low == middle == high else f"{middle}（{low}–{high}）"


def number(value: float) -> str:
    """三位有效数字；大数不用指数，按千分节。"""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:#.3g}"


def facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """一格里不是重复测量的东西 → 名字与内容；只为画图、或已写在格子名字里的不写。"""
    rows = []
    for key, value in found.items():
        if key not in _DRAWN:
            label, shown = _FACTS.get(key, (key, _any))
            rows.append((label, shown(value)))
    return rows


def _joined(value: object, separator: str = " / ") -> str:
    if isinstance(value, (list, tuple)):
        return separator.join(_joined(v, " ") for v in value)
    return "不限" if value is None else str(value)


def _any(value: object) -> str:
    if isinstance(value, dict):
        return _each(_any)(value)
    if isinstance(value, (list, tuple)):
        return "、".join(map(_any, value))
    return number(value) if isinstance(value, float) else str(value)


def _each(shown: Callable[[Any], str]) -> Callable[[Any], str]:
    """字典里的每一个。"""
    return lambda found: "；".join(f"{series(name)} {shown(value)}" for name, value in found.items())


def _count(value: float) -> str:
    """个数；大的用万、亿。"""
    for unit, name in ((1e8, "亿"), (1e4, "万")):
        if value >= unit:
            return f"{number(value / unit)} {name}"
    return f"{value:.0f}"


def _counts(value: Any) -> str:
    return _each(_count)(value) if isinstance(value, dict) else _count(value)


def _percent(value: float) -> str:
    return f"{value:.1%}".replace("%", " %")


def _speculation(value: Any) -> str:
    stopped = "；中途止损，改成了普通解码" if value["fell_back"] else ""
    return (
        f"{'、'.join(map(_percent, value['acceptance']))}；平均接受 {number(value['mean_accepted'])} 个，"
        f"主模型每次调用产出 {number(value['tokens_per_call'])} 个 token{stopped}"
    )


def _kills(runs: Sequence[Mapping[str, float]]) -> str:
    return "；".join(
        f"{number(one['seconds'])} s，{size(one['peak'])}，{size(one['killed_at_bytes'])}" for one in runs
    )


def _break_even(value: float | None) -> str:
    return "全中也不划算" if value is None else _percent(value)


def _balance(layers: Any) -> str:
    """``balance`` 给每层的最大 / 平均与归一化的熵。"""
    busiest, entropy = zip(*layers, strict=True)
    return f"{'、'.join(f'{x:.2f}' for x in busiest)}（熵 {'、'.join(f'{x:.3f}' for x in entropy)}）"


def _resolution(value: float) -> str:
    return f"±{_percent(value)}"


def _languages(seeds: list[dict[str, float]]) -> str:
    return "、".join(" / ".join(f"{name} {number(loss)}" for name, loss in one.items()) for one in seeds)


def _budget(found: dict[str, Any]) -> str:
    epochs = "、".join(f"{name} {number(count)}" for name, count in found["epochs"].items())
    return f"每个激活参数 {number(found['tokens_per_active_parameter'])} 个；语料重复的遍数 {epochs}"


#: 画在图里的，或格子的名字里已有的。
_DRAWN = frozenset(("acceptances", "curve", "steps", "curves", "loads", "context", "depth", "batch"))
_FACTS: Mapping[str, tuple[str, Callable[[Any], str]]] = MappingProxyType(
    {
        "speculation": ("各个草稿的条件接受率", _speculation),
        "break_even": ("盈亏平衡的接受率", _break_even),
        "parameters": ("参数", _counts),
        "active_parameters": ("每个 token 激活的参数", _counts),
        "prompt_tokens": ("提示词共几个 token", _count),
        "balance": ("各层最忙的专家 / 平均", _each(_balance)),
        "languages": ("各种子、各语言的留出损失", _each(_languages)),
        "budget": ("训练的 token", _budget),
        "nodes": ("节点", _counts),
        "written": ("写了多少", _each(size)),
        "peer_error": ("OnnxExporter 失败的原话", str),
        "failed": ("没有跑成的原话", _each(str)),
        "difference": ("最后一行 logits 与 transformers 差多少（calc_diff）", _each(lambda x: f"{x:.1e}")),
        "build": ("同类自报的版本与指令集", _any),
        "absent": ("没有测的", _each(str)),
        "amx": ("AMX", str),
        "step_bytes": ("一步至少读", _each(size)),
        "graphs": ("torch.compile 编译了几个图", str),
        "recompiled": ("其中在测量之中", str),
        "resolution": ("比值的散布不窄于", _resolution),
        "layers": ("层数", str),
        "arch": ("SM", str),
        "tensorrt_rtx": ("TensorRT-RTX", str),
        "engine_layers": ("引擎的层", _any),
        "parts": ("一步的各部分", _each(lambda seconds: f"{number(seconds * 1e3)} ms")),
        "accounted": ("各部分加起来，占一步的", _percent),
        "host_share": ("主机循环至多", _percent),
        "operators": ("各算子一步的时间", _each(lambda seconds: f"{number(seconds * 1e3)} ms")),
        "mtp_layers": ("MTP 层", str),
        "experts": ("专家", str),
        "shards": ("分片", str),
        "checkpoint_bytes": ("检查点", size),
        "weight_bytes": ("权重", size),
        "edge_bytes": ("过一条边的", size),
        "onnx_bytes": ("图", _each(size)),
        "stage_bytes": ("各 stage 的权重，按图里的 dtype", _each(size)),
        "stage_layers": ("各 stage 的层", _each(str)),
        "stage_shards": ("各 stage 链接的分片", _each(str)),
        "stage_shard_bytes": ("这些分片一共", _each(size)),
        "expert_groups_per_moe_layer": ("每个 MoE 层的专家拆成几组", number),
        "kills": ("被杀的几次：用时、内存峰值、已写多少", _kills),
        "tokens": ("比了几个 token", str),
        "before_a_flip": ("其中路由分叉之前的", str),
        "perplexity": ("困惑度", _each(number)),
        "perplexity_tokens": ("测困惑度的 token", str),
        "text_tokens": ("各段文本测困惑度的 token", _each(str)),
        "calibration_tokens": ("校准的 token", str),
        "not_calibrated": ("见过的 token 太少、没有校准的", str),
        "passed": ("校验通过", lambda passed: "是" if passed else "否"),
        "bound": ("受限于", str),
        "share": ("占上限的", _percent),
        "active_experts": ("有 token 的专家", str),
        "checks": ("核对，通过的", _count),
        "failed_checks": ("核对，不过的", lambda rows: _any(rows) or "没有"),
        "not_timed": ("没有量成的", lambda rows: _any(rows) or "没有"),
        "unverified": ("不算数", str),
        "estimated_share": (
            "机器码审计的估计，至多占上限的",
            lambda share: "没有这种卡的规格" if share is None else _percent(share),
        ),
        "phases": ("各步", _each(str)),
        "elapsed": ("共用了几秒", number),
        "memory_bytes": ("显存", size),
        "versions": ("版本", _any),
        "skipped": ("跳过没有测的", lambda points: _any(points) or "没有"),
        "slots": ("名额", str),
        "source": ("来处", str),
    }
)
