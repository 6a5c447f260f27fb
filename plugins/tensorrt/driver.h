// CUDA 驱动的几个入口，运行时用 dlopen 取得：没有驱动的机器也能装载本库、解析计算图。
#pragma once

#include <cuda.h>

#include <memory>
#include <string>
#include <type_traits>
#include <vector>

#include "program.h"

namespace dsx {

// 装载好的机器码。
class LoadedImage {
public:
    // 同一个 CUDA 上下文里，内容相同的机器码只装载一次：一个模型的几十层共用一份。
    // 需要当前线程有 CUDA 上下文。失败抛 std::runtime_error。
    static std::shared_ptr<LoadedImage const> shared(Program const& program, std::string const& image);

    // 在流上启动一次；不分配、不同步，可以录进 CUDA graph。
    void launch(BoundLaunch const& launch, void const* const* inputs, void* const* outputs, void* workspace,
        CUstream stream) const;

private:
    LoadedImage(Program const& program, std::string const& image);

    struct Unload {
        void operator()(CUlibrary library) const noexcept;
    };
    using Library = std::unique_ptr<std::remove_pointer_t<CUlibrary>, Unload>;

    std::vector<Kernel> kernels_;
    std::vector<Library> libraries_;
    std::vector<CUfunction> functions_;
};

}  // namespace dsx
