"""渲染聊天模板的子进程：一行一个请求，一行一个答复，都是 JSON；由 :mod:`.chat_template` 按路径启动，不导入 dsx 的其余部分。

模板是检查点带来的代码。Jinja 的沙箱管得住它碰什么，管不住它算多少：``'x' * 10**10``、``10 ** 10**9``、反复自拼的字符串、
几层 ``range`` 套在一起，都在一条语句里吃光内存或时间。逐个拦截总有漏的，所以交给操作系统：内存用 ``RLIMIT_AS``，时间用
CPU 定时器，到点由内核终止本进程。
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from datetime import datetime
from typing import Any, NoReturn

import jinja2
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

#: 本进程的地址空间；Python 与 Jinja 自己约占五分之一。
MAX_MEMORY = 1 << 30
#: 渲染出来至多多少个字符。
MAX_OUTPUT = 8 << 20


def main() -> None:
    """逐行处理，直到输入关闭；参数是一次渲染至多用多少秒 CPU。"""
    seconds = float(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)  # SIGPROF 不接，缺省就是终止
        try:
            answer = {"text": render(**json.loads(line))}
        except Exception as error:  # 模板里什么都可能冒出来，TypeError、MemoryError 也会
            answer = {"error": f"{type(error).__name__}：{str(error)[:2000]}"}
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


def render(template: str, variables: dict[str, Any]) -> str:
    """套模板。

    Raises:
        ValueError: 结果太长。
    """
    pieces, length = [], 0
    for piece in _environment().from_string(template).generate(**variables):
        pieces.append(piece)
        length += len(piece)
        if length > MAX_OUTPUT:
            raise ValueError(f"结果超过 {MAX_OUTPUT:,} 个字符")
    return "".join(pieces)


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """不同于 Jinja 自带的 tojson：不转义 HTML，也不把中文写成 \\u；参数与 transformers 的相同。"""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


if __name__ == "__main__":
    main()
