"""性能测量：``python -m perf run``。场景是数据，A/B 在同一次运行里交替，结果只追加不改写。

``suites`` 一个文件一套；``workload`` 是它们要的检查点与 bundle，``peers`` 是被比的引擎，``gpu`` 是卡上的一次运行；``history`` 是结果，不是代码。
"""
