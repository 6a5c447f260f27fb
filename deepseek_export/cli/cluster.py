"""``dsx cluster status``。"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import click

from deepseek_export.cli.console import console, echo_json, table
from deepseek_export.cli.formatting import Command, Group
from deepseek_export.cli.options import json_option
from deepseek_export.units import size

_SAID = {
    "running": "在跑",
    "stopped": "停着",
    "starting": "正在起",
    "ended": "结束了",
    "silent": "没有回答",
    "gone": "actor 没有了",
}


@click.group("cluster", cls=Group, short_help="看各个 stage、副本在哪里、怎样了")
def command() -> None:
    """看分给几个进程、几台机器的模型。"""


@command.command("status", cls=Command, short_help="占着什么、在哪里、怎样了")
@click.option(
    "--ray",
    metavar="ADDRESS",
    help="也看 Ray 上的：auto 是已经在跑的那个，或 HOST:PORT；缺省只看本机的进程。",
)
@json_option
def status(ray: str | None, as_json: bool) -> None:
    """列出本机上的 stage 进程；给了 --ray，另列 Ray 上的机器、占着的位置、各个 stage 与副本。

    只看，不碰。连不上 Ray 限时报错；哪个 stage 在限时之内没有回答，照实写着。

    \b
    例：
      dsx cluster status
      dsx cluster status --ray auto --json
    """
    from deepseek_export.cluster.status import local_stages, ray_status

    found: dict[str, Any] = {"local": local_stages(), "ray": None if ray is None else ray_status(ray)}
    if as_json:
        echo_json(found)
        return
    _print_local(found["local"])
    if found["ray"] is not None:
        _print_ray(found["ray"])


def _print_local(stages: list[dict[str, Any]] | None) -> None:
    if not stages:
        click.echo("本机上没有 stage 进程" if stages is not None else "这个系统看不到本机的 stage 进程")
        return
    shown = table("本机上的 stage", "目录", "第几个", "进程", "起它的", "怎样", "内存", right=("内存",))
    for one in stages:
        memory = "" if one["resident"] is None else size(one["resident"])
        place = f"{one['index']}/{one['count']}"
        shown.add_row(one["bundle"], place, str(one["pid"]), str(one["parent"]), _SAID[one["state"]], memory)
    console().print(shown)


def _print_ray(found: Mapping[str, Any]) -> None:
    hosts = {node["id"]: f"{node['host']}（{node['address']}）" for node in found["nodes"]}
    nodes = table("Ray 的机器", "机器", "怎样", "资源")
    for node in found["nodes"]:
        alive = "在" if node["alive"] else "不在了"
        nodes.add_row(hosts[node["id"]], alive, _amounts(node["resources"]))
    console().print(nodes)
    click.echo(f"还剩：{_amounts(found['free']) or '没有'}")
    groups = table("占着的位置", "名字", "怎样", "第几份", "资源", "机器")
    for group in found["groups"]:
        for number, bundle in enumerate(group["bundles"]):
            where = hosts.get(bundle["node"], "还没有占到")
            wanted = _amounts(bundle["resources"])
            groups.add_row(group["name"], group["state"], str(number), wanted, where)
    stages = table("Ray 上的 stage", "哪一套", "第几个", "目录", "机器", "进程", "怎样")
    for one in found["stages"]:
        said = one.get("ended") or _SAID[one["state"]]
        place = f"{one['index']}/{one['count']}" if one.get("count") else str(one["index"])
        where, pid = hosts.get(one.get("node", ""), ""), str(one.get("pid") or "")
        stages.add_row(one["gang"], place, one.get("bundle") or "", where, pid, said)
    replicas = table("副本", "模型", "部分", "怎样", "各几个")
    for one in found["replicas"]:
        states = "、".join(f"{state} {count}" for state, count in sorted(one["states"].items()) if count)
        replicas.add_row(one["application"], one["deployment"], one["status"], states)
    for shown, empty in ((groups, "没有占着的位置"), (stages, "没有 stage"), (replicas, "没有副本")):
        if shown.row_count:
            console().print(shown)
        else:
            click.echo(empty)


def _amounts(resources: Mapping[str, float]) -> str:
    return " ".join(
        f"{key} {size(int(value)) if key == 'memory' else f'{value:g}'}" for key, value in resources.items()
    )
