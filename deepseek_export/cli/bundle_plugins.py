"""``dsx doctor OUT``：bundle 的每个插件节点、需要的 creator、是否登记得上、缺什么。"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from deepseek_export.cli.console import console, facts, table
from deepseek_export.engine.flavour import FLAVOURS, library_folder, library_link_missing, load
from deepseek_export.errors import DsxError
from deepseek_export.ops.table import DOMAIN, PLUGIN_NAMESPACE, PLUGIN_VERSION


def diagnose_bundle(path: Path) -> dict[str, Any]:
    """读 manifest 与图；不加载权重。

    目标不是 TensorRT 的图里没有插件节点。图不能直接建引擎的，已经另导出过就看那一份（``derived``），没有就说为什么（``reason``），
    检查点不在、换了、改过的另说 ``dsx build`` 会怎样拒绝（``refusal``）。

    Raises:
        DsxError: ``DSX-E402`` 不是 bundle 或缺文件；``DSX-E403`` manifest 读不了；``DSX-E406`` 文件大小或内容不对。
    """
    import onnx
    from google.protobuf.message import DecodeError

    from deepseek_export.bundle import Bundle
    from deepseek_export.bundle.source import open_source
    from deepseek_export.bundle.weights import open_referenced
    from deepseek_export.engine.derived import existing_derived, unbuildable_reason
    from deepseek_export.engine.plugins import PLUGIN_OPS
    from deepseek_export.records import TENSORRT_TARGETS

    bundle = Bundle.open(path)
    reason, refusal, derived = unbuildable_reason(bundle.manifest), None, None
    try:
        if reason is not None and (derived := existing_derived(bundle)) is None:
            open_source(bundle, None, "--checkpoint")
        elif (derived or bundle).manifest.weights.mode == "reference":
            open_referenced(derived or bundle)
    except DsxError as error:
        refusal = {"code": error.code, "what": error.what, "todo": error.todo}
    bundle = derived or bundle
    path, manifest = bundle.path, bundle.manifest
    plugins = {spec.name for spec in PLUGIN_OPS} if manifest.target in TENSORRT_TARGETS else set()
    nodes = []
    for graph in manifest.graphs:
        file = path / graph.file
        try:
            model = onnx.load(file, load_external_data=False)
        except DecodeError as error:
            raise DsxError(
                "DSX-E406", f"{file} 不是 ONNX：{error}", "文件损坏：重新拷贝或重新导出"
            ) from error
        bodies = {function.name for function in model.functions}
        for node in model.graph.node:
            if node.domain == DOMAIN and node.op_type in plugins:
                nodes.append(
                    {
                        "graph": graph.file,
                        "node": node.name,
                        "creator": f"{PLUGIN_NAMESPACE}::{node.op_type}/{PLUGIN_VERSION}",
                        "function_body": node.op_type in bodies,
                        "op": node.op_type,
                    }
                )
    flavours = {name: _flavour(name) for name in FLAVOURS}
    for node in nodes:
        node["registered"] = {
            name: node["op"] in found["creators"] for name, found in flavours.items() if found["version"]
        }
    missing = _missing(flavours)
    unregistered = [node["node"] for node in nodes if not all(node["registered"].values())]
    return {
        "ok": not (missing or unregistered or refusal or any(f["problem"] for f in flavours.values())),
        "path": str(path),
        "target": manifest.target,
        "dtype": manifest.dtype,
        "reason": reason,
        "derived": derived is not None,
        "refusal": refusal,
        "nodes": nodes,
        "flavours": flavours,
        "engines": _engines(path),
        "missing": missing,
    }


def _flavour(name: str) -> dict[str, Any]:
    """一种发行：版本、登记上的 creator、出了什么问题。"""
    flavour = FLAVOURS[name]
    found: dict[str, Any] = {
        "version": flavour.version(),
        "install": flavour.install,
        "creators": [],
        "problem": None,
        "link_repaired": False,
    }
    if found["version"] is None:
        return found
    repaired = library_link_missing(library_folder()) if name == "rtx" else False
    try:
        from deepseek_export.engine.plugins import registered_creators

        found["creators"] = sorted(registered_creators(load(flavour)))
    except DsxError as error:
        found["problem"] = f"{error.code} {error.what}"
    found["link_repaired"] = repaired and found["problem"] is None
    return found


def _engines(path: Path) -> list[dict[str, Any]]:
    """建好的引擎，照 ``engine.json`` 写的；读不了的说明原因。"""
    from deepseek_export.engine.record import RECORD_FILE, EngineRecord

    found = []
    for file in sorted(path.glob(f"engines/*/{RECORD_FILE}")):
        one: dict[str, Any] = {"directory": file.parent.name, "version": None, "plans": [], "problem": None}
        try:
            record = EngineRecord.read(file.parent)
            one |= {"version": record.version, "plans": sorted(record.plans)}
        except DsxError as error:
            one["problem"] = f"{error.code} {error.what}"
        found.append(one)
    return found


def _missing(flavours: dict[str, Any]) -> list[str]:
    """缺的东西，每行带安装命令。"""
    lines = []
    if not any(found["version"] for found in flavours.values()):
        commands = " 或 ".join(found["install"] for found in flavours.values())
        lines.append(f"没有安装任何一种 TensorRT，建不了引擎：{commands}")
    try:
        import triton as _triton  # noqa: F401  只看装没装
    except ImportError:
        lines.append("没有 triton，编译不了插件的 kernel：pip install -U 'deepseek-export[kernels]'")
    return lines


def print_bundle(found: dict[str, Any]) -> None:
    """印成两张表。"""
    out = console()
    rows = []
    for name, flavour in found["flavours"].items():
        state = f"{flavour['version']}，登记了 {'、'.join(flavour['creators']) or '—'}"
        if flavour["version"] is None:
            state = f"没有安装：{flavour['install']}"
        elif flavour["problem"]:
            state = f"{flavour['version']}，{flavour['problem']}"
        elif flavour["link_repaired"]:
            state += "；刚补上缺少的符号链接 libtensorrt_rtx.so"
        rows.append((FLAVOURS[name].module, state))
    engines = [
        f"{e['directory']}（{e['problem'] or e['version'] + '：' + '、'.join(e['plans'])}）"
        for e in found["engines"]
    ]
    rows.append(("引擎", "；".join(engines) or "还没有，用 dsx build 建"))
    rows += [("缺少", line) for line in found["missing"]]
    if found["reason"]:
        state = "看的是由检查点另导出的这一份"
        if not found["derived"]:
            state = "dsx build 先由检查点另导出一份" + ("" if found["nodes"] else "，那时才有插件节点")
        rows.append(("原来的图", f"{found['reason']}；{state}"))
    if refusal := found["refusal"]:
        rows += [("建不了引擎", f"{refusal['code']} {refusal['what']}"), ("怎么办", refusal["todo"])]
    out.print()
    out.print(facts(f"{found['path']}（{found['target']}，{found['dtype']}）", rows))
    if not found["nodes"]:
        return
    out.print()
    made = table("插件节点", "图", "节点", "creator", "登记", "函数体", optional=("函数体", "图"))
    for node in found["nodes"]:
        registered = "、".join(f"{name} {'有' if on else '没有'}" for name, on in node["registered"].items())
        made.add_row(
            node["graph"],
            node["node"],
            node["creator"],
            registered or "-",
            "有" if node["function_body"] else "没有",
        )
    out.print(made)
