#include "isa.h"

#include <cstdlib>
#include <stdexcept>

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace dsx {
namespace {

// 一个能选的指令集：注意力的函数表，与之配套的矩阵乘。
struct Isa {
    const Kernels* kernels;
    const QuantKernels *int8, *int4;
};

#if defined(__x86_64__)
// 编译器内建的名字各版本不一（avx512bf16、avxvnni 较晚才有），直接问 CPUID：叶 7、子叶 1 的 eax。
bool has_feature(unsigned bit) {
    unsigned a = 0, b = 0, c = 0, d = 0;
    return __get_cpuid_count(7, 1, &a, &b, &c, &d) != 0 && (a & (1u << bit)) != 0;
}

constexpr unsigned kAvxVnni = 4, kAvx512Bf16 = 5;

// Intel 的核上 VDPBF16PS 每周期的乘加不比两条 FMA 多，还要先交错 value：整个 kernel 反而慢三成以上（torch 的 bfloat16 矩阵乘同样
// 慢于 float32）。AMD 从 Zen 4 起快一倍。只影响缺省取哪个，DSX_CPU_ISA 照样能指定。
bool bf16_beats_float32() {
    unsigned a = 0, b = 0, c = 0, d = 0;
    constexpr unsigned kGenuineIntel = 0x756e6547;  // ebx 里的 "Genu"
    return __get_cpuid(0, &a, &b, &c, &d) != 0 && b != kGenuineIntel;
}

void detect_native(std::vector<Isa>& found) {
    // __builtin_cpu_supports 同时看操作系统是否保存这些寄存器；f16c 在有 AVX2 的机器上都有。
    __builtin_cpu_init();
    if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
        return;
    }
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl")) {
        const bool vnni = __builtin_cpu_supports("avx512vnni");
        const auto with = [vnni](const Kernels& kernels) {
            return vnni ? Isa{&kernels, &kAvx512VnniInt8, &kAvx512VnniInt4} : Isa{&kernels, &kAvx2Int8, &kAvx2Int4};
        };
        found.push_back(with(kAvx512Kernels));
        if (has_feature(kAvx512Bf16)) {
            found.insert(bf16_beats_float32() ? found.begin() : found.end(), with(kAvx512Bf16Kernels));
        }
    }
#if defined(DSX_AVX_VNNI)
    if (has_feature(kAvxVnni)) {
        found.push_back({&kAvxVnniKernels, &kAvxVnniInt8, &kAvxVnniInt4});
    }
#endif
    found.push_back({&kAvx2Kernels, &kAvx2Int8, &kAvx2Int4});
}
#elif defined(__aarch64__)
struct Features {
    bool dotprod, i8mm, bf16;
};

#if defined(__linux__)
// 内核说这个进程能用哪些；位的编号是内核的接口，旧的头文件里还没有名字。
Features features() {
    constexpr unsigned long kDotprod = 1ul << 20, kI8mm = 1ul << 13, kBf16 = 1ul << 14;
    const unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
    return {(first & kDotprod) != 0, (second & kI8mm) != 0, (second & kBf16) != 0};
}
#elif defined(__APPLE__)
bool has(const char* name) {
    int value = 0;
    size_t size = sizeof value;
    return sysctlbyname(name, &value, &size, nullptr, 0) == 0 && value != 0;
}

Features features() {
    return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_I8MM"), has("hw.optional.arm.FEAT_BF16")};
}
#else
Features features() { return {}; }
#endif

void detect_native(std::vector<Isa>& found) {
    const Features have = features();
    Isa best{&kNeonKernels, &kNeonInt8, &kNeonInt4};
    found.push_back(best);
    if (have.dotprod) {
        best = {&kNeonDotprodKernels, &kNeonDotprodInt8, &kNeonDotprodInt4};
        found.insert(found.begin(), best);
    }
    if (have.dotprod && have.i8mm) {
        best = {&kNeonI8mmKernels, &kNeonI8mmInt8, &kNeonI8mmInt4};
        found.insert(found.begin(), best);
    }
    // 没有在真的机器上量过哪个快，所以缺省取乘数不舍入的；DSX_CPU_ISA 能指定。
    if (have.bf16) {
        found.insert(found.begin() + 1, {&kNeonBf16Kernels, best.int8, best.int4});
    }
}
#else
void detect_native(std::vector<Isa>&) {}
#endif

const std::vector<Isa>& available() {
    static const std::vector<Isa> all = [] {
        std::vector<Isa> found;
        detect_native(found);
        found.push_back({&kPlainKernels, &kPlainInt8, &kPlainInt4});
        return found;
    }();
    return all;
}

const Isa& choose(const std::string& name) {
    std::string names;
    for (const Isa& isa : available()) {
        if (name.empty() || name == isa.kernels->name) {
            return isa;
        }
        names += names.empty() ? isa.kernels->name : std::string("、") + isa.kernels->name;
    }
    throw std::invalid_argument("DSX_CPU_ISA=" + name + " 不可用，这台机器能用：" + names);
}

// 环境变量 DSX_CPU_ISA 指定的，没有设就是最快的。
const Isa& requested() {
    const char* value = std::getenv("DSX_CPU_ISA");
    return choose(value ? value : "");
}

}  // namespace

std::vector<std::string> available_isas() {
    std::vector<std::string> names;
    for (const Isa& isa : available()) {
        names.emplace_back(isa.kernels->name);
    }
    return names;
}

const Kernels& requested_kernels() { return *requested().kernels; }

const QuantKernels& requested_quant_kernels(int64_t bits) {
    const Isa& isa = requested();
    return bits == 4 ? *isa.int4 : *isa.int8;
}

}  // namespace dsx
