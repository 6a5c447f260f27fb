"""``dsx serve``。"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from functools import partial
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

import click

from deepseek_export.cli.formatting import Command
from deepseek_export.cli.options import (
    ByteSize,
    backend_option,
    cluster_settings,
    counts,
    micro_batches_option,
    ray_option,
    stages_option,
    strategy_option,
    threads_option,
    tls_options,
    verify_weights_option,
)
from deepseek_export.cli.sources import ExportOptions, bundle_of, checkpoint_options
from deepseek_export.cli.staging import check_replicas, replica_range, staged
from deepseek_export.errors import DsxError
from deepseek_export.extras import require_serve
from deepseek_export.formats.chat import TOOL_FORMATS
from deepseek_export.progress import Progress, Unit

if TYPE_CHECKING:
    from deepseek_export.replicas.replica import ReplicaSpec
    from deepseek_export.serving.http.keys import KeyRing
    from deepseek_export.serving.http.service import ServedModel

#: Ctrl-C 的退出码，同别的命令。
_INTERRUPTED = 130

logger = logging.getLogger("dsx.serve")


@click.command("serve", cls=Command, short_help="用 bundle 开一个 OpenAI 兼容的 HTTP 服务")
@click.argument("source", metavar="[OUT]", type=click.Path(path_type=Path), required=False)
@click.option(
    "--host", metavar="HOST", default="127.0.0.1", show_default=True, help="监听的地址；0.0.0.0 对外开放。"
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="端口；0 由系统挑一个。"
)
@click.option("--name", metavar="NAME", help="OUT 的模型名，请求里的 model；缺省是 OUT 的目录名。")
@click.option(
    "--model",
    "more",
    metavar="NAME=OUT",
    multiple=True,
    help="另一个模型与它的名字；可重复，请求里的 model 说要哪一个。",
)
@click.option(
    "--api-key-file",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="API 密钥，一行一个；也可以放在环境变量 DSX_API_KEYS 里，用逗号隔开。",
)
@click.option(
    "--cors-origin",
    "cors_origins",
    metavar="ORIGIN",
    multiple=True,
    help="允许这个网页跨域来用；可重复。",
)
@click.option(
    "--slots",
    type=click.IntRange(1, 4096),
    default=8,
    show_default=True,
    help="每个模型至多几个请求同时生成。",
)
@click.option(
    "--max-queue",
    type=counts(),
    default=256,
    show_default=True,
    help="每个模型至多几个请求排队，多的答 503。",
)
@click.option(
    "--context",
    type=counts(),
    help="一个请求（提示词加回答）至多几个 token；缺省由模型与引擎决定。",
)
@click.option(
    "--cache-bytes",
    metavar="SIZE",
    type=ByteSize(),
    help="每个模型的缓存至多占多少，例如 2GiB：放得下几行就开几行，多于 --slots 的留着用过的前缀；缺省只开 --slots 行。",
)
@click.option("--log-prompts", is_flag=True, help="日志里写上提示词；缺省不写。")
@click.option("--no-speculative", is_flag=True, help="bundle 带 MTP 时也逐个 token 解码；回答相同。")
@click.option(
    "--slot-save-path",
    "slot_folder",
    metavar="DIR",
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="允许 /slots 把前缀存到这个目录、从这里恢复。",
)
@click.option(
    "--tool-parser",
    type=click.Choice(list(TOOL_FORMATS)),
    help="模型怎么写工具调用；缺省由聊天模板看出来。",
)
@click.option(
    "--replicas",
    metavar="N|LOW-HIGH",
    help="配 --ray：用 Ray Serve 起几个副本，每个有自己的引擎；1-4 随请求多少伸缩。缺省一个，在这个进程里。",
)
@stages_option
@micro_batches_option
@ray_option
@strategy_option
@tls_options
@threads_option
@backend_option
@verify_weights_option(None)
@checkpoint_options
def command(
    source: Path | None,
    host: str,
    port: int,
    name: str | None,
    more: tuple[str, ...],
    api_key_file: Path | None,
    cors_origins: tuple[str, ...],
    slots: int,
    max_queue: int,
    context: int | None,
    cache_bytes: int | None,
    tool_parser: str | None,
    log_prompts: bool,
    no_speculative: bool,
    slot_folder: Path | None,
    replicas: str | None,
    stages: str | None,
    micro_batches: int,
    ray: str | None,
    strategy: Literal["pack", "spread"],
    tls_cert: Path | None,
    tls_key: Path | None,
    tls_ca: Path | None,
    threads: int | None,
    backend: str,
    verify_weights: bool | None,
    **options: Any,
) -> None:
    """用 bundle OUT 开一个 OpenAI 兼容的 HTTP 服务。OUT 也可以是检查点目录，先按引用导出，留着下次用。

    缺省只在本机上听得到，谁都能用；对外开放要给 --host，也该给密钥。日志写在 stderr，一个请求一行，不含回答，缺省也不含提示词。
    浏览器打开监听的地址，是试用的一页。第一个 Ctrl-C（或 SIGTERM）做完手上的再停，第二个立刻停。

    \b
    例：
      dsx serve OUT
      dsx serve CKPT -p full --quant int8
      dsx serve --model small=OUT1 --model large=OUT2
      dsx serve OUT --host 0.0.0.0 --port 8000 --api-key-file KEYS
      dsx serve OUT --ray auto --stages 4 --replicas 2
    """
    require_serve()
    # 到这里才导入：没有装 FastAPI 也能看帮助。
    from deepseek_export.serving import EngineSettings
    from deepseek_export.serving.http.keys import read_keys
    from deepseek_export.serving.http.server import Server, listen, serve, url_of
    from deepseek_export.serving.http.service import ServedModel

    exporting = ExportOptions.taken(options)
    sources = served(source, name, more)
    settings = EngineSettings(
        slots=slots,
        queue=max_queue,
        context=context,
        cache_bytes=cache_bytes,
        speculation=not no_speculative,
    )
    keys = read_keys(api_key_file)
    cluster = cluster_settings(micro_batches, ray, strategy, (tls_cert, tls_key, tls_ca))
    check_replicas(replicas, ray, stages, sources.values())
    progress = _LogProgress()

    def ready(source: Path) -> Path:
        return staged(bundle_of(source, exporting, verify_weights is True, progress), stages, progress)

    if replicas is not None:
        from deepseek_export.replicas.replica import ReplicaSpec

        counted, (named, origin) = replica_range(replicas), _only(sources, slot_folder)
        with _log_to_stderr():
            spec = ReplicaSpec(
                ready(origin).resolve(),
                named,
                settings,
                cluster,
                threads,
                backend,
                verify_weights,
                tool_parser,
                log_prompts,
            )
            _serve_replicas(spec, counted, host, port, keys, cors_origins)
        return

    def load(name: str, source: Path) -> ServedModel:
        from deepseek_export import api

        model = api.load(
            ready(source), threads, backend, verify_weights=verify_weights, progress=progress, cluster=cluster
        )
        return ServedModel.open(name, model.tokenizer, model.session, model.engine(settings), tool_parser)

    loads = [partial(load, *entry) for entry in sources.items()]
    server = Server(loads, keys, cors_origins, log_prompts=log_prompts, slot_folder=slot_folder)
    with _log_to_stderr(), listen(host, port) as listening:
        logger.info("在 %s 监听，正在加载 %s", url_of(listening), "、".join(map(str, sources.values())))
        if not keys and not _loopback(listening.getsockname()[0]):
            logger.warning("对外开放而没有密钥：谁都能用；用 --api-key-file 给密钥")
        # 脚本用 & 起的进程继承的是忽略 SIGINT；uvicorn 照样听它，停下时又照这里登记的走，退出码不能因此不同。
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            serve(server, listening)
        except (KeyboardInterrupt, SystemExit) as stop:
            if server.loading:
                _leave(stop)
            raise


def _only(sources: Mapping[str, Path], slot_folder: Path | None) -> tuple[str, Path]:
    """几个副本只服务一个模型，各有各的槽。"""
    if slot_folder is not None:
        todo = "去掉一个：几个副本各有各的槽，存取不知道是哪一个"
        raise DsxError("DSX-E753", "--replicas 与 --slot-save-path 都给了", todo)
    if len(sources) > 1:
        todo = "去掉 --model，或每个模型各起一个 dsx serve，各用一个 Ray"
        raise DsxError("DSX-E753", f"--replicas 只服务一个模型，这里有 {len(sources)} 个", todo)
    return next(iter(sources.items()))


def _serve_replicas(
    spec: ReplicaSpec,
    replicas: tuple[int, int],
    host: str,
    port: int,
    keys: KeyRing,
    cors_origins: tuple[str, ...],
) -> None:
    """用 Ray Serve 起副本，看到要停为止；停的时候再来的信号不管，停是限时的。"""
    from deepseek_export.replicas.service import ReplicaService
    from deepseek_export.serving.http.server import listen, url_of

    with listen(host, port) as probe:  # 端口先试一下，0 由系统挑；真正听的是 Ray Serve
        address, url = probe.getsockname()[:2], url_of(probe)
    stop = threading.Event()
    codes: list[int] = []

    def ask(number: int, _: object) -> None:
        codes.append(number)
        stop.set()

    with closing(ReplicaService(spec, replicas, address, keys, cors_origins)) as service:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, ask)
        logger.info("正在 Ray 上起副本")
        if service.start(stop.wait):
            logger.info("在 %s 监听，%s 就绪", url, spec.name)
            service.watch(stop.wait)
        logger.info("收到 %s：做完手上的就停", signal.Signals(codes[0]).name)
    sys.exit(_INTERRUPTED if codes[0] == signal.SIGINT else 128 + codes[0])


def _leave(stop: KeyboardInterrupt | SystemExit) -> NoReturn:
    """加载到一半要停：解释器收尾时，还在 C++ 里的线程会让进程异常终止，所以不收尾，退出码照旧。"""
    if isinstance(stop, KeyboardInterrupt):
        click.echo("已中断", err=True)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(stop.code if isinstance(stop, SystemExit) and isinstance(stop.code, int) else _INTERRUPTED)


def served(source: Path | None, name: str | None, more: tuple[str, ...]) -> Mapping[str, Path]:
    """模型名 → 目录，先 OUT，再依次是各个 ``--model``。

    Raises:
        DsxError: ``DSX-E733``，一个也没有给、写得不对，或名字重了。
    """
    todo = "给 OUT，或 --model NAME=OUT，名字各不相同"
    if source is None and not more:
        raise DsxError("DSX-E733", "OUT 与 --model 都没有给", todo)
    if source is None and name is not None:
        raise DsxError("DSX-E733", f"给了 --name {name}，而没有 OUT", todo)
    found = {} if source is None else {name or source.resolve().name: source}
    for text in more:
        given, separator, path = text.partition("=")
        if not (given and separator and path):
            raise DsxError("DSX-E733", f"--model {text!r} 不是 NAME=OUT", todo)
        if given in found:
            raise DsxError("DSX-E733", f"有两个模型叫 {given!r}", todo)
        found[given] = Path(path)
    return found


class _LogProgress(Progress):
    """导出的进度写进日志：一个阶段一行。"""

    def start(self, stage: str, total: int | None = None, unit: Unit = "items") -> None:
        """进入一个阶段。"""
        logger.info("%s", stage)

    def note(self, line: str) -> None:
        """要让用户看到的话。"""
        logger.warning("注意：%s", line)


def _loopback(address: str) -> bool:
    return ip_address(address).is_loopback


@contextmanager
def _log_to_stderr() -> Iterator[None]:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
