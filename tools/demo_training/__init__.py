"""演示检查点的训练代码；入口是 ``tools/train_demo.py``。"""
