"""specs 对 int4 校准的承诺：EXPORT-37、PARITY-20、PARITY-21。"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

import deepseek_export
from deepseek_export import DsxError, Quantization
from deepseek_export.bundle import Bundle
from deepseek_export.calibration import read_calibration
from deepseek_export.checkpoint.synthetic import write_checkpoint
from deepseek_export.cli.demo import CHECKPOINT
from deepseek_export.cli.main import cli
from deepseek_export.engine.derived import buildable_bundle
from tests.bundles import edit_weight, tampered
from tests.integration.cli import TINY

pytestmark = [pytest.mark.contract, pytest.mark.heavy]

INT4 = Quantization(kind="int4")
LINES = (
    "And God said, Let there be light: and there was light.",
    "床前明月光，疑是地上霜。举头望明月，低头思故乡。",
    "In the beginning God created the heaven and the earth.",
    "学而时习之，不亦说乎？有朋自远方来，不亦乐乎？",
)


def _export(out: Path, text: Path, checkpoint: Path = CHECKPOINT, **options) -> Bundle:
    given = {"target": "ort-cpu", "quantization": INT4, "calibrate": text} | options
    return deepseek_export.export(checkpoint, out, given.pop("profile", "mla+moe"), **given)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n".join(LINES * 12), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def bundle(text: Path, tmp_path_factory) -> Bundle:
    return _export(tmp_path_factory.mktemp("calibrated") / "out", text)


def test_what_is_calibrated(bundle: Bundle, text: Path):
    """EXPORT-37：int4 的全部校准，w_kv_b 与词嵌入不动；方法、文本、阻尼与没有校准到的写进 manifest，暂存的码不留下。"""
    assert bundle.manifest.quantization is not None
    entry = bundle.manifest.quantization.calibration
    assert entry is not None
    assert (entry.method, entry.file, entry.damping) == ("gptq", "text.txt", 0.01)
    assert entry.tokens == 512 * entry.windows
    recipes = bundle.manifest.weights.recipes
    parts = {name for name, recipe in recipes.items() if recipe.form and recipe.form.kind == "int4"}
    assert parts == {name for name, recipe in recipes.items() if recipe.calibrated}
    sources = {source for name in parts for source in recipes[name].sources}
    assert entry.tensors + len(entry.nearest) == len(sources)
    assert set(entry.nearest) <= sources
    assert bool(entry.nearest) == any("校准" in line for line in bundle.manifest.fallbacks)
    assert {path.name for path in bundle.path.iterdir()} == {
        *("manifest.json", "model.onnx", "reports", "weights"),
        *(
            path.name
            for path in CHECKPOINT.iterdir()
            if path.name.endswith(".json") and "held" not in path.name
        ),
    }
    report = json.loads((bundle.path / "reports/export.json").read_text(encoding="utf-8"))
    errors = report["quantization"]["tensors"]
    assert all(0.02 < error["relative"] < 0.4 for name, error in errors.items() if name in parts)


@pytest.mark.parametrize("levels", [["op", "block"], pytest.param(["model"], marks=pytest.mark.slow)])
def test_the_graph_equals_pytorch_with_the_same_codes(bundle: Bundle, levels: list):
    """PARITY-20：校准过的，参照从权重文件里读回同样的码，op、block、model 照样在表内。"""
    report = deepseek_export.verify(bundle.path, levels=levels)
    assert report.passed, report.first_failure


def test_codes_of_another_tensor_are_caught(bundle: Bundle, tmp_path: Path):
    """PARITY-20：一层里两个专家的码互换，还原出的权重对不上检查点。"""
    name = "model.layers.2.mlp.experts.*.down_proj.weight.int4"
    swap = edit_weight(bundle, name, lambda codes: codes[[1, 0, *range(2, len(codes))]])
    broken = tampered(bundle, tmp_path, swap)
    with pytest.raises(DsxError) as error:
        deepseek_export.verify(broken.path, levels=["op"], verify_weights=False)
    assert error.value.code == "DSX-E664"
    assert "model.layers.2.mlp.experts.0.down_proj.weight" in error.value.what


def test_the_result_does_not_depend_on_threads(bundle: Bundle, text: Path, tmp_path: Path):
    """EXPORT-37：换一个线程数、用命令行再导出，权重文件逐字节相同；dsx export 写明用了什么，dsx inspect 也列出。"""
    out, before = str(tmp_path / "out"), torch.get_num_threads()
    arguments = ["-p", "mla+moe", "--target", "ort-cpu", "--quant", "int4", "--calibrate", str(text)]
    torch.set_num_threads(1 if before > 1 else 2)
    try:
        result = CliRunner().invoke(cli, ["export", str(CHECKPOINT), "-o", out, *arguments])
    finally:
        torch.set_num_threads(before)
    assert result.exit_code == 0, result.output
    assert "GPTQ" in result.output
    assert Bundle.open(out).manifest.files == bundle.manifest.files
    assert "GPTQ，按 text.txt" in CliRunner().invoke(cli, ["inspect", out]).output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("profile", "target", "changes"),
    [
        ("mla+moe+mtp", "ort-cpu", {"tie_word_embeddings": True, "num_nextn_predict_layers": 1}),
        ("moe", "tensorrt", {"q_lora_rank": None}),
    ],
)
def test_every_kind_of_layer(tmp_path: Path, text: Path, profile: str, target: str, changes: dict):
    """EXPORT-37：MTP 模块、展开的 kv_b、共享的 lm_head、有符号的码也校准；参照读回的就是图里的。"""
    widths = {"hidden_size": 64, "moe_intermediate_size": 32, "intermediate_size": 64, "vocab_size": 768}
    ranks = {"q_lora_rank": 32, "kv_lora_rank": 32, "max_position_embeddings": 256}
    config = {**TINY, **widths, **ranks, **changes}
    checkpoint = write_checkpoint(tmp_path / "ckpt", config, mtp="mtp" in profile)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(CHECKPOINT / name, checkpoint / name)
    bundle = _export(tmp_path / "out", text, checkpoint, profile=profile, target=target)
    int4 = [one for one in bundle.manifest.weights.recipes.values() if one.form and one.form.kind == "int4"]
    assert int4
    assert all(recipe.calibrated for recipe in int4)
    report = deepseek_export.verify(bundle.path, levels=["op", "block"])
    assert report.passed, report.first_failure


class TestRefusals:
    """EXPORT-37：校准不了的按码拒绝，不产生 bundle。"""

    @pytest.mark.parametrize(
        ("options", "code"),
        [
            ({"quantization": Quantization(kind="int8")}, "DSX-E660"),
            ({"quantization": None}, "DSX-E660"),
            ({"weights": "reference"}, "DSX-E660"),
        ],
    )
    def test_only_packed_int4(self, tmp_path: Path, text: Path, options: dict, code: str):
        with pytest.raises(DsxError) as error:
            _export(tmp_path / "out", text, **options)
        assert error.value.code == code
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize(
        ("content", "code"),
        [
            (None, "DSX-E661"),
            (b"", "DSX-E661"),
            (b" \n\t\n", "DSX-E661"),
            (b"\x80\x81\xff" * 400, "DSX-E661"),
            (b"words\0words" * 400, "DSX-E661"),
            (b"too short", "DSX-E662"),
        ],
    )
    def test_the_text(self, tmp_path: Path, content: bytes | None, code: str):
        path = tmp_path / "text.txt"
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(DsxError) as error:
            _export(tmp_path / "out", path)
        assert error.value.code == code
        assert not (tmp_path / "out").exists()

    def test_a_text_that_is_too_long(self, tmp_path: Path):
        path = tmp_path / "text.txt"
        with path.open("wb") as file:
            file.truncate((64 << 20) + 1)
        with pytest.raises(DsxError) as error:
            _export(tmp_path / "out", path)
        assert error.value.code == "DSX-E661"

    def test_a_directory_is_not_a_text(self, tmp_path: Path):
        with pytest.raises(DsxError) as error:
            _export(tmp_path / "out", tmp_path)
        assert error.value.code == "DSX-E661"

    def test_no_tokenizer(self, tmp_path: Path, text: Path):
        checkpoint = write_checkpoint(tmp_path / "ckpt", dict(TINY))
        with pytest.raises(DsxError) as error:
            _export(tmp_path / "out", text, checkpoint)
        assert error.value.code == "DSX-E663"

    def test_a_tokenizer_of_another_model(self, text: Path):
        with pytest.raises(DsxError) as error:
            read_calibration(text, lambda words: list(range(1000)), None, 97, 128)
        assert error.value.code == "DSX-E663"

    def test_option_without_quant(self, tmp_path: Path, text: Path):
        arguments = ["export", str(CHECKPOINT), "-o", str(tmp_path / "out"), "--calibrate", str(text)]
        result = CliRunner().invoke(cli, arguments)
        assert result.exit_code == 1
        assert "DSX-E705" in result.output

    def test_an_engine_from_a_calibrated_bundle(self, bundle: Bundle):
        """另导出的一份没有校准，不悄悄代替它。"""
        flavour = SimpleNamespace(target="tensorrt-rtx")
        with pytest.raises(DsxError) as error:
            buildable_bundle(bundle, flavour)
        assert error.value.code == "DSX-E660"
        assert "--calibrate FILE" in error.value.todo


def test_long_texts_are_sampled_evenly(tmp_path: Path):
    """EXPORT-37：窗数有上限，多的均匀地取；每窗以 bos 开头。"""
    path = tmp_path / "text.txt"
    path.write_text("words", encoding="utf-8")
    found = read_calibration(path, lambda words: range(300_000), 7, 300_000, 2048)
    assert len(found.windows) == 128
    assert all(len(window) == 512 and int(window[0]) == 7 for window in found.windows)
    starts = [int(window[1]) for window in found.windows]
    assert starts[0] == 0
    assert starts[-1] > 290_000
    gaps = np.diff(starts)
    assert gaps.max() - gaps.min() <= 511
