// CUDA 驱动的几个入口，运行时用 dlopen 取得：没有驱动的机器也能装载本库、解析计算图。
#pragma once

#include <cuda.h>

#include <memory>
#include <optional>
#include <string>
#include <type_traits>
#include <utility>
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

    // 所在设备的 SM 个数。
    int sm_count() const { return sm_count_; }

private:
    LoadedImage(Program const& program, std::string const& image);

    struct Unload {
        void operator()(CUlibrary library) const noexcept;
    };
    using Library = std::unique_ptr<std::remove_pointer_t<CUlibrary>, Unload>;

    int sm_count_ = 0;
    std::vector<Kernel> kernels_;
    std::vector<Library> libraries_;
    std::vector<CUfunction> functions_;
};

// 一个插件节点的启动：装载好的程序，与最近一组形状的启动序列。
class Launcher {
public:
    Launcher(std::shared_ptr<Program const> program, std::shared_ptr<std::string const> image)
        : program_(std::move(program)), image_(std::move(image)) {}

    // 装载机器码；装过的不再装。失败抛 std::runtime_error。
    void load();

    // 在流上依次启动。没有先装载、换了形状都可以：这里补上；平常只启动，可以录进 CUDA graph。
    void enqueue(std::vector<std::vector<int64_t>> const& shapes, void const* const* inputs, void* const* outputs,
        void* workspace, CUstream stream);

private:
    std::shared_ptr<Program const> program_;
    std::shared_ptr<std::string const> image_;
    std::shared_ptr<LoadedImage const> loaded_;
    std::optional<std::vector<std::vector<int64_t>>> shapes_;  // launches_ 是哪组形状的
    std::vector<BoundLaunch> launches_;
};

}  // namespace dsx
