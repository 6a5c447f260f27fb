"""bundle → Triton Inference Server 的模型仓库：``<仓库>/<名字>/config.pbtxt`` 与 ``1/`` 里的模型。

Triton 只执行计算图。缓存由它的隐式状态存着：一个序列一份，容量是定死的 T，不经过网络；其余的——分词、模板、取样、往下走、停——都归客户端。
一次只跑一个序列的一步（``max_batch_size: 1``）：几个序列的长度不同，Triton 不会把它们拼成一批。
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from deepseek_export.bundle import Bundle
from deepseek_export.bundle.disk import atomic_directory, disk_errors, link_or_copy
from deepseek_export.bundle.manifest import ValueEntry
from deepseek_export.engine.graph import KEY_SPAN, KEY_SPAN_DIMS
from deepseek_export.engine.record import ENGINES, EngineRecord
from deepseek_export.engine.shapes import Range
from deepseek_export.errors import DsxError
from deepseek_export.records import BEST_ID, BEST_LOGIT

CONFIG_FILE = "config.pbtxt"
#: 没有给容量时，一个序列至多这么长：缓存按容量分配。
DEFAULT_CONTEXT = 4096
#: 一个序列这么多微秒没有动静，Triton 就放掉它的缓存。
_IDLE_US = 300_000_000
_TYPES = {
    "int8": "TYPE_INT8",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "float32": "TYPE_FP32",
}
#: 有 prefill 路径的引擎另要的输入，见 :mod:`~deepseek_export.engine.graph`。
_KEY_SPAN = ValueEntry(name=KEY_SPAN, dtype="int8", shape=list(KEY_SPAN_DIMS))
#: 引擎另给的输出，同上。
_BEST = [
    ValueEntry(name=BEST_ID, dtype="int64", shape=["B", "L", 1]),
    ValueEntry(name=BEST_LOGIT, dtype="float32", shape=["B", "L", 1]),
]
_HEAD = """\
# 由 dsx pack --triton 写成。一次请求是一个序列（sequence_id）的一步：
#   input_ids [1, S]         这一步的新 token：先是整个提示词，以后每次一个
#   past_lens [1]            此前已经送过多少个 token
#   logits_positions [1, L]  要这一步里哪几个位置的 logits；通常只要最后一个，[[S - 1]]
{key_span}# sequence_start 与 sequence_end 说开头与结束。past_lens 加 S 不超过 {context}：再长就写出界了。
# Triton 不做的：分词与聊天模板、取样、停止、接着往下走的循环、把几个序列拼成一批、前缀复用、投机解码。
# 这些 dsx serve 都做。
"""


@dataclass(frozen=True)
class TritonModel:
    """写好的一个模型。

    Attributes:
        path: ``<仓库>/<名字>``。
        context: 一个序列至多几个 token，即缓存的容量 T。
        cache_bytes: 一个序列的缓存占多少字节。
    """

    path: Path
    context: int
    cache_bytes: int


def write_triton(
    bundle: Bundle,
    repository: Path,
    name: str,
    *,
    slots: int = 8,
    context: int | None = None,
    engine: str | None = None,
    overwrite: bool = False,
) -> TritonModel:
    """写一个模型；要么完整出现，要么不出现。权重是硬链接，不在同一个文件系统上就复制。

    Args:
        bundle: 打包的 bundle。
        repository: Triton 的模型仓库，没有就建。
        name: 模型名，也是目录名。
        slots: 至多几个序列同时留着缓存。
        context: 一个序列至多几个 token；缺省 :data:`DEFAULT_CONTEXT` 与模型的长度里小的那个。用引擎时由引擎定。
        engine: ``engines/`` 里的目录名，例如 ``tensorrt-sm89``：用 TensorRT 的引擎而不是 ONNX。
        overwrite: 替换已有的。

    Raises:
        DsxError: ``DSX-E734``，名字不能当目录名、bundle 没有打包、容量超出模型、没有这个引擎，或引擎是 TensorRT-RTX 的；``DSX-E917``，引擎的记录读不了；
            ``DSX-E401`` / ``DSX-E404`` / ``DSX-E405``，写不了。
    """
    manifest, graph = bundle.manifest, bundle.manifest.main
    if not name or name in (".", "..") or "/" in name or "\0" in name or '"' in name or "\\" in name:
        raise _refused(f"模型名 {name!r} 不能当目录名", "用字母、数字、- 与 _")
    if manifest.weights.mode != "packed" and engine is None:
        raise _refused(f"{bundle.path} 的权重按引用，Triton 生成不了它们", f"先 dsx pack {bundle.path}")
    limit = manifest.model.max_position_embeddings
    files = {graph.file: bundle.path / graph.file} | {
        file: bundle.path / file for file in manifest.weights.files
    }
    platform, kind = "onnxruntime_onnx", "instance_group { kind: KIND_CPU count: 1 }"
    key_span: Range | None = None
    best: list[ValueEntry] = []
    if engine is not None:
        plan, record = _find_engine(bundle, engine)
        if context is not None and context != record.shapes.capacity:
            raise _refused(
                f"引擎的容量 T 是 {record.shapes.capacity}，给的是 {context}",
                "去掉 --context，或用 dsx build --profile-shapes T=… 重建",
            )
        context, limit = record.shapes.capacity, record.shapes.capacity
        files = {plan.name: plan}
        key_span = record.plans[plan.name].profiles["decode"].get("P")
        best = _BEST if record.plans[plan.name].best else []
        profiles = "".join(f' profile: "{number}"' for number in range(len(record.plans[plan.name].profiles)))
        platform, kind = "tensorrt_plan", f"instance_group {{ kind: KIND_GPU count: 1{profiles} }}"
    context = min(DEFAULT_CONTEXT, limit) if context is None else context
    if context > limit:
        raise _refused(f"容量 {context} 超出模型的最大长度 {limit}", f"把 --context 设为不超过 {limit} 的数")
    lines = [
        f'name: "{name}"',
        f'platform: "{platform}"',
        f'default_model_filename: "{next(iter(files))}"',
        "max_batch_size: 1",
        kind,
        *_ports("input", [port for port in graph.inputs if not _is_cache(port)]),
        *_ports("input", [] if key_span is None else [_KEY_SPAN]),
        *_ports("output", [port for port in graph.outputs if not _is_cache(port)]),
        *_ports("output", best),
        "sequence_batching {",
        f"  max_sequence_idle_microseconds: {_IDLE_US}",
        f"  oldest {{ max_candidate_sequences: {slots} }}",
        *_states(graph.inputs, graph.outputs, context, in_place=engine is not None),
        "}",
    ]
    with disk_errors(repository):
        repository.mkdir(parents=True, exist_ok=True)
    text = _HEAD.format(context=context, key_span=_key_span_help(key_span, context)) + "\n".join(lines) + "\n"
    with (
        atomic_directory(repository / name, overwrite, marker=CONFIG_FILE) as directory,
        disk_errors(directory),
    ):
        for file, source in files.items():
            target = directory / "1" / file
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.suffix == ".onnx":
                shutil.copyfile(source, target)  # 小，各是各的
            else:
                link_or_copy(source, target)
        (directory / CONFIG_FILE).write_text(text, encoding="utf-8")
    return TritonModel(repository / name, context, context * manifest.cache.bytes_per_token)


def _key_span_help(decode: Range | None, context: int) -> str:
    """``decode`` 是解码配置里 P 的范围；引擎没有这个输入是 ``None``。"""
    if decode is None:
        return ""
    rule = "S 不超过 8 时是 1，否则不小于" if decode[2] == 1 else "不小于"
    return f"#   key_span [1, P]          只看 P，内容不读：{rule} past_lens + S，至多 {context}\n"


def _find_engine(bundle: Bundle, engine: str) -> tuple[Path, EngineRecord]:
    folder = bundle.path / ENGINES
    directory = folder / engine
    found = sorted(path.name for path in folder.glob("*") if (path / "engine.json").is_file())
    if engine not in found:
        raise _refused(
            f"{folder} 里没有引擎 {engine}，有 {'、'.join(found) or '（一个也没有）'}",
            "用 dsx build 建；由检查点另导出的那一份在 engines/bundle 里，用它当 OUT",
        )
    record = EngineRecord.read(directory)
    if record.flavour != "tensorrt":
        raise _refused(f"{engine} 是 TensorRT-RTX 的引擎，Triton 没有它的后端", "用 TensorRT 另建一个")
    plan = next(name for name, entry in record.plans.items() if entry.role == "main")
    return directory / plan, record


def _is_cache(port: ValueEntry) -> bool:
    return "T" in port.shape


def _dims(shape: Sequence[int | str], context: int = -1) -> list[int]:
    """去掉行这一维；T 是容量，别的名字是 -1。"""
    return [dim if isinstance(dim, int) else context if dim == "T" else -1 for dim in shape[1:]]


def _ports(kind: str, ports: Sequence[ValueEntry]) -> Iterator[str]:
    for port in ports:
        dims = _dims(port.shape)
        # 只有行这一维的，Triton 要当作每行一个数。
        shape = f"dims: {dims}" if dims else "dims: [1] reshape { shape: [] }"
        yield f'{kind} {{ name: "{port.name}" data_type: {_TYPES[port.dtype]} {shape} }}'


def _states(
    inputs: Sequence[ValueEntry], outputs: Sequence[ValueEntry], context: int, in_place: bool
) -> Iterator[str]:
    """每个缓存一份隐式状态；开头是零（没有写过的位置反正不读），不发给客户端。"""
    written = [port.name for port in outputs if _is_cache(port)]
    caches = [port for port in inputs if _is_cache(port)]
    for port, out in zip(caches, written, strict=True):
        kind = f"data_type: {_TYPES[port.dtype]} dims: {_dims(port.shape, context)}"
        same = " use_same_buffer_for_input_output: true" if in_place else ""
        yield (
            f'  state {{ input_name: "{port.name}" output_name: "{out}" {kind}'
            f' initial_state {{ name: "zero" {kind} zero_data: true }}{same} }}'
        )


def _refused(what: str, todo: str) -> DsxError:
    return DsxError("DSX-E734", what, todo)
