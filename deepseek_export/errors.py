"""错误码：dsx 对用户错误的唯一出口。

用户错误一律抛 :class:`DsxError`；命令行把它印成三行（码、出了什么事、怎么办），退出码 1，不带 traceback。
dsx 自身的缺陷不用这个类，traceback 原样保留。码一经发布就不改号、不复用，便于搜索。

编号按层分段：0xx 配置方案，1xx 检查点，2xx 捕获，3xx pass，4xx bundle，5xx 运行时，6xx 对齐校验，7xx 命令行与环境，
8xx transformers 集成，9xx TensorRT 与 kernel。
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import ValidationError

ERRORS: Mapping[str, str] = MappingProxyType(
    {
        # 0xx：OptimizationProfile
        "DSX-E001": "未知的优化方案",
        "DSX-E002": "方案里有未知的键",
        "DSX-E003": "方案的键取了不允许的值",
        "DSX-E004": "方案的组合不成立",
        "DSX-E005": "方案文件读不了",
        # 1xx：检查点
        "DSX-E101": "检查点不完整或读不了",
        "DSX-E102": "config.json 读不了",
        "DSX-E103": "不支持的 model_type",
        "DSX-E104": "config.json 里有 dsx 不认识的字段",
        "DSX-E105": "config.json 的字段取值不支持",
        "DSX-E106": "config.json 缺少必需的字段",
        "DSX-E107": "不支持的 rope 类型",
        "DSX-E108": "不支持的量化方式",
        "DSX-E109": "路由字段不支持",
        "DSX-E110": "safetensors 文件已损坏或被截断",
        "DSX-E111": "检查点缺少张量",
        "DSX-E112": "检查点多出张量",
        "DSX-E113": "张量形状不符",
        "DSX-E114": "张量 dtype 不支持",
        "DSX-E115": "权重里有 NaN 或 Inf",
        "DSX-E116": "权重超出目标 dtype 的范围",
        "DSX-E117": "tie_word_embeddings 与检查点内容矛盾",
        "DSX-E118": "索引文件与分片不一致",
        "DSX-E119": "检查点没有需要的 MTP 权重",
        "DSX-E120": "量化声明与张量不符",
        "DSX-E121": "结束生成的 token 不能用",
        "DSX-E130": "稀疏注意力的字段不支持",
        "DSX-E136": "模型没有索引 key 的缓存",
        # 3xx：pass
        "DSX-E301": "不支持的编译目标",
        "DSX-E302": "算子个数与方案不符",
        "DSX-E303": "图不合法",
        "DSX-E310": "这个目标不能量化权重",
        "DSX-E311": "这个 dtype 不能量化权重",
        "DSX-E312": "--keep 什么也没有匹配到",
        "DSX-E313": "没有可以量化的权重",
        "DSX-E320": "注意力头太宽，TensorRT 没有原生核",
        "DSX-E321": "bfloat16 只能在 TensorRT 上运行",
        "DSX-E322": "这个目标不支持 int8 缓存",
        # 4xx：bundle 与磁盘
        "DSX-E401": "输出位置已有东西",
        "DSX-E402": "bundle 不完整或读不了",
        "DSX-E403": "manifest 读不了",
        "DSX-E404": "磁盘空间不足",
        "DSX-E405": "输出位置不可写",
        "DSX-E406": "bundle 的文件与 manifest 不符",
        "DSX-E407": "检查点无法硬链接",
        "DSX-E408": "引用的检查点与导出时不同",
        "DSX-E409": "bundle 已经打包",
        "DSX-E410": "单个权重太大",
        "DSX-E411": "别人正在写这个输出位置",
        "DSX-E412": "bundle 在读的时候被换掉",
        "DSX-E413": "没有整个权重的哈希",
        # 5xx：运行时
        "DSX-E501": "分词器文件读不了",
        "DSX-E502": "没有聊天模板",
        "DSX-E503": "聊天模板渲染失败",
        "DSX-E504": "采样参数取值不允许",
        "DSX-E505": "logits 里没有可用的最大值",
        "DSX-E506": "缓存超出模型的最大长度",
        "DSX-E507": "模型加载失败",
        "DSX-E508": "模型的输入输出不符合约定",
        "DSX-E509": "token id 超出词表",
        "DSX-E510": "提示词为空",
        "DSX-E511": "提示词过长",
        "DSX-E512": "生成参数取值不允许",
        "DSX-E513": "ONNX Runtime 执行失败",
        "DSX-E514": "bundle 没有 tokenizer",
        "DSX-E515": "采样方式与投机解码不相容",
        "DSX-E516": "投机解码的参数取值不允许",
        "DSX-E517": "bundle 不支持投机解码",
        "DSX-E518": "没有 token 可选",
        "DSX-E519": "图里没有要的输出",
        "DSX-E520": "C++ 算子库装载不了",
        "DSX-E521": "指令集在这台机器上不能用",
        "DSX-E522": "模型已经关闭",
        "DSX-E530": "排队的请求满了",
        "DSX-E531": "服务引擎已经停了",
        "DSX-E532": "服务引擎的参数取值不允许",
        "DSX-E533": "槽的文件不能用",
        "DSX-E534": "这个槽现在不能这样用",
        # 6xx：对齐校验
        "DSX-E601": "找不到检查点",
        "DSX-E602": "检查点与导出时不同",
        "DSX-E603": "transformers 与参考模型不一致",
        "DSX-E604": "校验用的 prompt 不可用",
        "DSX-E605": "校验不过",
        "DSX-E606": "--text 的文本不可用",
        "DSX-E607": "校验的层级不可用",
        "DSX-E613": "没有这个比较后端",
        "DSX-E614": "比较后端在这里不能用",
        "DSX-E615": "没有这个块",
        "DSX-E616": "比较后端执行失败",
        # 4 位检查点
        "DSX-E650": "4 位检查点的这种变体不支持",
        "DSX-E651": "4 位的声明与张量不符",
        "DSX-E652": "4 位权重的内容自相矛盾",
        "DSX-E653": "没有可以照搬的 4 位码",
        "DSX-E660": "这次导出不能校准",
        "DSX-E661": "校准的文本读不了",
        "DSX-E662": "校准的文本不够用",
        "DSX-E663": "没有能用的 tokenizer，校准不了",
        "DSX-E664": "校准过的码与检查点对不上",
        # 7xx：命令行
        "DSX-E700": "命令行的用法不对",
        "DSX-E701": "--ids 写得不对",
        "DSX-E702": "生成的输入给得不对",
        "DSX-E703": "不认识的 GPU",
        "DSX-E704": "估算的长度超出模型的最大长度",
        "DSX-E705": "量化的选项没有配 --quant",
        "DSX-E706": "标准输出写不了",
        "DSX-E710": "基准测试的长度超出模型的最大长度",
        "DSX-E711": "对照的 bundle 来自别的检查点",
        "DSX-E720": "没有安装编译用的依赖",
        "DSX-E721": "没有安装 HTTP 服务的依赖",
        "DSX-E730": "API 密钥给得不对",
        "DSX-E731": "服务的地址用不了",
        "DSX-E732": "导出的选项给了 bundle",
        "DSX-E733": "服务的模型给得不对",
        "DSX-E734": "写不成 Triton 的模型",
        "DSX-E735": "这套 stage 建不了引擎",
        "DSX-E736": "SM 的个数与 stage 的不符",
        "DSX-E740": "切分给得不对",
        "DSX-E741": "不是完整的一套 stage",
        "DSX-E742": "流水线断了",
        "DSX-E743": "流水线正在重启",
        "DSX-E744": "stage 起不来",
        "DSX-E745": "信道上收到的不对",
        "DSX-E746": "图不能在这里切开",
        "DSX-E747": "缓存随流水线丢了",
        "DSX-E748": "一套 stage 做不了这件事",
        "DSX-E749": "信道的另一端证明不了自己",
        "DSX-E750": "批量的输入不能用",
        "DSX-E751": "没有安装 Ray",
        "DSX-E752": "没有安装 Ray Serve",
        "DSX-E753": "副本给得不对",
        "DSX-E754": "连不上 Ray",
        "DSX-E755": "副本起不来",
        "DSX-E756": "信道的证书用不了",
        "DSX-E760": "约束输出的语法用不了",
        "DSX-E761": "没有安装约束输出的依赖",
        "DSX-E762": "照着语法生成不下去",
        "DSX-E763": "模型没有 eos，约束输出停不下来",
        "DSX-E764": "消息里的工具调用不对",
        "DSX-E765": "不知道模型怎么写工具调用",
        "DSX-E766": "--cluster 写得不对",
        "DSX-E767": "估算集群的选项合不来",
        # 8xx：transformers 集成
        "DSX-E801": "没有安装 transformers",
        "DSX-E802": "transformers 版本不在支持范围内",
        "DSX-E803": "不支持的模型类",
        "DSX-E804": "模型现在的状态不能替换模块",
        "DSX-E805": "方案里有 apply 做不到的设置",
        "DSX-E806": "找不到 MTP 权重的来源",
        "DSX-E807": "generate 的用法与 MTP 不相容",
        "DSX-E808": "DsxForCausalLM 不支持的输入",
        "DSX-E809": "DsxForCausalLM 不支持的操作",
        "DSX-E810": "模型对象不能这样导出",
        # 9xx：TensorRT 与 kernel
        "DSX-E901": "没有这种 SM 的启动表",
        "DSX-E902": "没有安装 Triton",
        "DSX-E903": "kernel 不支持这种 dtype 或形状",
        "DSX-E904": "kernel 放不进共享内存",
        "DSX-E905": "没有可用的 NVIDIA 驱动",
        "DSX-E910": "没有安装 TensorRT",
        "DSX-E911": "TensorRT-RTX 的库缺少不带版本号的名字",
        "DSX-E912": "不能为这种 SM 建引擎",
        "DSX-E913": "这个 bundle 的图不能直接建引擎",
        "DSX-E914": "TensorRT 报错",
        "DSX-E915": "插件没有留在引擎里",
        "DSX-E916": "插件内部出错",
        "DSX-E917": "引擎与这里不符",
        "DSX-E918": "没有可用的 GPU",
        "DSX-E919": "--profile-shapes 写得不对",
        "DSX-E920": "没有这种 GPU 的引擎",
        "DSX-E921": "形状超出引擎的优化配置",
        "DSX-E922": "引擎把缓存抄一遍",
        "DSX-E923": "驱动比编译 kernel 的 CUDA 旧",
    }
)


class DsxError(Exception):
    """用户能自己解决的错误。

    Args:
        code: :data:`ERRORS` 里的码，例如 ``"DSX-E103"``。
        what: 出了什么事，必须带上出错的值和位置（中文）。
        todo: 下一步怎么办（中文）。

    Raises:
        KeyError: ``code`` 不在 :data:`ERRORS` 里，属于 dsx 的缺陷。
    """

    def __init__(self, code: str, what: str, todo: str) -> None:
        self.code, self.title, self.what, self.todo = code, ERRORS[code], what, todo
        super().__init__(f"{code} {self.title}\n  {what}\n  建议：{todo}")


class UnwrittenReport(DsxError):
    """结果算出来了，报告却写不下；``report`` 就是那个结果，不必重算。"""

    def __init__(self, error: DsxError, report: Any) -> None:
        super().__init__(error.code, error.what, error.todo)
        self.report = report


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``known`` 里与写错了的 ``name`` 最像的一个，接在 ``todo`` 前面；都不像是空串。"""
    close = difflib.get_close_matches(name.lower(), list(known), n=1, cutoff=0.5)
    return f"是不是想写 {close[0]}？" if close else ""


def first_invalid(error: ValidationError) -> str:
    """pydantic 的第一条错误，一行：字段的路径与原因。"""
    first = error.errors(include_url=False)[0]
    reasons = {"missing": "没有这个字段", "extra_forbidden": "不认识这个字段"}
    reason = reasons.get(first["type"]) or first["msg"].removeprefix("Value error, ")
    return "：".join([*filter(None, [".".join(map(str, first["loc"]))]), reason])
