// 启动程序：dsx 提前编译好的 kernel 与启动它们的方法。
//
// 文本格式见 deepseek_export/kernels/program.py；这里是同一份格式的 C++ 读法。只用标准库，不依赖 CUDA 与 TensorRT。
#pragma once

#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace dsx {

using Sizes = std::map<std::string, int64_t, std::less<>>;

// 当前设备的 SM 个数，算式里的符号；与 deepseek_export/kernels/program.py 的同名常数相同。
constexpr char const* kSmCount = "sms";

// 符号尺寸上的整数算式，逆波兰记号。
class Expression {
public:
    Expression() = default;
    explicit Expression(std::string_view text);

    int64_t evaluate(Sizes const& sizes) const;

private:
    std::vector<std::string> tokens_;
};

struct Tensor {
    std::string dtype;
    std::vector<std::string> dims;  // 十进制整数或符号
};

struct Kernel {
    std::string entry;
    int threads = 0;
    int shared = 0;
    int scratch = 0;
    size_t offset = 0;  // 在 image 里的位置
    size_t length = 0;
};

struct Argument {
    enum class Kind { kInput, kOutput, kWorkspace, kInt32, kFloat32 };
    Kind kind = Kind::kInput;
    int index = 0;           // kInput、kOutput
    Expression expression;   // kWorkspace、kInt32
    float number = 0.0F;     // kFloat32
};

struct Launch {
    size_t kernel = 0;  // Program::kernels 的下标
    Expression grid[3];
    std::vector<Argument> arguments;
};

struct Variant {
    Expression when;
    Expression workspace;
    std::vector<Launch> launches;
};

// 代入具体尺寸的参数；指针在启动时才知道。
struct BoundArgument {
    Argument::Kind kind = Argument::Kind::kInput;
    int64_t value = 0;  // 序号、workspace 偏移或整数
    float number = 0.0F;
};

struct BoundLaunch {
    size_t kernel = 0;
    unsigned grid[3] = {0, 0, 0};
    std::vector<BoundArgument> arguments;
};

class Program {
public:
    // 解析失败抛 std::runtime_error。
    Program(std::string_view text, size_t image_size);

    // 由输入形状得到符号的值；形状与声明不符时抛 std::runtime_error。
    Sizes sizes(std::vector<std::vector<int64_t>> const& shapes) const;

    // 对这组尺寸以及任何更小的尺寸都够用的字节数。
    size_t workspace(Sizes const& sizes) const;

    // 这组尺寸在有 sm_count 个 SM 的卡上的启动序列；空网格已去掉。
    std::vector<BoundLaunch> bind(Sizes sizes, int sm_count) const;

    std::string op;
    int sm = 0;
    std::vector<Tensor> inputs;
    std::vector<Tensor> outputs;
    std::vector<std::pair<size_t, size_t>> aliases;  // 第几个输出与第几个输入是同一块内存
    std::vector<Kernel> kernels;
    std::vector<Variant> variants;
};

// 记号是整数吗（否则是符号）。
bool is_number(std::string_view token);

}  // namespace dsx
