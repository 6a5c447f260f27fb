"""``dsx serve``：真的进程、真的信号；docs/serve.md 里的每一行。"""

from __future__ import annotations

import json
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import psutil
import pytest

from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.disk_cache import home as cache_home
from tests.integration.cli import assert_refused, dsx, environment
from tests.serving_http import events

pytestmark = pytest.mark.integration

GUIDE = Path(__file__).resolve().parents[2] / "docs/serve.md"
#: 服务停下之后说它导入了哪些编译用的包。
_SERVE = """
import sys
from deepseek_export.cli.main import main
try:
    main(sys.argv[1:])
finally:
    print([name for name in ("torch", "onnx", "transformers") if name in sys.modules])
"""


def linked_home(folder: Path) -> Path:
    """空的 ``DSX_HOME``；捕获的缓存与别的测试共用，省去每次十几秒。"""
    traces = cache_home() / "traces"
    traces.mkdir(parents=True, exist_ok=True)
    home = folder / "home"
    home.mkdir()
    (home / "traces").symlink_to(traces)
    return home


@contextmanager
def serving(
    trained_bundle: Path | None, *options: str, in_background: bool = False, **extra: str
) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """一个就绪了的服务进程，与它的地址；``in_background``：像脚本用 ``&`` 起的，继承的是忽略 SIGINT。"""
    given = [] if trained_bundle is None else [str(trained_bundle)]
    command = [sys.executable, "-c", _SERVE, "serve", *given, "--port", "0", "--threads", "1", *options]
    interrupts = signal.SIG_IGN if in_background else signal.SIG_DFL
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(**extra),
        preexec_fn=lambda: signal.signal(signal.SIGINT, interrupts),
    )
    try:
        assert process.stderr is not None
        seen = process.stderr.readline()
        url = re.search(r"http://\S+:\d+", seen)
        assert url is not None, seen + process.stderr.read()
        lines = iter(process.stderr.readline, "")
        assert any("就绪" in line for line in lines)
        yield process, url[0]
    finally:
        process.kill()
        process.communicate()


def stopped(process: subprocess.Popen[str], code: int = 143) -> str:
    """等它停下：退出码对，没有导入编译用的包；返回 stderr 余下的。"""
    out, err = process.communicate(timeout=60)
    assert process.returncode == code, err
    assert out == "[]\n"
    assert "Traceback" not in err
    return err


def test_every_line_of_the_guide_runs(trained_bundle: Path):
    """SERVE-20：命令、curl、openai 客户端。"""
    text = GUIDE.read_text(encoding="utf-8")
    shell = "".join(re.findall(r"^```bash\n(.*?)^```", text, re.MULTILINE | re.DOTALL)).splitlines()
    scripts = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    install, start, *curls = shell
    assert install == "pip install 'deepseek-export[serve]'"
    assert start == "dsx serve OUT --port 8000"
    with serving(trained_bundle) as (process, url):
        for line in curls:
            command = shlex.split(line.replace("http://127.0.0.1:8000", url))
            assert command[0] == "curl"
            done = subprocess.run([*command, "-sSf"], capture_output=True, text=True, check=False)
            assert done.returncode == 0, (line, done.stderr)
            if "-N" in command:
                assert events(done.stdout)
            else:
                assert json.loads(done.stdout)
        outputs = []
        for script in scripts:
            script = script.replace("http://127.0.0.1:8000", url)
            done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
            outputs.append(done.stdout)
        assert outputs[0] == "子曰：“君子不学，不仁者不可得而不礼。”\n"
        assert set(json.loads(outputs[1])) == {"name", "age"}
        process.send_signal(signal.SIGTERM)
        stopped(process)


def test_the_readme_goes_from_a_checkpoint_to_curl(tmp_path: Path):
    """SERVE-52：README 里的四行，除了安装，原样在 shell 里跑。"""
    readme = (GUIDE.parents[1] / "README.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```text\n(pip install.*?)^```", readme, re.MULTILINE | re.DOTALL)
    install, script = block.split("\n", 1)
    assert install == "pip install -c constraints.txt -e '.[export,serve]'"
    shutil.copytree(CHECKPOINT, tmp_path / "CKPT")
    home = linked_home(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    script = script.replace("8000", port).replace("dsx serve CKPT", f"dsx serve CKPT --port {port}", 1)
    shell = (
        f'dsx() {{ exec "{sys.executable}" -m deepseek_export "$@"; }}\n{script}\nkill %1\nwait %1\nexit $?'
    )
    done = subprocess.run(
        ["bash", "-mc", shell],
        cwd=tmp_path,
        env=environment(DSX_HOME=str(home)),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 143, done.stderr
    chunks = events(done.stdout)
    assert "".join(chunk["choices"][0]["delta"].get("content", "") for chunk in chunks)


def test_the_first_sigterm_lets_what_is_running_finish(trained_bundle: Path):
    """SERVE-27：手上的答完，新的连不上。"""
    body = {"prompt": "And", "max_tokens": 400, "ignore_eos": True, "stream": True}
    with serving(trained_bundle) as (process, url), httpx.Client(timeout=60) as client:
        with client.stream("POST", f"{url}/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            got = [next(lines)]
            process.send_signal(signal.SIGTERM)
            assert process.stderr is not None
            while "收到 SIGTERM" not in process.stderr.readline():
                pass
            got += list(lines)
        chunks = events("\n".join(got) + "\n")
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"
        err = stopped(process)
        assert "new=400 finish=length" in err
        with pytest.raises(httpx.ConnectError):
            client.get(f"{url}/health")


def test_the_second_sigterm_stops_at_once(trained_bundle: Path):
    """SERVE-27：没有做完的流以错误的事件结束，不是断掉。"""
    # 八个 slot，十六个回答：再快的机器也要几秒。
    body = {"prompt": "And", "max_tokens": 2000, "n": 16, "ignore_eos": True, "stream": True}
    with serving(trained_bundle) as (process, url), httpx.Client(timeout=60) as client:
        with client.stream("POST", f"{url}/v1/completions", json=body) as stream:
            lines = stream.iter_lines()
            got = [next(lines)]
            process.send_signal(signal.SIGTERM)
            assert process.stderr is not None
            while "收到 SIGTERM" not in process.stderr.readline():
                pass
            process.send_signal(signal.SIGTERM)
            got += list(lines)
        assert events("\n".join(got) + "\n")[-1]["error"]["code"] == "shutting_down"
        assert "finish=error" in stopped(process)


@pytest.mark.parametrize(("times", "in_background"), [(1, False), (2, False), (1, True)])
def test_ctrl_c(trained_bundle: Path, times: int, in_background: bool):
    """SERVE-27：没有请求时，一次、两次都停得干净；从脚本的后台起的也一样。"""
    with serving(trained_bundle, in_background=in_background) as (process, _):
        for _ in range(times):
            process.send_signal(signal.SIGINT)
        assert stopped(process, 130).splitlines()[-1] == "已中断"


def test_several_models_from_the_command_line(trained_bundle: Path):
    """SERVE-53：OUT 与 ``--model`` 都列出来，各答各的。"""
    with (
        serving(trained_bundle, "--name", "one", "--model", f"two={trained_bundle}") as (process, url),
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        names = [card["id"] for card in client.get("/v1/models").json()["data"]]
        assert names == ["one", "two"]
        texts = set()
        for name in names:
            body = {"model": name, "prompt": "春", "temperature": 0, "max_tokens": 8}
            texts.add(client.post("/v1/completions", json=body).json()["choices"][0]["text"])
        assert len(texts) == 1
        process.send_signal(signal.SIGTERM)
        assert "model=two" in stopped(process)


def test_the_memory_of_the_cache_is_bounded(trained_bundle: Path, tmp_path: Path):
    """SERVE-6：``--cache-bytes`` 放得下几行就有几行，多于 ``--slots`` 的留着前缀；一行多长由 ``--context`` 定。"""
    options = ("--slots", "2", "--context", "256", "--cache-bytes", "8MiB", "--slot-save-path", str(tmp_path))
    with serving(trained_bundle, *options) as (process, url):
        slots = httpx.get(f"{url}/slots").json()
        (line,) = re.findall(
            r"^dsx:kv_cache_bytes\{.*\} (\S+)$", httpx.get(f"{url}/metrics").text, re.MULTILINE
        )
        assert len(slots) > 2
        assert float(line) <= 8 << 20 < float(line) * (len(slots) + 1) / len(slots)
        body = {"prompt": "月" * 300, "max_tokens": 1}
        assert httpx.post(f"{url}/v1/completions", json=body).status_code == 400
        process.send_signal(signal.SIGTERM)
        stopped(process)


def test_a_checkpoint_is_served(tmp_path: Path):
    """SERVE-52：一条命令从检查点到服务；名字是检查点的目录名。"""
    checkpoint = tmp_path / "CKPT"
    shutil.copytree(CHECKPOINT, checkpoint)
    home = linked_home(tmp_path)
    with serving(checkpoint, DSX_HOME=str(home)) as (_, url):
        assert httpx.get(f"{url}/v1/models").json()["data"][0]["id"] == "CKPT"
        body = {"prompt": "春", "max_tokens": 4}
        assert httpx.post(f"{url}/v1/completions", json=body, timeout=60).status_code == 200
    with serving(checkpoint, DSX_HOME=str(home)) as (process, url):
        assert httpx.get(f"{url}/health").status_code == 200
        process.send_signal(signal.SIGTERM)
        stopped(process)  # 现成的那一份，不要编译的依赖


def test_stopping_during_the_export_leaves_nothing(tmp_path: Path):
    """SERVE-27、SERVE-52：导出到一半也停得下来，退出码照旧，没有留下子进程与写了一半的。"""
    home = tmp_path / "home"
    shutil.copytree(CHECKPOINT, tmp_path / "CKPT")
    process = subprocess.Popen(
        [sys.executable, "-c", _SERVE, "serve", str(tmp_path / "CKPT"), "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(DSX_HOME=str(home)),
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "捕获计算图" in line:  # 没有缓存，要好几秒
            break
    children = psutil.Process(process.pid).children(recursive=True)
    assert children
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    _, alive = psutil.wait_procs(children, timeout=60)
    assert not alive
    assert not (home / "bundles").exists() or not list((home / "bundles").iterdir())


def test_refusals(trained_bundle: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch):
    """SERVE-26、SERVE-27、SERVE-52、SERVE-53：按码拒绝，没有 traceback。"""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert_refused(dsx("serve", trained_bundle, "--port", port), "DSX-E731")
    assert_refused(dsx("serve", trained_bundle, "--host", "no-such-host.invalid"), "DSX-E731")
    assert_refused(dsx("serve", trained_bundle, "--api-key-file", tmp_path / "none"), "DSX-E730")
    assert_refused(dsx("serve", tmp_path / "none", "--port", 0), "DSX-E402")
    assert_refused(dsx("serve", tiny_bundle, "--port", 0), "DSX-E514")
    assert_refused(dsx("serve", trained_bundle, "--port", 0, "--cache-bytes", "1KiB"), "DSX-E532")
    assert_refused(dsx("serve", trained_bundle, "--port", 0, "--context", 1 << 30), "DSX-E532")
    for wrong in ("2XiB", "", "-1", "0", "2000TiB"):
        refused = dsx("serve", trained_bundle, "--port", 0, "--cache-bytes", wrong)
        assert refused.returncode != 0
        assert "2GiB、500MB" in refused.stderr
    for wrong in (
        (),
        ("--model", "x"),
        ("--model", "=OUT"),
        ("--model", "x="),
        ("--name", "x"),
        ("--name", "x", "--model", "y=OUT"),
        ("--model", "x=OUT", "--model", "x=OUT2"),
        (trained_bundle, "--name", "x", "--model", "x=OUT"),
    ):
        assert_refused(dsx("serve", "--port", 0, *wrong), "DSX-E733")
    assert_refused(dsx("serve", trained_bundle, "--port", 0, "--quant", "int8"), "DSX-E732")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    refused = dsx("serve", trained_bundle)
    assert_refused(refused, "DSX-E721")
    assert "uvicorn" in refused.stderr
    assert "deepseek-export[serve]" in refused.stderr
    assert dsx("serve", "--help").returncode == 0
