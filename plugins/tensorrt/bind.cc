// 打印一个程序在给定形状下的启动序列；测试用它核对 C++ 与 Python 两份实现。
//
//   bind PROGRAM IMAGE_SIZE SM_COUNT 4,1,128,576 4,1,1024,576 4
#include <clocale>
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <sstream>

#include "program.h"

namespace {

std::vector<int64_t> parse_shape(std::string const& text) {
    std::vector<int64_t> shape;
    std::istringstream stream(text);
    for (std::string size; std::getline(stream, size, ',');) {
        shape.push_back(std::stoll(size));
    }
    return shape;
}

void print(dsx::Program const& program, int sm_count, std::vector<std::vector<int64_t>> const& shapes) {
    constexpr char const* kKinds[] = {"input", "output", "workspace", "int32", "float32"};
    auto const sizes = program.sizes(shapes);
    auto const launches = program.bind(sizes, sm_count);
    std::printf("%s %d %zu\n", program.op.c_str(), program.sm, program.workspace(sizes));
    for (auto const& launch : launches) {
        auto const& kernel = program.kernels[launch.kernel];
        std::printf("%s %d %d %d %zu %zu %u %u %u\n", kernel.entry.c_str(), kernel.threads, kernel.shared, kernel.scratch,
            kernel.offset, kernel.length, launch.grid[0], launch.grid[1], launch.grid[2]);
        for (auto const& argument : launch.arguments) {
            std::printf("%s ", kKinds[static_cast<int>(argument.kind)]);
            if (argument.kind == dsx::Argument::Kind::kFloat32) {
                std::printf("%a\n", static_cast<double>(argument.number));
            } else {
                std::printf("%lld\n", static_cast<long long>(argument.value));
            }
        }
    }
}

}  // namespace

int main(int argc, char** argv) {
    if (argc < 4) {
        std::fprintf(stderr, "用法：bind PROGRAM IMAGE_SIZE SM_COUNT SHAPE...\n");
        return 2;
    }
    try {
        std::ifstream file(argv[1]);
        std::stringstream text;
        text << file.rdbuf();
        std::vector<std::vector<int64_t>> shapes;
        for (int i = 4; i < argc; ++i) {
            shapes.push_back(parse_shape(argv[i]));
        }
        std::setlocale(LC_ALL, "");  // 宿主进程可以用任何 locale；读出的数不得随它变
        dsx::Program const program(text.str(), std::stoull(argv[2]));
        std::setlocale(LC_ALL, "C");
        print(program, std::stoi(argv[3]), shapes);
    } catch (std::exception const& error) {
        std::fprintf(stderr, "%s\n", error.what());
        return 1;
    }
    return 0;
}
