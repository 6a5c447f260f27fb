"""specs 对只量化权重的承诺：EXPORT-32、PARITY-20、PARITY-21。"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner

import deepseek_export
from deepseek_export import DsxError, Quantization
from deepseek_export.bundle import Bundle, disk
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.cli.main import cli
from deepseek_export.parity.report import ParityReport
from deepseek_export.parity.tolerances import TOLERANCES
from deepseek_export.plan.written import HEADROOM, written_bytes
from deepseek_export.profile import resolve_profile
from tests.bundles import edit_weight, tampered
from tests.integration.cli import TINY

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

TEXT = (
    "And God said, Let there be light: and there was light.\n床前明月光，疑是地上霜。举头望明月，低头思故乡。\n"
    * 4
)


@pytest.fixture(scope="module")
def bundles(tmp_path_factory) -> dict[str, Bundle]:
    """演示检查点的 int8 与 int4；同一进程里第二次捕获不必再追踪。"""
    folder = tmp_path_factory.mktemp("quant")
    return {
        kind: deepseek_export.export(
            CHECKPOINT,
            folder / kind,
            "mla+moe",
            target="ort-cpu",
            quantization=Quantization.model_validate({"kind": kind}),
        )
        for kind in ("int8", "int4")
    }


@pytest.fixture(scope="module")
def reports(bundles, tmp_path_factory) -> dict[str, ParityReport]:
    text = tmp_path_factory.mktemp("text") / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    return {kind: deepseek_export.verify(bundle.path, text=text) for kind, bundle in bundles.items()}


@pytest.mark.parametrize(("kind", "ratio"), [("int8", 0.4), ("int4", 0.3)])
def test_what_is_quantised(bundles, kind: str, ratio: float):
    """EXPORT-32：线性层与专家都换掉，router、norm 仍是 float32，w_kv_b 总是 int8，词嵌入是 bfloat16 或 int8；误差进报告，最敏感的点名。"""
    bundle = bundles[kind]
    counts, recipes = bundle.manifest.main.op_counts, bundle.manifest.weights.recipes
    config = bundle.manifest.model
    experts, linear = f"dsx::{kind.capitalize()}Experts", f"dsx::{kind.capitalize()}Linear"
    assert counts[experts] == config.num_moe_layers
    assert counts[linear] == 4 * config.num_hidden_layers + 3 * config.num_hidden_layers + 1
    kept = {
        name.rpartition("layers.")[2].partition(".")[2] or name
        for name, r in recipes.items()
        if r.form is None and not name.endswith(".lookup")
    }
    assert kept == {
        "norm.weight",
        *(f"{name}_layernorm.weight" for name in ("input", "post_attention")),
        *(f"self_attn.{name}.weight" for name in ("q_a_layernorm", "kv_a_layernorm")),
        "mlp.gate.weight",
        "mlp.gate.e_score_correction_bias",
    }
    assert {r.dtype for r in recipes.values() if r.op == "scales"} == {"float16"}
    kv_b = [recipe for name, recipe in recipes.items() if name.endswith("kv_b_proj.weight.rows")]
    assert [(recipe.dtype, recipe.form.kind) for recipe in kv_b] == [
        ("int8", "int8")
    ] * config.num_hidden_layers
    assert recipes["model.embed_tokens.weight.lookup"].dtype == ("bfloat16" if kind == "int8" else "int8")
    report = json.loads((bundle.path / "reports/export.json").read_text(encoding="utf-8"))
    errors = report["quantization"]["tensors"]
    assert errors.keys() == {name for name, recipe in recipes.items() if recipe.op in ("codes", "rows")}
    worst = report["quantization"]["most_sensitive"]
    assert errors[worst[0]]["relative"] == max(error["relative"] for error in errors.values())
    float32 = sum(np.prod(shape) for shape in map(_shape, recipes.values())) * 4
    assert report["weight_bytes"] < ratio * float32


@pytest.mark.parametrize(
    ("profile", "target", "kind", "block", "keep", "changes"),
    [
        ("mla+moe", "ort-cpu", "int4", 64, ("layers.1.self_attn",), {"tie_word_embeddings": True}),
        pytest.param(
            *("moe", "ort-cpu", "int8", 32, ("o_proj", "layers.1.mlp.experts", "gate_proj"), {}),
            marks=pytest.mark.slow,
        ),
        pytest.param(*("mla", "ort-cpu", "int8", 32, (), {}), marks=pytest.mark.slow),
        ("mla+moe", "tensorrt", "int4", 32, ("lm_head",), {"moe_intermediate_size": 48}),
    ],
)
def test_the_planned_size_is_what_is_written(
    tmp_path: Path, profile: str, target: str, kind: str, block: int, keep: tuple[str, ...], changes: dict
):
    """EXPORT-31：磁盘预检与 ``dsx plan`` 用的字节数，与改完图之后的配方一个字节不差。"""
    shape = {"hidden_size": 64, "moe_intermediate_size": 32}
    checkpoint = write_checkpoint(tmp_path / "ckpt", {**TINY, **shape, **changes})
    resolved = resolve_profile(profile)
    quantization = Quantization.model_validate({"kind": kind, "block": block, "keep": keep})
    options = {"target": target, "quantization": quantization, "weights": "reference"}
    bundle = deepseek_export.export(checkpoint, tmp_path / "out", resolved, **options)
    manifest = bundle.manifest
    parts = written_bytes(manifest.model, resolved, 0, "float32", quantization, target == "tensorrt")
    assert sum(parts.values()) == sum(recipe.nbytes for recipe in manifest.weights.recipes.values())


def test_free_space_is_checked_against_the_quantised_size(bundles, tmp_path: Path, monkeypatch):
    """EXPORT-32：磁盘只放得下量化之后的，``--quant`` 照常导出；不量化的在动工之前拒绝，写明还差多少。"""
    free = HEADROOM + bundles["int4"].manifest.files["weights/model.safetensors"].bytes
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    options = {"target": "ort-cpu", "quantization": Quantization(kind="int4")}
    bundle = deepseek_export.export(CHECKPOINT, tmp_path / "int4", "mla+moe", **options)
    assert bundle.manifest.files == bundles["int4"].manifest.files
    with pytest.raises(DsxError) as error:
        deepseek_export.export(CHECKPOINT, tmp_path / "float32", "mla+moe", target="ort-cpu")
    assert error.value.code == "DSX-E404"
    assert "剩余 66.4 MiB，需要约 79.5 MiB，还差 13.2 MiB" in error.value.what


def _shape(recipe) -> tuple[int, ...]:
    if recipe.op == "scales":
        return (0,)
    return recipe.shape if recipe.of is None else recipe.of.shape


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_graph_equals_pytorch_with_the_same_weights(reports, kind: str):
    """PARITY-20：参照用同样的量化权重，op、block、model 都在表内；不逐 token 比，另有 loss 一级。"""
    report = reports[kind]
    assert report.passed, report.first_failure
    assert {case.level for case in report.cases} == {"op", "block", "model", "loss"} == set(report.levels)
    assert report.oracle.startswith("transformers")


def test_int8_is_within_one_percent(bundles, reports):
    """PARITY-21：int8 的 logits 相对误差不超过 1e-2，有算子库时全部 token 都算，没有时只算路由分叉之前的；int4 大一个量级，如实报告。"""
    int8, int4 = reports["int8"].loss, reports["int4"].loss
    assert int8 is not None
    assert int4 is not None
    assert int8.relative_error_before_a_flip is not None
    assert int8.relative_error_before_a_flip <= 1e-2
    assert bundles["int8"].manifest.cpu_library is None or int8.relative_error <= 1e-2
    assert int8.before_a_flip > 0.6 * int8.tokens
    assert int8.relative_error_before_a_flip <= int8.relative_error < int4.relative_error < 0.3
    for loss in (int8, int4):
        assert loss.perplexity is not None
        assert loss.perplexity.tokens > 100


def test_a_swapped_expert_is_still_caught(bundles, tmp_path: Path):
    """PARITY-20：容差放宽了，绑错的权重仍然不通过：一层里两个专家的码互换。"""
    bundle = bundles["int8"]
    name = "model.layers.2.mlp.experts.*.down_proj.weight.int8"
    broken = tampered(bundle, tmp_path, edit_weight(bundle, name, lambda w: w[[1, 0, *range(2, len(w))]]))
    report = deepseek_export.verify(broken.path, levels=["op", "block"])
    assert report.first_failure is not None
    assert report.first_failure.name.startswith("layers.2")


def test_by_reference_gives_the_same_numbers(bundles, tmp_path: Path):
    """EXPORT-32：按引用导出时，码与 scale 在加载时由配方算出，与打包的逐位相同。"""
    checkpoint = tmp_path / "ckpt"
    shutil.copytree(CHECKPOINT, checkpoint)  # 硬链接要在同一个文件系统
    bundle = deepseek_export.export(
        checkpoint,
        tmp_path / "out",
        "mla+moe",
        target="ort-cpu",
        weights="reference",
        quantization=Quantization(kind="int8"),
    )
    packed, referenced = (
        deepseek_export.load(b.path).generator.logits([[3, 1, 4, 1, 5]])[0] for b in (bundles["int8"], bundle)
    )
    assert np.array_equal(packed, referenced)


def test_a_quantised_bundle_generates(bundles):
    """EXPORT-32：量化的 bundle 照常生成。"""
    result = deepseek_export.load(bundles["int4"].path).generate("And God said", 8, ignore_eos=True)
    assert len(result.token_ids[0]) == 8


def test_command_line_reports_the_loss(bundles, tmp_path: Path):
    """PARITY-21：dsx verify 列出 loss 一级、误差与困惑度；dsx inspect 列出格式。"""
    text = tmp_path / "text.txt"
    text.write_text(TEXT, encoding="utf-8")
    path = str(bundles["int8"].path)
    result = CliRunner().invoke(cli, ["verify", path, "--level", "model", "--text", str(text)])
    assert result.exit_code == 0, result.output
    for shown in ("loss", "路由分叉之前", "困惑度", "logits 相对误差"):
        assert shown in result.output
    shown = CliRunner().invoke(cli, ["inspect", path]).output
    assert "int8，每 32 个一块" in shown


@pytest.fixture(scope="module")
def tensorrt_bundles(tmp_path_factory) -> dict[str, Bundle]:
    """演示检查点给 TensorRT 的 float16 bundle，int8 与 int4。"""
    folder = tmp_path_factory.mktemp("tensorrt-quant")
    return {
        kind: deepseek_export.export(
            CHECKPOINT,
            folder / kind,
            "mla+moe",
            target="tensorrt-rtx",
            dtype="float16",
            quantization=Quantization.model_validate({"kind": kind}),
        )
        for kind in ("int8", "int4")
    }


@pytest.mark.parametrize(("kind", "ratio"), [("int8", 0.61), ("int4", 0.37)])
def test_what_tensorrt_gets(tensorrt_bundles, bundles, kind: str, ratio: float):
    """EXPORT-33：量化的权重与 ort-cpu 的相同（那里另有 w_kv_b 与词嵌入），专家的由插件读，线性层 int8 的也是，int4 的由 DequantizeLinear 还原（与矩阵乘融成一层）；其余
    仍是浮点，连同误差进报告。"""
    bundle = tensorrt_bundles[kind]
    recipes = bundle.manifest.weights.recipes
    codes = [name for name, recipe in recipes.items() if recipe.op == "codes"]
    assert {recipes[name].dtype for name in codes} == {kind}
    assert {recipes[f"{name}.scales"].dtype for name in codes} == {"float16"}
    counts, experts = bundle.manifest.main.op_counts, bundle.manifest.model.num_moe_layers
    linears = {"int8": "dsx::QuantizedLinear", "int4": "ai.onnx::DequantizeLinear"}
    reads = linears.pop(kind)
    (other,) = linears.values()
    assert counts[reads] == len(codes) - 3 * experts
    assert other not in counts
    assert counts["dsx::QuantizedMoeExperts"] == experts
    assert "dsx::MoeExperts" not in counts
    own = {
        name
        for name in bundles[kind].manifest.formats
        if name.endswith(("kv_b_proj.weight", "embed_tokens.weight"))
    }
    assert bundle.manifest.formats.keys() == bundles[kind].manifest.formats.keys() - own
    assert bundle.manifest.fallbacks == []
    report = json.loads((bundle.path / "reports/export.json").read_text(encoding="utf-8"))
    assert report["quantization"]["tensors"].keys() == set(codes)
    plain = sum(
        np.prod(recipe.shape) * 2 if recipe.of is None else np.prod(recipe.of.shape) * 2
        for recipe in recipes.values()
        if recipe.op != "scales"
    )
    assert report["weight_bytes"] < ratio * plain


def test_tensorrt_graph_equals_pytorch_with_the_same_weights(tensorrt_bundles):
    """EXPORT-33、PARITY-20：没有激活的舍入，op、block 照 float16 的容差比，参照用还原的同一份权重。"""
    report = deepseek_export.verify(tensorrt_bundles["int4"].path, levels=["op", "block"])
    assert report.passed, report.first_failure
    assert {case.tolerance for case in report.cases} <= {
        TOLERANCES["op", "float16"],
        TOLERANCES["block", "float16"],
    }


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_tensorrt_loss(tensorrt_bundles, kind: str):
    """PARITY-21：TensorRT 的量化 bundle 同样报告损失；int8 连路由分叉之后的也在 1e-2 以内。"""
    report = deepseek_export.verify(tensorrt_bundles[kind].path)
    assert report.passed, report.first_failure
    loss = report.loss
    assert loss is not None
    assert loss.relative_error < {"int8": 1e-2, "int4": 0.15}[kind]


def test_tensorrt_codes_by_reference(tensorrt_bundles, tmp_path: Path):
    """EXPORT-33：按引用时 int4 的码在加载时生成，与打包的 logits 逐位相同。"""
    checkpoint = tmp_path / "ckpt"
    shutil.copytree(CHECKPOINT, checkpoint)
    bundle = deepseek_export.export(
        checkpoint,
        tmp_path / "out",
        "mla+moe",
        target="tensorrt-rtx",
        dtype="float16",
        weights="reference",
        quantization=Quantization(kind="int4"),
    )
    packed, referenced = (
        deepseek_export.load(b.path).generator.logits([[3, 1, 4, 1, 5]])[0]
        for b in (tensorrt_bundles["int4"], bundle)
    )
    assert np.array_equal(packed, referenced)


class TestRefusals:
    """EXPORT-32：说不清、做不到的请求按码拒绝，不产生 bundle。"""

    @pytest.mark.parametrize(
        ("target", "dtype", "keep", "code"),
        [
            ("portable", "float32", (), "DSX-E310"),
            ("ort-cpu", "float16", (), "DSX-E311"),
            ("ort-cpu", "float32", ("lmhead",), "DSX-E312"),
            ("ort-cpu", "float32", ("layers", "lm_head", "embed_tokens"), "DSX-E313"),
        ],
    )
    def test_export(self, bundles, tmp_path: Path, target, dtype, keep, code):
        quantization = Quantization(kind="int8", keep=keep)
        with pytest.raises(DsxError) as error:
            deepseek_export.export(
                CHECKPOINT,
                tmp_path / "out",
                "mla+moe",
                target=target,
                dtype=dtype,
                quantization=quantization,
            )
        assert error.value.code == code
        assert list(tmp_path.iterdir()) == []

    def test_text(self, bundles, v3_bundle: Bundle, tmp_path: Path):
        empty = tmp_path / "empty.txt"
        empty.write_text("", encoding="utf-8")
        for bundle, text in (
            (v3_bundle, empty),
            (bundles["int8"], empty),
            (bundles["int8"], tmp_path / "none.txt"),
        ):
            with pytest.raises(DsxError) as error:
                deepseek_export.verify(bundle.path, text=text)
            assert error.value.code == "DSX-E606"

    @pytest.mark.parametrize("options", [["--keep", "lm_head"], ["--quant-block", "64"]])
    def test_options_without_quant(self, tmp_path: Path, options):
        result = CliRunner().invoke(cli, ["export", str(CHECKPOINT), "-o", str(tmp_path / "out"), *options])
        assert result.exit_code == 1
        assert "DSX-E705" in result.output
