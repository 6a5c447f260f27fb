"""命令行外壳：造一个随机权重的检查点，见 ``deepseek_export.checkpoint.synthetic``。

``--like`` 造已发布模型的样子：真的 config.json、张量名、dtype（含 FP8 分块、4 位）、分片数与索引；加 ``--sparse-files`` 则 671B 也几乎不占磁盘。
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import click

from deepseek_export.checkpoint.synthetic import write_checkpoint, write_demo_checkpoint
from deepseek_export.cli.progress import open_progress
from deepseek_export.errors import DsxError

CONFIGS = Path(__file__).with_name("published_configs.json")


@dataclass(frozen=True)
class Published:
    """一个已发布的检查点。

    Attributes:
        config: 它的 config.json 在 ``published_configs.json`` 里的键。
        shards: 发布时分成几个 safetensors。
    """

    config: str
    shards: int


#: ``--like`` 认得的模型；加一个模型就是在这里加一行，再把它的 config.json 放进 ``published_configs.json``。
PUBLISHED: Mapping[str, Published] = MappingProxyType(
    {
        "deepseek-v3": Published("V3", shards=163),
        "v2-lite": Published("V2_LITE", shards=4),
        "kimi-k2": Published("KIMI_K2", shards=61),
        "kimi-k2-thinking": Published("KIMI_K2_THINKING", shards=62),
        "glm-4.7-flash": Published("GLM_4_7_FLASH", shards=48),
        # 以下几个的分片数没有核实，按约 5 GB 一个算；各个 config.json 的来处与没有核实的字段见 docs/large-models.md。
        "deepseek-v3.2": Published("V3_2", shards=163),
        "glm-5": Published("GLM_5", shards=282),
        "sarvam-105b": Published("SARVAM_105B", shards=43),
        "a.x-k1": Published("AX_K1", shards=208),
    }
)


def write_like(out: Path, like: str, layers: int | None, shards: int | None, **options: Any) -> None:
    """按已发布的样子写；``layers`` 截短主干，分片数按层数缩减，MTP 层（有的话）照带。"""
    published = PUBLISHED[like]
    config = json.loads(CONFIGS.read_text(encoding="utf-8"))[published.config]
    depth = config["num_hidden_layers"]
    layers = layers or depth
    shards = shards or max(round(published.shards * layers / depth), 1)
    mtp = bool(config.get("num_nextn_predict_layers"))
    # 逐层的表（如 mlp_layer_types）随主干一起截短。
    config = {k: v[:layers] if isinstance(v, list) and len(v) == depth else v for k, v in config.items()}
    config["num_hidden_layers"] = layers
    dtype = config.get("torch_dtype") or config["dtype"]
    write_checkpoint(out, config, shards=shards, mtp=mtp, dtype=dtype, **options)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("out", type=click.Path(path_type=Path, file_okay=False))
@click.option(
    "--config", type=click.Path(path_type=Path, exists=True, dir_okay=False), help="HF 的 config.json。"
)
@click.option("--demo", is_flag=True, help="用内置的演示配置，并训练一个小分词器。")
@click.option(
    "--like", type=click.Choice(list(PUBLISHED)), help="已发布模型的样子，含 dtype、分片与 MTP 层。"
)
@click.option("--layers", type=click.IntRange(min=1), help="与 --like 同用：主干只要这么多层。")
@click.option(
    "--sparse-files", "sparse", is_flag=True, help="与 --like 同用：权重全零，是稀疏文件，不占磁盘。"
)
@click.option("--seed", default=0, show_default=True, help="随机种子。")
@click.option(
    "--dtype",
    type=click.Choice(["bfloat16", "float32", "float16"]),
    default="bfloat16",
    show_default=True,
    help="权重的 dtype；--like 用发布时的。",
)
@click.option(
    "--shards", type=click.IntRange(min=1), help="分成几个 safetensors 文件；缺省 1，--like 用发布时的。"
)
@click.option("--mtp", is_flag=True, help="同时写 MTP 层的张量；--like 按发布时的。")
def main(
    out: Path,
    config: Path | None,
    demo: bool,
    like: str | None,
    layers: int | None,
    sparse: bool,
    seed: int,
    dtype: str,
    shards: int | None,
    mtp: bool,
) -> None:
    """在 OUT 目录里造一个随机权重的 HF 格式检查点。"""
    if [demo, config is not None, like is not None].count(True) != 1:
        raise click.UsageError("--config、--demo、--like 必须三选一")
    if like is None and (layers or sparse):
        raise click.UsageError("--layers、--sparse-files 要与 --like 同用")
    try:
        options: dict[str, Any] = {"dtype": dtype, "shards": shards or 1, "mtp": mtp, "seed": seed}
        with open_progress(as_json=False) as progress:
            options["progress"] = progress
            if like is not None:
                write_like(out, like, layers, shards, seed=seed, sparse=sparse, progress=progress)
            elif config is None:
                write_demo_checkpoint(out, **options)
            else:
                write_checkpoint(out, json.loads(config.read_text(encoding="utf-8")), **options)
    except (DsxError, OSError, ValueError) as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"已写好：{out}")


if __name__ == "__main__":
    main()
