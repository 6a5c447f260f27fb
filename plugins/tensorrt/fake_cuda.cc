// 没有 GPU 时的 libcuda.so.1：driver.cc 用到的入口，装载与启动各打印一行。测试用，不装。
#include <cuda.h>

#include <cstdio>
#include <cstdlib>

namespace {

// 各种句柄：不取内容，只要不为空。
template <typename Handle>
Handle handle() {
    static int object = 0;
    return reinterpret_cast<Handle>(&object);
}

}  // namespace

extern "C" {

CUresult cuGetErrorName(CUresult, char const** name) {
    *name = "CUDA_ERROR";
    return CUDA_SUCCESS;
}

CUresult cuDriverGetVersion(int* version) {
    *version = 12080;
    return CUDA_SUCCESS;
}

CUresult cuCtxGetCurrent(CUcontext* context) {
    *context = handle<CUcontext>();
    return CUDA_SUCCESS;
}

CUresult cuCtxGetDevice(CUdevice* device) {
    *device = 0;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute attribute, CUdevice) {
    *value = attribute == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT ? std::atoi(std::getenv("FAKE_SMS")) : 0;
    return CUDA_SUCCESS;
}

CUresult cuLibraryLoadData(
    CUlibrary* library, void const*, CUjit_option*, void**, unsigned, CUlibraryOption*, void**, unsigned) {
    *library = handle<CUlibrary>();
    std::puts("load");
    return std::getenv("FAKE_OLD") != nullptr ? CUDA_ERROR_NO_BINARY_FOR_GPU : CUDA_SUCCESS;
}

CUresult cuLibraryUnload(CUlibrary) { return CUDA_SUCCESS; }

CUresult cuLibraryGetKernel(CUkernel* kernel, CUlibrary, char const*) {
    *kernel = handle<CUkernel>();
    return CUDA_SUCCESS;
}

CUresult cuKernelSetAttribute(CUfunction_attribute, int, CUkernel, CUdevice) { return CUDA_SUCCESS; }

CUresult cuKernelGetFunction(CUfunction* function, CUkernel) {
    *function = handle<CUfunction>();
    return CUDA_SUCCESS;
}

CUresult cuLaunchKernel(CUfunction, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned, unsigned,
    unsigned shared, CUstream, void**, void**) {
    std::printf("launch %u %u %u %u %u\n", x, y, z, threads, shared);
    return CUDA_SUCCESS;
}
}
