"""一步的进程：``python -m perf.gpu.phase NAME FOLDER``，由 :mod:`perf.gpu.accept` 启动；``probe`` 只问有没有卡。

每做完一项就写一行。内存不够的一项跳过或记下，别的照做。
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from perf.gpu import lines
from perf.gpu.phases import PHASES, Item, Row

#: 空着的显存用到几成为止：驱动与 torch 还要一些。
_USABLE = 0.92


def main(name: str, folder: Path) -> int:
    """做一步的各项；有一项不成，退出码是 1。"""
    from perf.gpu.card import Card

    if name == "probe":
        missing = Card.missing()
        print(missing or "", end="")
        return 0 if missing is None else 1
    phase = next(phase for phase in PHASES if phase.name == name)
    card, failed = Card(), False
    on = card.facts()["card"]
    for item in phase.items(card, folder):
        row = _row(card, item)
        failed |= row["status"] == "failed"
        lines.append(folder / lines.ROWS, {"phase": name, "on": on, **row})
        print(f"{row['status']}  {item.name}  {row.get('detail', '')}", flush=True)
    return int(failed)


def _row(card, item: Item) -> Row:
    began, about = time.monotonic(), {"item": item.name, **(item.about or {})}
    free = card.free()
    if item.needs > free * _USABLE:
        detail = f"要 {item.needs / 1e9:.1f} GB 显存，空着 {free / 1e9:.1f} GB"
        return {**about, "status": "skipped", "detail": detail}
    try:
        found = item.work()
    except Exception as error:  # 一项的错不妨碍下一项；进程没了由启动它的一方记
        text = str(error).strip().splitlines() or [""]
        found = {"ok": False, "detail": f"{type(error).__name__}：{text[0]}"}
    status = "ok" if found.pop("ok", True) else "failed"
    return {**about, "status": status, "elapsed": round(time.monotonic() - began, 3), **found}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
