"""用户会犯的错：每一种都有码、退出码 1、没有 traceback、没有半个 bundle。"""

from __future__ import annotations

import json
import os
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
from tests.integration.cli import (
    DSX,
    TINY,
    assert_refused,
    dsx,
    dsx_limited,
    environment,
    last_json,
)
from tests.odd_files import make_odd
from tests.permissions import permissions_apply

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
    "tokenizer is a folder": (lambda d: (d / "tokenizer.json").mkdir(), "DSX-E501", "tokenizer.json 是目录"),
    "config is a pipe": (lambda d: make_odd(d / "config.json", "fifo"), "DSX-E102", "不是普通文件"),
    "weights are a device": (lambda d: make_odd(d / WEIGHTS, "device"), "DSX-E101", WEIGHTS),
    "stop tokens without end": (
        lambda d: make_odd(d / "generation_config.json", "device"),
        "DSX-E121",
        "特殊文件",
    ),
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
        (["--keep", ""], "DSX-E705"),
        (["--quant", "int8", "--target", "ort-cpu", "--keep", ""], "DSX-E312"),
        (["--quant", "int8", "--target", "ort-cpu", "--keep", "lm_head,,o_proj"], "DSX-E312"),
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


CLOSED = {
    "plan": ("DSX-E101", ["plan", "CLOSED"]),
    "export": ("DSX-E101", ["export", "CLOSED", "-o", "OUT"]),
    "export into it": ("DSX-E405", ["export", "CKPT", "-o", "CLOSED"]),
    "inspect": ("DSX-E402", ["inspect", "CLOSED"]),
    "doctor": ("DSX-E402", ["doctor", "CLOSED"]),
    "generate": ("DSX-E402", ["generate", "CLOSED", "--ids", "1"]),
    "pack": ("DSX-E402", ["pack", "CLOSED"]),
    "verify": ("DSX-E601", ["verify", "BUNDLE", "--against", "CLOSED"]),
    "profile": ("DSX-E005", ["export", "CKPT", "-o", "OUT", "-p", "CLOSED/p.toml"]),
}


@pytest.mark.parametrize("name", CLOSED)
def test_a_parent_that_may_not_be_entered(name, plain, tiny_bundle, tmp_path):
    """上级目录没有权限、是文件、名字太长：都按码拒绝，说出操作系统的原因。"""
    code, args = CLOSED[name]
    (tmp_path / "closed").mkdir(mode=0)
    (tmp_path / "file").touch()
    places = {
        "Permission denied": tmp_path / "closed/c",
        "Not a directory": tmp_path / "file/c",
        "File name too long": tmp_path / ("x" * 256),
    }
    for reason, place in places.items():
        known = {"CKPT": plain, "BUNDLE": tiny_bundle, "OUT": tmp_path / "out"}
        with permissions_apply():
            process = dsx(*(known.get(arg, arg.replace("CLOSED", str(place))) for arg in args))
        assert_refused(process, code)
        assert reason in process.stderr
    (tmp_path / "closed").rmdir()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_paths_that_are_not_utf8(plain, tiny_bundle, tmp_path):
    """不是 UTF-8 的路径：动工之前就拒绝，什么也不写。"""
    odd = tmp_path / os.fsdecode(b"n\xff8")
    shutil.copytree(tiny_bundle, odd)
    for code, *args in (
        ("DSX-E405", "export", plain, "-p", "mla", "-o", tmp_path / os.fsdecode(b"o\xff8")),
        ("DSX-E101", "export", odd, "-p", "mla", "-o", tmp_path / "out"),
        ("DSX-E402", "build", odd, "--arch", "sm89"),
        ("DSX-E402", "verify", odd),
        ("DSX-E405", "compare", tiny_bundle, "--save", tmp_path / os.fsdecode(b"s\xff8")),
        ("DSX-E601", "verify", tiny_bundle, "--against", odd),
    ):
        process = dsx(*args, "--json")
        assert_refused(process, code)
        assert "UTF-8" in process.stderr
    (tmp_path / "link").symlink_to(odd)  # manifest 记的是真正的位置
    assert_refused(dsx("export", tmp_path / "link", "-o", tmp_path / "out"), "DSX-E101")
    assert set(tmp_path.iterdir()) == {odd, tmp_path / "link"}


def test_a_file_given_as_the_checkpoint_exists(plain, tiny_bundle):
    process = dsx("verify", tiny_bundle, "--against", plain / WEIGHTS)
    assert_refused(process, "DSX-E601")
    assert f"{WEIGHTS} 不是目录" in process.stderr
    assert "不存在" not in process.stderr


def test_checkpoint_files_that_may_not_be_read(demo, tmp_path):
    """读不了与坏了、与输出写不了是三回事。"""
    checkpoint = shutil.copytree(demo, tmp_path / "ckpt")
    for name, code in ((WEIGHTS, "DSX-E101"), ("tokenizer.json", "DSX-E501"), ("config.json", "DSX-E102")):
        (checkpoint / name).chmod(0)
        with permissions_apply():
            process = dsx("export", checkpoint, "-o", tmp_path / "out")
        (checkpoint / name).chmod(0o600)
        assert_refused(process, code)
        assert f"{name}：" in process.stderr
        assert "Permission denied" in process.stderr
        assert "重新下载" not in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt"]


def test_advice_about_the_output_can_be_followed(plain, tiny_bundle, tmp_path):
    """--overwrite 只在行得通时建议；没有 -o 的命令不提 -o。"""
    for out in (plain, "/dev/null", plain / WEIGHTS):
        process = dsx("export", plain, "-o", out)
        assert_refused(process, "DSX-E401")
        assert "--overwrite" not in process.stderr
    process = dsx("export", plain, "-o", tiny_bundle)
    assert_refused(process, "DSX-E401")
    assert "--overwrite" in process.stderr
    process = dsx("compare", tiny_bundle, "--save", plain)
    assert_refused(process, "DSX-E401")
    assert " -o" not in process.stderr
    bundle = tmp_path / "referenced"
    assert dsx("export", plain, "-o", bundle, "--weights", "reference").returncode == 0
    tmp_path.chmod(0o500)
    with permissions_apply():
        process = dsx("pack", bundle)
    tmp_path.chmod(0o700)
    assert_refused(process, "DSX-E405")
    assert " -o" not in process.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["referenced"]


def test_reports_of_a_read_only_bundle(tiny_bundle, tmp_path):
    """校验、测速跑完了，报告却写不进去：先印算好的结果，再按码说，不是 traceback。"""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    shutil.rmtree(bundle / "reports")
    (bundle / "reports").touch()
    small = ["--prompt-len", "4", "--new-tokens", "2", "--depth", "16", "--runs", "1"]
    for command, shown, key in (
        (["verify", bundle, "--level", "model"], "结论    全部通过", "passed"),
        (["bench", bundle, *small], "token/s", "ways"),
    ):
        process = dsx(*command)
        assert_refused(process, "DSX-E405")
        assert "reports" in process.stderr
        assert shown in process.stdout
        assert "报告    " not in process.stdout
        process = dsx(*command, "--json")
        assert_refused(process, "DSX-E405")
        result, error = map(json.loads, process.stdout.splitlines())
        assert result[key]
        assert error["error"]["code"] == "DSX-E405"


def test_a_bench_that_cannot_write_its_report_leaves_no_file(tiny_bundle, tmp_path):
    """写到一半满了：没有半个报告，上一次的还在。"""
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    small = ["--prompt-len", "4", "--new-tokens", "2", "--depth", "16", "--runs", "1"]
    before = sorted(path.name for path in (bundle / "reports").iterdir())

    def bench() -> subprocess.CompletedProcess[str]:
        return dsx_limited(256, "bench", bundle, *small)

    process = bench()
    assert_refused(process, "DSX-E404")
    assert "token/s" in process.stdout
    assert sorted(path.name for path in (bundle / "reports").iterdir()) == before
    (bundle / "reports/bench.json").write_text("{}")
    assert_refused(bench(), "DSX-E404")
    assert (bundle / "reports/bench.json").read_text() == "{}"


def test_an_output_written_with_dots(plain, tmp_path):
    """``-o zz/../out``：不留下 zz，下一步的命令指向真正的位置。"""
    process = dsx("export", plain, "-p", "mla", "-o", "zz/../", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert "manifest.json" in {path.name for path in tmp_path.iterdir()}
    assert "zz" not in {path.name for path in tmp_path.iterdir()}
    process = dsx("export", plain, "-p", "mla", "-o", "zz/../", cwd=tmp_path.parent)
    assert_refused(process, "DSX-E401")
    process = dsx("export", plain, "-p", "mla", "-o", "zz/../out", cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    assert f"dsx verify {tmp_path / 'out'}" in process.stdout
    assert not (tmp_path / "zz").exists()


def test_a_manifest_without_graphs_is_refused_by_every_command(tiny_bundle, tmp_path):
    bundle = shutil.copytree(tiny_bundle, tmp_path / "bundle")
    manifest = json.loads((bundle / "manifest.json").read_text())
    (bundle / "manifest.json").write_text(json.dumps(manifest | {"graphs": []}))
    for args in (["generate", bundle, "--ids", "1"], ["verify", bundle], ["build", bundle, "--arch", "sm89"]):
        process = dsx(*args)
        assert_refused(process, "DSX-E403")
        assert "graphs 里有 0 个主模型" in process.stderr


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
        (["--ids", "1,999999999999999999"], "DSX-E509"),
        (["--ids", "1,99999999999999999999999"], "DSX-E509"),
        (["--ids", "9" * 5000], "DSX-E509"),
        (["--ids", "1", "--min-p", "2"], "DSX-E504"),
        (["--ids", "1", "--logprobs", "21"], "DSX-E504"),
        (["--ids", "1", "--logit-bias", "1=101"], "DSX-E504"),
        (["--ids", "1", "--logit-bias", "9999999999999999999999=1"], "DSX-E509"),
        (["--ids", "1", "--min-tokens", "65"], "DSX-E512"),
        (["--ids", "1", "-n", "0"], "DSX-E512"),
    ):
        process = dsx("generate", tiny_bundle, *args, "--json")
        assert_refused(process, code)
        assert last_json(process)["error"]["code"] == code
        assert "dtype" not in process.stderr


def test_numbers_no_machine_word_can_hold(plain, tiny_bundle):
    """再大的个数：有上限的照上限，没有意义的按码拒绝。"""
    huge = "9" * 30
    process = dsx("generate", tiny_bundle, "--ids", "1,2", "--max-new-tokens", huge, "--ignore-eos", "--json")
    assert process.returncode == 0, process.stderr
    assert last_json(process)["counts"]["new_tokens"] == TINY["max_position_embeddings"] - 2
    sampled = ("--temperature", "1", "--seed", huge, "--top-k", huge, "--max-new-tokens", "2")
    assert dsx("generate", tiny_bundle, "--ids", "1", *sampled).returncode == 0
    for args in (
        ["plan", plain, "--batch", "9" * 400],
        ["verify", tiny_bundle, "--steps", huge],
        ["bench", tiny_bundle, "--new-tokens", huge],
        ["generate", tiny_bundle, "--ids", "1", "--max-new-tokens", "9" * 5000],
    ):
        process = dsx(*args)
        assert process.returncode == 2, process.stderr
        assert "DSX-E700" in process.stderr


@pytest.mark.parametrize("command", [["profiles"], ["--help"], ["generate", "BUNDLE", "--ids", "1,2"]])
def test_output_that_cannot_be_written(command, tiny_bundle):
    """标准输出关着、写满：按码拒绝；下游先走了不是错误。都没有 traceback。"""
    line = shlex.join([*DSX, *(str(tiny_bundle) if arg == "BUNDLE" else arg for arg in command)])
    for redirect in (">&-", ">/dev/full"):
        process = subprocess.run(
            ["bash", "-c", f"{line} {redirect}"],
            capture_output=True,
            text=True,
            env=environment(),
            timeout=300,
        )
        assert_refused(process, "DSX-E706")
    for script in (f"{line} | true; exit ${{PIPESTATUS[0]}}", f"{line} 2>&-"):
        process = subprocess.run(
            ["bash", "-c", script], capture_output=True, text=True, env=environment(), timeout=300
        )
        assert process.returncode == 0, process.stderr
        assert "Traceback" not in process.stderr
        assert "Exception ignored" not in process.stderr


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
    left = sorted(path.name.rpartition("-")[0] or path.name for path in tmp_path.iterdir())
    assert left == [".out.lock", f".out.tmp-{process.pid}"]
    assert dsx("export", plain, "-p", "mla", "-o", out).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_file_size_limit_is_reported_as_disk_full(wide, tmp_path):
    process = dsx_limited(4 << 20, "export", wide, "-p", "mla", "-o", tmp_path / "out")
    assert_refused(process, "DSX-E404")
    assert list(tmp_path.iterdir()) == []


def test_a_comparison_that_does_not_fit(tiny_bundle, tmp_path):
    """compare 截下的图连同权重写到一半写不下：说磁盘满了，不留半个。"""
    shutil.copytree(tiny_bundle, tmp_path / "out", ignore=shutil.ignore_patterns("compare*"))
    process = dsx_limited(2000, "compare", tmp_path / "out")
    assert_refused(process, "DSX-E404")
    assert "None" not in process.stderr
    assert not list((tmp_path / "out/reports").glob("*compare*"))


def test_no_room_for_temporary_files(tiny_bundle, tmp_path):
    """哪里都写不了一个字节：torch 连导入都要临时目录，说得清。"""
    process = dsx_limited(0, "verify", tiny_bundle, cwd=tmp_path)
    assert_refused(process, "DSX-E405")
    assert "临时文件" in process.stderr
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
