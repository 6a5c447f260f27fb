"""几个命令共用的选项：同一个选项在哪个命令里都是同一个意思。"""

from __future__ import annotations

import errno
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from deepseek_export.backend import BACKENDS
from deepseek_export.errors import DsxError
from deepseek_export.paths import MAX_TEXT, read_text
from deepseek_export.units import parse_size

if TYPE_CHECKING:
    from deepseek_export.cluster.settings import ClusterSettings

_JSON = "deepseek_export.json"
_SHORT_DTYPES = {"fp32": "float32", "fp16": "float16", "bf16": "bfloat16"}


class DtypeChoice(click.Choice[str]):
    """dtype 的全名，另收别处惯用的短名。"""

    def __init__(self) -> None:
        super().__init__(list(_SHORT_DTYPES.values()))

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """总是给出全名。"""
        return super().convert(_SHORT_DTYPES.get(value, value), param, ctx)


class ByteSize(click.ParamType):
    """字节数：``2GiB``、``500MB``，没有单位的就是字节。"""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        """总是给出字节数，1 到 :data:`MAX_BYTES`。"""
        count = value if isinstance(value, int) else parse_size(value)
        if count is None or not 1 <= count <= MAX_BYTES:
            self.fail(f"{value!r} 不是大小：写成 2GiB、500MB 或字节数，至少 1 字节、至多 1024TiB", param, ctx)
        return count


def wants_json(ctx: click.Context) -> bool:
    """这次调用有没有给 ``--json``。"""
    return bool(ctx.meta.get(_JSON))


def _remember(ctx: click.Context, param: click.Parameter, value: Any) -> Any:
    # demo 在一次调用里跑好几个命令，meta 是共用的，只增不减。
    ctx.meta[_JSON] = ctx.meta.get(_JSON) or value
    return value


json_option = click.option(
    "--json",
    "as_json",
    is_flag=True,
    is_eager=True,
    callback=_remember,
    help="stdout 的最后一行是一个 JSON 对象；不显示进度。",
)
set_option = click.option(
    "--set",
    "overrides",
    metavar="KEY=VALUE",
    multiple=True,
    help="覆盖方案里的一个键，例如 mla.form=absorb；可重复。",
)
#: 字节数；再大就是写错了。
MAX_BYTES = 1 << 50
#: 个数与长度；再大的算起来没有意义，64 位、浮点数也放不下。
MAX_COUNT = 1 << 40


def counts(low: int = 1) -> click.IntRange:
    """``low`` 到 :data:`MAX_COUNT` 的整数。"""
    return click.IntRange(low, MAX_COUNT)


#: 再多没有用处，几万个线程要占几 GB、永远起不完。
threads_option = click.option(
    "--threads", type=click.IntRange(1, 1024), help="线程数；缺省由 ONNX Runtime 决定。"
)

backend_option = click.option(
    "--backend",
    type=click.Choice(list(BACKENDS)),
    default="ort",
    show_default=True,
    help="在哪里运行：ONNX Runtime CPU，或 dsx build 为当前 GPU 建的引擎。",
)


micro_batches_option = click.option(
    "--micro-batches",
    type=click.IntRange(1, 1024),
    default=1,
    show_default=True,
    help="OUT 是一套 stage 时，一批里的各行至多分成几个小批，让几个 stage 同时在算。",
)


def balance_option(default: str | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``--balance``；``dsx export`` 要知道给了没有，没有缺省值。"""
    return click.option(
        "--balance",
        type=click.Choice(["bytes", "time"]),
        default=default,
        show_default=default is not None,
        help="什么尽量均匀：bytes 是权重的大小，最大的 stage 最省内存；time 是解码一个 token 要读的字节，专家只算选中的，最慢的 stage 最快"
        + ("。" if default else "；缺省 bytes，要配 --stages。"),
    )


ray_option = click.option(
    "--ray",
    metavar="ADDRESS",
    help="用 Ray 起一套 stage、几个副本：auto 连已经在跑的，HOST:PORT 连那一个，local 在本机上起一个；缺省在本机上起 stage，不要 Ray。",
)
stages_option = click.option(
    "--stages",
    metavar="N|0-14,15-29",
    help="OUT 还没有切开：先照 dsx split 切，放在旁边的 OUT.stages-N，下次直接用。",
)
strategy_option = click.option(
    "--strategy",
    type=click.Choice(["pack", "spread"]),
    default="pack",
    show_default=True,
    help="配 --ray：各 stage 尽量放在一起，还是尽量分开。",
)


def tls_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """``--tls-cert``、``--tls-key``、``--tls-ca``：三个一起给。"""
    pem = click.Path(path_type=Path)
    decorators = (
        click.option(
            "--tls-cert", metavar="PEM", type=pem, help="配 --ray：stage 之间的信道用 TLS，这一端的证书。"
        ),
        click.option("--tls-key", metavar="PEM", type=pem, help="它的私钥，不加密。"),
        click.option(
            "--tls-ca", metavar="PEM", type=pem, help="对方的证书要由它签；三个文件在每台机器的同样路径上。"
        ),
    )
    for decorator in reversed(decorators):
        command = decorator(command)
    return command


def cluster_settings(
    micro_batches: int,
    ray: str | None = None,
    strategy: Literal["pack", "spread"] = "pack",
    tls: tuple[Path | None, Path | None, Path | None] = (None, None, None),
) -> ClusterSettings:
    """命令行上的流水线参数。

    Raises:
        DsxError: ``DSX-E756``，三个证书文件没有给全，或没有配 ``--ray``。
    """
    from deepseek_export.cluster.settings import ClusterSettings
    from deepseek_export.cluster.tls import TlsFiles

    given = [str(path.absolute()) for path in tls if path is not None]
    if given and len(given) < len(tls):
        todo = "三个一起给：--tls-cert、--tls-key、--tls-ca"
        raise DsxError("DSX-E756", f"只给了 {'、'.join(given)}", todo)
    files = TlsFiles(*given) if given else None
    return ClusterSettings(micro_batches=micro_batches, ray=ray, strategy=strategy, tls=files)


def read_prompts(ctx: click.Context, param: click.Parameter, values: tuple[str, ...]) -> tuple[str, ...]:
    """``-`` 读标准输入，``@FILE`` 读文件，``@@`` 开头是字面上的一个 ``@``；去掉末尾的一个换行。

    Raises:
        DsxError: ``DSX-E702``，读不了、不是 UTF-8，或标准输入要了两次。
    """
    if values.count("-") > 1:
        raise DsxError("DSX-E702", f"-P - 给了 {values.count('-')} 次，标准输入只读得了一次", "只留一个")
    return tuple(_read_prompt(value) for value in values)


def _read_prompt(value: str) -> str:
    if value.startswith("@@"):
        return value[1:]
    if value != "-" and not value.startswith("@"):
        return value
    where = "标准输入" if value == "-" else value[1:]
    try:
        text = _read_stdin() if value == "-" else read_text(Path(value[1:]))
    except OSError as error:
        todo = "检查路径；提示词本身以 @ 开头就写成 @@" if value != "-" else "从管道或文件给"
        raise DsxError("DSX-E702", f"提示词 {where} 读不了：{error.strerror}", todo) from error
    except UnicodeDecodeError as error:
        raise DsxError(
            "DSX-E702", f"提示词 {where} 不是 UTF-8：{error.reason}", "用 UTF-8 编码给出提示词"
        ) from error
    return text.removesuffix("\n")


def _read_stdin() -> str:
    content = sys.stdin.buffer.read(MAX_TEXT + 1)
    if len(content) > MAX_TEXT:
        raise OSError(errno.EFBIG, f"超过 {MAX_TEXT:,} 字节")
    return content.decode("utf-8")


def _html_target(ctx: click.Context, param: click.Parameter, value: Path | None) -> Path | None:
    from deepseek_export.report.write import check_target

    if value is not None:
        check_target(value)
    return value


#: 写不写得下先看一遍（``DSX-E401`` / ``DSX-E405``）：要比、要量好几分钟的，不该做完才说。
html_option = click.option(
    "--html",
    metavar="FILE",
    type=click.Path(path_type=Path),
    callback=_html_target,
    help="另写一页自包含的 HTML，有图有表，离线可看；那里已有的只替换 dsx 写的页。",
)
# 路径是否存在由 api 检查，好给出带码的错误。
bundle_argument = click.argument("bundle", metavar="OUT", type=click.Path(path_type=Path))


def verify_weights_option(default: bool | None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """``--verify-weights/--no-verify-weights``；要证明什么的命令缺省是开的，只是用的是 ``None``：从来没有读过的才读。"""
    unread = "缺省只读 sha256 取自下载记录、还没有核对过的。" if default is None else ""
    return click.option(
        "--verify-weights/--no-verify-weights",
        default=default,
        show_default=default is not None,
        help=f"先读一遍全部权重，核对 sha256。{unread}图、配置、tokenizer 总是核对；关掉时打包的权重只看大小，按引用的只抽查每个张量的三处。",
    )


against_option = click.option(
    "--against", metavar="CKPT", type=click.Path(path_type=Path), help="对照的检查点；缺省取导出时的那一个。"
)
seed_option = click.option(
    "--seed", type=click.IntRange(min=0), default=0, show_default=True, help="随机输入的种子。"
)
checkpoint_argument = click.argument("checkpoint", metavar="CKPT", type=click.Path(path_type=Path))
