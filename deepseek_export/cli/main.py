"""``dsx`` 的入口：命令按需加载，错误在这里变成退出码。"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from types import MappingProxyType
from typing import Any, NoReturn, TextIO

import click

from deepseek_export.cli.formatting import Group
from deepseek_export.cli.options import wants_json
from deepseek_export.cli.usage import usage_error
from deepseek_export.errors import DsxError
from deepseek_export.version import __version__

#: 命令 → 所在模块；次序就是帮助里的次序。模块顶层不许导入 torch、onnx 这类重的依赖。
COMMANDS = MappingProxyType(
    {
        name: f"deepseek_export.cli.{name}"
        for name in (
            "plan",
            "export",
            "verify",
            "compare",
            "build",
            "generate",
            "chat",
            "serve",
            "batch",
            "inspect",
            "bench",
            "pack",
            "split",
            "cluster",
            "demo",
            "profiles",
            "doctor",
        )
    }
)
_INTERRUPTED, _TERMINATED = 130, 143


class LazyGroup(Group):
    """用到哪个命令才导入哪个模块；:class:`DsxError` 在这里印成三行，退出码 1。"""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """全部命令，按使用的先后。"""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """导入模块，取其中的 ``command``。"""
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = import_module(COMMANDS[cmd_name]).command
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """执行命令。"""
        try:
            return self._invoke(ctx)
        except DsxError as error:
            sys.stdout.flush()
            click.echo(str(error), err=True)
            if wants_json(ctx):
                fields = {"code": error.code, "title": error.title, "what": error.what, "todo": error.todo}
                click.echo(json.dumps({"error": fields}, ensure_ascii=False))
            ctx.exit(1)

    def _invoke(self, ctx: click.Context) -> Any:
        """执行命令；torch 一导入就要临时目录，没有一处写得了时说清楚。"""
        try:
            return super().invoke(ctx)
        except FileNotFoundError as error:
            try:
                tempfile.gettempdir()
            except FileNotFoundError as missing:
                todo = "清理磁盘，或把 TMPDIR 设成一个写得了的目录"
                raise DsxError("DSX-E405", f"没有一处放得了临时文件：{missing.strerror}", todo) from error
            raise


@click.group("dsx", cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="dsx", message="%(prog)s %(version)s", help="显示版本并退出。")
def cli() -> None:
    """把 DeepSeek 系检查点（V2、V3、R1、V3.2，同样架构的 Kimi-K2、GLM-5 等）编译成 ONNX / TensorRT，并证明与 PyTorch 相等。

    \b
    第一次用：
      dsx demo                               在随包附带的小模型上走一遍全程
      dsx plan CKPT --gpu h100               动工之前：多大、放不放得下、多快
      dsx export CKPT OUT -p mla+moe         编译自己的检查点
      dsx verify OUT                         与 PyTorch 逐层比对
      dsx compare OUT                        逐块比较，存成 Polygraphy 的格式
      dsx generate OUT -P "床前明月光"       生成
      dsx chat OUT                           在终端里对话
      dsx serve OUT                          OpenAI 兼容的 HTTP 服务
    """


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """运行命令行并退出。

    退出码：0 成功；1 用户能解决的错误（或校验不过）；2 用法不对；130 Ctrl-C；143 SIGTERM。dsx 自身的缺陷保留 traceback。

    Args:
        argv: 参数，缺省取 ``sys.argv[1:]``。
    """
    closed = _reopen_closed()
    streams = sys.stdout, sys.stderr
    for stream in streams:
        with suppress(AttributeError):
            stream.reconfigure(errors="replace")  # type: ignore[union-attr]  # 终端编码不是 UTF-8 时也别崩
    signal.signal(signal.SIGTERM, _terminate)
    code: Any = 0
    try:
        sys.stdout, sys.stderr = (_Guarded(stream) for stream in streams)
        if closed:
            raise _UnwritableError(OSError(errno.EBADF, "标准输出是关着的"))
        code = cli.main(args=argv, prog_name="dsx", standalone_mode=False)
        sys.stdout.flush()
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()  # 什么都没给：印帮助
        code = error.exit_code
    except click.UsageError as error:
        click.echo(str(usage_error(error)), err=True)
        code = error.exit_code
    except click.ClickException as error:
        error.show()
        code = error.exit_code
    except (click.Abort, KeyboardInterrupt):
        click.echo("已中断", err=True)
        code = _INTERRUPTED
    except _UnwritableError as error:
        code = _report_unwritable(error.reason)
    finally:
        sys.stdout, sys.stderr = streams
    sys.exit(code if isinstance(code, int) else 0)


class _UnwritableError(Exception):
    """标准输出、标准错误写不出去；不是 ``OSError``，免得 rich、click 各自处理，也好与别处的文件分开。"""

    def __init__(self, reason: OSError) -> None:
        super().__init__(str(reason))
        self.reason = reason


class _Guarded:
    """写不出去时抛 :class:`_UnwritableError` 的流，其余照旧。"""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except OSError as error:
            raise _UnwritableError(error) from error

    def flush(self) -> None:
        try:
            self._stream.flush()
        except OSError as error:
            raise _UnwritableError(error) from error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _report_unwritable(reason: OSError) -> int:
    """说一声，返回退出码；下游（例如 head）先走了不是错误。"""
    broken_pipe = isinstance(reason, BrokenPipeError)
    todo = "检查它指向哪里：磁盘满没满，是不是 >&- 关掉了；不要输出就用 >/dev/null"
    for stream in (sys.stdout, sys.stderr):
        try:
            if stream is sys.stderr and not broken_pipe:
                click.echo(str(DsxError("DSX-E706", str(reason.strerror), todo)), err=True)
            stream.flush()
        except _UnwritableError:
            # 没写完的接到别处，别让解释器退出时再抱怨一次。
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    return 0 if broken_pipe else 1


def _reopen_closed() -> bool:
    """关着的标准输出、标准错误接到 ``/dev/null``，免得接着打开的文件占了它们的号；返回标准输出是不是关着的。"""
    closed = sys.stdout is None
    for name, number in (("stdout", 1), ("stderr", 2)):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_WRONLY)
            if null != number:
                os.dup2(null, number)
                os.close(null)
            setattr(sys, name, os.fdopen(number, "w", encoding="utf-8"))
    return closed


def _terminate(signum: int, frame: Any) -> NoReturn:
    """SIGTERM 变成异常，``finally`` 得以清掉写了一半的目录。"""
    sys.exit(_TERMINATED)


if __name__ == "__main__":
    main()
