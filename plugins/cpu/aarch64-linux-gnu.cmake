# 在别的机器上为 aarch64 的 Linux 交叉编译：Debian 的 g++-aarch64-linux-gnu。
set(CMAKE_SYSTEM_NAME Linux)
set(CMAKE_SYSTEM_PROCESSOR aarch64)
set(CMAKE_CXX_COMPILER aarch64-linux-gnu-g++)
