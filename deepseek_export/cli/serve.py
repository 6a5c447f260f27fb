"""``dsx serve``。"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Literal

import click

from deepseek_export.cli.formatting import Command
from deepseek_export.cli.options import (
    backend_option,
    bundle_argument,
    cluster_settings,
    counts,
    micro_batches_option,
    ray_option,
    strategy_option,
    threads_option,
    verify_weights_option,
)
from deepseek_export.extras import require_serve


@click.command("serve", cls=Command, short_help="用 bundle 开一个 OpenAI 兼容的 HTTP 服务")
@bundle_argument
@click.option(
    "--host", metavar="HOST", default="127.0.0.1", show_default=True, help="监听的地址；0.0.0.0 对外开放。"
)
@click.option(
    "--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="端口；0 由系统挑一个。"
)
@click.option("--name", metavar="NAME", help="模型名，请求里的 model；缺省是 OUT 的目录名。")
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
    "--slots", type=click.IntRange(1, 4096), default=8, show_default=True, help="至多几个请求同时生成。"
)
@click.option(
    "--max-queue", type=counts(), default=256, show_default=True, help="至多几个请求排队，多的答 503。"
)
@micro_batches_option
@ray_option
@strategy_option
@threads_option
@backend_option
@verify_weights_option(False)
def command(
    bundle: Path,
    host: str,
    port: int,
    name: str | None,
    api_key_file: Path | None,
    cors_origins: tuple[str, ...],
    slots: int,
    max_queue: int,
    micro_batches: int,
    ray: str | None,
    strategy: Literal["pack", "spread"],
    threads: int | None,
    backend: str,
    verify_weights: bool,
) -> None:
    """用 bundle OUT 开一个 OpenAI 兼容的 HTTP 服务。

    缺省只在本机上听得到，谁都能用；对外开放要给 --host，也该给密钥。日志写在 stderr，一个请求一行，不含提示词与回答。
    第一个 Ctrl-C（或 SIGTERM）做完手上的再停，第二个立刻停。

    \b
    例：
      dsx serve OUT
      dsx serve OUT --host 0.0.0.0 --port 8000 --api-key-file KEYS
    """
    require_serve()
    # 到这里才导入：没有装 FastAPI 也能看帮助。
    from deepseek_export.serving import EngineSettings
    from deepseek_export.serving.http.keys import read_keys
    from deepseek_export.serving.http.server import Server, listen, serve, url_of
    from deepseek_export.serving.http.service import ServedModel

    settings = EngineSettings(slots=slots, queue=max_queue)
    keys = read_keys(api_key_file)

    def load() -> ServedModel:
        from deepseek_export import api

        cluster = cluster_settings(micro_batches, ray, strategy)
        model = api.load(bundle, threads, backend, verify_weights=verify_weights, cluster=cluster)
        served = name or bundle.resolve().name
        return ServedModel.open(served, model.tokenizer, model.session, model.engine(settings))

    server = Server(load, keys, cors_origins)
    with _log_to_stderr() as log, listen(host, port) as listening:
        log.info("在 %s 监听，正在加载 %s", url_of(listening), bundle)
        if not keys and not _loopback(listening.getsockname()[0]):
            log.warning("对外开放而没有密钥：谁都能用；用 --api-key-file 给密钥")
        # 脚本用 & 起的进程继承的是忽略 SIGINT；uvicorn 照样听它，停下时又照这里登记的走，退出码不能因此不同。
        signal.signal(signal.SIGINT, signal.default_int_handler)
        serve(server, listening)


def _loopback(address: str) -> bool:
    return ip_address(address).is_loopback


@contextmanager
def _log_to_stderr() -> Iterator[logging.Logger]:
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    log = logging.getLogger("dsx.serve")
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield log
    finally:
        log.removeHandler(handler)
