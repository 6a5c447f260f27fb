"""建一个已发布形状的引擎，读 TensorRT 自己报的显存：权重、各配置的中间值；不需要 GPU，也不需要那么大的内存。

图与 ``dsx export`` 的相同，权重是随机的：每种 dtype 一池随机数，每个权重从里面错开地取一段，内容各不相同，编译器合并不了。plan 边建边收，只数几个字节，
不留；TensorRT 建的时候自己在内存里留一份全部权重，由 ``blocks.c`` 放进文件（:func:`blocks_library`），所以几十 GB 的引擎在小机器上也建得完。
"""

from __future__ import annotations

import json
import math
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx

from deepseek_export.bundle.graph import Slot, bind_external
from deepseek_export.capture import capture_model
from deepseek_export.checkpoint import ModelConfig, parse_model_config
from deepseek_export.checkpoint.recipe import Recipe
from deepseek_export.checkpoint.weight_only import Quantization
from deepseek_export.dtypes import DTYPES
from deepseek_export.engine.build import build_engine_bytes, check_plugins, expected_plugins
from deepseek_export.engine.flavour import FLAVOURS, load, parse_arch
from deepseek_export.engine.graph import engine_graph
from deepseek_export.engine.layers import activation_bytes, parse_layers, weight_bytes
from deepseek_export.engine.logger import logger_for
from deepseek_export.engine.shapes import ProfileShapes
from deepseek_export.passes import lower
from deepseek_export.profile import resolve_profile
from deepseek_export.progress import Progress
from tools.make_checkpoint import CONFIGS

ARCH = "sm89"
_FLAVOUR = FLAVOURS["rtx"]
_SOURCE = Path(__file__).with_name("blocks.c")
#: 相邻两个权重在池里错开几个字节。
_STEP = 256


def blocks_library(folder: Path) -> Path:
    """编译 ``blocks.c``；预先装载它的进程，大块内存在 ``DSX_BLOCKS`` 文件夹的文件里。

    Raises:
        FileNotFoundError: 没有 gcc。
        RuntimeError: 编译失败，带编译器的原话。
    """
    library = folder / "libblocks.so"
    command = ["gcc", "-O2", "-shared", "-fPIC", "-o", str(library), str(_SOURCE), "-lpthread"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-300:])
    return library


def published(name: str, layers: int | None) -> ModelConfig:
    """``tools/published_configs.json`` 里的一个模型，主干可以截短。"""
    fields = json.loads(CONFIGS.read_text(encoding="utf-8"))[name]
    return parse_model_config(fields | ({} if layers is None else {"num_hidden_layers": layers}), name)


def weights_like(recipes: Mapping[str, Recipe], seed: int = 0) -> dict[str, np.ndarray]:
    """各权重的字节，随机、各不相同；合起来占的内存只比各种 dtype 里最大的一个多一点。"""
    generator, pools, made = np.random.default_rng(seed), {}, {}
    for index, (name, recipe) in enumerate(recipes.items()):
        if recipe.dtype not in pools:
            same = [one.nbytes for one in recipes.values() if one.dtype == recipe.dtype]
            pools[recipe.dtype] = _random(generator, recipe.dtype, max(same) + _STEP * len(recipes))
        made[name] = pools[recipe.dtype][index * _STEP :][: recipe.nbytes]
    return made


def _random(generator: np.random.Generator, dtype: str, nbytes: int) -> np.ndarray:
    """至少 ``nbytes`` 个字节的随机数：浮点的约 0.02，整数的每个字节均匀。"""
    if dtype in ("int8", "uint8", "int4"):
        return generator.integers(0, 256, nbytes, dtype=np.uint8)
    kind = np.dtype(getattr(ml_dtypes, dtype, dtype))
    values = generator.standard_normal(math.ceil(nbytes / kind.itemsize), dtype=np.float32)
    return (values * np.float32(0.02)).astype(kind).view(np.uint8)


def build(name: str, layers: int, kind: str, folder: str, arch: str = ARCH) -> Callable[[], dict[str, Any]]:
    """子进程里：建 ``name`` 的主模型，缺省的优化配置。

    Args:
        name: ``published_configs.json`` 里的键。
        layers: 几层。
        kind: 权重的码，例如 ``int8``。
        folder: 图写在这里。
        arch: 为哪种 SM 建。
    """
    trt, profile, config = load(_FLAVOUR), resolve_profile("mla+moe"), published(name, layers)

    def work() -> dict[str, Any]:
        lowered = lower(
            capture_model(config, profile, "bfloat16"),
            config=config,
            profile=profile,
            dtype="bfloat16",
            target=_FLAVOUR.target,
            quantization=Quantization.model_validate({"kind": kind}),
        )
        path = Path(folder) / "model.onnx"
        # 位置只是占位：内容逐个交给解析器。
        slots = {key: Slot("none", 0, recipe.nbytes) for key, recipe in lowered.weights.items()}
        onnx.save(bind_external(lowered.proto, slots), path)
        shapes = ProfileShapes.parse("", config.max_position_embeddings)
        graph = engine_graph(path, shapes.capacity)
        onnx.save(graph.model, path)
        ranges = shapes.profiles(profile, graph.key_span)
        plan = _Plan()
        _, text = build_engine_bytes(
            trt,
            _FLAVOUR,
            path,
            parse_arch(arch),
            ranges,
            Progress(),
            weights_like(lowered.weights),
            plan.serializer(trt),
        )
        found = parse_layers(text, list(ranges), graph.plugins)
        for one, each in found.items():
            check_plugins(f"{name} 的 {one} 配置", each, expected_plugins(one, graph.plugins))
        messages = logger_for(trt).messages()
        return {
            "weights": weight_bytes(messages),
            "workspace": activation_bytes(messages, list(ranges)),
            "plan_bytes": plan.nbytes,
            "given": sum(recipe.nbytes for recipe in lowered.weights.values()),
            "caches": _cache_bytes(config, shapes),
            "shapes": shapes.model_dump(),
            "engine_layers": {one: len(each) for one, each in found.items()},
        }

    return work


def _cache_bytes(config: ModelConfig, shapes: ProfileShapes) -> int:
    """配置的上限之内，潜向量缓存占几个字节：bfloat16，每层每个 token 一行。"""
    row = DTYPES["bfloat16"].nbytes(config.kv_lora_rank + config.qk_rope_head_dim)
    return shapes.batch[2] * shapes.capacity * config.num_hidden_layers * row


class _Plan:
    """收下 plan：数几个字节，不留。"""

    def __init__(self) -> None:
        self.nbytes = 0

    def write(self, part: Any) -> int:
        """下一段。"""
        size = memoryview(part).nbytes
        self.nbytes += size
        return size

    def serializer(self, trt: Any) -> Callable[[Any, Any, Any], Any]:
        """交给 :func:`build_engine_bytes` 的：边建边收；代替 plan 的是一个记号。"""
        plan = self

        class Writer(trt.IStreamWriter):
            """TensorRT 一段一段地写。"""

            def __init__(self) -> None:
                super().__init__()

            def write(self, part: Any) -> int:
                return plan.write(part)

        def serialize(builder: Any, network: Any, config: Any) -> Any:
            done = builder.build_serialized_network_to_stream(network, config, Writer())
            return b"streamed" if done else None

        return serialize
