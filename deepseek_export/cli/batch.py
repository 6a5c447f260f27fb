"""``dsx batch``。"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Literal

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
    strategy_option,
    threads_option,
    verify_weights_option,
)
from deepseek_export.cli.progress import open_progress
from deepseek_export.extras import require_serve


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
    "--slots", type=click.IntRange(1, 4096), default=8, show_default=True, help="至多几个请求同时生成。"
)
@micro_batches_option
@ray_option
@strategy_option
@threads_option
@backend_option
@verify_weights_option(False)
@json_option
@click.pass_context
def command(
    ctx: click.Context,
    bundle: Path,
    source: Path,
    out: Path,
    overwrite: bool,
    slots: int,
    micro_batches: int,
    ray: str | None,
    strategy: Literal["pack", "spread"],
    threads: int | None,
    backend: str,
    verify_weights: bool,
    as_json: bool,
) -> None:
    """用 bundle OUT 把 IN.jsonl 里的请求都做完，答案按同样的次序写进 ANSWERS.jsonl。

    每行一个请求：{"custom_id": "1", "method": "POST", "url": "/v1/chat/completions", "body": {…}}，body 同 dsx serve。答案每行一个：{"id", "custom_id", "response", "error"}。
    不成立的行、答不了的请求写着原因，不影响别的；有这样的行，退出码是 1。中途被杀（kill -9 也一样）再运行一次就接着做，不丢也不重；全部做完 ANSWERS.jsonl 才出现。

    \b
    例：
      dsx batch OUT IN.jsonl -o ANSWERS.jsonl
    """
    require_serve()
    with open_progress(as_json) as progress:
        progress.start("加载模型")
        from deepseek_export import api
        from deepseek_export.bundle.disk import sha256_file
        from deepseek_export.bundle.stages import STAGES_FILE, is_stage_set
        from deepseek_export.serving import EngineSettings
        from deepseek_export.serving.batch import check_batch, run_batch
        from deepseek_export.serving.http.inside import app_of, post
        from deepseek_export.serving.http.service import ServedModel

        check_batch(source, out, overwrite)
        cluster = cluster_settings(micro_batches, ray, strategy)
        model = api.load(bundle, threads, backend, verify_weights=verify_weights, cluster=cluster)
        engine = model.engine(EngineSettings(slots=slots))
        served = ServedModel.open(bundle.resolve().name, model.tokenizer, model.session, engine)
        try:
            report = run_batch(
                source,
                out,
                partial(post, app_of(served)),
                model=sha256_file(bundle / (STAGES_FILE if is_stage_set(bundle) else "manifest.json")),
                concurrency=slots,
                overwrite=overwrite,
                progress=progress,
            )
        finally:
            engine.close(drain=False)
            model.close()
    if as_json:
        echo_json({"out": str(out), **vars(report)})
    else:
        click.echo(f"{out}：{report.lines} 行，{report.failed} 行没有得到回答")
    ctx.exit(1 if report.failed else 0)
