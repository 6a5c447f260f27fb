#include "driver.h"

#include <dlfcn.h>

#include <cstdint>
#include <map>
#include <mutex>
#include <stdexcept>
#include <utility>

namespace dsx {
namespace {

struct Driver {
    decltype(&cuGetErrorName) get_error_name = nullptr;
    decltype(&cuDriverGetVersion) driver_get_version = nullptr;
    decltype(&cuCtxGetCurrent) ctx_get_current = nullptr;
    decltype(&cuCtxGetDevice) ctx_get_device = nullptr;
    decltype(&cuDeviceGetAttribute) device_get_attribute = nullptr;
    decltype(&cuLibraryLoadData) library_load_data = nullptr;
    decltype(&cuLibraryUnload) library_unload = nullptr;
    decltype(&cuLibraryGetKernel) library_get_kernel = nullptr;
    decltype(&cuKernelSetAttribute) kernel_set_attribute = nullptr;
    decltype(&cuKernelGetFunction) kernel_get_function = nullptr;
    decltype(&cuLaunchKernel) launch_kernel = nullptr;
};

template <typename Function>
void resolve(void* library, char const* name, Function& function) {
    function = reinterpret_cast<Function>(dlsym(library, name));
    if (function == nullptr) {
        throw std::runtime_error(std::string("dsx: CUDA 驱动太旧，没有 ") + name + "（需要 12.0 以上）");
    }
}

Driver const& driver() {
    static Driver const loaded = [] {
        void* library = dlopen("libcuda.so.1", RTLD_NOW | RTLD_LOCAL);
        if (library == nullptr) {
            throw std::runtime_error(std::string("dsx: 没有 NVIDIA 驱动：") + dlerror());
        }
        Driver d;
        resolve(library, "cuGetErrorName", d.get_error_name);
        resolve(library, "cuDriverGetVersion", d.driver_get_version);
        resolve(library, "cuCtxGetCurrent", d.ctx_get_current);
        resolve(library, "cuCtxGetDevice", d.ctx_get_device);
        resolve(library, "cuDeviceGetAttribute", d.device_get_attribute);
        resolve(library, "cuLibraryLoadData", d.library_load_data);
        resolve(library, "cuLibraryUnload", d.library_unload);
        resolve(library, "cuLibraryGetKernel", d.library_get_kernel);
        resolve(library, "cuKernelSetAttribute", d.kernel_set_attribute);
        resolve(library, "cuKernelGetFunction", d.kernel_get_function);
        resolve(library, "cuLaunchKernel", d.launch_kernel);
        return d;
    }();
    return loaded;
}

void check(CUresult status, std::string const& what) {
    if (status == CUDA_SUCCESS) {
        return;
    }
    char const* name = nullptr;
    driver().get_error_name(status, &name);
    throw std::runtime_error("dsx: " + what + "：" + (name != nullptr ? name : "未知的 CUDA 错误"));
}

std::string supported() {
    int version = 0;
    driver().driver_get_version(&version);
    return "驱动支持到 CUDA " + std::to_string(version / 1000) + "." + std::to_string(version % 1000 / 10);
}

}  // namespace

LoadedImage::LoadedImage(Program const& program, std::string const& image) : kernels_(program.kernels) {
    CUdevice device = 0;
    check(driver().ctx_get_device(&device), "取当前设备");
    check(driver().device_get_attribute(&sm_count_, CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT, device), "取 SM 个数");
    for (auto const& kernel : kernels_) {
        CUlibrary library = nullptr;
        check(driver().library_load_data(
                  &library, image.data() + kernel.offset, nullptr, nullptr, 0, nullptr, nullptr, 0),
            "装载 " + kernel.entry + "（sm" + std::to_string(program.sm) + "；" + supported() +
                "，更旧的主版本不认 engine.json 里 toolkit 那一版编译的机器码）");
        libraries_.emplace_back(library);
        CUkernel handle = nullptr;
        check(driver().library_get_kernel(&handle, library, kernel.entry.c_str()), "查找 " + kernel.entry);
        check(driver().kernel_set_attribute(
                  CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, kernel.shared, handle, device),
            "为 " + kernel.entry + " 设置共享内存");
        CUfunction function = nullptr;
        check(driver().kernel_get_function(&function, handle), "取 " + kernel.entry);
        functions_.push_back(function);
    }
}

void LoadedImage::Unload::operator()(CUlibrary library) const noexcept { driver().library_unload(library); }

std::shared_ptr<LoadedImage const> LoadedImage::shared(Program const& program, std::string const& image) {
    static std::mutex mutex;
    static std::map<std::pair<CUcontext, std::string>, std::weak_ptr<LoadedImage const>> loaded;
    CUcontext context = nullptr;
    check(driver().ctx_get_current(&context), "取当前上下文");
    std::lock_guard<std::mutex> const lock(mutex);
    auto& known = loaded[{context, image}];
    auto result = known.lock();
    if (!result) {
        result.reset(new LoadedImage(program, image));
        known = result;
    }
    return result;
}

void LoadedImage::launch(BoundLaunch const& launch, void const* const* inputs, void* const* outputs, void* workspace,
    CUstream stream) const {
    // kernelParams 是指向各参数值的指针；值都放得进 8 字节。
    constexpr size_t kMost = 32;
    // kernel 按它编译，与 deepseek_export/kernels/program.py 的 POINTER_ALIGNMENT 相同。
    constexpr uintptr_t kPointerAlignment = 16;
    Kernel const& kernel = kernels_[launch.kernel];
    size_t const count = launch.arguments.size();
    if (count + static_cast<size_t>(kernel.scratch) > kMost) {
        throw std::runtime_error("dsx: " + kernel.entry + " 的参数太多");
    }
    union Value {
        void const* pointer;
        int32_t integer;
        float number;
    } values[kMost];
    void* pointers[kMost];
    for (size_t i = 0; i < count; ++i) {
        BoundArgument const& argument = launch.arguments[i];
        switch (argument.kind) {
        case Argument::Kind::kInput: values[i].pointer = inputs[argument.value]; break;
        case Argument::Kind::kOutput: values[i].pointer = outputs[argument.value]; break;
        case Argument::Kind::kWorkspace: values[i].pointer = static_cast<char*>(workspace) + argument.value; break;
        case Argument::Kind::kInt32: values[i].integer = static_cast<int32_t>(argument.value); break;
        case Argument::Kind::kFloat32: values[i].number = argument.number; break;
        }
        bool const address = argument.kind == Argument::Kind::kInput || argument.kind == Argument::Kind::kOutput ||
            argument.kind == Argument::Kind::kWorkspace;
        if (address && reinterpret_cast<uintptr_t>(values[i].pointer) % kPointerAlignment != 0) {
            throw std::runtime_error("dsx: " + kernel.entry + " 的参数 " + std::to_string(i) + " 没有按 " +
                std::to_string(kPointerAlignment) + " 字节对齐");
        }
        pointers[i] = &values[i];
    }
    for (size_t i = count; i < count + static_cast<size_t>(kernel.scratch); ++i) {
        values[i].pointer = nullptr;
        pointers[i] = &values[i];
    }
    check(driver().launch_kernel(functions_[launch.kernel], launch.grid[0], launch.grid[1], launch.grid[2],
              static_cast<unsigned>(kernel.threads), 1, 1, static_cast<unsigned>(kernel.shared), stream, pointers,
              nullptr),
        "启动 " + kernel.entry);
}

void Launcher::load() {
    if (!loaded_) {
        loaded_ = LoadedImage::shared(*program_, *image_);
    }
}

void Launcher::enqueue(std::vector<std::vector<int64_t>> const& shapes, void const* const* inputs, void* const* outputs,
    void* workspace, CUstream stream) {
    load();
    if (shapes_ != shapes) {
        launches_ = program_->bind(program_->sizes(shapes), loaded_->sm_count());
        shapes_ = shapes;
    }
    for (auto const& [output, given] : program_->aliases) {
        // 没有改写的行在别处：不是同一块就不能启动。
        if (outputs[output] != inputs[given]) {
            throw std::runtime_error("dsx: " + program_->op + " 的输出 " + std::to_string(output) + " 与输入 " +
                std::to_string(given) + " 应是同一块内存");
        }
    }
    for (auto const& launch : launches_) {
        loaded_->launch(launch, inputs, outputs, workspace, stream);
    }
}

}  // namespace dsx
