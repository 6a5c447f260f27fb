"""用户会犯的错：每一种都有码、退出码 1、没有 traceback、没有半个 bundle。"""

from __future__ import annotations

import json
import os
import resource
import shlex
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from deepseek_export.checkpoint.synthetic import write_checkpoint
from tests.integration.cli import DSX, TINY, assert_refused, dsx, dsx_process, environment, last_json

pytestmark = pytest.mark.integration

WEIGHTS = "model.safetensors"
#: 没有 MoE 层，捕获最快。
DENSE = {**TINY, "first_k_dense_replace": 2}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """没有 MoE 层的最小检查点。"""
    return write_checkpoint(tmp_path_factory.mktemp("plain") / "ckpt", DENSE, dtype="float32")


@pytest.fixture(scope="module")
def wide(tmp_path_factory) -> Path:
    """词表大，写权重要花一点时间，好在中途打断。"""
    return write_checkpoint(tmp_path_factory.mktemp("wide") / "ckpt", {**DENSE, "vocab_size": 400_000})


def _config(**changes: object) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def _tensors(change: Callable[[dict[str, np.ndarray]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        save_file(tensors, directory / WEIGHTS)

    return edit


def _truncate(directory: Path) -> None:
    with (directory / WEIGHTS).open("r+b") as file:
        file.truncate(file.seek(0, os.SEEK_END) - 100)


def _put_nan(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"][2, 5] = np.nan


BROKEN = {
    "unknown model_type": (_config(model_type="llama"), "DSX-E103", "llama"),
    "unknown field": (_config(sliding_window=4096), "DSX-E104", "sliding_window"),
    "truncated file": (_truncate, "DSX-E110", WEIGHTS),
    "missing tensor": (_tensors(lambda t: t.pop("model.norm.weight")), "DSX-E111", "model.norm.weight"),
    "extra tensor": (_tensors(lambda t: t.update(mystery=np.zeros(3, np.float32))), "DSX-E112", "mystery"),
    "wrong shape": (_config(intermediate_size=40), "DSX-E113", "layers.0.mlp"),
    "broken tokenizer": (lambda d: (d / "tokenizer.json").write_text("{"), "DSX-E501", "tokenizer.json"),
    "NaN": (_tensors(_put_nan), "DSX-E115", "layers.1.mlp.up_proj.weight[2, 5]"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_checkpoints(name, plain, tmp_path):
    edit, code, value = BROKEN[name]
    checkpoint = tmp_path / "ckpt"
    shutil.copytree(plain, checkpoint)
    edit(checkpoint)
    process = dsx("export", checkpoint, "-p", "mla", "-o", tmp_path / "out", "--json")
    assert_refused(process, code)
    assert value in process.stderr
    error = last_json(process)["error"]
    assert set(error) == {"code", "title", "what", "todo"}
    assert error["code"] == code
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


@pytest.mark.parametrize(
    ("args", "code"),
    [
        (["-p", "mlaa"], "DSX-E001"),
        (["-p", "mla", "--set", "mla.from=absorb"], "DSX-E002"),
        (["-p", "mla", "--set", "mla.form=fast"], "DSX-E003"),
        (["--set", "mla.form=absorb"], "DSX-E004"),
        (["-p", "./nothing.toml"], "DSX-E005"),
        (["-p", "full"], "DSX-E119"),
        (["-p", "mla", "--target", "tpu"], "DSX-E301"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_export_options(args, code, plain, tmp_path):
    assert_refused(dsx("export", plain, "-o", tmp_path / "out", *args), code)
    assert list(tmp_path.iterdir()) == []


def test_bad_paths(plain, tiny_bundle, tmp_path):
    assert_refused(dsx("export", tmp_path / "none", "-o", tmp_path / "out"), "DSX-E101")
    before = (tiny_bundle / "manifest.json").read_bytes()
    assert_refused(dsx("export", plain, "-p", "mla", "-o", tiny_bundle), "DSX-E401")
    assert (tiny_bundle / "manifest.json").read_bytes() == before
    assert_refused(dsx("verify", plain), "DSX-E402")
    assert_refused(dsx("verify", tiny_bundle, "--against", tmp_path / "none"), "DSX-E601")


def test_a_cut_bundle_is_refused(tiny_bundle, tmp_path):
    bundle = tmp_path / "bundle"
    shutil.copytree(tiny_bundle, bundle)
    with (bundle / "weights" / WEIGHTS).open("r+b") as file:
        file.truncate(1000)
    assert_refused(dsx("inspect", bundle), "DSX-E406")
    (bundle / "manifest.json").write_text("{")
    process = dsx("inspect", bundle, "--json")
    assert_refused(process, "DSX-E403")
    assert last_json(process)["error"]["code"] == "DSX-E403"


def test_bad_generate_inputs(tiny_bundle):
    for args, code in (
        ([], "DSX-E702"),
        (["-P", "你好", "--ids", "1"], "DSX-E702"),
        (["--ids", "1", "--chat"], "DSX-E702"),
        (["--ids", "1,二"], "DSX-E701"),
        (["-P", "你好"], "DSX-E514"),
        (["--ids", "1,9999"], "DSX-E509"),
    ):
        process = dsx("generate", tiny_bundle, *args, "--json")
        assert_refused(process, code)
        assert last_json(process)["error"]["code"] == code


@pytest.mark.parametrize(
    ("number", "code"),
    [(signal.SIGKILL, -9), (signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)],
)
def test_an_interrupted_export_leaves_no_bundle(number, code, wide, plain, tmp_path):
    out = tmp_path / "out"
    command = [*DSX, "export", str(wide), "-p", "mla", "-o", str(out)]
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stderr is not None
        seen = []
        for line in process.stderr:
            seen.append(line)
            if "写权重" in line:
                process.send_signal(number)
                break
        seen.append(process.stderr.read())
    assert process.returncode == code, "".join(seen)
    assert "Traceback" not in "".join(seen)
    assert not out.exists()
    if number != signal.SIGKILL:
        assert list(tmp_path.iterdir()) == []
        return
    assert [path.name for path in tmp_path.iterdir()] == [f".out.tmp-{process.pid}"]
    assert dsx("export", plain, "-p", "mla", "-o", out).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_size_limit_is_reported_as_disk_full(wide, tmp_path):
    limit = 4 << 20
    process = dsx_process(
        *("export", wide, "-p", "mla", "-o", tmp_path / "out"),
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)),
    )
    assert_refused(process, "DSX-E404")
    assert list(tmp_path.iterdir()) == []


def _can_mount() -> bool:
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        return False
    probe = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=64k none /mnt"]
    return subprocess.run(probe, capture_output=True).returncode == 0


@pytest.mark.slow
@pytest.mark.skipif(not _can_mount(), reason="要 root 才能在独立的挂载空间里挂 tmpfs")
def test_a_full_disk(wide, tmp_path):
    """真的 2 MB 文件系统。"""
    export = shlex.join([*DSX, "export", str(wide), "-p", "mla", "-o", f"{tmp_path}/out", "--json"])
    script = f"mount -t tmpfs -o size=2m none {shlex.quote(str(tmp_path))}; {export}; code=$?; ls -A {tmp_path} >&3; exit $code"
    reader, writer = os.pipe()
    process = subprocess.run(
        ["unshare", "-m", "bash", "-c", f"exec 3>/dev/fd/{writer}; {script}"],
        capture_output=True,
        text=True,
        env=environment(),
        pass_fds=(writer,),
        timeout=120,
    )
    os.close(writer)
    with os.fdopen(reader) as left:
        assert left.read() == ""
    assert_refused(process, "DSX-E404")
    assert last_json(process)["error"]["code"] == "DSX-E404"
