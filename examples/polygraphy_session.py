"""一次 Polygraphy 的会话：记下一个 bundle 的图算出什么，再拿另一个 bundle 的图与它比；不导入 dsx。

    python examples/polygraphy_session.py OUT --save golden.json
    python examples/polygraphy_session.py OTHER --against golden.json --atol 1e-3

输入写在存下的文件里，两次因此喂同样的东西；一致返回 0，不一致返回 1，并指出是哪个输出。比的是 logits 与 hidden：缓存的布局随方案变。
拿来比的可以是换了目标、换了 dtype、改过图的 bundle，只要是同一个模型。
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from polygraphy.backend.onnxrt import OnnxrtRunner, SessionFromOnnx
from polygraphy.common import TensorMetadata
from polygraphy.comparator import Comparator, RunResults
from polygraphy.datatype import DataType
from polygraphy.json import load_json, save_json

try:
    from polygraphy.comparator import SimpleCompareFunc
except ImportError:  # 旧的 Polygraphy 里是一个类的静态方法
    from polygraphy.comparator import CompareFunc

    SimpleCompareFunc = CompareFunc.simple

#: 每个 bundle 都有、意思相同的输出。
COMPARED = ("logits", "hidden")


def make_inputs(ports: TensorMetadata, ids: list[int]) -> dict[str, np.ndarray]:
    """一次 prefill 的输入：token、位置、要每一行的 logits，以及全是零的缓存。"""
    feeds = {
        "input_ids": np.array([ids], np.int64),
        "past_lens": np.zeros(1, np.int64),
        "logits_positions": np.arange(len(ids), dtype=np.int64)[None],
    }
    for name, port in ports.items():
        if "cache." in name:
            _, heads, _, width = port.shape
            feeds[name] = np.zeros((1, heads, len(ids), width), DataType.to_dtype(port.dtype, "numpy"))
    return feeds


def run(bundle: Path, ids: list[int]) -> RunResults:
    """在 Polygraphy 的 ONNX Runtime 后端上跑一次，只留要比的输出，都换成 float32。"""
    with OnnxrtRunner(SessionFromOnnx(str(bundle / "model.onnx"))) as runner:
        outputs = runner.infer(make_inputs(runner.get_input_metadata(), ids))
        results = RunResults()
        results.add([{name: outputs[name].astype(np.float32) for name in COMPARED}], runner_name=str(bundle))
    return results


def main() -> int:
    """命令行。"""
    parser = argparse.ArgumentParser(description="用 Polygraphy 比较两个 bundle 的图。")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--ids", default="5,9,23,100,7,42", help="提示词的 token id；只在 --save 时有用")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--save", type=Path, help="跑一次，连同输入存到这里")
    what.add_argument("--against", type=Path, help="跑一次，与从前存下的比")
    parser.add_argument("--atol", type=float, default=1e-4, help="每个值至多差多少")
    arguments = parser.parse_args()
    # Polygraphy 不把缓存绑在原地，ONNX Runtime 每层会警告一次；只跑一次，复制无妨。
    ort.set_default_logger_severity(3)
    if arguments.save:
        ids = [int(token) for token in arguments.ids.split(",")]
        save_json({"ids": ids, "results": run(arguments.bundle, ids)}, str(arguments.save))
        return 0
    golden = load_json(str(arguments.against))
    results = run(arguments.bundle, golden["ids"])
    results.extend(golden["results"])
    compare = SimpleCompareFunc(atol=arguments.atol, rtol=0, check_error_stat="max")
    return 0 if bool(Comparator.compare_accuracy(results, compare_func=compare)) else 1


if __name__ == "__main__":
    sys.exit(main())
