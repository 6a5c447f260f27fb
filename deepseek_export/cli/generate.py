"""``dsx generate``。"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepseek_export.cli.console import echo_json
from deepseek_export.cli.formatting import Command
from deepseek_export.cli.options import (
    backend_option,
    bundle_argument,
    json_option,
    read_prompts,
    threads_option,
    verify_weights_option,
)
from deepseek_export.cli.progress import open_progress
from deepseek_export.errors import DsxError

if TYPE_CHECKING:
    from deepseek_export.runtime import BundleTokenizer, GenerationResult, SpeculationStats, TextStream

#: 至多这么多位的 id 才交给模型去核对；再大的 64 位整数放不下。
_ID_DIGITS = 18


def _biases(context: click.Context, parameter: click.Parameter, values: tuple[str, ...]) -> dict[int, float]:
    """``ID=BIAS`` 几个 → 字典。"""
    biases = {}
    for value in values:
        token, _, bias = value.partition("=")
        try:
            biases[int(token)] = float(bias)
        except ValueError as error:
            raise click.BadParameter(f"{value!r} 不是 ID=BIAS，例如 42=-100", context, parameter) from error
    return biases


@click.command("generate", cls=Command, short_help="用 bundle 生成文本")
@bundle_argument
@click.option(
    "-P",
    "--prompt",
    "prompts",
    metavar="TEXT",
    multiple=True,
    callback=read_prompts,
    help="提示词；重复给就合成一批。- 读标准输入，@FILE 读文件，@@ 开头是字面上的 @。",
)
@click.option(
    "--ids", "id_texts", metavar="1,2,3", multiple=True, help="直接给 token id，可重复；与 -P 二选一。"
)
@click.option("--max-new-tokens", default=64, show_default=True, help="每条至多生成多少个 token。")
@click.option("--temperature", default=0.0, show_default=True, help="0 为 greedy。")
@click.option("--top-p", default=1.0, show_default=True, help="只在累计概率 top-p 之内采样。")
@click.option("--top-k", default=0, show_default=True, help="只在前 k 个里采样；0 不限。")
@click.option("--min-p", default=0.0, show_default=True, help="去掉概率不到最大那个的 min-p 倍的。")
@click.option("--presence-penalty", default=0.0, show_default=True, help="生成过的 token，logit 减去它。")
@click.option("--frequency-penalty", default=0.0, show_default=True, help="每生成过一次减去它一次。")
@click.option(
    "--repetition-penalty",
    default=1.0,
    show_default=True,
    help="提示词里有的、生成过的 token，logit 正的除以它，负的乘以它。",
)
@click.option("--min-tokens", default=0, show_default=True, help="至少生成几个才可以结束。")
@click.option(
    "--logit-bias",
    metavar="ID=BIAS",
    multiple=True,
    callback=_biases,
    help="给一个 token 的 logit 加上一个数，-100 到 100；可重复。",
)
@click.option("--seed", type=int, help="随机种子；缺省每次不同。")
@click.option("-n", "n", default=1, show_default=True, help="每条提示词要几个回答。")
@click.option(
    "--logprobs",
    metavar="K",
    type=int,
    help="每个新 token 另给它的与最可能的 K 个的对数概率，写在 stderr；--json 时在里面。",
)
@click.option("--stop", metavar="TEXT", multiple=True, help="文本里出现它就停，它自己不输出；可重复。")
@click.option("--chat", is_flag=True, help="套用检查点自带的聊天模板。")
@click.option("--ignore-eos", is_flag=True, help="遇到 EOS 不停。")
@click.option("--no-speculative", is_flag=True, help="bundle 带 MTP 时也逐个 token 解码。")
@click.option("--no-floor", is_flag=True, help="投机解码不划算也不退回普通解码。")
@click.option("--stats", is_flag=True, help="在 stderr 上打印投机解码的接受率与调用次数。")
@threads_option
@backend_option
@verify_weights_option(None)
@json_option
def command(
    bundle: Path,
    prompts: tuple[str, ...],
    id_texts: tuple[str, ...],
    threads: int | None,
    backend: str,
    verify_weights: bool | None,
    as_json: bool,
    no_speculative: bool,
    no_floor: bool,
    stats: bool,
    stop: tuple[str, ...],
    n: int,
    **options: Any,
) -> None:
    """用 bundle OUT 生成，缺省在 ONNX Runtime 上。

    一条提示词时边生成边输出，stdout 上只有生成的文本；几条合成一批跑，跑完依次输出。用时写在 stderr。没有 tokenizer 的检查点用
    --ids，输出也是 token id。带 MTP 的 bundle 自动投机解码，输出不变；实测不比普通解码快就退回，并在 stderr 上说明。

    \b
    例：
      dsx generate OUT -P "床前明月光" --max-new-tokens 32
      dsx generate OUT -P 你好 --chat --temperature 0.7 --top-p 0.95 --seed 1
      dsx generate OUT -P @poem.txt --stop 。 --repetition-penalty 1.1
      dsx generate OUT --ids 0,15,27 --ids 0,9 --json
    """
    rows = _rows(prompts, id_texts)
    if id_texts and options["chat"]:
        raise DsxError("DSX-E702", "--chat 只能套在文本上，而这里给的是 --ids", "改用 -P，或去掉 --chat")
    with open_progress(as_json) as progress:
        progress.start("加载模型")
        from deepseek_export import api

        began = time.perf_counter()
        model = api.load(
            bundle,
            threads,
            backend,
            speculative_floor=not no_floor,
            verify_weights=verify_weights,
            progress=progress,
        )
        load_s = time.perf_counter() - began
    options |= {"stop": stop, "speculative": False if no_speculative else None}
    if not (alone := len(rows) == n == 1 and not as_json):
        result = model.generate(rows, n=n, **options)
    elif model.tokenizer is None:
        result = model.generate(rows, on_token=_IdPrinter(), **options)
    else:
        result = _streamed(model.stream(rows[0], **options))
    if as_json:
        echo_json(_summary(result, load_s))
        return
    if alone:
        click.echo()
    else:
        _print_batch(prompts or id_texts, n, result)
    for line in _logprob_lines(result, model.tokenizer):
        click.echo(line, err=True)
    click.echo(
        f"[提示 {result.prompt_tokens} token，{result.prefill_s:.2f} s；生成 {result.new_tokens} token，"
        f"{result.decode_s:.2f} s，{result.decode_tokens_per_s:.1f} token/s；"
        f"结束：{'、'.join(result.finish_reasons)}；加载 {load_s:.1f} s]",
        err=True,
    )
    for note in result.notes:
        click.echo(f"[{note}]", err=True)
    if stats:
        click.echo(_stats_line(result.speculation), err=True)


def _stats_line(stats: SpeculationStats | None) -> str:
    if stats is None:
        return "[没有投机解码：每次调用产出 1 个 token]"
    pairs = zip(stats.acceptance, stats.acceptance_overall, strict=True)
    positions = "，".join(
        f"第 {number} 个 {_percent(reached)}（总 {_percent(overall)}）"
        for number, (reached, overall) in enumerate(pairs, start=1)
    )
    return (
        f"[投机解码：接受率 {positions}；平均接受 {stats.mean_accepted:.2f} / {stats.num_draft_tokens} 个；"
        f"每次主模型调用 {stats.tokens_per_call:.2f} token；主模型 {stats.main_calls} 次，草稿 {stats.draft_calls} 次]"
    )


def _percent(ratio: float | None) -> str:
    return "—" if ratio is None else f"{ratio:.0%}"


def _rows(prompts: tuple[str, ...], id_texts: tuple[str, ...]) -> list[Any]:
    if bool(prompts) == bool(id_texts):
        what = "-P 与 --ids 都给了" if prompts else "-P 与 --ids 都没有给"
        raise DsxError("DSX-E702", what, '给文本用 -P "床前明月光"，给 token id 用 --ids 1,2,3；只用其中一种')
    return list(prompts) or [parse_ids(text) for text in id_texts]


def parse_ids(text: str) -> list[int]:
    """``1,2,3`` → ``[1, 2, 3]``。

    Raises:
        DsxError: ``DSX-E701`` 不是非负整数；``DSX-E509`` 大得 64 位放不下。
    """
    ids = []
    for number, part in enumerate(text.split(","), start=1):
        part = part.strip()
        if not (part.isascii() and part.isdigit()):
            raise DsxError(
                "DSX-E701",
                f"--ids {text!r} 的第 {number} 项是 {part!r}",
                "写成逗号隔开的非负整数：--ids 1,2,3",
            )
        part = part.lstrip("0") or "0"
        if len(part) > _ID_DIGITS:
            raise DsxError(
                "DSX-E509",
                f"--ids 的第 {number} 项是 {part if len(part) <= 40 else part[:37] + '...'}，任何词表都没有这么大的 id",
                "改成词表以内的 id",
            )
        ids.append(int(part))
    return ids


def _streamed(stream: TextStream) -> GenerationResult:
    """单条提示词：能确定多少文本就输出多少。"""
    for piece in stream:
        click.echo(piece, nl=False)
    if stream.result is None:
        raise ValueError("取完了而没有结果")
    return stream.result


class _IdPrinter:
    """没有 tokenizer 的单条提示词：来一个 token 输出一个 id。"""

    def __init__(self) -> None:
        self._separator = ""

    def __call__(self, row: int, token: int) -> None:
        click.echo(f"{self._separator}{token}", nl=False)
        self._separator = ","


def _print_batch(prompts: tuple[str, ...], n: int, result: GenerationResult) -> None:
    outputs = result.text or [",".join(map(str, ids)) for ids in result.token_ids]
    asked = [prompt for prompt in prompts for _ in range(n)]
    for number, (prompt, output) in enumerate(zip(asked, outputs, strict=True), start=1):
        click.echo(f"[{number}/{len(outputs)}] {prompt}\n{output}\n")


def _logprob_lines(result: GenerationResult, tokenizer: BundleTokenizer | None) -> Iterator[str]:
    """每个新 token 一行：它的对数概率，然后是最可能的几个。"""

    def shown(token: int) -> str:
        if tokenizer is None:
            return str(token)
        data = tokenizer.bytes_of(token)
        try:
            return repr(data.decode())
        except UnicodeDecodeError:  # 半个字
            return repr(data)

    for number, row in enumerate(result.logprobs or (), start=1):
        yield f"[对数概率 {number}/{len(result.token_ids)}]"
        for one in row:
            top = "，".join(f"{shown(token)} {value:.3f}" for token, value in one.top)
            yield f"{one.logprob:9.3f}  {shown(one.token)}" + (f"    {top}" if top else "")


def _summary(result: GenerationResult, load_s: float) -> dict[str, Any]:
    summary: dict[str, Any] = {
        "text": result.text,
        "token_ids": result.token_ids,
        "counts": {"prompt_tokens": result.prompt_tokens, "new_tokens": result.new_tokens},
        "finish_reasons": result.finish_reasons,
        "notes": list(result.notes),
        "timings": {
            "load_s": round(load_s, 4),
            "prefill_s": round(result.prefill_s, 4),
            "decode_s": round(result.decode_s, 4),
            "decode_tokens_per_s": round(result.decode_tokens_per_s, 2),
        },
    }
    if result.logprobs is not None:
        summary["logprobs"] = [[asdict(one) for one in row] for row in result.logprobs]
    if result.speculation is not None:
        stats = result.speculation.as_dict()
        keys = ("acceptance", "tokens_per_call", "mean_accepted", "main_calls", "draft_calls", "fell_back")
        summary |= {key: stats[key] for key in keys}
    return summary
