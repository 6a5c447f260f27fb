"""部署的样例：没有 docker、Kubernetes、Grafana 也核对得了的都核对。"""

from __future__ import annotations

import configparser
import json
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
import yaml

from deepseek_export.cli.main import cli
from tests.integration.cli import assert_refused, dsx, last_json
from tests.serving_http import NAME, Running, loader

pytestmark = pytest.mark.integration

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "deploy"
DOCKERFILES = ("Dockerfile", "Dockerfile.gpu")


@pytest.fixture(scope="module")
def running(trained_bundle: Path) -> Iterator[Running]:
    """开着的服务，答过一个请求。"""
    with Running(loader(trained_bundle)) as one:
        one.post("/v1/completions", {"prompt": "春", "max_tokens": 4})
        yield one


def parsed(argv: list[str]) -> dict[str, Any]:
    """``dsx`` 认得这条命令；给出各个选项的值。"""
    name, *rest = argv
    assert name == "serve"
    with click.Context(cli, info_name="dsx") as parent:
        command = cli.get_command(parent, name)
        assert command is not None
        return command.make_context(name, rest, parent=parent).params


def instructions(name: str) -> list[tuple[str, str]]:
    """Dockerfile 的各条指令；续行接起来，注释去掉。"""
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = [line for line in text.splitlines() if line.strip() and not line.lstrip().startswith("#")]
    joined = "\n".join(lines).replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in joined.splitlines())]


@pytest.mark.parametrize("name", DOCKERFILES)
def test_dockerfiles_name_what_exists(name: str, running: Running):
    """SERVE-55：COPY 的都在、都没有被 .dockerignore 挡住；extras 有；不以 root 跑；命令、端口、探针对得上。"""
    found = instructions(name)
    words = [word for word, _ in found]
    assert words[0] == "ARG"
    kept = {line[1:] for line in lines_of(ROOT / ".dockerignore") if line.startswith("!")}
    for word, rest in found:
        if word == "COPY":
            sources = [part.removeprefix("./") for part in rest.split()[:-1] if not part.startswith("--")]
            assert all((ROOT / source).exists() for source in sources)
            assert set(sources) <= kept
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"][
        "optional-dependencies"
    ]
    (asked,) = re.findall(r"EXTRAS=(\S+)", "\n".join(rest for word, rest in found if word == "ARG"))
    assert set(asked.split(",")) <= set(extras)
    assert {"serve"} <= set(asked.split(","))
    last = dict(found)
    assert last["USER"].isdigit()
    assert last["USER"] != "0"
    assert words.index("USER") < words.index("ENTRYPOINT")
    command = [*json.loads(last["ENTRYPOINT"]), *json.loads(last["CMD"])]
    assert command[0] == "dsx"
    options = parsed(command[1:])
    assert options["host"] == "0.0.0.0"
    assert last["EXPOSE"] == str(options["port"])
    (port, path) = re.findall(r"http://127\.0\.0\.1:(\d+)(/\w+)", last["HEALTHCHECK"])[0]
    assert port == last["EXPOSE"]
    assert running.get(path).status_code == 200


def lines_of(path: Path) -> list[str]:
    """不空的行。"""
    return [line for line in path.read_text(encoding="utf-8").splitlines() if line]


def test_the_unit_starts_what_exists():
    """SERVE-55：ExecStart 是 dsx 认得的命令；停下的退出码是 dsx 的；先 SIGTERM，留够时间。"""
    unit = configparser.ConfigParser(strict=False, interpolation=None)
    unit.optionxform = str  # type: ignore[assignment,method-assign]
    unit.read_string((DEPLOY / "dsx-serve.service").read_text(encoding="utf-8"))
    service = unit["Service"]
    program, *argv = shlex.split(service["ExecStart"])
    assert Path(program).name == "dsx"
    options = parsed(argv)
    credential = service["LoadCredential"].partition(":")[0]
    assert str(options["api_key_file"]) == f"%d/{credential}"
    assert service["SuccessExitStatus"] == "143"
    assert service["KillSignal"] == "SIGTERM"
    assert int(service["TimeoutStopSec"]) > 60
    assert service["Environment"] == f"DSX_HOME=/var/cache/{service['CacheDirectory']}"


def test_the_kubernetes_manifest_asks_what_is_answered(running: Running):
    """SERVE-55：命令、端口、探针的路径、标签、挂载都对得上。"""
    text = (DEPLOY / "kubernetes.yaml").read_text(encoding="utf-8")
    deployment, service = yaml.safe_load_all(text)
    pod = deployment["spec"]["template"]
    (container,) = pod["spec"]["containers"]
    options = parsed(container["args"])
    (port,) = container["ports"]
    assert port["containerPort"] == options["port"]
    mounts = {mount["mountPath"] for mount in container["volumeMounts"]}
    assert str(options["source"]) in mounts
    assert str(options["api_key_file"].parent) in mounts
    assert {"/cache", "/tmp"} <= mounts  # 根文件系统只读
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["spec"]["volumes"]
    }
    for name in ("startupProbe", "livenessProbe", "readinessProbe"):
        probe = container[name]
        assert probe["httpGet"]["port"] == port["name"]
        assert running.get(probe["httpGet"]["path"]).status_code == 200
        assert probe["failureThreshold"] > 1  # 失败过的引擎，下一问才知道好了没有
    assert pod["metadata"]["labels"] == deployment["spec"]["selector"]["matchLabels"]
    assert service["spec"]["selector"] == pod["metadata"]["labels"]
    assert service["spec"]["ports"][0]["targetPort"] == port["name"]
    assert pod["spec"]["securityContext"]["runAsUser"] == int(dict(instructions("Dockerfile"))["USER"])


def test_every_metric_of_the_dashboard_is_served(running: Running):
    """SERVE-55：面板、变量、文档里的指标与标签，``/metrics`` 都有；抓取的路径与格式对得上。"""
    scrape = yaml.safe_load((DEPLOY / "prometheus.yml").read_text(encoding="utf-8"))
    (job,) = scrape["scrape_configs"]
    served = running.get(job["metrics_path"]).text
    names = set(re.findall(r"^(dsx:\w+)", served, re.MULTILINE))
    labels = set(re.findall(r'[{,](\w+)="', served)) | {"le"}
    board = json.loads((DEPLOY / "grafana.json").read_text(encoding="utf-8"))
    expressions = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    queries = [one["query"]["query"] for one in board["templating"]["list"] if one["type"] == "query"]
    page = (ROOT / "docs/deploy.md").read_text(encoding="utf-8")
    used = set(re.findall(r"dsx:\w+", "\n".join([*expressions, *queries])))
    assert used <= names
    documented = set(re.findall(r"`(dsx:\w+)", page))
    families = {re.sub(r"_(bucket|count|sum)$", "", name) for name in names}
    assert documented <= families
    for expression in expressions:
        by = re.findall(r"by \(([^)]+)\)", expression)
        assert {label.strip() for part in by for label in part.split(",")} <= labels
        assert set(re.findall(r"(\w+)=~", expression)) <= labels
        assert expression.count("(") == expression.count(")")
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    assert f'model_name="{NAME}"' in served


def test_pack_for_triton_from_the_command_line(trained_bundle: Path, tmp_path: Path):
    """SERVE-56：说明写在哪里、Triton 不做什么；选项没有配 --triton 的拒绝；OUT 不变。"""
    before = sorted(path for path in trained_bundle.rglob("*"))
    repository = tmp_path / "models"
    done = dsx("pack", trained_bundle, "--triton", repository, "--name", "v3", "--context", "256")
    assert done.returncode == 0, done.stderr
    assert "Triton 不做的" in done.stdout
    assert f"tritonserver --model-repository {repository}" in done.stdout
    again = dsx("pack", trained_bundle, "--triton", repository, "--name", "v3", "--overwrite", "--json")
    assert last_json(again)["context"] == 2048
    assert sorted(path for path in trained_bundle.rglob("*")) == before
    assert_refused(dsx("pack", trained_bundle, "--name", "v3", "--overwrite"), "DSX-E734")
    assert_refused(dsx("pack", trained_bundle, "--triton", repository, "--name", "v3"), "DSX-E401")
