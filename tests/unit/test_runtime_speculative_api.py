"""投机解码的拒绝、CompiledModel 与命令行。"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from deepseek_export import api
from deepseek_export.backend.ort.runner import OrtRunner
from deepseek_export.bundle import Bundle
from deepseek_export.checkpoint.config import parse_model_config
from deepseek_export.cli.main import main
from deepseek_export.errors import DsxError
from deepseek_export.model import CompiledModel
from deepseek_export.runtime import (
    MeasuredFloor,
    ModelSession,
    SamplingParams,
    SpeculativeFloor,
    SpeculativeGenerator,
)
from tests.unit.test_runtime_speculative_toy import LIMIT, build, make_drafts, save_draft, save_main
from tests.unit.test_runtime_toy import make_toy, save_toy

pytestmark = pytest.mark.unit

TOY = make_toy(LIMIT)


@pytest.mark.parametrize(
    ("verify", "params", "todo"),
    [
        ("greedy", {"temperature": 0.7}, "mtp.verify=rejection"),
        ("rejection", {}, "mtp.verify=greedy"),
        ("rejection", {"temperature": 0.7, "top_k": 3}, "top-k"),
        ("rejection", {"temperature": 0.7, "top_p": 0.5}, "top-p"),
        ("rejection", {"temperature": 0.7, "min_p": 0.1}, "min-p"),
        ("rejection", {"temperature": 0.7, "presence_penalty": 0.5}, "speculative=False"),
        ("greedy", {"frequency_penalty": -0.5}, "speculative=False"),
        ("greedy", {"repetition_penalty": 1.1}, "speculative=False"),
        ("greedy", {"min_tokens": 2}, "speculative=False"),
        ("greedy", {"logit_bias": {1: 1.0}}, "speculative=False"),
        ("greedy", {"allowed_token_ids": [1]}, "speculative=False"),
    ],
)
def test_incompatible_sampling(tmp_path: Path, verify: str, params: dict[str, Any], todo: str) -> None:
    generator = build(tmp_path, TOY, make_drafts(TOY, 1), 1, verify=verify)
    with pytest.raises(DsxError, match="DSX-E515") as caught:
        generator.generate([[1]], 2, SamplingParams(**params))
    assert todo in caught.value.todo


def test_refused_construction(tmp_path: Path) -> None:
    good = build(tmp_path, TOY, make_drafts(TOY, 1), 1)
    for count in (0, 9, True, 1.5):
        with pytest.raises(DsxError, match="DSX-E516"):
            SpeculativeGenerator(good.session, good.drafts, None, (), count, "greedy")  # type: ignore[arg-type]
    with pytest.raises(DsxError, match="DSX-E516"):
        SpeculativeGenerator(good.session, [], None, (), 1, "greedy")
    for floor in ((-1.0, 4), (float("nan"), 4), (0.5, 0)):
        with pytest.raises(DsxError, match="DSX-E516"):
            SpeculativeFloor(*floor)
    for sizes in ((0, 4), (16, 0), (True, 4), (16, 1.5)):
        with pytest.raises(DsxError, match="DSX-E516"):
            MeasuredFloor(*sizes)  # type: ignore[arg-type]
    with pytest.raises(DsxError, match="DSX-E508"):
        SpeculativeGenerator(good.session, good.drafts, None, (), 1, "rejection")
    with pytest.raises(DsxError, match="DSX-E508"):
        ModelSession(OrtRunner(save_draft(make_drafts(TOY, 1)[0], tmp_path / "x.onnx"), max_positions=LIMIT))
    session = ModelSession(OrtRunner(save_toy(TOY, tmp_path / "plain.onnx"), max_positions=LIMIT))
    assert session.verify_mode is None
    one = np.array([[0]])
    with pytest.raises(ValueError, match="不带草稿验证"):
        session.verify(one, np.array([0]), one, np.empty((1, 0)), session.new_caches(1))


def test_unusable_logits_are_refused(tmp_path: Path) -> None:
    generator = build(tmp_path, TOY, make_drafts(TOY, 1), 1)
    path = save_main(TOY, tmp_path / "nan.onnx")
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name == "head":
            tensor.CopyFrom(numpy_helper.from_array(TOY.weights["head"] * np.float32(np.nan), "head"))
    onnx.save_model(model, path)
    session = ModelSession(OrtRunner(path, max_positions=LIMIT))
    with pytest.raises(DsxError, match="DSX-E505"):
        SpeculativeGenerator(session, generator.drafts, None, (), 1, "greedy").generate([[1]], 4)


def _compiled(folder: Path, with_drafts: bool = True, **options: Any) -> CompiledModel:
    """不经导出，直接拼一个 bundle 的样子。"""
    save_main(TOY, folder / "model.onnx")
    save_draft(make_drafts(TOY, 1)[0], folder / "mtp.onnx")
    configs = json.loads((Path(__file__).parents[2] / "tools/published_configs.json").read_text())
    config = parse_model_config(
        configs["V3"] | {"max_position_embeddings": LIMIT, "eos_token_id": None}, "V3"
    )
    mtp = SimpleNamespace(enabled=with_drafts, num_draft_tokens=2, verify="greedy")
    weights = SimpleNamespace(mode="packed", recipes={})
    manifest: Any = SimpleNamespace(
        model=config,
        profile=SimpleNamespace(mtp=mtp),
        weights=weights,
        dtype="float32",
        target="portable",
        graphs=[],
        main=SimpleNamespace(file="model.onnx", by_recipe=[]),
        drafts=[SimpleNamespace(file="mtp.onnx", by_recipe=[])] if with_drafts else [],
    )
    return CompiledModel(Bundle(folder, manifest), **options)


def test_compiled_model_chooses(tmp_path: Path) -> None:
    model = _compiled(tmp_path)
    drafted, alone = model.generate([[5, 2]], 12), model.generate([[5, 2]], 12, speculative=False)
    assert drafted.token_ids == alone.token_ids
    assert drafted.speculation is not None
    assert alone.speculation is None
    bare = _compiled(tmp_path, with_drafts=False)
    assert bare.generate([[5, 2]], 12).speculation is None
    with pytest.raises(DsxError, match="DSX-E517"):
        bare.generate([[5, 2]], 1, speculative=True)


def test_cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    limit: list[SpeculativeFloor] = []

    def load(bundle: Path, threads: int | None, backend: Any, *, speculative_floor: bool, **_: Any) -> Any:
        model = _compiled(tmp_path, threads=threads, backend=backend, speculative_floor=speculative_floor)
        assert model.speculative is not None
        if model.speculative.floor is not None:  # 缺省的看实测的用时，换成确定的
            model.speculative.floor = limit[0] if limit else None
        return model

    monkeypatch.setattr(api, "load", load)
    base = ["generate", str(tmp_path), "--ids", "5,2", "--max-new-tokens", "12"]

    def call(*more: str) -> tuple[str, str]:
        with pytest.raises(SystemExit) as caught:
            main([*base, *more])
        assert not caught.value.code
        return tuple(capsys.readouterr())  # type: ignore[return-value]

    out, err = call("--stats")
    assert "投机解码：接受率 第 1 个" in err
    plain_out, plain_err = call("--stats", "--no-speculative")
    assert plain_out == out
    assert "没有投机解码" in plain_err
    data = json.loads(call("--json")[0])
    assert len(data["acceptance"]) == 2
    assert data["main_calls"] >= 1
    assert data["fell_back"] is False
    assert "acceptance" not in json.loads(call("--json", "--no-speculative")[0])
    limit.append(SpeculativeFloor(8.0, window=1))
    assert call()[1].count("止损线") == 1
    assert "止损线" not in call("--no-floor")[1]
