"""specs/tensorrt：没有 GPU 时能证明的部分。用 TensorRT-RTX 建引擎；引擎的数值要有 GPU 才能跑。"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import onnx
import onnxruntime
import pytest
from click.testing import CliRunner

import deepseek_export
from deepseek_export.bundle import Bundle, BundleWeights
from deepseek_export.bundle.by_reference import BY_RECIPE_FILE
from deepseek_export.bundle.graph import external_location
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.cli.build import command as build_command
from deepseek_export.engine import plugins as plugin_module
from deepseek_export.engine.build import build_engine, build_engine_bytes, check_plugins
from deepseek_export.engine.flavour import choose, device_sm, load
from deepseek_export.engine.graph import engine_graph
from deepseek_export.engine.layers import activation_bytes, layer_counts, parse_layers
from deepseek_export.engine.logger import logger_for
from deepseek_export.engine.plugins import building_for, registered_creators
from deepseek_export.engine.record import EngineRecord
from deepseek_export.errors import DsxError
from deepseek_export.kernels.compile import compile_table
from deepseek_export.kernels.latent_attention_launch import latent_attention_launch
from deepseek_export.ops.table import LATENT_ATTENTION
from deepseek_export.progress import Progress
from tests.engines import assert_listing, assert_plugin_layers, refused
from tests.integration.cli import DSX, environment
from tests.rebuilt import assert_rebuilt, kernel_images, read_engine
from tools.make_engine_graphs import (
    ARCHES,
    CASES,
    ENGINE_GRAPHS,
    NAMES,
    SHAPES,
    build_for,
    listing_name,
    make_bundle,
)
from tools.make_graphs import CONFIGS

pytestmark = [pytest.mark.contract, pytest.mark.heavy]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tensorrt")


@pytest.fixture(scope="module")
def bundle(folder) -> Bundle:
    """deepseek_v3 小配置的 tensorrt-rtx float16 bundle（MLA + MoE）。"""
    return make_bundle("deepseek_v3", folder)


@pytest.fixture(scope="module")
def built(bundle):
    """为 sm89 建好的引擎，以及期间插件方法被调用的次序。"""
    with building_for(89) as observer:
        engine = build_for(bundle, 89)
    return engine, observer.calls


def only_decode(engine):
    """只建解码配置，快一些。"""
    return {"decode": dict(engine.record.plans["model.plan"].profiles)["decode"]}


def test_every_mla_and_moe_layer_is_one_plugin_layer(bundle, built):
    """TRT-3：解码配置里每层 MLA、每个 MoE 层恰好一个插件层；prefill 的注意力融成原生核，吸收的矩阵乘被删掉。"""
    engine, _ = built
    config = bundle.manifest.model
    assert_plugin_layers(engine.layers["model.plan"], config.num_hidden_layers, config.num_moe_layers)


def test_layers_match_what_is_recorded(built):
    """TRT-3：引擎的层逐行记在 graphs/engines/。"""
    assert_listing("deepseek_v3", 89, built[0].layers)


def test_the_workspace_follows_the_span_not_the_capacity(built, bundle, tmp_path):
    """TRT-15、TRT-18：构建日志里权重与中间值的字节数：prefill 看的行数相同，容量四倍，一个字节也不多；看的行数多了才多。解码的与容量无关。"""
    flavour, shapes = choose("rtx"), built[0].record.shapes
    trt, found = load(flavour), {}
    folder = shutil.copytree(built[0].path, tmp_path / "engine")
    for capacity, span in ((128, 128), (512, 128), (512, 512)):
        graph = engine_graph(bundle.path / "model.onnx", capacity)
        onnx.save(graph.model, folder / "model.onnx")
        profiles = {name: dict(one) for name, one in shapes.profiles(bundle.manifest.profile, True).items()}
        profiles["prefill"] |= {"S": (9, 16, 32), "L": (1, 1, 1), "P": (1, 32, span)}
        build_engine_bytes(trt, flavour, folder / "model.onnx", 89, profiles, Progress())
        found[capacity, span] = activation_bytes(logger_for(trt).messages(), list(profiles))
    assert found[128, 128] == found[512, 128]
    assert found[512, 512]["prefill"] > found[512, 128]["prefill"] > 0
    assert found[512, 512]["decode"] == found[128, 128]["decode"] > 0
    plan = built[0].record.plans["model.plan"]
    assert set(plan.workspace) == {"decode", "prefill"}
    assert plan.weights is not None
    assert 0.9 * (bundle.path / "weights/model.safetensors").stat().st_size < plan.weights < plan.bytes


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_layers_of_every_arch_match_what_is_recorded(name, tmp_path):
    """TRT-3、TRT-13：SM80、SM86、SM89、SM120；V2、V3、GLM-5，带 MTP 的演示检查点，以及 bfloat16、int8、int4、FP8 的。"""
    bundle = make_bundle(name, tmp_path)
    config = bundle.manifest.model
    for sm in ARCHES:
        engine = build_for(bundle, sm)
        assert_listing(name, sm, engine.layers)
        indexers = sum(map(config.runs_indexer, range(config.num_hidden_layers)))
        counts = (config.num_hidden_layers, config.num_moe_layers, indexers)
        case = CASES[name]
        updates = config.num_hidden_layers if bundle.manifest.cache.dtype == "int8" else 0
        assert_plugin_layers(engine.layers["model.plan"], *counts, case.experts, case.linears, updates)
        if name == "demo":
            assert_plugin_layers(engine.layers["mtp.plan"], 1, 1)


def test_engine_directory_describes_itself(bundle, built):
    """TRT-6：记着发行、版本、SM、bundle 的哈希；旁边的 ONNX 与 layers.json 说的是同一件事。"""
    engine, _ = built
    directory = bundle.path / "engines/rtx-sm89"
    record = EngineRecord.read(directory)
    assert record == engine.record
    assert (record.flavour, record.version, record.sm) == ("rtx", load(choose("rtx")).__version__, 89)
    digest = hashlib.sha256((bundle.path / "manifest.json").read_bytes()).hexdigest()
    record.check(directory, record.version, 89, digest)
    for name, plan in record.plans.items():
        assert hashlib.sha256((directory / name).read_bytes()).hexdigest() == plan.sha256
        assert list(plan.profiles) == ["decode", "prefill"]
    fused = record.plans["model.plan"].fused_attention
    assert (fused, record.plans["model.plan"].unfused_attention) == (
        bundle.manifest.model.num_hidden_layers,
        [],
    )
    listed = json.loads((directory / "layers.json").read_text(encoding="utf-8"))
    found = listed["model.plan"]["decode"]
    assert sum(layer["op"] is not None for layer in found) == sum(
        count
        for kind, count in record.plans["model.plan"].layers["decode"].items()
        if kind.startswith("dsx::")
    )


def test_the_onnx_beside_the_engine_runs_on_onnxruntime(built):
    """TRT-2：引擎旁边的 ONNX 连同权重就是解析时用的那一份，普通 ONNX Runtime 能加载。"""
    path = built[0].path / "model.onnx"
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    caches = [node for node in session.get_inputs() if node.name.startswith("kv_cache.")]
    assert {node.shape[2] for node in caches} == {built[0].record.shapes.capacity}


def test_plugin_methods_are_called_in_the_expected_order(built):
    """TRT-4：建引擎时 TensorRT 先问类型与形状，再问格式，配置之后才要 workspace 与序列化字段；从不 enqueue。"""
    first = {name: index for index, name in reversed(list(enumerate(built[1])))}
    order = [
        "create_plugin",
        "get_output_data_types",
        "get_output_shapes",
        "supports_format_combination",
        "configure_plugin",
        "get_workspace_size",
        "get_fields_to_serialize",
    ]
    assert sorted(order, key=first.__getitem__) == order
    assert set(first) == set(order)


def test_kernel_binaries_are_inside_the_plan(built):
    """TRT-4：plan 里有启动说明与 cubin，运行时不再编译。"""
    plan = (built[0].path / "model.plan").read_bytes()
    for text in (
        b"dsx-program 2",
        b"op LatentAttention 89",
        b"op MoeExperts 89",
        b"latent_attention_partial",
    ):
        assert text in plan
    assert plan.count(b"\x7fELF") > 0


def test_serialised_fields_restore_the_program(built):
    """TRT-4：序列化的两个字段还原出同一个程序；没有驱动时在挂到上下文的那一步报码。"""
    trt = load(choose("rtx"))
    spec = LATENT_ATTENTION
    program = compile_table(latent_attention_launch(89, 4, 16, 8, 0.2, "float16"))
    original = plugin_module.plugin_class(trt, spec)({"kv_lora_rank": 16, "scale": 0.2}, program)
    creator = registered_creators(trt)[spec.name]
    fields = original.get_fields_to_serialize()
    restored = creator.create_plugin("x", fields, trt.TensorRTPhase.RUNTIME)
    assert restored.program == program
    assert restored.clone().program is restored.program
    if device_sm() is None:
        with building_for(89) as target:
            assert restored.attach_to_context(None) is None
        refused("DSX-E905", target.raise_failure, "挂到上下文 ")


def test_without_plugins_the_function_bodies_build(built):
    """TRT-4：插件没有登记时，同一个 ONNX 由函数体建成原生层。"""
    flavour = choose("rtx")
    trt = load(flavour)
    registry, creators = trt.get_plugin_registry(), registered_creators(trt)
    for creator in creators.values():
        assert registry.deregister_creator(creator)
    try:
        profiles = only_decode(built[0])
        content, text = build_engine_bytes(
            trt, flavour, built[0].path / "model.onnx", 89, profiles, Progress()
        )
    finally:
        for creator in creators.values():
            assert registry.register_creator(creator, "dsx")
    assert not isinstance(content.obj, bytes), "引擎是 TensorRT 的那块内存，没有复制"
    counts = layer_counts(parse_layers(text, list(profiles), {})["decode"])
    assert "custom_layer" not in counts
    assert counts["gemm"] > 0


def test_rebuilding_changes_only_the_numbering(bundle, built):
    """TRT-7：重建得到同样的 ONNX、层、cubin 与权重，同样大小的 plan；变的只有编号与次序，不到千分之一个字节。"""
    old = read_engine(built[0].path)
    again = build_for(bundle, 89)
    assert_rebuilt(old, read_engine(again.path), again.path)
    plan = bytearray(old["model.plan"])
    plan[next(iter(kernel_images(old["model.plan"]))) + 64] ^= 1  # 第一个 cubin 里改一位就要看得出来
    with pytest.raises(AssertionError):
        assert_rebuilt(old, {**old, "model.plan": bytes(plan)}, again.path)


@pytest.mark.slow
def test_rebuilding_in_fresh_processes_changes_only_the_numbering(tmp_path):
    """TRT-7：带 MTP 的演示检查点，SM80、SM89、SM120，两次各用一个新的进程。"""
    bundle = make_bundle("demo", tmp_path)
    arches = ",".join(f"sm{sm}" for sm in ARCHES)
    command = [*DSX, "build", str(bundle.path), "--arch", arches, "--profile-shapes", SHAPES]
    folders = [bundle.path / f"engines/rtx-sm{sm}" for sm in ARCHES]
    subprocess.run(command, check=True)
    before = [read_engine(folder) for folder in folders]
    subprocess.run(command, check=True)
    for folder, old in zip(folders, before, strict=True):
        assert_rebuilt(old, read_engine(folder), folder)


def test_an_unsupported_arch_is_refused(bundle, built):
    """TRT-5：RTX 不支持的 SM 有自己的码。"""
    refusal = refused("DSX-E912", build_engine, bundle, 90, choose("rtx"), built[0].record.shapes)
    assert "sm90" in refusal.what


def test_weights_by_reference_build_the_same_engine(built, tmp_path):
    """EXPORT-21：按引用的 bundle 直接建引擎，指得进检查点的由解析器读，其余按配方逐个交给它；层同打包的，plan 里有专家的内容。"""
    checkpoint = write_checkpoint(tmp_path / "checkpoint", CONFIGS["deepseek_v3"], dtype="float16")
    options = {"target": "tensorrt-rtx", "dtype": "float16", "weights": "reference"}
    bundle = deepseek_export.export(checkpoint, tmp_path / "out", "mla+moe", **options)
    graph = onnx.load(bundle.model_path, load_external_data=False).graph
    places = Counter(external_location(tensor) == BY_RECIPE_FILE for tensor in graph.initializer)
    assert places[True] > 0
    assert places[False] > 0
    engine = build_for(bundle, 89)
    assert engine.layers == built[0].layers
    plan = (engine.path / "model.plan").read_bytes()
    experts = [
        a
        for name, a in BundleWeights(bundle).arrays(bundle.manifest.main.by_recipe).items()
        if ".experts." in name
    ]
    assert len(experts) == 3 * bundle.manifest.model.num_moe_layers
    assert all(array.tobytes() in plan for array in experts)


def test_failures_inside_a_plugin_surface_as_ours(built, monkeypatch):
    """TRT-4：插件里的异常带着自己的文字出来；DsxError 原样出来；TensorRT 自己的错误附原话。"""
    flavour, path = choose("rtx"), built[0].path / "model.onnx"
    trt, profiles = load(flavour), only_decode(built[0])

    def fail_with(error: Exception):
        def broken(*_):
            raise error

        monkeypatch.setattr(
            plugin_module, "LAUNCH_TABLES", dict.fromkeys(plugin_module.LAUNCH_TABLES, broken)
        )

    fail_with(ValueError("boom"))
    error = refused("DSX-E916", build_engine_bytes, trt, flavour, path, 89, profiles, Progress())
    assert "ValueError：boom" in error.what
    fail_with(DsxError("DSX-E903", "不行", "换一个"))
    refused("DSX-E903", build_engine_bytes, trt, flavour, path, 89, profiles, Progress())
    model = onnx.load(path, load_external_data=False)
    next(node for node in model.graph.node if node.op_type == "MatMul").op_type = "NoSuchOp"
    broken = path.with_name("broken.onnx")
    onnx.save(model, broken)
    try:
        error = refused("DSX-E914", build_engine_bytes, trt, flavour, broken, 89, profiles, Progress())
    finally:
        broken.unlink()
    assert "NoSuchOp" in error.what


def test_a_plugin_that_did_not_survive_fails_the_build(built):
    """TRT-3：预期的插件不在引擎里就失败，并说出是哪一个。"""
    layers = built[0].layers["model.plan"]["decode"]
    error = refused("DSX-E915", check_plugins, "model.plan", layers, {"layers.9/MoeExperts": "MoeExperts"})
    assert "layers.9/MoeExperts" in error.what


def test_attention_that_did_not_fuse_is_named(bundle, monkeypatch):
    """TRT-3：prefill 的注意力没有融合时，记进 engine.json、命令行与进度各说一遍；结果仍然对，所以不失败。"""
    nodes = [f"layers.{i}.self_attn/mla/Attention" for i in range(bundle.manifest.model.num_hidden_layers)]

    def without_fused_attention(text, *rest):
        """TensorRT 的层清单，像是没有一个融合的注意力核。"""
        assert "mha" in text
        return parse_layers(text.replace("mha", "mm"), *rest)

    monkeypatch.setattr("deepseek_export.engine.build.parse_layers", without_fused_attention)
    arguments = [str(bundle.path), "--arch", "sm86", "--profile-shapes", "T=256"]
    result = CliRunner().invoke(build_command, arguments, catch_exceptions=False)
    directory = bundle.path / "engines/rtx-sm86"
    plan = EngineRecord.read(directory).plans["model.plan"]
    shutil.rmtree(directory)
    assert (plan.fused_attention, plan.unfused_attention) == (0, nodes)
    assert f"没有融合的：{nodes[0]}" in result.output
    assert "没有融成一个原生核" in result.output


def test_progress_comes_from_tensorrt(built):
    """进度来自 TensorRT 自己的进度监视器：有总步数，逐步前进。"""
    seen: list[tuple[str, int | None]] = []
    steps: list[str] = []

    class Watch(Progress):
        def start(self, stage, total=None, unit="items"):
            seen.append((stage, total))

        def advance(self, amount=1, detail=""):
            steps.append(detail)

    flavour = choose("rtx")
    profiles = only_decode(built[0])
    build_engine_bytes(load(flavour), flavour, built[0].path / "model.onnx", 89, profiles, Watch())
    stage, total = seen[-1]
    assert stage == "TensorRT 构建 model（sm89）"
    assert total is not None
    assert 0 < len(steps) <= total


def test_a_signal_while_tensorrt_builds_stops_it(bundle):
    """TRT-14：TensorRT 构建时收到 SIGTERM：说一句，建完这一个就停，退出码 143，不留半个引擎，也不接着建下一个。"""
    command = [*DSX, "build", str(bundle.path), "--arch", "sm86,sm80", "--profile-shapes", SHAPES]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment()) as process:
        assert any("TensorRT 构建 model" in line for line in process.stderr)
        process.terminate()
        rest = process.stderr.read()
    assert process.returncode == 143, rest
    assert "Traceback" not in rest
    assert "建完这一个就退出" in rest
    assert "构建 model（sm80）" not in rest
    assert [path for path in (bundle.path / "engines").iterdir() if "sm89" not in path.name] == []


def test_build_command(bundle):
    """TRT-3：``dsx build`` 打印每个配置的插件层；写法不对的 --arch 在动工之前拒绝。"""
    arguments = [str(bundle.path), "--arch", "sm80", "--profile-shapes", "T=256"]
    result = CliRunner().invoke(build_command, arguments, catch_exceptions=False)
    assert "dsx::LatentAttention×2" in result.output
    assert "2 / 2 层" in result.output
    assert (bundle.path / "engines/rtx-sm80/model.plan").is_file()
    shutil.rmtree(bundle.path / "engines/rtx-sm80")
    refused(
        "DSX-E912", lambda: CliRunner().invoke(build_command, [*arguments[:2], "ada"], catch_exceptions=False)
    )


def test_listings_are_recorded_for_every_arch_and_nothing_else():
    names = {listing_name(name, sm) for name in NAMES for sm in ARCHES}
    assert {path.name for path in Path(ENGINE_GRAPHS).iterdir()} == names
