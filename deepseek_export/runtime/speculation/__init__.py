"""投机解码：草稿模块起草（:mod:`.draft`、:mod:`.drafter`），主模型验证（:mod:`.generator`），不划算就停（:mod:`.floor`）。"""
