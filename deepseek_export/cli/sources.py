"""``dsx serve``、``dsx chat`` 的 OUT 也可以是检查点目录：先导出，按引用，留着下次用。"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import click

from deepseek_export.cli.export_worker import export_elsewhere
from deepseek_export.cli.options import DtypeChoice, set_option
from deepseek_export.errors import DsxError
from deepseek_export.extras import require_export
from deepseek_export.progress import Progress
from deepseek_export.records import ModelDtype

Command = Callable[..., Any]

#: 没有给就用的方案与目标。
PROFILE, TARGET = "mla+moe", "ort-cpu"
DTYPE: ModelDtype = "float32"


@dataclass(frozen=True)
class ExportOptions:
    """由检查点导出时的选项，名字同 ``dsx export``；``None`` 是没有给。"""

    profile: str | None
    target: str | None
    dtype: ModelDtype | None
    quant: Literal["int8", "int4", "checkpoint"] | None
    overrides: tuple[str, ...]

    @classmethod
    def taken(cls, options: dict[str, Any]) -> ExportOptions:
        """从命令的选项里取走自己的。"""
        return cls(**{field.name: options.pop(field.name) for field in fields(cls)})

    @property
    def given(self) -> list[str]:
        """给了哪些选项。"""
        names = {"overrides": "--set"}
        return [names.get(key, f"--{key}") for key, value in asdict(self).items() if value]


def checkpoint_options(command: Command) -> Command:
    """``-p``、``--target``、``--dtype``、``--quant``、``--set``：只在给的是检查点时有用。"""
    decorators = (
        click.option(
            "-p", "--profile", help=f"CKPT 的优化方案，同 dsx export；缺省 {PROFILE}，带 MTP 的可以用 full。"
        ),
        click.option("--target", help=f"CKPT 的编译目标；缺省 {TARGET}。"),
        click.option("--dtype", type=DtypeChoice(), help=f"CKPT 的权重与计算的 dtype；缺省 {DTYPE}。"),
        click.option(
            "--quant",
            type=click.Choice(["int8", "int4", "checkpoint"]),
            help="CKPT 只量化权重；checkpoint 是 4 位的检查点照发布的码；缺省不量化。",
        ),
        set_option,
    )
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def bundle_of(source: Path, options: ExportOptions, verify_weights: bool, progress: Progress) -> Path:
    """``source`` 是 bundle 就是它自己；是检查点就按引用导出，已经有了的直接用。

    Args:
        source: bundle 或检查点的目录。
        options: 导出的选项。
        verify_weights: 以后要核对权重：导出时读一遍检查点，记下 sha256。
        progress: 进度。

    Raises:
        DsxError: ``DSX-E732``，给了导出的选项而 ``source`` 不是检查点；``DSX-E720``，要导出而没有装编译的依赖；其余见
            :func:`~deepseek_export.bundle.cached.cached_bundle` 与 :func:`~deepseek_export.api.export`。
    """
    # 到这里才导入：看帮助不必等它们。
    from deepseek_export.bundle.cached import cached_bundle, is_checkpoint
    from deepseek_export.checkpoint.weight_only import Quantization
    from deepseek_export.profile import resolve_profile

    if not is_checkpoint(source):
        if options.given:
            raise DsxError(
                "DSX-E732",
                f"给了 {'、'.join(options.given)}，而 {source} 不是检查点目录，这些选项不起作用",
                "去掉它们；要别的方案就从检查点重新导出",
            )
        return source

    profile = resolve_profile(options.profile or PROFILE, options.overrides)
    quant = options.quant
    quantization = quant if quant is None or quant == "checkpoint" else Quantization(kind=quant)
    target, dtype = options.target or TARGET, options.dtype or DTYPE

    asked = {
        "profile": profile.model_dump(mode="json"),
        "target": target,
        "dtype": dtype,
        "quantization": quantization.model_dump(mode="json")
        if isinstance(quantization, Quantization)
        else quantization,
        "hash_weights": verify_weights,
        "weights": "reference",
    }

    def write(out: Path, overwrite: bool) -> None:
        require_export("导出")
        progress.note(f"由检查点导出到 {out}，按引用，不另占权重的空间；下次直接用")
        places = {"checkpoint": str(source), "out": str(out), "overwrite": overwrite}
        export_elsewhere({**asked, **places}, progress)

    return cached_bundle(source, asked, write, progress)
