"""``dsx chat``。"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from deepseek_export.cli.console import console, facts
from deepseek_export.cli.formatting import Command
from deepseek_export.cli.generate import command as generate
from deepseek_export.cli.options import backend_option, counts, threads_option, verify_weights_option
from deepseek_export.cli.progress import open_progress
from deepseek_export.cli.sources import ExportOptions, bundle_of, checkpoint_options
from deepseek_export.errors import DsxError
from deepseek_export.paths import MAX_TEXT

if TYPE_CHECKING:
    from deepseek_export.serving import Conversation

#: 采样的选项：就是 ``dsx generate`` 的那几个，名字是 ``SamplingParams`` 的字段。
SAMPLING = (
    *("temperature", "top_p", "top_k", "min_p", "seed"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "min_tokens", "logit_bias"),
)
_SHARED = (*SAMPLING, "stop", "ignore_eos")
_HELP = """\
  /reset   忘掉说过的话，重新开始
  /stats   用了多少 token，前缀命中多少，快慢
  /help    这份说明
  /exit    离开（Ctrl-D 也是）
  三个双引号（\"\"\"）单独一行开头、单独一行结尾，中间可以有好几行；以 // 开头的一行，去掉一个 / 再问。
  回答的时候按 Ctrl-C 停下这个回答。"""
_FENCE = '"""'


def _with_sampling(command: click.Command) -> click.Command:
    """添上 ``dsx generate`` 的采样选项，一个字不差。"""
    command.params[1:1] = [param for param in generate.params if param.name in _SHARED]
    return command


@_with_sampling
@click.command("chat", cls=Command, short_help="在终端里与 bundle 对话")
@click.argument("source", metavar="OUT", type=click.Path(path_type=Path))
@click.option("--system", metavar="TEXT", help="系统提示词。")
@click.option("--max-new-tokens", type=counts(), help="一个回答至多几个 token；缺省到上下文用完为止。")
@threads_option
@backend_option
@verify_weights_option(None)
@checkpoint_options
def command(
    source: Path,
    system: str | None,
    max_new_tokens: int | None,
    threads: int | None,
    backend: str,
    verify_weights: bool | None,
    stop: tuple[str, ...],
    ignore_eos: bool,
    **options: Any,
) -> None:
    """在终端里与 bundle OUT 对话：边生成边输出，上文的前缀不重算。OUT 也可以是检查点目录，先按引用导出，留着下次用。

    一行一问；回答的时候按 Ctrl-C 停下这个回答，/help 看别的命令。标准输入不是终端时，一行一问，读到末尾为止，stdout 上只有回答。

    \b
    例：
      dsx chat OUT
      dsx chat CKPT -p full --system "用文言回答" --temperature 0.7
      echo "《论语》" | dsx chat OUT
    """
    exporting = ExportOptions.taken(options)
    with open_progress(False) as progress:
        progress.start("加载模型")
        # 到这里才导入：看帮助不必等它们。
        from deepseek_export import api
        from deepseek_export.runtime import SamplingParams
        from deepseek_export.serving import Conversation, EngineSettings

        sampling = SamplingParams(**options)
        bundle = bundle_of(source, exporting, verify_weights is True, progress)
        model = api.load(bundle, threads, backend, verify_weights=verify_weights, progress=progress)
    with model.engine(EngineSettings(slots=1)) as engine:
        conversation = Conversation(
            engine,
            model.tokenizer,
            sampling,
            max_new_tokens=max_new_tokens,
            stops=stop,
            ignore_eos=ignore_eos,
            system=system,
        )
        for note in engine.notes:
            click.echo(f"[{note}]", err=True)
        if sys.stdin.isatty():
            _talk(conversation)
        else:
            _answer_lines(conversation)


def _talk(conversation: Conversation) -> None:
    """人在键盘前。"""
    with suppress(ImportError):  # 有的 Python 没有它
        import readline  # noqa: F401  # input() 因此能编辑、翻看前面的话
    click.echo("/help 看命令，Ctrl-D 离开。")
    interrupted = False
    while True:
        try:
            text = _question()
        except EOFError:
            click.echo()
            return
        except KeyboardInterrupt:
            if interrupted:
                raise
            interrupted = True
            click.echo("\n（再按一次 Ctrl-C 离开；/exit、Ctrl-D 也是）")
            continue
        interrupted = False
        if _is_command(text):
            if not _obey(conversation, text.strip()):
                return
        elif text.strip():
            try:
                _answer(conversation, _unescaped(text), in_terminal=True)
            except KeyboardInterrupt:
                click.echo("\n[停下了]\n")
            except DsxError as error:
                click.echo(f"{error}\n[这一问不算；说得太长了就 /reset]\n", err=True)


def _question() -> str:
    first = input(">>> ")
    if first.strip() != _FENCE:
        return first
    lines: list[str] = []
    while (line := input("... ")).strip() != _FENCE:
        lines.append(line)
    return "\n".join(lines)


def _answer_lines(conversation: Conversation) -> None:
    """问题来自管道或文件：答完为止；有一问答不了就停。"""
    answered = False
    for text in _lines():
        if _is_command(text):
            if not _obey(conversation, text.strip()):
                return
        elif text.strip():
            if answered:
                click.echo()
            _answer(conversation, _unescaped(text), in_terminal=False)
            answered = True


def _lines() -> Iterator[str]:
    """标准输入的各问；三个双引号之间的几行是一问。

    Raises:
        DsxError: ``DSX-E702``，不是 UTF-8，或一行太长。
    """
    held: list[str] | None = None
    number = 0
    while line := sys.stdin.buffer.readline(MAX_TEXT + 1):
        number += 1
        if len(line) > MAX_TEXT:
            raise DsxError("DSX-E702", f"标准输入的第 {number} 行超过 {MAX_TEXT:,} 字节", "分成几问")
        try:
            text = line.decode("utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            what = f"标准输入的第 {number} 行不是 UTF-8：{error.reason}"
            raise DsxError("DSX-E702", what, "用 UTF-8 编码给出") from error
        fenced = text.strip() == _FENCE
        if held is None and fenced:
            held = []
        elif held is not None and fenced:
            yield "\n".join(held)
            held = None
        elif held is not None:
            held.append(text)
        else:
            yield text
    if held:
        yield "\n".join(held)


def _answer(conversation: Conversation, text: str, in_terminal: bool) -> None:
    """一边生成一边输出；思考在终端里是暗的，不是终端就写到 stderr。"""
    thinking = False
    with closing(conversation.ask(text)) as parts:
        for part in parts:
            if part.reasoning:
                thinking = True
                click.secho(part.reasoning, dim=True, nl=False, err=not in_terminal)
            if part.content:
                if thinking:
                    click.echo("\n", nl=False, err=not in_terminal)
                    thinking = False
                click.echo(part.content, nl=False)
    click.echo("\n" if in_terminal else "")
    if conversation.stats and conversation.stats[-1].reason == "length":
        click.echo("[到了上限，没有说完]", err=True)


def _is_command(text: str) -> bool:
    return text.startswith("/") and not text.startswith("//")


def _unescaped(text: str) -> str:
    return text.removeprefix("/") if text.startswith("//") else text


def _obey(conversation: Conversation, name: str) -> bool:
    """照 ``/`` 开头的命令做；要离开了为假。"""
    if name == "/exit":
        return False
    if name == "/reset":
        conversation.reset()
        click.echo("[忘掉了前面的话]", err=True)
    elif name == "/stats":
        console(sys.stderr).print(facts("用量", _stats_rows(conversation)))
    else:
        if name != "/help":
            click.echo(f"没有命令 {name}", err=True)
        click.echo(_HELP, err=True)
    return True


def _stats_rows(conversation: Conversation) -> list[tuple[str, str]]:
    stats = conversation.stats
    if not stats:
        return [("回答", "还没有")]
    last = stats[-1]
    prompt, cached = sum(one.prompt_tokens for one in stats), sum(one.cached_tokens for one in stats)
    new, seconds = sum(one.new_tokens for one in stats), sum(one.decode_s for one in stats)
    later = new - len(stats)
    return [
        ("回答", f"{len(stats)} 个"),
        ("提示词", f"{prompt} token，其中 {cached} 个是现成的前缀，没有重算"),
        ("生成", f"{new} token" + (f"，{later / seconds:.1f} token/s" if seconds and later else "")),
        (
            "上一个回答",
            f"提示词 {last.prompt_tokens}（现成 {last.cached_tokens}），生成 {last.new_tokens}，"
            f"第一个 token {last.first_s:.2f} s，结束：{last.reason}",
        ),
    ]
