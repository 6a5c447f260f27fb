"""``python -m deepseek_export``，同 ``dsx``。"""

from deepseek_export.cli.main import main

if __name__ == "__main__":
    main()
