// 不经过 TensorRT 执行一个程序的 C 入口：perf/gpu/native.py 在卡上拿它与 Python 的启动器比。
#include <cstdint>
#include <exception>
#include <memory>
#include <string>
#include <vector>

#include "driver.h"

// 各输入的维首尾相接在 dims 里，ranks 是各有几维；地址都在设备上，stream 属于当前上下文。
// 成功返回空指针；失败返回说明，下一次调用之前有效。
extern "C" char const* dsx_launch(char const* text, char const* image, size_t image_size, size_t inputs,
    int const* ranks, int64_t const* dims, void const* const* sources, void* const* outputs, void* workspace,
    void* stream) {
    static std::string message;
    try {
        std::vector<std::vector<int64_t>> shapes;
        for (size_t i = 0; i < inputs; ++i) {
            shapes.emplace_back(dims, dims + ranks[i]);
            dims += ranks[i];
        }
        dsx::Launcher launcher(std::make_shared<dsx::Program const>(text, image_size),
            std::make_shared<std::string const>(image, image_size));
        launcher.enqueue(shapes, sources, outputs, workspace, static_cast<CUstream>(stream));
        return nullptr;
    } catch (std::exception const& error) {
        message = error.what();
        return message.c_str();
    }
}
