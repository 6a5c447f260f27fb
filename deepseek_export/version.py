"""dsx 的版本，与它测过的 transformers 的范围；自成一层，谁都可以导入。"""

__version__ = "0.1.0"

#: 对齐校验的基准与 ``apply`` 最低要求的 transformers。
MIN_TRANSFORMERS = (5, 17)
#: 契约测试跑过的最新一版；更新的先过自检，见 :mod:`~deepseek_export.parity.self_check`。
MAX_TRANSFORMERS = (5, 25)
