#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace dsx {
namespace {

#if defined(__x86_64__)
// 编译器内建的名字各版本不一（avx512bf16 较晚才有），直接问 CPUID。
bool has_avx512_bf16() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << 5)) != 0;
}

// Intel 的核上 VDPBF16PS 每周期的乘加不比两条 FMA 多，还要先交错 value：整个 kernel 反而慢三成以上（torch 的 bfloat16 矩阵乘同样
// 慢于 float32）。AMD 从 Zen 4 起快一倍。只影响缺省取哪个，DSX_CPU_ISA 照样能指定。
bool bf16_beats_float32() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kGenuineIntel = 0x756e6547;  // ebx 里的 "Genu"
    return __get_cpuid(0, &a, &b, &c, &d) != 0 && b != kGenuineIntel;
}
#endif

std::vector<const Kernels*> detect() {
    std::vector<const Kernels*> found;
#if defined(__x86_64__)
    // __builtin_cpu_supports 同时看操作系统是否保存这些寄存器；f16c 在有 AVX2 的机器上都有。
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
            found.push_back(&kAvx512Kernels);
            if (has_avx512_bf16()) {
                found.insert(bf16_beats_float32() ? found.begin() : found.end(), &kAvx512Bf16Kernels);
            }
        }
        found.push_back(&kAvx2Kernels);
    }
#endif
    found.push_back(&kPlainKernels);
    return found;
}

}  // namespace

const std::vector<const Kernels*>& available_kernels() {
    static const std::vector<const Kernels*> found = detect();
    return found;
}

const Kernels& choose_kernels(const std::string& name) {
    std::string names;
    for (const Kernels* kernels : available_kernels()) {
        if (name.empty() || name == kernels->name) {
            return *kernels;
        }
        names += names.empty() ? kernels->name : std::string("、") + kernels->name;
    }
    throw std::invalid_argument("DSX_CPU_ISA=" + name + " 不可用，这台机器能用：" + names);
}

const Kernels& requested_kernels() {
    const char* value = std::getenv("DSX_CPU_ISA");
    return choose_kernels(value ? value : "");
}

const QuantKernels& requested_quant_kernels(int64_t bits) {
    const Kernels* kernels = &requested_kernels();
#if defined(__x86_64__)
    if (kernels != &kPlainKernels) {
        const bool vnni = kernels != &kAvx2Kernels && __builtin_cpu_supports("avx512vnni");
        if (bits == 4) {
            return vnni ? kAvx512VnniInt4 : kAvx2Int4;
        }
        return vnni ? kAvx512VnniInt8 : kAvx2Int8;
    }
#endif
    return bits == 4 ? kPlainInt4 : kPlainInt8;
}

}  // namespace dsx
