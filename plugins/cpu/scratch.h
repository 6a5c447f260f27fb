#pragma once

#include <cstddef>
#include <cstdint>
#include <new>

namespace dsx {

// 只增不减、64 字节对齐的内存。每个线程一块，一步里不再分配。
class Scratch {
public:
    Scratch() = default;
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;
    ~Scratch() { release(); }

    float* need(int64_t floats) {
        if (floats > size_) {
            release();
            data_ = static_cast<float*>(::operator new(static_cast<size_t>(floats) * sizeof(float), kAlignment));
            size_ = floats;
        }
        return data_;
    }

private:
    static constexpr std::align_val_t kAlignment{64};

    void release() {
        ::operator delete(data_, kAlignment);
        data_ = nullptr;
        size_ = 0;
    }

    float* data_ = nullptr;
    int64_t size_ = 0;
};

}  // namespace dsx
