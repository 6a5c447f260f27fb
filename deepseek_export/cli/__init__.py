"""命令行：每个命令一个文件，都是 :mod:`deepseek_export.api` 的薄壳。"""
