"""重新生成 graphs/engines/：TensorRT-RTX 引擎的层清单，由 tests/contract/test_tensorrt_contract.py 逐行比较；不需要 GPU。"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import click

import deepseek_export
from deepseek_export.bundle import Bundle
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.checkpoint.weight_only import Quantization, QuantKind
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.engine.build import build_engine
from deepseek_export.engine.flavour import choose
from deepseek_export.engine.layers import EngineLayer, layer_listing
from deepseek_export.engine.shapes import ProfileShapes
from deepseek_export.ops.table import MOE_EXPERTS, QUANTIZED_MOE_EXPERTS
from deepseek_export.records import ModelDtype
from tools.make_graphs import CONFIGS, GRAPHS

ENGINE_GRAPHS = GRAPHS / "engines"
#: 宽度都是 32 的倍数而且不止一块，每个线性层都量化得了，int4 的都融得了。
WIDE = CONFIGS["deepseek_v3"] | {
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "q_lora_rank": 64,
    "v_head_dim": 32,
}
#: latent 宽一些，int8 的一行补零之后也比 bfloat16 的短。
WIDE_LATENT = WIDE | {"kv_lora_rank": 64, "qk_rope_head_dim": 16}
#: 同上，FP8 分块的检查点，块是发布的大小。
WIDE_FP8 = WIDE | {
    "quantization_config": {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "activation_scheme": "dynamic",
        "weight_block_size": [128, 128],
    }
}


class Case(NamedTuple):
    """一份清单由什么来。

    Attributes:
        config: 随机权重的检查点的配置；``None`` 是随包附带的演示检查点，带 MTP。
        dtype: 模型 dtype。
        quant: 只量化权重。
        linears: 几个线性层由插件读码。
        overrides: 方案里另设的。
    """

    config: Mapping[str, Any] | None
    dtype: ModelDtype = "float16"
    quant: QuantKind | None = None
    linears: int = 0
    overrides: tuple[str, ...] = ()

    @property
    def experts(self) -> str:
        """专家的插件。"""
        coded = self.quant is not None or self.linears
        return (QUANTIZED_MOE_EXPERTS if coded else MOE_EXPERTS).name


#: 清单的名字 → 由什么来。
CASES: Mapping[str, Case] = MappingProxyType(
    {
        "deepseek_v2": Case(CONFIGS["deepseek_v2"]),
        "deepseek_v3": Case(CONFIGS["deepseek_v3"]),
        "glm_moe_dsa": Case(CONFIGS["glm_moe_dsa"]),
        "demo": Case(None),
        "wide.bfloat16": Case(WIDE, "bfloat16"),
        # 两层各四个注意力的、三个 MLP 的；int8 的另有 lm_head，发布的 FP8 检查点里它不是 FP8。
        "wide.int8": Case(WIDE, "bfloat16", "int8", linears=15),
        "wide.int4": Case(WIDE, "bfloat16", "int4"),
        "wide.fp8": Case(WIDE_FP8, "bfloat16", linears=14),
        "wide.int8-cache": Case(WIDE_LATENT, "bfloat16", overrides=("mla.cache_dtype=int8",)),
    }
)
NAMES = tuple(CASES)
ARCHES = (80, 86, 89, 120)
#: 小一点的容量，清单不随它变。
SHAPES = "T=256"


def make_checkpoint(name: str, directory: Path) -> Path:
    """清单所用的检查点。"""
    config = CASES[name].config
    if config is None:
        return CHECKPOINT
    write_checkpoint(directory / name, dict(config))
    return directory / name


def make_bundle(name: str, directory: Path) -> Bundle:
    """tensorrt-rtx 的 bundle。"""
    case = CASES[name]
    profile = "full" if case.config is None else "mla+moe"
    checkpoint, out = make_checkpoint(name, directory), directory / f"{name}-out"
    quantization = None if case.quant is None else Quantization(kind=case.quant)
    return deepseek_export.export(
        checkpoint,
        out,
        profile,
        target="tensorrt-rtx",
        dtype=case.dtype,
        quantization=quantization,
        overrides=list(case.overrides),
    )


def build_for(bundle: Bundle, sm: int):
    """建一个引擎。"""
    shapes = ProfileShapes.parse(SHAPES, bundle.manifest.model.max_position_embeddings)
    return build_engine(bundle, sm, choose("rtx"), shapes)


def listing(layers: Mapping[str, Mapping[str, list[EngineLayer]]]) -> str:
    """清单全文；第一行是版本，层怎么融由它决定。"""
    return f"# tensorrt_rtx {choose('rtx').version()}\n{layer_listing(layers)}"


def listing_name(name: str, sm: int) -> str:
    """清单的文件名。"""
    return f"{name}.rtx-sm{sm}.txt"


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """重新生成 graphs/engines/ 下的全部清单；提交前请读一遍 git diff。"""
    ENGINE_GRAPHS.mkdir(exist_ok=True)
    for name in NAMES:
        with tempfile.TemporaryDirectory() as directory:
            bundle = make_bundle(name, Path(directory))
            for sm in ARCHES:
                path = ENGINE_GRAPHS / listing_name(name, sm)
                path.write_text(listing(build_for(bundle, sm).layers), encoding="utf-8")
                click.echo(str(path))


if __name__ == "__main__":
    main()
