"""plugins/tensorrt：C++ 一侧读懂的程序与 Python 一侧相同；给了头文件时构建整个库并用 TensorRT-RTX 解析、建引擎。"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from deepseek_export.kernels.compile import compile_table
from deepseek_export.kernels.expression import OPERATORS
from deepseek_export.kernels.grouped_swiglu_launch import grouped_swiglu_launch
from deepseek_export.kernels.latent_attention_launch import latent_attention_launch
from deepseek_export.kernels.program import Program

pytestmark = pytest.mark.unit

SOURCES = Path(__file__).resolve().parents[2] / "plugins/tensorrt"
CXX = shutil.which("g++")
COMPILE = (CXX, "-std=c++17", "-O0", "-Wall", "-Wextra", "-Werror")
HEADERS = os.environ.get("TENSORRT_ROOT")


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    """两个算子的小程序。"""
    tables = (
        latent_attention_launch(89, 8, 64, 16, 0.1, "float16"),
        grouped_swiglu_launch(89, 8, 2, 32, 48, "float16"),
    )
    return {table.op: compile_table(table) for table in tables}


@pytest.fixture(scope="module")
def bind(tmp_path_factory):
    """编译好的 ``bind`` 小程序。"""
    if CXX is None:
        pytest.skip("没有 g++，不能编译 C++ 一侧")
    binary = tmp_path_factory.mktemp("native") / "bind"
    command = [*COMPILE, "-o", binary]
    subprocess.run([*command, SOURCES / "bind.cc", SOURCES / "program.cc"], check=True)

    def run(
        program: Program, shapes, text: str | None = None, image_size: int | None = None, sms=128, **variables
    ):
        file = binary.with_suffix(".txt")
        file.write_text(program.to_text() if text is None else text, encoding="utf-8")
        size = len(program.image) if image_size is None else image_size
        command = [binary, file, str(size), str(sms), *(",".join(map(str, shape)) for shape in shapes)]
        return subprocess.run(
            command, capture_output=True, text=True, check=False, env={**os.environ, **variables}
        )

    return run


def expected(program: Program, shapes, sm_count: int = 128) -> str:
    """``bind`` 应当打印的内容，由 Python 一侧得到。"""
    offsets = {}
    for variant in program.variants:
        for launch in variant.launches:
            if launch.kernel not in offsets:
                offsets[launch.kernel] = sum(len(kernel.cubin) for kernel in offsets)
    lines = [f"{program.op} {program.sm} {program.workspace(shapes)}"]
    for launch in program.bind(shapes, sm_count):
        k = launch.kernel
        numbers = (k.threads, k.shared, k.scratch, offsets[k], len(k.cubin), *launch.grid)
        lines.append(" ".join(map(str, (k.entry, *numbers))))
        for kind, value in launch.arguments:
            # C++ 存成 float，按 %a 打印，所以先舍入再比。
            shown = value
            if kind == "float32":
                mantissa, exponent = float(np.float32(value)).hex().split("p")
                shown = f"{mantissa.rstrip('0')}p{exponent}"
            lines.append(f"{kind} {shown}")
    return "\n".join(lines) + "\n"


def attention_shapes(B, S, T):
    return [(B, S, 8, 80), (B, 1, T, 80), (B,)]


def experts_shapes(N):
    return [(N, 32), (N, 2), (N, 2), (8, 48, 32), (8, 48, 32), (8, 32, 48)]


@pytest.mark.parametrize(
    ("op", "shapes"),
    [("LatentAttention", attention_shapes(*sizes)) for sizes in ((1, 1, 1), (3, 2, 500), (40, 8, 4096))]
    + [("MoeExperts", experts_shapes(N)) for N in (0, 1, 7, 5000)],
)
def test_both_sides_agree(op, shapes, programs, bind):
    """KERNEL-5：同一份文本、同样的形状：变体、网格、参数、workspace 都相同。"""
    done = bind(programs[op], shapes)
    assert done.stderr == ""
    assert done.stdout == expected(programs[op], shapes)


@pytest.mark.parametrize("sms", [1, 78, 500])
def test_both_sides_bind_the_sm_count(sms, programs, bind):
    """KERNEL-5：SM 的个数在装载之后才代入，两边得到同样的段数；比表里多的按表里的。"""
    shapes = attention_shapes(1, 1, 4096)
    assert bind(programs["LatentAttention"], shapes, sms=sms).stdout == expected(
        programs["LatentAttention"], shapes, sms
    )


@pytest.fixture(scope="module")
def decimal_comma(tmp_path_factory) -> dict[str, str]:
    """小数点是逗号的 locale，由 localedef 编译；环境变量。"""
    if shutil.which("localedef") is None or not Path("/usr/share/i18n/locales/de_DE").exists():
        pytest.skip("没有 localedef 或它的 de_DE，编译不出小数点是逗号的 locale")
    folder = tmp_path_factory.mktemp("locales")
    subprocess.run(["localedef", "-i", "de_DE", "-f", "UTF-8", folder / "de_DE.utf8"], check=True)
    return {"LOCPATH": str(folder), "LC_ALL": "de_DE.utf8"}


def test_numbers_do_not_follow_the_locale(programs, bind, decimal_comma):
    """KERNEL-5：宿主进程的 locale 以逗号作小数点，读出的 scale 也不变。"""
    program, shapes = programs["LatentAttention"], attention_shapes(1, 1, 64)
    assert bind(program, shapes, **decimal_comma).stdout == expected(program, shapes)


def test_refusals(programs, bind):
    """形状不符、截断的 image、别的版本、不认识的行、没有值的符号：一行说明，不崩溃。"""
    program = programs["LatentAttention"]
    good, text = attention_shapes(2, 1, 64), program.to_text()
    for done, message in (
        (bind(program, [(2, 1, 8, 64), *good[1:]]), "维 80 是 64，应为 80"),
        (bind(program, [*good[:2], (3,)]), "维 B 是 3，应为 2"),
        (bind(program, good[:2]), "有 2 个输入，应为 3"),
        (bind(program, [(2,), *good[1:]]), "的秩不符"),
        (bind(program, good, image_size=len(program.image) - 1), "image 只有"),
        (bind(program, good, text.replace("program 2", "program 1")), "应为 dsx-program 2"),
        (bind(program, good, text + "cluster 2\n"), "不认识的行 cluster 2"),
        (bind(program, good, text + "alias 1 0\n"), "不认识的行 alias 1 0"),
        (bind(program, good, text + "alias 0\n"), "不认识的行 alias 0"),
        (bind(program, good, text.replace("argument int32 S", "argument int64 S")), "不认识的参数 int64"),
        (bind(program, good, text.replace("argument float32 0.1", "argument float32 0,1")), "0,1 不是数"),
        (bind(program, good, text.replace("argument int32 S", "argument int32 Q")), "符号 Q 没有值"),
        (bind(program, good, text.replace("argument int32 S", "argument int32 S +")), "算式不完整"),
        (bind(program, good, text.replace("argument int32 S", "argument int32 S 0 /")), "不是正数"),
    ):
        assert (done.returncode, done.stdout) == (1, "")
        assert re.fullmatch(r"dsx: .*\n", done.stderr)
        assert message in done.stderr


def test_operators_are_the_same_on_both_sides():
    """C++ 里算式的运算符与 Python 的表一致。"""
    program = (SOURCES / "program.cc").read_text(encoding="utf-8")
    assert set(re.findall(r'token == "(.+?)"', program)) == set(OPERATORS)


@pytest.fixture(scope="module")
def enqueue(tmp_path_factory):
    """``enqueue(program, shapes...)``：C++ 的启动器在一个假的 libcuda 上执行，返回它打印的各行。"""
    triton = importlib.util.find_spec("triton")
    if CXX is None or triton is None:
        pytest.skip("没有 g++，或没有 triton 带的 cuda.h，不能编译 C++ 一侧")
    folder = tmp_path_factory.mktemp("driver")
    include = f"-I{Path(triton.origin).parent / 'backends/nvidia/include'}"
    shared = ["-shared", "-fPIC", "-o", folder / "libcuda.so.1", SOURCES / "fake_cuda.cc"]
    subprocess.run([*COMPILE, include, *shared], check=True)
    sources = [SOURCES / name for name in ("enqueue.cc", "driver.cc", "program.cc")]
    subprocess.run([*COMPILE, include, "-o", folder / "enqueue", *sources, "-ldl"], check=True)

    def run(program: Program, *calls, sms: int = 128, **variables: str) -> list[str]:
        (folder / "program").write_text(program.to_text(), encoding="utf-8")
        shapes = [",".join(map(str, shape)) for call in calls for shape in call]
        numbers = [str(len(program.image)), str(len(program.inputs))]
        environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "FAKE_SMS": str(sms), **variables}
        command = [folder / "enqueue", folder / "program", *numbers, *shapes]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        return done.stdout.splitlines()

    return run


@pytest.mark.parametrize("sms", [4, 128])
def test_enqueue_needs_no_earlier_call(sms, programs, enqueue):
    """KERNEL-6：没有先装载、没有先报形状就 enqueue：当场装载（只一次），按这一次的形状与这张卡的 SM 个数启动，不会什么也不做就说
    成功；没有对齐的地址不启动。
    """
    program = programs["LatentAttention"]
    calls = [attention_shapes(1, 1, 4096), attention_shapes(3, 8, 500)]
    want = []
    for call in calls:
        want += ["enqueue", *["load" for _ in program.kernels if call is calls[0]]]
        for launch in program.bind(call, sms):
            numbers = (*launch.grid, launch.kernel.threads, launch.kernel.shared)
            want.append(f"launch {' '.join(map(str, numbers))}")
    *lines, last = enqueue(program, *calls, sms=sms)
    assert lines == want
    assert last == "dsx: latent_attention_partial 的参数 0 没有按 16 字节对齐"


def test_an_output_elsewhere_is_refused(programs, enqueue):
    """KERNEL-6：就地改写的，输出与输入不是同一块就不启动；都在同一块（这里都是空指针）照常。"""
    program = programs["LatentAttention"]
    *lines, last = enqueue(replace(program, aliases=((0, 1),)), attention_shapes(1, 1, 64))
    assert any(line.startswith("launch") for line in lines)
    assert last == "dsx: LatentAttention 的输出 0 与输入 1 应是同一块内存"


def test_a_refused_image_names_the_driver(programs, enqueue):
    """KERNEL-5：驱动不认机器码时，说出驱动支持到哪一版 CUDA。"""
    *_, last = enqueue(programs["LatentAttention"], attention_shapes(1, 1, 64), FAKE_OLD="1")
    assert "sm89；驱动支持到 CUDA 12.8" in last


PARSE = """
import ctypes, sys
from pathlib import Path
import numpy as np, onnx
from onnx import TensorProto, helper, numpy_helper
from deepseek_export.engine.flavour import FLAVOURS, load
from deepseek_export.engine.plugins import plugin_class
from deepseek_export.kernels.program import Program
from deepseek_export.ops.table import LATENT_ATTENTION

library, how, folder = sys.argv[1:]
trt = load(FLAVOURS["rtx"])

class Log(trt.ILogger):
    def __init__(self):
        super().__init__()
        self.lines = []
    def log(self, severity, message):
        self.lines.append(message)
        if severity <= trt.ILogger.Severity.ERROR:
            print(message)

log = Log()
builder = trt.Builder(log)
if how == "ctypes":
    ctypes.CDLL(library)
else:
    assert trt.get_plugin_registry().load_library(library)
attributes = {"scale": 0.1, "kv_lora_rank": 64, "plugin_namespace": "dsx", "plugin_version": "1"}
if how != "bare":
    image = (Path(folder) / "image").read_bytes()
    attributes["program"] = text = (Path(folder) / "program").read_text(encoding="utf-8")
    attributes["image"] = numpy_helper.from_array(np.frombuffer(image, np.int8))
    # 反序列化引擎时 TensorRT 就是这样调用的：字段由 Python 插件序列化，插件由 C++ 的 creator 还原。
    writer = plugin_class(trt, LATENT_ATTENTION)({}, Program.from_text(text, image))
    written = writer.get_fields_to_serialize()  # 只借用 writer 的内存，writer 要活着
    creator = trt.get_plugin_registry().get_creator("LatentAttention", "1", "dsx")
    restored = creator.create_plugin("core", written, trt.TensorRTPhase.RUNTIME)
    print(restored.get_capability_interface(trt.PluginCapabilityType.CORE).plugin_name)
node = helper.make_node(
    "LatentAttention", ["q", "kv_cache", "past_lens"], ["context"], name="core", domain="dsx", **attributes
)
half, value = TensorProto.FLOAT16, helper.make_tensor_value_info
graph = helper.make_graph(
    [node, helper.make_node("Add", ["context", "context"], ["y"])],
    "toy",
    [
        value("q", half, ["B", "S", 8, 80]),
        value("kv_cache", half, ["B", 1, "T", 80]),
        value("past_lens", TensorProto.INT64, ["B"]),
    ],
    [value("y", half, ["B", "S", 8, 64])],
)
opsets = [helper.make_opsetid("", 24), helper.make_opsetid("dsx", 1)]
model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
network = builder.create_network()
if not trt.OnnxParser(network, log).parse(model.SerializeToString()):
    sys.exit(1)
config = builder.create_builder_config()
config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
profile = builder.create_optimization_profile()
profile.set_shape("q", (1, 1, 8, 80), (2, 1, 8, 80), (4, 8, 8, 80))
profile.set_shape("kv_cache", (1, 1, 16, 80), (2, 1, 64, 80), (4, 1, 128, 80))
profile.set_shape("past_lens", (1,), (2,), (4,))
config.add_optimization_profile(profile)
config.num_compute_capabilities = 1
config.set_compute_capability(trt.ComputeCapability.SM89, 0)
plan = bytes(builder.build_serialized_network(network, config))
assert image in plan
print(tuple(network.get_output(0).shape), network.get_output(0).dtype.name)
print(*[l for m in log.lines if m.startswith("Layers:") for l in m.splitlines() if "custom_layer" in l])
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    """用 CMake 构建的库。"""
    if not HEADERS:
        pytest.skip("没有设 TENSORRT_ROOT（含 NvInfer.h 的目录），不构建 C++ 插件")
    if importlib.util.find_spec("tensorrt_rtx") is None:
        pytest.skip("没有安装 tensorrt_rtx，不能用它解析")
    header = next(Path(HEADERS).rglob("NvInferVersion.h")).read_text(encoding="utf-8")
    if int(re.search(r"define (?:TRT_MAJOR_ENTERPRISE|NV_TENSORRT_MAJOR) (\d+)", header)[1]) < 11:
        pytest.skip("TENSORRT_ROOT 是 TensorRT 10 的头文件，与 TensorRT-RTX 不是同一代")
    build = tmp_path_factory.mktemp("build")
    options = [f"-DTENSORRT_ROOT={HEADERS}", "-DCMAKE_CXX_FLAGS=-Werror"]
    subprocess.run(["cmake", "-S", SOURCES, "-B", build, *options], check=True, capture_output=True)
    subprocess.run(["cmake", "--build", build], check=True, capture_output=True)
    return build / "libdsx_tensorrt.so"


@pytest.fixture
def parse(library, programs, tmp_path):
    """``parse(how)``：在子进程里装载库、解析带插件节点的图、为 sm89 建引擎。"""
    program = programs["LatentAttention"]
    (tmp_path / "program").write_text(program.to_text(), encoding="utf-8")
    (tmp_path / "image").write_bytes(program.image)

    def run(how: str):
        command = [sys.executable, "-c", PARSE, library, how, tmp_path]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    return run


@pytest.mark.parametrize("how", ["ctypes", "registry"])
def test_builds_an_engine(how, parse, programs):
    """dlopen 与 load_library 都能登记；由 Python 插件写下的字段还原出插件；在引擎里是一层，形状、workspace 与 Python 一侧相同，
    机器码在引擎里。
    """
    done = parse(how)
    assert done.returncode == 0, done.stdout + done.stderr
    restored, shape, layer = done.stdout.splitlines()
    assert restored == "LatentAttention"
    assert shape == "(-1, -1, 8, 64) HALF"
    assert layer.count("custom_layer") == 1
    assert f"[{programs['LatentAttention'].workspace(attention_shapes(4, 8, 128))}]" in layer


def test_refuses_a_node_without_kernels(parse):
    """没有机器码的节点：解析失败，说明由谁编译，不崩溃。"""
    done = parse("bare")
    assert done.returncode == 1
    assert "节点 core 没有字段 program" in done.stdout
