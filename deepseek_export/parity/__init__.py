"""对齐校验：证明 bundle 与 PyTorch 相等，并指出第一处不相等的地方。

这里不汇集各模块的名字：只用度量与容差表的地方（``perf/gpu``）不必有 onnx、ONNX Runtime、pydantic。
"""
