"""重新生成 graphs/engines/：TensorRT-RTX 引擎的层清单，由 tests/contract/test_tensorrt_contract.py 逐行比较；不需要 GPU。"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import click

import deepseek_export
from deepseek_export.bundle import Bundle
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.engine.build import build_engine
from deepseek_export.engine.flavour import choose
from deepseek_export.engine.layers import EngineLayer, layer_listing
from deepseek_export.engine.shapes import ProfileShapes
from tools.make_graphs import CONFIGS, GRAPHS

ENGINE_GRAPHS = GRAPHS / "engines"
#: ``demo`` 是随包附带的演示检查点，带 MTP；另外的是 tools/make_graphs.py 的小配置，随机权重。
NAMES = ("deepseek_v2", "deepseek_v3", "glm_moe_dsa", "demo")
ARCHES = (80, 89, 120)
#: 小一点的容量，清单不随它变。
SHAPES = "T=256"


def make_checkpoint(name: str, directory: Path) -> Path:
    """清单所用的检查点。"""
    if name == "demo":
        return CHECKPOINT
    write_checkpoint(directory / name, CONFIGS[name])
    return directory / name


def make_bundle(name: str, directory: Path) -> Bundle:
    """tensorrt-rtx、float16 的 bundle。"""
    profile = "full" if name == "demo" else "mla+moe"
    checkpoint, out = make_checkpoint(name, directory), directory / f"{name}-out"
    return deepseek_export.export(checkpoint, out, profile, target="tensorrt-rtx", dtype="float16")


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
