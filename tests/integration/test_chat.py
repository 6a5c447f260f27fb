"""``dsx chat``：管道里、真的终端里；由检查点开始。"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from deepseek_export.bundle import Bundle
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.disk_cache import home as cache_home
from tests.integration.cli import DSX, assert_refused, dsx_process, environment

pytestmark = pytest.mark.integration


def chat(source: Path, text: str | bytes, *options: str, **extra: str) -> subprocess.CompletedProcess[str]:
    """问题从管道来。"""
    content = text if isinstance(text, bytes) else text.encode()
    command = [*DSX, "chat", str(source), "--threads", "1", *options]
    done = subprocess.run(
        command, input=content, capture_output=True, timeout=300, env=environment(**extra), check=False
    )
    return subprocess.CompletedProcess(command, done.returncode, done.stdout.decode(), done.stderr.decode())


def test_questions_from_a_pipe(trained_bundle: Path):
    """SERVE-51：stdout 上只有回答；空行不算，命令不是问题，几行可以是一问。"""
    lines = '《论语》\n\n/stats\n/reset\n"""\n《论语》\n"""\n/what\n//stats\n'
    done = chat(trained_bundle, lines, "--max-new-tokens", "24")
    assert done.returncode == 0, done.stderr
    first, second, third = done.stdout.split("\n\n")
    assert first == second == "子曰：“君子不学，不仁者不可得而不礼。”"
    assert third.strip()
    assert "现成" in done.stderr
    assert "没有命令 /what" in done.stderr
    assert "/reset" in done.stderr
    left = chat(trained_bundle, "春\n/exit\n秋\n", "--max-new-tokens", "4")
    assert left.returncode == 0
    assert "\n\n" not in left.stdout


def test_sampling_is_as_in_generate(trained_bundle: Path):
    """SERVE-51：同样的选项，同样的文本。"""
    options = ("--temperature", "0.8", "--top-k", "20", "--top-p", "0.9", "--seed", "5")
    options += ("--max-new-tokens", "16", "--ignore-eos", "--stop", "。")
    said = chat(trained_bundle, "明月", *options)
    want = dsx_process("generate", trained_bundle, "-P", "明月", "--chat", "--threads", "1", *options)
    assert said.returncode == want.returncode == 0
    assert said.stdout == want.stdout


def test_refusals(trained_bundle: Path, tiny_bundle: Path, tmp_path: Path):
    """SERVE-51：按码拒绝，没有 traceback。"""
    assert_refused(chat(tiny_bundle, "x"), "DSX-E514")
    assert_refused(chat(tmp_path / "none", "x"), "DSX-E402")
    assert_refused(chat(trained_bundle, b"\xff\xfe\n"), "DSX-E702")
    assert_refused(chat(trained_bundle, "长" * 3000), "DSX-E511")
    assert_refused(chat(trained_bundle, "x", "--temperature", "-1"), "DSX-E504")
    refused = chat(trained_bundle, "x", "-p", "full", "--set", "mla.form=naive")
    assert_refused(refused, "DSX-E732")
    assert "--profile、--set" in refused.stderr


class Terminal:
    """一个伪终端里的 ``dsx chat``。"""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process, self._descriptor = process, descriptor
        self.shown = ""
        self._seen = 0
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        while True:
            try:
                content = os.read(self._descriptor, 4096)
            except OSError:  # 对面都关上了
                return
            self.shown += content.decode(errors="replace")

    def wait(self, text: str) -> None:
        """等到新印出来的里面有 ``text``。"""
        deadline = time.monotonic() + 60
        while text not in self.shown[self._seen :]:
            assert time.monotonic() < deadline, self.shown
            time.sleep(0.01)
        self._seen = self.shown.index(text, self._seen) + len(text)

    def type(self, text: str) -> None:
        """敲键。"""
        os.write(self._descriptor, text.encode())


@contextmanager
def terminal(source: Path, *options: str) -> Iterator[Terminal]:
    """开着的终端。"""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [*DSX, "chat", str(source), "--threads", "1", *options],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(TERM="dumb", COLUMNS="100"),
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def test_ctrl_c_stops_an_answer_without_leaving(trained_bundle: Path):
    """SERVE-51：停下之后还能问；空着的时候按两次才离开。"""
    with terminal(trained_bundle, "--ignore-eos") as one:
        one.wait(">>> ")
        one.type("《论语》\r")
        one.wait("子曰")
        one.process.send_signal(signal.SIGINT)
        one.wait("停下了")
        one.wait(">>> ")
        one.type("/stats\r")
        one.wait("cancelled")
        one.wait(">>> ")
        one.process.send_signal(signal.SIGINT)
        one.wait("再按一次")
        one.wait(">>> ")
        one.process.send_signal(signal.SIGINT)
        assert one.process.wait(30) == 130


def test_a_terminal_survives_a_question_that_is_too_long(trained_bundle: Path):
    """SERVE-51：说明原因，上文不变；几行的一问；Ctrl-D 离开。"""
    with terminal(trained_bundle, "--max-new-tokens", "8") as one:
        one.wait(">>> ")
        one.type('"""\r')
        for _ in range(4):
            one.wait("... ")
            one.type("long " * 400 + "\r")
        one.wait("... ")
        one.type('"""\r')
        one.wait("DSX-E511")
        one.wait(">>> ")
        one.type("春\r")
        one.wait("到了上限")
        one.wait(">>> ")
        one.type("\x04")
        assert one.process.wait(30) == 0


def test_it_needs_neither_fastapi_nor_a_compiler(trained_bundle: Path):
    """SERVE-51"""
    script = (
        "import sys\n"
        "from deepseek_export.cli.main import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "finally:\n    print([n for n in ('torch', 'onnx', 'fastapi', 'uvicorn') if n in sys.modules])\n"
    )
    command = [sys.executable, "-c", script, "chat", str(trained_bundle), "--max-new-tokens", "2"]
    done = subprocess.run(
        command, input="春\n", capture_output=True, text=True, env=environment(), check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("[]\n")


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """演示检查点的副本：按引用导出要硬链接，得在同一个文件系统上。"""
    folder = tmp_path / "CKPT"
    folder.mkdir()
    for file in CHECKPOINT.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """空的 ``DSX_HOME``；捕获的缓存与别的测试共用，省去每次十几秒。"""
    traces = cache_home() / "traces"
    traces.mkdir(parents=True, exist_ok=True)
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "traces").symlink_to(traces)
    return folder


def exported(home: Path) -> list[Path]:
    """缓存着的 bundle。"""
    return sorted(path for path in (home / "bundles").iterdir() if not path.name.startswith("."))


def test_a_checkpoint_is_exported_once(checkpoint: Path, home: Path):
    """SERVE-52：按引用；再来直接用，那时不要编译的依赖；两个同时来也只导出一次。"""
    answers: list[subprocess.CompletedProcess[str]] = []

    def talk() -> None:
        answers.append(chat(checkpoint, "春", "--max-new-tokens", "4", DSX_HOME=str(home)))

    together = [threading.Thread(target=talk) for _ in range(2)]
    for thread in together:
        thread.start()
    for thread in together:
        thread.join()
    assert [one.returncode for one in answers] == [0, 0], [one.stderr for one in answers]
    assert answers[0].stdout == answers[1].stdout
    assert sum("由检查点导出到" in one.stderr and "链接检查点" in one.stderr for one in answers) == 1
    (out,) = exported(home)
    manifest = Bundle.open(out).manifest
    assert (manifest.weights.mode, manifest.target, manifest.profile.name) == (
        "reference",
        "ort-cpu",
        "mla+moe",
    )
    blocked = (
        "import sys\nfor name in ('torch', 'onnx', 'onnxscript'): sys.modules[name] = None\n"
        "from deepseek_export.cli.main import main\nmain(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", blocked, "chat", str(checkpoint), "--max-new-tokens", "4"]
    env = environment(DSX_HOME=str(home))
    again = subprocess.run(command, input="春", capture_output=True, text=True, env=env, check=False)
    assert again.returncode == 0, again.stderr
    assert again.stdout == answers[0].stdout
    other = subprocess.run(
        [*command, "--quant", "int8"], input="春", capture_output=True, text=True, env=env, check=False
    )
    other.stdout = ""
    assert_refused(other, "DSX-E720")  # 变了一样就要另导出一份


def test_a_damaged_copy_is_exported_again(checkpoint: Path, home: Path):
    """SERVE-52：坏了的说一声；检查点换了模板，是另一份。"""
    options = ("--max-new-tokens", "4")
    first = chat(checkpoint, "春", *options, DSX_HOME=str(home))
    assert first.returncode == 0, first.stderr
    (out,) = exported(home)
    graph = out / "model.onnx"
    graph.write_bytes(graph.read_bytes()[:-1])
    again = chat(checkpoint, "春", *options, DSX_HOME=str(home))
    assert again.returncode == 0, again.stderr
    assert "DSX-E406" in again.stderr
    assert again.stdout == first.stdout
    (checkpoint / "chat_template.jinja").write_text("{{ messages[0]['content'] }}", encoding="utf-8")
    assert chat(checkpoint, "春", *options, DSX_HOME=str(home)).returncode == 0
    assert len(exported(home)) == 2
