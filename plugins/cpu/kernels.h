// 与指令集有关的计算的接口。每个指令集一个编译单元（kernels_<指令集>.cc），各自填一张函数表；其余代码不含任何指令集。
#pragma once

#include <cstdint>

namespace dsx {

enum class Dtype { kFloat32, kFloat16, kBfloat16, kInt8 };

constexpr int64_t kPad = 16;      // 各指令集向量长度的公倍数：内部矩阵的宽度都补零到它的倍数
constexpr int64_t kBlockRows = 64;  // attend 一次最多几行 query
constexpr int64_t kTile = 64;     // attend 一次看几个 key：64 行 576 个 float32 是 144 KiB，与 query、累加器一起留在 L2

constexpr int64_t kBf16Pad = 32;  // 直接乘 bfloat16 的注意力，key 与 value 的宽度都要是它的倍数

constexpr int64_t padded(int64_t n) { return (n + kPad - 1) / kPad * kPad; }
constexpr int64_t bytes_of(Dtype dtype) { return dtype == Dtype::kFloat32 ? 4 : dtype == Dtype::kInt8 ? 1 : 2; }
// int8 权重一行的字节数。
constexpr int64_t weight_row(int64_t r, int64_t block) { return r + 2 * (r / block); }
// 缓存一行的元素数；int8 的一行见 int8_cache.h。
constexpr int64_t cache_width(Dtype dtype, int64_t r, int64_t dr) { return dtype == Dtype::kInt8 ? r + 2 * dr + 6 : r + dr; }

// 一块 query 对一段连续的 key：在线 softmax 的状态 (acc, max, sum) 就地更新，所以可以分段调用。
struct Block {
    const float* q;          // [rows, padded(width)]，已乘 scale，补的列是 0
    int64_t rows;            // 1..kBlockRows
    const void* keys;        // 第 begin 个 key；行距 key_stride 个元素
    const void* values;      // 第 begin 个 value；行距 value_stride。与 keys 相等表示 latent：value 是 key 的前几列
    Dtype dtype;             // keys、values 的 dtype；int8 的只交给 QuantKernels::attend：latent，一行的 r = value_width、dr = width - r
    int64_t key_stride;
    int64_t value_stride;
    int64_t width;           // key 的宽度
    int64_t value_width;     // value 的宽度
    int64_t begin;           // key 的下标区间
    int64_t end;
    int64_t last_visible;    // 第 0 个 token 看得见的最后一个 key
    int64_t first_row;       // 这一块的第 0 行是第几行；第 i 行属于第 (first_row + i) / rows_per_token 个 token，
    int64_t rows_per_token;  // 每晚一个 token 就多看见一个 key
    float* acc;              // [rows, padded(value_width)]，没有除以 sum
    float* max;              // [rows]，初值 -inf
    float* sum;              // [rows]，初值 0
};

// int8 权重的若干行：一行是 r 个码，再是每 block 个一个 float16 的 scale；r 是 block 的倍数，block 是 32、64 或 128。
struct Int8Rows {
    const int8_t* codes;
    int64_t rows, r, block;
};

struct Kernels {
    const char* name;
    // dst[rows, dst_width] = src[rows, width]，多出的列填 0。
    void (*widen)(Dtype dtype, const void* src, int64_t src_stride, int64_t rows, int64_t width, float* dst,
        int64_t dst_width, int64_t dst_stride);
    // int8 缓存的行 → latent[rows, latent_width] 与 rope[rows, rope_width]，多出的列填 0；先写 latent，后写 rope。
    void (*unpack)(const int8_t* src, int64_t rows, int64_t r, int64_t dr, float* latent, int64_t latent_width,
        int64_t latent_stride, float* rope, int64_t rope_width, int64_t rope_stride);
    // int8 权重的行 → dst[rows, dst_stride]，多出的列填 0。
    void (*widen_weights)(const Int8Rows& w, float* dst, int64_t dst_stride);
    // c[m, n] = a[m, k] · b[k, n]；n 是 kPad 的倍数。
    void (*multiply)(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t m, int64_t n, int64_t k,
        float* c, int64_t ldc);
    // c[m, n] = a[m, k] · b[n, k]ᵀ；k 是 kPad 的倍数。
    void (*multiply_transposed)(const float* a, int64_t lda, const float* b, int64_t ldb, int64_t m, int64_t n,
        int64_t k, float* c, int64_t ldc);
    // c[m, r] = a[m, rows] · w，与展宽之后的 multiply 逐位相同，只是边读边展宽：行少时省去写一遍、读一遍。scales 放得下 rows * r / block 个。
    void (*multiply_weights)(const float* a, int64_t lda, int64_t m, const Int8Rows& w, float* c, int64_t ldc, float* scales);
    // c[m, rows] = a[m, r] · wᵀ，同上，与 multiply_transposed 逐位相同。
    void (*multiply_transposed_weights)(const float* a, int64_t lda, int64_t m, const Int8Rows& w, float* c, int64_t ldc, float* scales);
    // x[count] = max(x, 0)，就地；count 是 kPad 的倍数。
    void (*rectify)(float* x, int64_t count);
    // dst[count] = src[count] 舍入到 bfloat16；count 是 kPad 的倍数。只有直接乘 bfloat16 的指令集有，别的是空。
    void (*narrow)(const float* src, int64_t count, uint16_t* dst);
    // scratch 至少 attend_scratch(width) 个 float，64 字节对齐。
    void (*attend)(const Block& block, float* scratch);
};

// 一格 key 的 float32 副本、一格 value 的副本、分数、每行的缩放；bfloat16 的 query、概率与交错的 value 也放得进来。
constexpr int64_t attend_scratch(int64_t width) {
    return 2 * kTile * padded(width) + 2 * kBlockRows * kTile + kBlockRows + kBlockRows * padded(width);
}

extern const Kernels kPlainKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels, kAvxVnniKernels;
extern const Kernels kAvx512Kernels;
extern const Kernels kAvx512Bf16Kernels;
#elif defined(__aarch64__)
extern const Kernels kNeonKernels, kNeonDotprodKernels, kNeonI8mmKernels;
extern const Kernels kNeonBf16Kernels;
#endif

}  // namespace dsx
