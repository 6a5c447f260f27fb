"""渲染检查点自带的聊天模板（Jinja），行为与 transformers 一致；在限时、限内存的子进程里跑。"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepseek_export.errors import DsxError

#: 一次渲染至多用多少秒 CPU；真实的模板是毫秒级的。
MAX_SECONDS = 10


def render_chat_template(
    template: str,
    messages: Sequence[Mapping[str, Any]],
    special_tokens: Mapping[str, str],
    add_generation_prompt: bool,
    tools: Sequence[Mapping[str, Any]] | None = None,
    extra: Mapping[str, Any] | None = None,
) -> str:
    """把对话渲染成一段提示词。

    模板来自检查点，是不可信的代码：在 Jinja 的沙箱里跑，读不到 Python 内部属性，也改不了传入的对象；沙箱又在
    :mod:`.chat_worker` 的子进程里，用时、内存与结果的长度都有上限。

    Args:
        template: Jinja 模板原文。
        messages: ``{"role": ..., "content": ...}`` 的序列，能写成 JSON。
        special_tokens: 模板可以用的 ``bos_token``、``eos_token`` 等。
        add_generation_prompt: 是否在末尾加上助手回合的开头。
        tools: OpenAI 写法的 ``tools``；没有就是 ``None``。
        extra: 另给模板的变量，例如 ``thinking``；盖不住上面这些。

    Raises:
        DsxError: ``DSX-E503``，模板语法错误、用到沙箱禁止的东西、超出限额，或模板自己用 ``raise_exception`` 拒绝；
            消息写不成 JSON。
    """
    variables = {
        **(extra or {}),
        "messages": [dict(message) for message in messages],
        "tools": [dict(tool) for tool in tools] if tools else None,
        "documents": None,
        "add_generation_prompt": add_generation_prompt,
        **special_tokens,
    }
    try:
        request = json.dumps({"template": template, "variables": variables})
    except (TypeError, ValueError, RecursionError) as error:
        raise _failed(f"消息写不成 JSON：{error}") from error
    answer = WORKER.ask(request)
    if "error" in answer:
        raise _failed(answer["error"])
    return str(answer["text"])


class ChatWorker:
    """子进程，用到才启动，一直留着：启动一次要几十毫秒，渲染一次不到一毫秒。dsx 退出时它的输入关闭，随之退出。

    Args:
        seconds: 一次渲染至多用多少秒 CPU。
    """

    def __init__(self, seconds: float = MAX_SECONDS) -> None:
        self.seconds = seconds
        self._lock = threading.Lock()
        self._process: subprocess.Popen[str] | None = None
        self._owner = 0

    def ask(self, request: str) -> dict[str, str]:
        """一问一答。

        Raises:
            DsxError: ``DSX-E503``，子进程被终止：超时，或内存不够。
        """
        with self._lock:
            process = self._running()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                process.stdin.write(request + "\n")
                process.stdin.flush()
                line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            except BaseException:  # 例如 Ctrl-C：答复还没有来，不能留给下一问
                self._process = None
                process.kill()
                raise
            if line.endswith("\n"):
                answer: dict[str, str] = json.loads(line)
                return answer
            self._process = None
            code = process.wait()
        reason = f"渲染超过 {self.seconds} 秒" if code == -signal.SIGPROF else f"渲染的进程中止了（{code}）"
        raise _failed(reason)

    def _running(self) -> subprocess.Popen[str]:
        # fork 出来的进程不能与上级共用一条管道。
        if self._process is None or self._process.poll() is not None or self._owner != os.getpid():
            script = Path(__file__).with_name("chat_worker.py")
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-X", "utf8", str(script), str(self.seconds)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                encoding="utf-8",
                start_new_session=True,  # 终端里按 Ctrl-C 归 dsx 处理
            )
            self._owner = os.getpid()
        return self._process


#: 一个进程共用一个。
WORKER = ChatWorker()


def _failed(reason: str) -> DsxError:
    return DsxError(
        "DSX-E503",
        reason,
        "检查消息的 role 与 content 是否符合模型的要求，或改用不套模板的原始提示词",
    )
