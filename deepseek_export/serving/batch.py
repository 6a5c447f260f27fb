"""批量：一个 JSONL 文件里的许多请求，答案写进另一个，次序不变（OpenAI 的 batch 格式）。

答案按输入的次序一行一行地写进 ``OUT.partial``，先做完的等着前面的；全部做完才改名成 ``OUT``。所以被杀之后留下的总是前若干行，从下一行接着做，不丢也不重；
写了一半的最后一行截掉。旁边的 ``OUT.partial.json`` 记着是哪个输入、哪个模型，换了就不接着写。
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import os
from collections import deque
from collections.abc import Awaitable, Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from deepseek_export.bundle.disk import disk_errors
from deepseek_export.bundle.lock import locked
from deepseek_export.errors import DsxError
from deepseek_export.paths import check_readable, path_kind
from deepseek_export.progress import Progress

#: ``(路径, 请求体) -> (状态码, 回答)``。
Call = Callable[[str, bytes], Awaitable[tuple[int, bytes]]]

#: 能在批里用的端点。
URLS = ("/v1/chat/completions", "/v1/completions")
#: 一行至多这么长。
MAX_LINE = 8 << 20
#: 先做完的至多等在多少个做到一半的后面，以同时做的个数计。
_AHEAD = 4
#: 服务暂时不行（503）时隔多少秒再试，至多试几次。
_RETRY_S, _RETRIES = 1.0, 120


@dataclass(frozen=True)
class BatchReport:
    """一次批量的结果。

    Attributes:
        lines: 一共几行。
        failed: 其中几行没有得到回答。
        resumed: 其中几行是上一次做完的。
    """

    lines: int
    failed: int
    resumed: int


class _RefusedError(Exception):
    """一行自己不成立。"""

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code, self.message = code, message


def run_batch(
    source: Path | str,
    out: Path | str,
    call: Call,
    *,
    model: str,
    concurrency: int = 8,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> BatchReport:
    """做完 ``source`` 里的全部请求。

    Args:
        source: 每行一个 ``{"custom_id", "method": "POST", "url", "body"}``；空行跳过。
        out: 答案写到这里，每个请求一行 ``{"id", "custom_id", "response", "error"}``；全部做完才出现。
        call: 做一个请求。
        model: 模型的身份；与上一次没做完的不同就不接着写。
        concurrency: 至多几个请求同时做。
        overwrite: 替换已有的 ``out``，不要上一次没做完的。
        progress: 以行计的进度。

    Raises:
        DsxError: ``DSX-E750``，输入读不了，或上一次没做完的不是同一个输入、同一个模型；``DSX-E401`` ``out`` 已存在；``DSX-E404`` / ``DSX-E405``
            写不了；``DSX-E411`` 别人正在写。
    """
    source, out, progress = Path(source), Path(out).absolute(), progress or Progress()
    with disk_errors(out), locked(out):
        return _run(source, out, call, model, concurrency, overwrite, progress)


def check_batch(source: Path, out: Path, overwrite: bool) -> None:
    """输入与输出能不能用；便宜，加载模型之前就该查。

    Raises:
        DsxError: ``DSX-E750``，输入读不了；``DSX-E401`` ``out`` 已存在。
    """
    if path_kind(source, "DSX-E750") != "file":
        raise DsxError("DSX-E750", f"{source} 不存在，或不是普通文件", "给一个 JSONL 文件，一行一个请求")
    check_readable(source, "DSX-E750", "检查权限")
    if (kind := path_kind(out, "DSX-E405")) == "missing" or (kind == "file" and overwrite):
        return
    todo = "换一个 -o，或加 --overwrite 替换它" if kind == "file" else "换一个 -o：不是普通文件，不会替换它"
    raise DsxError("DSX-E401", f"{out} 已存在", todo)


def _run(
    source: Path, out: Path, call: Call, model: str, concurrency: int, overwrite: bool, progress: Progress
) -> BatchReport:
    partial, note = out.with_name(f"{out.name}.partial"), out.with_name(f"{out.name}.partial.json")
    check_batch(source, out, overwrite)
    total, digest = _measure(source)
    identity = {"input_sha256": digest, "model": model}
    if overwrite:
        partial.unlink(missing_ok=True)
    done, failed = _resumed(partial, note, identity, source)
    note.write_text(json.dumps(identity), encoding="utf-8")
    progress.start("做请求", total)
    if done:
        progress.note(f"接着上一次没做完的：已有 {done} 行")
        progress.advance(done, "接着上一次")
    with partial.open("ab") as file:
        rest = itertools.islice(_lines(source), done, None)
        failed += asyncio.run(_answer_all(enumerate(rest, done), call, concurrency, file, progress))
        os.fsync(file.fileno())
    partial.replace(out)
    note.unlink()
    return BatchReport(total, failed, done)


def _measure(source: Path) -> tuple[int, str]:
    """有几个请求，与文件的 sha256。"""
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return sum(1 for _ in _lines(source)), digest


def _lines(source: Path) -> Iterator[bytes]:
    """不空的各行；太长的只留开头，交给后面拒绝。"""
    with source.open("rb") as file:
        while line := file.readline(MAX_LINE + 1):
            whole = line
            while len(whole) > MAX_LINE and not whole.endswith(b"\n"):
                whole = file.readline(MAX_LINE + 1)
                if not whole:
                    break
            if line.strip():
                yield line


def _resumed(partial: Path, note: Path, identity: Mapping[str, str], source: Path) -> tuple[int, int]:
    """上一次做完了几行、其中失败的几行；写了一半的截掉。"""
    if not partial.exists():
        return 0, 0
    try:
        same = json.loads(note.read_bytes()) == identity
    except (OSError, ValueError):
        same = False
    if not same:
        raise DsxError(
            "DSX-E750",
            f"{partial} 是上一次没做完的，可那时的输入或模型不是现在的（{source}）",
            "加 --overwrite 从头做，或换一个 -o",
        )
    done = failed = good = 0
    with partial.open("r+b") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break
            done, good = done + 1, good + len(line)
            failed += _is_failure(json.loads(line))
        file.truncate(good)
    return done, failed


async def _answer_all(
    lines: Iterator[tuple[int, bytes]], call: Call, concurrency: int, file: BinaryIO, progress: Progress
) -> int:
    """同时做几个，按次序写；返回失败了几行。"""
    running: deque[asyncio.Task[dict[str, Any]]] = deque()
    free = asyncio.Semaphore(concurrency)
    failed = 0

    async def one(number: int, line: bytes) -> dict[str, Any]:
        try:
            return await _answer(number, line, call)
        finally:
            free.release()

    async def write_first() -> None:
        nonlocal failed
        answer = await running.popleft()
        file.write(json.dumps(answer, ensure_ascii=False).encode("utf-8", "replace") + b"\n")
        file.flush()
        failed += _is_failure(answer)
        progress.advance(1, answer["custom_id"] or answer["id"])

    try:
        for number, line in lines:
            await free.acquire()
            running.append(asyncio.create_task(one(number, line)))
            while running and (running[0].done() or len(running) >= concurrency * _AHEAD):
                await write_first()
        while running:
            await write_first()
    finally:
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
    return failed


async def _answer(number: int, line: bytes, call: Call) -> dict[str, Any]:
    """一行的答案。"""
    custom_id: str | None = None
    answer: dict[str, Any] = {"id": f"batch_req_{number}", "custom_id": None, "response": None, "error": None}
    try:
        request = _parsed(line)
        answer["custom_id"] = custom_id = request["custom_id"]
        url, body = _checked(request)
    except _RefusedError as refused:
        return {**answer, "error": {"code": refused.code, "message": refused.message}}
    for left in reversed(range(_RETRIES)):
        status, said = await call(url, body)
        if status != 503 or not left:
            break
        await asyncio.sleep(_RETRY_S)
    response = {"status_code": status, "request_id": f"{answer['id']}", "body": json.loads(said)}
    return {**answer, "custom_id": custom_id, "response": response}


def _parsed(line: bytes) -> dict[str, Any]:
    if len(line) > MAX_LINE:
        raise _RefusedError("line_too_long", f"一行至多 {MAX_LINE} 字节")
    try:
        request = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise _RefusedError("invalid_json", f"不是合法的 JSON：{error}") from error
    if not isinstance(request, dict) or not isinstance(request.get("custom_id"), str):
        raise _RefusedError("invalid_line", "要是 JSON 对象，custom_id 要是字符串")
    return request


def _checked(request: Mapping[str, Any]) -> tuple[str, bytes]:
    method, url, body = (request.get(key) for key in ("method", "url", "body"))
    if method != "POST" or url not in URLS:
        raise _RefusedError("invalid_url", f"只做 POST {'、'.join(URLS)}，这里是 {method} {url}")
    if not isinstance(body, dict):
        raise _RefusedError("invalid_body", "body 要是 JSON 对象")
    if body.get("stream"):
        raise _RefusedError("invalid_body", "批里不能流式：去掉 stream")
    return url, json.dumps(body).encode()


def _is_failure(answer: Mapping[str, Any]) -> bool:
    response = answer["response"]
    return response is None or response["status_code"] >= 400
