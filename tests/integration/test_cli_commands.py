"""每个命令的正常用法；不导入重依赖、流式、管道与 Ctrl-C 在真的子进程里。"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import onnx
import pytest

import deepseek_export
from deepseek_export import __version__
from deepseek_export.bundle import Bundle
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.cli.demo import BUNDLE, ENGINE_BUNDLE
from deepseek_export.cli.main import COMMANDS
from deepseek_export.profile import BUILTIN_PROFILES
from tests.bundles import edit_weight, run_polygraphy, tampered
from tests.integration.cli import DSX, TINY, assert_refused, dsx, dsx_process, environment, last_json

pytestmark = pytest.mark.integration

#: 碰到这些模块就报错，模拟没有装它们的机器。
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("torch", "onnx", "onnxruntime", "onnxscript", "transformers"):
            raise ImportError(f"不该导入 {name}")
sys.meta_path.insert(0, Block())
from deepseek_export.cli.main import main
main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    "args",
    [
        ["--help"],
        ["--version"],
        ["doctor"],
        ["doctor", "--json"],
        ["profiles"],
        ["profiles", "show", "mla+moe"],
        ["demo", "--path"],
        ["generate", "--help"],
    ],
    ids=" ".join,
)
def test_light_commands_never_import_the_heavy_packages(args):
    process = subprocess.run(
        [sys.executable, "-c", BLOCK, *args], capture_output=True, text=True, env=environment(), timeout=60
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.strip()
    assert "\x1b" not in process.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_help_is_chinese(name):
    process = dsx(name, "--help")
    assert process.returncode == 0
    assert sum("\u4e00" <= char <= "\u9fff" for char in process.stdout) > 20
    assert name in dsx("--help").stdout


def test_version_and_usage_errors():
    assert dsx("--version").stdout == f"dsx {__version__}\n"
    for args, what in (
        (["nothing"], "没有命令 nothing"),
        (["exprot"], "是不是想写 export？"),
        (["export", "CKPT", "-o", "x", "--dtype", "flaot16"], "是不是想写 float16？"),
        (["verify", "OUT", "--level", "token"], "是不是想写 tokens？"),
        (["export"], "缺少参数"),
        (["export", "CKPT", "-o", "x", "--quant", "int3"], "--quant：int3 不在可选的值里"),
        (["export", "CKPT", "--outptu", "x"], "没有选项 --outptu，是不是 --output"),
        (["build", "OUT"], "缺少选项 --arch"),
        (["export", "CKPT"], "缺少输出目录"),
        (["export", "CKPT", "A", "-o", "B"], "输出目录给了两个：A 与 --output B"),
        (["pack", "OUT", "--triton"], "建议：dsx pack --help 有全部用法"),
        (["generate", "OUT", "--threads", "0"], "--threads：0 不在"),
        (["bench", "OUT", "--threads", "100000"], "--threads：100000 不在"),
        (["inspect", "OUT", "more"], "多余的参数：more"),
    ):
        process = dsx(*args)
        assert process.returncode == 2
        assert process.stdout == ""
        assert process.stderr.startswith("DSX-E700 "), process.stderr
        assert what in process.stderr


def test_python_dash_m_is_the_same_program():
    process = subprocess.run(
        [sys.executable, "-m", "deepseek_export", "--version"],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    assert (process.returncode, process.stdout) == (0, f"dsx {__version__}\n")


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shell_completion(shell):
    """文档里的那一行真的给出脚本；命令与选项的值补得出来。"""
    line = f"_DSX_COMPLETE={shell}_source dsx"
    assert line in (Path(__file__).parents[2] / "docs/shell-completion.md").read_text(encoding="utf-8")
    process = dsx_process(env=environment(_DSX_COMPLETE=f"{shell}_source"))
    assert process.returncode == 0, process.stderr
    assert f"_DSX_COMPLETE={shell}_complete" in process.stdout

    def completed(words: str, index: int) -> str:
        asked = {"_DSX_COMPLETE": "bash_complete", "COMP_WORDS": words, "COMP_CWORD": str(index)}
        return dsx_process(env=environment(**asked)).stdout

    if shell == "bash":
        assert completed("dsx gen", 1).split() == ["plain,generate"]
        assert completed("dsx export CKPT --dtype b", 4).split() == ["plain,bfloat16"]
        assert "plain,ort-cpu" in completed("dsx export CKPT --target o", 4)


def test_short_dtypes(tiny, tmp_path):
    """``--dtype fp16`` 就是 float16；ONNX 文件写着是谁、是什么，不写何时、何处。"""
    process = dsx("export", tiny, "-p", "mla", "-o", tmp_path / "out", "--dtype", "fp16", "--json")
    assert last_json(process)["dtype"] == "float16"
    model = onnx.load(tmp_path / "out/model.onnx", load_external_data=False)
    assert (model.producer_name, model.producer_version) == ("dsx", __version__)
    assert model.doc_string == "deepseek_v3 的主模型，编译到 portable；输入输出的约定见 manifest.json"
    assert {prop.key: prop.value for prop in model.metadata_props} == {
        "dsx.target": "portable",
        "dsx.profile": "mla",
        "dsx.family": "deepseek_v3",
        "dsx.role": "main",
        "dsx.layers": "2",
        "dsx.moe_layers": "1",
        "dsx.dtype": "float16",
        "dsx.cache_dtype": "float16",
        "dsx.quantization": "none",
    }
    again = dsx("export", tiny, "-p", "mla", "-o", tmp_path / "again", "--dtype", "float16")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "out/model.onnx").read_bytes() == (tmp_path / "again/model.onnx").read_bytes()


def test_profiles_lists_them_all():
    """每个内置方案一行，说的是效果；都能导出。"""
    listed = dsx("profiles").stdout
    for name in BUILTIN_PROFILES:
        assert f" {name} " in listed
    assert "不能" not in listed


def test_profiles_show_round_trips(tmp_path):
    text = dsx("profiles", "show", "mla+moe", "--set", "mla.form=absorb").stdout
    assert tomllib.loads(text)["mla"] == {"enabled": True, "form": "absorb", "cache_dtype": "model"}
    path = tmp_path / "my.toml"
    path.write_text(text)
    assert dsx("profiles", "show", path).stdout == text


def test_demo_path_creates_nothing(tmp_path):
    home = tmp_path / "home"
    process = dsx("demo", "--path", env=environment(DSX_HOME=str(home)))
    path = Path(process.stdout.strip())
    assert (path / "config.json").is_file()
    assert not home.exists()


def test_export_json_and_verbose(tiny, tmp_path):
    out = tmp_path / "out"
    process = dsx("export", tiny, "-p", "mla+moe", "--target", "ort-cpu", "-o", out, "-v")
    assert process.returncode == 0, process.stderr
    assert "\x1b" not in process.stdout + process.stderr
    assert "pass lower-" in process.stdout
    assert f"dsx verify {out}" in process.stdout
    assert "写权重" in process.stderr
    process = dsx("export", tiny, "-p", "mla", "-o", out, "--overwrite", "--json")
    assert process.stderr == ""
    summary = last_json(process)
    assert (summary["out"], summary["profile"], summary["target"]) == (str(out), "mla", "portable")
    assert summary["op_counts"]["model.onnx"]["dsx::MlaAttention"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_export_check_verifies_first(tiny, tmp_path):
    process = dsx("export", tiny, "-p", "moe", "-o", tmp_path / "out", "--check", "-v")
    assert process.returncode == 0, process.stderr
    assert "校验 tokens" in process.stderr
    assert (tmp_path / "out/reports/parity.json").is_file()


def test_verify_prints_every_level(tiny, tiny_bundle, demo_bundle):
    process = dsx(
        "verify", demo_bundle, "--level", "op", "--level", "model", "--level", "tokens", "--steps", "4"
    )
    assert process.returncode == 0, process.stdout + process.stderr
    for expected in (
        "op",
        "model",
        "tokens",
        "全部通过",
        f"{demo_bundle}/reports/parity.json",
        "polygraphy run",
    ):
        assert expected in process.stdout
    assert "\x1b" not in process.stdout + process.stderr
    summary = last_json(dsx("verify", tiny_bundle, "--against", tiny, "--level", "block", "--json"))
    assert summary["passed"]
    assert [level["level"] for level in summary["levels"]] == ["block"]


def test_a_changed_weight_is_found(tiny_bundle, tmp_path):
    """权重改了一处、哈希也跟着改：只有比数才看得出来；compare 说到节点，打印的命令原样执行。"""
    good = Bundle.open(tiny_bundle)

    def change(weight):
        weight[:4] = 0
        return weight

    name = "model.layers.1.self_attn.o_proj.weight"
    bundle = tampered(good, tmp_path, edit_weight(good, name, change)).path
    process = dsx("verify", bundle, "--level", "block")
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    for expected in ("第一处不通过", "layers.1.self_attn", "坐标 [", "结论    不通过"):
        assert expected in process.stdout

    process = dsx("compare", bundle, "--bisect")
    assert process.returncode == 1
    assert "Traceback" not in process.stderr
    assert "\x1b" not in process.stdout + process.stderr
    for expected in (
        "第一个不对的块",
        "第一个不对的节点",
        "layers.1.self_attn.o_proj/MatMul",
        f"权重 {name} 与检查点不同",
        "结论    不一致",
    ):
        assert expected in process.stdout
    (command,) = (line for line in process.stdout.splitlines() if line.startswith("复现"))
    assert run_polygraphy(command.removeprefix("复现").strip()).returncode == 1


def test_compare_json(tiny_bundle, tmp_path):
    out = tmp_path / "saved"
    process = dsx("compare", tiny_bundle, "--block", "0", "--block", "head", "--save", out, "--json")
    assert process.returncode == 0, process.stdout + process.stderr
    assert process.stderr == ""
    summary = last_json(process)
    assert summary["passed"]
    assert [row["block"] for row in summary["blocks"]] == ["layers.0.self_attn", "layers.0.mlp", "head"]
    assert summary["report"] == str(out / "compare.json")
    assert list(summary["polygraphy"]) == ["model.onnx"]
    assert_refused(dsx("compare", tiny_bundle, "--backend", "ort,tensorrt"), "DSX-E613")


def test_inspect(tiny_bundle, demo_bundle):
    text = dsx("inspect", demo_bundle).stdout
    for expected in (
        "dsx::MlaAttention×4",
        "1,280 字节",
        "8.0 倍",
        "真实模型的缓存",
        "70,272",
        "31,104",
        "98.6%",
    ):
        assert expected in text
    assert "就是展开的缓存" in dsx("inspect", tiny_bundle).stdout
    summary = last_json(dsx("inspect", demo_bundle, "--json"))
    assert summary["cache"]["bytes_per_token"] == 1280
    assert summary["cache"]["ratio"] == 8
    assert summary["weights"]["recipes"] == {"copy": 57, "stack": 9}
    assert [row["name"] for row in summary["published"]] == ["DeepSeek-V2-Lite", "DeepSeek-V3"]
    for row, layers, expanded in zip(summary["published"], (27, 61), (5120, 40960), strict=True):
        assert row["values_per_token_per_layer"] == 576
        assert row["expanded_values_per_token_per_layer"] == expanded
        assert row["bytes_per_token"] == 576 * layers * 2
        assert row["bytes_at_context"] == 576 * layers * 2 * 8192
        assert row["saving"] == pytest.approx(1 - 576 / expanded)


def test_the_polygraphy_command_of_inspect_runs(tmp_path):
    """不给形状会失败；印出来的那一条，主模型与草稿模型都跑得过。"""
    checkpoint = write_checkpoint(tmp_path / "ckpt", TINY, dtype="float32", mtp=True)
    bundle = tmp_path / "out"
    process = dsx("export", checkpoint, "-p", "full", "-o", bundle)
    assert process.returncode == 0, process.stderr
    shown = dsx("inspect", bundle).stdout
    commands = last_json(dsx("inspect", bundle, "--json"))["polygraphy"]
    assert list(commands) == ["model.onnx", "mtp.onnx"]
    for command in commands.values():
        assert f"试跑    {command}" in shown
        process = run_polygraphy(command)
        assert process.returncode == 0, process.stdout + process.stderr
    bare = commands["model.onnx"].partition(" --input-shapes")[0]
    assert run_polygraphy(bare).returncode != 0


def test_inspect_into_a_closed_pipe_is_quiet(demo_bundle):
    command = f'"{DSX[0]}" -m {DSX[2]} inspect "{demo_bundle}" | true'
    process = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, env=environment(), timeout=60
    )
    assert process.stderr == ""


def test_generate_json(demo_bundle):
    args = ("--max-new-tokens", 8, "--temperature", "0.8", "--top-k", 20, "--top-p", "0.9", "--seed", 7)
    prompts = ("-P", "床前明月光", "-P", "白日")
    # 子进程：依赖的 C++ 日志也不许混进 stderr
    process = dsx_process("generate", demo_bundle, *prompts, *args, "--ignore-eos", "--json")
    assert process.stderr == ""
    found = last_json(process)
    assert [len(ids) for ids in found["token_ids"]] == [8, 8]
    assert len(found["text"]) == 2
    assert found["counts"]["new_tokens"] == 16
    assert found["finish_reasons"] == ["length", "length"]
    assert set(found["timings"]) == {"load_s", "prefill_s", "decode_s", "decode_tokens_per_s"}
    again = dsx("generate", demo_bundle, *prompts, *args, "--ignore-eos", "--threads", 1)
    assert "[1/2] 床前明月光" in again.stdout
    assert found["text"][1] in again.stdout


def test_generate_takes_every_sampling_option(demo_bundle):
    """RUNTIME-13：与 Python 的同名参数相同；对数概率在 ``--json`` 里，或在 stderr 上。"""
    args = ("generate", demo_bundle, "-P", "床前明月光", "--max-new-tokens", 8, "--threads", 1)
    args += ("--temperature", 0.9, "--min-p", 0.05, "--presence-penalty", 0.5, "--frequency-penalty", 0.25)
    args += ("--repetition-penalty", 1.2, "--min-tokens", 8, "--logit-bias", "7=-100", "--seed", 3)
    found = last_json(dsx(*args, "-n", 2, "--logprobs", 2, "--json"))
    want = deepseek_export.load(demo_bundle, threads=1).generate(
        "床前明月光",
        8,
        n=2,
        temperature=0.9,
        min_p=0.05,
        presence_penalty=0.5,
        frequency_penalty=0.25,
        repetition_penalty=1.2,
        min_tokens=8,
        logit_bias={7: -100},
        seed=3,
        logprobs=2,
    )
    assert (found["token_ids"], found["text"]) == (want.token_ids, want.text)
    assert [[one["token"] for one in row] for row in found["logprobs"]] == want.token_ids
    assert all(len(one["top"]) == 2 for row in found["logprobs"] for one in row)
    shown = dsx(*args, "--logprobs", 1)
    assert shown.stdout == want.text[0] + "\n"
    assert f"{want.logprobs[0][0].logprob:.3f}" in shown.stderr
    both = dsx(*args, "-n", 2)
    assert both.stdout.startswith(f"[1/2] 床前明月光\n{want.text[0]}\n\n[2/2] 床前明月光\n")


def test_generate_streams(demo_bundle):
    """第一段文本在进程结束之前就到了；拼起来等于整段解码。"""
    args = ["generate", str(demo_bundle), "-P", "床前明月光", "--chat", "--ignore-eos", "--max-new-tokens"]
    with subprocess.Popen([*DSX, *args, "200"], stdout=subprocess.PIPE, env=environment()) as process:
        assert process.stdout is not None
        first = os.read(process.stdout.fileno(), 1)
        running = process.poll() is None
        text = (first + process.stdout.read()).decode()
    assert process.returncode == 0
    assert running
    whole = last_json(dsx(*args, "200", "--json"))["text"][0]
    assert text == whole + "\n"


def test_generate_without_a_tokenizer_prints_ids(tiny_bundle):
    process = dsx("generate", tiny_bundle, "--ids", "1,2,3", "--max-new-tokens", 4, "--ignore-eos")
    assert process.returncode == 0, process.stderr
    assert len(process.stdout.strip().split(",")) == 4
    assert "token/s" in process.stderr


def test_ctrl_c_stops_without_a_traceback(demo_bundle):
    args = ["generate", str(demo_bundle), "-P", "白日", "--ignore-eos", "--max-new-tokens", "4000"]
    with subprocess.Popen(
        [*DSX, *args],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment(),
        # 测试若在后台跑，SIGINT 是被忽略的，而且会传给子进程。
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        os.read(process.stdout.fileno(), 1)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        errors = process.stderr.read().decode()
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "已中断" in errors


def test_demo_runs_the_whole_tour(tmp_path):
    process = dsx("demo", "--dir", tmp_path)
    assert process.returncode == 0, process.stdout + process.stderr
    commands = [line for line in process.stdout.splitlines() if line.startswith("$ dsx ")]
    steps = ["export", "verify", "inspect", "generate", "generate", "export", "build", "serve"]
    assert [line.split()[2] for line in commands] == steps
    asked = process.stdout.partition("$ curl -N http://127.0.0.1:")[2].splitlines()[1:3]
    assert asked == ["子曰：“君子不学，不仁者不可得而不礼。”", "服务已停下。"]
    assert "收到 SIGTERM" in process.stderr
    assert "全部通过" in process.stdout
    assert {"dsx::LatentAttention×4", "dsx::MoeExperts×3"} <= set(re.findall(r"dsx::\w+×\d+", process.stdout))
    assert "token" in process.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted((BUNDLE, ENGINE_BUNDLE))


def test_bench_prints_tables_and_refuses_a_context_that_does_not_fit(tiny_bundle):
    small = ("--prompt-len", 8, "--new-tokens", 4, "--depth", 100, "--runs", 1, "--threads", 1)
    process = dsx("bench", tiny_bundle, *small)
    assert process.returncode == 0, process.stderr
    for expected in ("逐个 token", "实测的缓存", f"{tiny_bundle}/reports/bench.json"):
        assert expected in process.stdout
    assert "\x1b" not in process.stdout + process.stderr
    process = dsx("bench", tiny_bundle, "--depth", 129, "--json")
    assert process.returncode == 1
    assert last_json(process)["error"]["code"] == "DSX-E710"


def test_generate_stops_at_a_string(demo_bundle):
    """流式与 ``--json`` 都到停止串之前为止；停止串不露出来。"""
    args = ("generate", demo_bundle, "-P", "床前明月光", "--ignore-eos", "--max-new-tokens", 40)
    whole = last_json(dsx(*args, "--json"))["text"][0]
    stop = whole[6:9]
    want = whole[: whole.index(stop)]
    process = dsx(*args, "--stop", "没有的", "--stop", stop)
    assert process.returncode == 0, process.stderr
    assert process.stdout == want + "\n"
    assert "结束：stop" in process.stderr
    found = last_json(dsx(*args, "--stop", stop, "--json"))
    assert (found["text"], found["finish_reasons"], found["notes"]) == ([want], ["stop"], [])


def test_prompts_from_a_file_and_from_stdin(demo_bundle, tmp_path):
    args = ("--max-new-tokens", 6, "--ignore-eos", "--json")
    poem, text = tmp_path / "poem.txt", "床前明月光，\n疑是地上霜"
    poem.write_text(text + "\n", encoding="utf-8")
    want = last_json(dsx("generate", demo_bundle, "-P", text, *args))["token_ids"]
    assert last_json(dsx("generate", demo_bundle, "-P", f"@{poem}", *args))["token_ids"] == want
    process = dsx_process("generate", demo_bundle, "-P", "-", *args, input=text + "\n")
    assert last_json(process)["token_ids"] == want
    at = last_json(dsx("generate", demo_bundle, "-P", "@@春", *args))
    assert at["counts"]["prompt_tokens"] > 1
    poem.write_bytes("春".encode("gbk"))
    for prompts, what in (
        (["-P", f"@{tmp_path / 'none'}"], "none 读不了"),
        (["-P", f"@{tmp_path}"], "读不了"),
        (["-P", f"@{poem}"], "不是 UTF-8"),
        (["-P", "-", "-P", "-"], "只读得了一次"),
    ):
        process = dsx("generate", demo_bundle, *prompts)
        assert_refused(process, "DSX-E702")
        assert what in process.stderr


def test_a_cut_number_of_tokens_is_said(tiny_bundle):
    process = dsx("generate", tiny_bundle, "--ids", "1,2", "--max-new-tokens", 500, "--ignore-eos")
    assert process.returncode == 0, process.stderr
    assert "[要 500 个新 token，提示词之后只放得下 126 个：max_position_embeddings 是 128]" in process.stderr
