"""``/slots``：看每个槽，把一个槽的前缀存到文件、恢复、忘掉；字段同 llama.cpp。

文件都在启动时给的那个目录里，请求只能给名字，不能给路径。
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Literal

from fastapi import APIRouter, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from deepseek_export.errors import DsxError
from deepseek_export.serving.http.problems import ApiError, json_response
from deepseek_export.serving.http.service import ServedModel

#: ext4、NTFS 的文件名至多 255 字节；留出临时文件的后缀。
_LONGEST_NAME = 200


class SlotFile(BaseModel):
    """请求体。"""

    filename: str | None = None


def slots_router(named: Callable[[str | None], ServedModel], folder: Path | None) -> APIRouter:
    """``GET /slots`` 与 ``POST /slots/{id}?action=…``。

    Args:
        named: 按名字找模型；没有给名字就是缺省的那个。
        folder: 槽的文件放在哪里；``None`` 不许存、不许恢复。
    """
    router = APIRouter()

    @router.get("/slots")
    async def listing(model: str | None = None, fail_on_no_slot: bool = False) -> Response:
        served = named(model)
        states = await asyncio.to_thread(served.engine.slots)
        settings = served.engine.settings
        if fail_on_no_slot and sum(state.busy for state in states) >= settings.slots:
            raise ApiError(503, "没有闲着的槽", code="no_slot")
        return JSONResponse(
            [
                {
                    "id": state.id,
                    "n_ctx": settings.context,
                    "n_tokens": state.tokens,
                    "is_processing": state.busy,
                    "speculative": settings.num_drafts > 0,
                }
                for state in states
            ]
        )

    @router.post("/slots/{slot}")
    async def act(
        slot: int,
        action: Literal["save", "restore", "erase"],
        body: SlotFile | None = None,
        model: str | None = None,
    ) -> Response:
        engine, began = named(model).engine, perf_counter()
        if action == "erase":
            count = await asyncio.to_thread(engine.erase_slot, slot)
            return json_response({"id_slot": slot, "n_erased": count})
        path = _path(folder, body)
        work, done = (
            (engine.save_slot, ("n_saved", "n_written"))
            if action == "save"
            else (engine.restore_slot, ("n_restored", "n_read"))
        )
        try:
            counts = await asyncio.to_thread(work, slot, path)
        except DsxError as error:
            # 目录在哪里，客户端不必知道。
            shown = DsxError(error.code, error.what.replace(f"{path.parent}/", ""), error.todo)
            raise ApiError.of(shown, "filename") from error
        timings = {f"{action}_ms": round((perf_counter() - began) * 1e3, 3)}
        answer = {"id_slot": slot, "filename": path.name, **dict(zip(done, counts, strict=True))}
        return json_response(answer | {"timings": timings})

    return router


def _path(folder: Path | None, body: SlotFile | None) -> Path:
    """请求给的名字在 ``folder`` 里的路径。

    Raises:
        ApiError: 501，启动时没有给目录；400，没有给名字，或它不是一个名字。
    """
    if folder is None:
        raise ApiError(501, "存、恢复槽要以 --slot-save-path DIR 启动服务", code="not_supported")
    name = "" if body is None or body.filename is None else body.filename
    plain = name.isprintable() and not set(name) & set("/\\:") and not name.startswith(".")
    if not name or not plain or len(name.encode("utf-8", "replace")) > _LONGEST_NAME:
        what = f"filename 是一个文件名：不空，不带路径，不以点开头，至多 {_LONGEST_NAME} 字节"
        raise ApiError(400, what, param="filename", code="invalid_value")
    return folder / name
