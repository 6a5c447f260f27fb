"""``dsx batch``。"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from deepseek_export.cli.console import echo_json
from deepseek_export.cli.formatting import Command
from deepseek_export.cli.options import (
    backend_option,
    bundle_argument,
    cluster_settings,
    json_option,
    micro_batches_option,
    ray_option,
    stages_option,
    strategy_option,
    threads_option,
    tls_options,
    verify_weights_option,
)
from deepseek_export.cli.progress import open_progress
from deepseek_export.cli.staging import check_replicas, staged
from deepseek_export.extras import require_serve
from deepseek_export.progress import Progress

if TYPE_CHECKING:
    from deepseek_export.cluster.settings import ClusterSettings
    from deepseek_export.serving import EngineSettings
    from deepseek_export.serving.batch import Call


@click.command("batch", cls=Command, short_help="把一个文件里的请求都做完（OpenAI 的 batch 格式）")
@bundle_argument
@click.argument("source", metavar="IN.jsonl", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--out",
    metavar="ANSWERS.jsonl",
    type=click.Path(path_type=Path),
    required=True,
    help="答案写到这里。",
)
@click.option("--overwrite", is_flag=True, help="替换已有的答案，上一次没做完的也不要了。")
@click.option(
    "--slots",
    type=click.IntRange(1, 4096),
    default=8,
    show_default=True,
    help="至多几个请求同时生成；有几个副本，每个这么多。",
)
@click.option(
    "--replicas",
    metavar="N",
    type=click.IntRange(1, 1024),
    help="配 --ray：起几个副本一起做，每个是一个 actor，有自己的引擎；缺省不起，在这个进程里做。",
)
@stages_option
@micro_batches_option
@ray_option
@strategy_option
@tls_options
@threads_option
@backend_option
@verify_weights_option(None)
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    source: Path,
    out: Path,
    overwrite: bool,
    slots: int,
    replicas: int | None,
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
    as_json: bool,
) -> None:
    """用 bundle OUT 把 IN.jsonl 里的请求都做完，答案按同样的次序写进 ANSWERS.jsonl。

    每行一个请求：{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {…}}，body 同 dsx serve。答案每行一个：{"id", "custom_id", "response", "error"}。
    不成立的行、答不了的请求写着原因，不影响别的；有这样的行，退出码是 1。中途被杀（kill -9 也一样）再运行一次就接着做，不丢也不重；全部做完 ANSWERS.jsonl 才出现。

    --ray 与 --replicas 把请求分给 Ray 上的几个副本；哪个死了、停住了就重起它，手上的重做，答案照样不丢不重，次序不变。

    \b
    例：
      dsx batch OUT IN.jsonl -o ANSWERS.jsonl
      dsx batch OUT IN.jsonl -o ANSWERS.jsonl --ray auto --replicas 4
    """
    require_serve()
    check_replicas(replicas, ray, stages, [bundle])
    with open_progress(as_json) as progress:
        progress.start("加载模型")
        from deepseek_export.bundle.disk import sha256_file
        from deepseek_export.bundle.stages import STAGES_FILE, is_stage_set
        from deepseek_export.serving import EngineSettings
        from deepseek_export.serving.batch import check_batch, run_batch

        check_batch(source, out, overwrite)
        bundle = staged(bundle, stages, progress)
        cluster = cluster_settings(micro_batches, ray, strategy, (tls_cert, tls_key, tls_ca))
        engine = EngineSettings(slots=slots)
        if replicas is None:
            opened = _here(bundle, engine, cluster, threads, backend, verify_weights, progress)
        else:
            opened = _on_ray(bundle, engine, cluster, threads, backend, verify_weights, replicas, progress)
        with opened as call:
            report = run_batch(
                source,
                out,
                call,
                model=sha256_file(bundle / (STAGES_FILE if is_stage_set(bundle) else "manifest.json")),
                concurrency=slots * (replicas or 1),
                overwrite=overwrite,
                progress=progress,
            )
    if as_json:
        echo_json({"out": str(out), **vars(report)})
    else:
        click.echo(f"{out}：{report.lines} 行，{report.failed} 行没有得到回答")
    ctx.exit(1 if report.failed else 0)


@contextmanager
def _here(
    bundle: Path,
    settings: EngineSettings,
    cluster: ClusterSettings,
    threads: int | None,
    backend: str,
    verify_weights: bool | None,
    progress: Progress,
) -> Iterator[Call]:
    """在这个进程里做；切开了的照 ``cluster`` 起各个 stage。"""
    from deepseek_export import api
    from deepseek_export.serving.http.inside import app_of, post
    from deepseek_export.serving.http.service import ServedModel

    opened = api.load(
        bundle, threads, backend, verify_weights=verify_weights, progress=progress, cluster=cluster
    )
    with opened as model:
        engine = model.engine(settings)
        served = ServedModel.open(bundle.resolve().name, model.tokenizer, model.session, engine)
        yield partial(post, app_of(served))


@contextmanager
def _on_ray(
    bundle: Path,
    settings: EngineSettings,
    cluster: ClusterSettings,
    threads: int | None,
    backend: str,
    verify_weights: bool | None,
    replicas: int,
    progress: Progress,
) -> Iterator[Call]:
    """交给 Ray 上的几个副本。"""
    from deepseek_export.replicas.pool import ray_pool
    from deepseek_export.replicas.replica import ReplicaSpec

    spec = ReplicaSpec(
        bundle.resolve(), bundle.resolve().name, settings, cluster, threads, backend, verify_weights
    )
    progress.start(f"在 Ray 上起 {replicas} 个副本")
    with ray_pool(spec, replicas) as pool:
        yield pool.post
