"""``manifest.json``：bundle 的自述。写入与读取都经过这里的类型校验。"""

from __future__ import annotations

from pathlib import PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, model_validator

from deepseek_export.checkpoint import ModelConfig
from deepseek_export.checkpoint.fingerprint import Fingerprint
from deepseek_export.checkpoint.recipe import Recipe
from deepseek_export.checkpoint.weight_only import (
    BlockFormat,
    QuantBlock,
    Quantization,
    QuantKind,
    ScaleDtype,
)
from deepseek_export.dtypes import DTYPES
from deepseek_export.profile import OptimizationProfile
from deepseek_export.records import TARGETS, OpSite, PassResult

SCHEMA_VERSION: Literal[1] = 1

WeightsMode = Literal["packed", "reference"]


def _inside(name: str) -> str:
    """bundle 里面的文件：规范的相对路径，不往外走。"""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or not path.parts or str(path) != name or "\0" in name:
        raise ValueError(f"{name!r} 不是 bundle 里面的文件")
    return name


def _known_target(target: str) -> str:
    if target not in TARGETS:
        raise ValueError(f"没有目标 {target!r}")
    return target


BundleFile = Annotated[str, AfterValidator(_inside)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class SourceEntry(_Entry):
    """检查点的出处与指纹：路径、config.json 的 sha256、每个 safetensors 文件的身份。"""

    path: str
    config_sha256: str
    fingerprint: Fingerprint
    mtp_tensors: int


class ValueEntry(_Entry):
    """图的一个输入或输出；维度是整数或名字（B、S、T、L）。"""

    name: str
    dtype: str
    shape: list[int | str]


class GraphEntry(_Entry):
    """一个 ONNX 文件。

    Attributes:
        file: 相对 bundle 的路径。
        role: ``main`` 主模型；``draft`` MTP 草稿模型，次序即第几个 MTP 模块。
        layers: 图里的解码层编号；草稿模型的接在主干之后。
        inputs, outputs: I/O 契约。
        op_counts: ``域::op_type`` → 主图里的个数。
        passes: 每个 pass 改了什么、拒绝了什么。
        sites: 每个 ``dsx::`` 节点的位置。
        by_recipe: 没有现成字节、加载时按配方生成的 initializer；打包的没有。
    """

    file: BundleFile
    role: Literal["main", "draft"]
    layers: list[int]
    inputs: list[ValueEntry]
    outputs: list[ValueEntry]
    op_counts: dict[str, int]
    passes: list[PassResult]
    sites: list[OpSite]
    by_recipe: list[str] = []


CacheDtype = Literal["float32", "float16", "bfloat16", "int8"]


class CacheTensorEntry(_Entry):
    """一种缓存张量：[B, heads, T, width]。

    Attributes:
        name: 名字的词干，``kv_cache``。
        heads, width: 常数的两维。
        dtype: ``null`` 是 :class:`CacheEntry` 的。
        layers: 哪些层有，MTP 层接在主干之后；``null`` 是每一层。
    """

    name: str
    heads: int
    width: int
    dtype: CacheDtype | None = None
    layers: list[int] | None = None


class CacheEntry(_Entry):
    """KV cache 的布局。"""

    tensors: list[CacheTensorEntry]
    dtype: CacheDtype
    num_layers: int

    def of_layer(self, layer: int) -> list[CacheTensorEntry]:
        """第 ``layer`` 层（MTP 层接在主干之后）有哪几种，按输入的次序。"""
        return [tensor for tensor in self.tensors if tensor.layers is None or layer in tensor.layers]

    @property
    def values_per_token_per_layer(self) -> int:
        """每个 token 的 key、value 在一层里占多少个元素；MLA 打开时浮点的缓存是 ``kv_lora_rank + qk_rope_head_dim``。

        稀疏注意力的索引 key 不在每一层都有，不算在内，见 :attr:`bytes_per_token`。
        """
        return sum(tensor.heads * tensor.width for tensor in self.tensors if tensor.layers is None)

    @property
    def bytes_per_token(self) -> int:
        """每个 token 在所有层里占的字节数，各种缓存都算。"""
        return sum(
            DTYPES[tensor.dtype or self.dtype].nbytes(
                tensor.heads
                * tensor.width
                * (self.num_layers if tensor.layers is None else len(tensor.layers))
            )
            for tensor in self.tensors
        )


class CalibrationEntry(_Entry):
    """int4 的码是怎么校准的。

    Attributes:
        method: ``gptq``，见 :mod:`deepseek_export.calibration`。
        file, sha256: 校准的文本，文件名不带目录。
        tokens, windows: 用了多少个 token，切成几窗。
        damping: Gram 矩阵的阻尼。
        tensors: 校准了多少个检查点张量。
        nearest: 见过的 token 太少、照常取最近的码的。
    """

    method: Literal["gptq"]
    file: str
    sha256: str
    tokens: int
    windows: int
    damping: float
    tensors: int
    nearest: list[str]


class QuantizationEntry(_Entry):
    """只量化权重的 bundle：格式、用户要保留的，以及实际量化了哪些权重。

    Attributes:
        kind, block, keep: 见 :class:`~deepseek_export.checkpoint.weight_only.Quantization`。
        tensors: 量化了的权重，按量化之前的名字；与词嵌入共享的 lm_head 记作 ``lm_head.weight``。
        calibration: int4 的码是校准得来的；``None`` 是最近的码。
    """

    kind: QuantKind
    block: QuantBlock
    keep: list[str]
    tensors: list[str]
    calibration: CalibrationEntry | None = None

    @classmethod
    def of(
        cls, quantization: Quantization, tensors: list[str], calibration: CalibrationEntry | None
    ) -> QuantizationEntry:
        """由导出时的选项、实际量化了的权重与校准建立。"""
        return cls(
            kind=quantization.kind,
            block=quantization.block,
            keep=list(quantization.keep),
            tensors=tensors,
            calibration=calibration,
        )

    def formats(self, scale: ScaleDtype, zeros: bool) -> dict[str, BlockFormat]:
        """权重名 → 格式，供参考模型换上同样的权重；``scale`` 是 scale 的 dtype，``zeros`` 是有没有零点。"""
        form = BlockFormat(kind=self.kind, block=self.block, scale=scale, zeros=zeros)
        return dict.fromkeys(self.tensors, form)


class WeightsEntry(_Entry):
    """权重文件与每个 initializer 的配方。

    Attributes:
        mode: ``packed`` 权重都在自己的文件里；``reference`` 权重文件是检查点的硬链接，指不进去的 initializer 在加载时按配方生成。
        files: 权重文件，相对 bundle 的路径。
        recipes: initializer 名 → 配方。
    """

    mode: WeightsMode
    files: list[BundleFile]
    recipes: dict[str, Recipe]


class FileEntry(_Entry):
    """一个文件的大小与 sha256。

    Attributes:
        sha256_from: ``read`` 是读了文件算的；``hub`` 取自 Hugging Face 的下载记录，导出时没有读，见
            :meth:`~deepseek_export.bundle.Bundle.confirm_weights`。
    """

    bytes: int
    sha256: str
    sha256_from: Literal["read", "hub"] = "read"


class StageEntry(_Entry):
    """这个 bundle 是流水线里的哪一个 stage，见 :mod:`~deepseek_export.bundle.stages`。"""

    index: int
    count: int


class Manifest(_Entry):
    """bundle 的全部事实。

    ``cpu_library`` 是导出时那台机器的 C++ 算子库用的指令集，没有库或目标不用它则为 ``None``；它只是记录，图不因此而不同：
    同一个 bundle 有库时走库、没有库时走函数体。

    ``files`` 覆盖除 manifest.json、engines/ 与 reports/ 之外的每个文件；按引用而导出时没有算哈希的，检查点的硬链接也除外，它们只由
    ``source.fingerprint`` 抽查。
    """

    schema_version: Literal[1]
    dsx_version: str
    target: Annotated[str, AfterValidator(_known_target)]
    dtype: Literal["float32", "float16", "bfloat16"]
    profile: OptimizationProfile
    model: ModelConfig
    source: SourceEntry
    graphs: list[GraphEntry]
    cache: CacheEntry
    weights: WeightsEntry
    quantization: QuantizationEntry | None = None
    fallbacks: list[str]
    float32_islands: dict[str, int]
    cpu_library: str | None = None
    files: dict[BundleFile, FileEntry]
    stage: StageEntry | None = None

    @model_validator(mode="after")
    def _check_graphs(self) -> Manifest:
        """恰有一个主模型；每张图都在 ``files`` 里，打开时查得到它在不在。"""
        if (mains := [graph.role for graph in self.graphs].count("main")) != 1:
            raise ValueError(f"graphs 里有 {mains} 个主模型，应恰有一个")
        pointed = self.weights.mode == "packed" or all(
            one.op == "copy" for one in self.weights.recipes.values()
        )
        if not pointed and not any(graph.by_recipe for graph in self.graphs):
            raise ValueError("graphs 没有写明哪些权重按配方生成（旧版 dsx 导出的）")
        for graph in self.graphs:
            if graph.file not in self.files:
                raise ValueError(f"graphs 的 {graph.file} 不在 files 里")
        return self

    @property
    def formats(self) -> dict[str, BlockFormat]:
        """量化了的权重 → 格式；没有量化就是空的。"""
        if self.quantization is None:
            return {}
        recipes = self.weights.recipes
        scales = (recipe.form.scale for recipe in recipes.values() if recipe.form is not None)
        zeros = any(recipe.op == "zero_points" for recipe in recipes.values())
        formats = self.quantization.formats(next(scales, self.dtype), zeros)
        # 词嵌入与 w_kv_b 有自己的格式：int4 的 bundle 里也是 int8。
        for name in formats:
            own = recipes.get(f"{name}.rows", recipes.get(f"{name}.lookup"))
            if own is not None and own.form is not None:
                formats[name] = own.form
        return formats

    @property
    def quant(self) -> QuantKind | None:
        """权重量化成什么，而且 kernel 把激活也舍入到 int8（``ort-cpu``）；没有量化、或权重先还原再相乘，为 ``None``：照常比。"""
        rounded = self.target == "ort-cpu"
        return self.quantization.kind if self.quantization is not None and rounded else None

    @property
    def published(self) -> list[str]:
        """sha256 取自下载记录的权重文件。"""
        files = self.files
        names = (name for name in self.weights.files if name in files)
        return [name for name in names if files[name].sha256_from == "hub"]

    @property
    def main(self) -> GraphEntry:
        """主模型。"""
        return next(graph for graph in self.graphs if graph.role == "main")

    @property
    def drafts(self) -> list[GraphEntry]:
        """草稿模型，按 MTP 模块的次序；没有打开 MTP 时为空。"""
        return [graph for graph in self.graphs if graph.role == "draft"]
