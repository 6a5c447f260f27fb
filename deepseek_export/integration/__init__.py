"""transformers 集成：``apply`` / ``restore``、``DsxForCausalLM``、从模型对象导出。

transformers 是可选依赖（``hf``）。导入本包的任何模块都先过这里：没装或版本不在测过的范围内就拒绝。
"""

from deepseek_export.integration.compat import require_transformers

require_transformers()
