// 不经过 TensorRT 执行一个程序：没有先装载就 enqueue，换形状再来，最后给一个没有对齐的地址；测试用它，配 fake_cuda.cc。
//
//   enqueue PROGRAM IMAGE_SIZE INPUTS SHAPES...    每组形状 INPUTS 个
#include <cstdio>
#include <exception>
#include <fstream>
#include <iostream>
#include <sstream>

#include "driver.h"

int main(int, char** argv) {
    std::ifstream file(argv[1]);
    std::stringstream text;
    text << file.rdbuf();
    auto const image = std::make_shared<std::string const>(std::stoull(argv[2]), '\0');
    dsx::Launcher launcher(std::make_shared<dsx::Program const>(text.str(), image->size()), image);
    size_t const inputs = std::stoull(argv[3]);
    std::vector<void const*> const sources(inputs, nullptr);
    std::vector<void const*> const misaligned(inputs, reinterpret_cast<void const*>(8));
    void* outputs[] = {nullptr, nullptr};
    std::vector<std::vector<int64_t>> shapes;
    try {
        for (char** argument = argv + 4; *argument != nullptr; ++argument) {
            shapes.emplace_back();
            std::istringstream stream(*argument);
            for (std::string size; std::getline(stream, size, ',');) {
                shapes.back().push_back(std::stoll(size));
            }
            if (shapes.size() == inputs) {
                std::puts("enqueue");
                launcher.enqueue(shapes, sources.data(), outputs, nullptr, nullptr);
                if (argument[1] != nullptr) {
                    shapes.clear();
                }
            }
        }
        launcher.enqueue(shapes, misaligned.data(), outputs, nullptr, nullptr);
    } catch (std::exception const& error) {
        std::puts(error.what());
    }
    return 0;
}
