"""``dsx demo`` 的最后一步：开一个服务，照 openai 客户端的协议问一句，停下它。"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from http.client import HTTPConnection
from pathlib import Path
from urllib.parse import urlsplit

import click

#: SIGTERM 停下的 ``dsx serve`` 的退出码。
_STOPPED = 143
_WAIT_S = 60.0


def serve_and_ask(bundle: Path, question: str) -> None:
    """另起一个进程跑 ``dsx serve``，流式地问一句，边来边印，再用 SIGTERM 停下。

    Args:
        bundle: 要服务的 bundle。
        question: 用户说的一句话。

    Raises:
        click.exceptions.Exit: 服务没有起来，或没有干净地停下；原因在它的 stderr 上，已经照印。
    """
    from deepseek_export.serving.http.keys import VARIABLE  # 到这里才导入：看帮助不必等它

    env = {name: value for name, value in os.environ.items() if name != VARIABLE}  # 演示不要密钥
    command = [sys.executable, "-m", "deepseek_export", "serve", str(bundle), "--port", "0"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, encoding="utf-8", env=env) as process:
        assert process.stderr is not None
        log = iter(process.stderr.readline, "")
        try:
            url = _ready(log)
            if url is not None:
                body = {"messages": [{"role": "user", "content": question}], "temperature": 0, "stream": True}
                sent = json.dumps(body, ensure_ascii=False)
                head = "-H 'Content-Type: application/json'"
                click.secho(f"$ curl -N {url}/v1/chat/completions {head} -d '{sent}'", fg="cyan")
                for piece in _asked(url, sent):
                    click.echo(piece, nl=False)
                click.echo()
        finally:
            process.terminate()
            for line in log:
                click.echo(line, nl=False, err=True)
    if process.returncode != _STOPPED:
        raise click.exceptions.Exit(process.returncode or 1)
    click.echo("服务已停下。")


def _ready(log: Iterator[str]) -> str | None:
    """照印日志，到就绪为止；给出地址，没有起来就是 ``None``。"""
    url = None
    for line in log:
        click.echo(line, nl=False, err=True)
        if found := re.search(r"http://\S+", line):
            url = found[0]
        if "就绪" in line:
            return url
    return None


def _asked(url: str, body: str) -> Iterator[str]:
    """流式的回答，一段一段的文本。"""
    connection = HTTPConnection(urlsplit(url).netloc, timeout=_WAIT_S)
    try:
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/chat/completions", body.encode(), headers)
        for line in connection.getresponse():
            text = line.decode().strip().removeprefix("data: ")
            if text.startswith("{"):
                event = json.loads(text)
                if "error" in event:
                    click.echo(event["error"]["message"], err=True)
                    raise click.exceptions.Exit(1)
                yield from (choice["delta"].get("content") or "" for choice in event["choices"])
    finally:
        connection.close()
