#include "program.h"

#include <algorithm>
#include <locale>
#include <sstream>
#include <stdexcept>

namespace dsx {
namespace {

[[noreturn]] void fail(std::string const& what) { throw std::runtime_error("dsx: " + what); }

// 按 C locale 读的流：程序的文本与进程的 locale 无关。std::stof、strtof 则跟着 LC_NUMERIC 走，逗号作小数点的 locale 里 "0.1147" 读成 0。
std::istringstream reader(std::string_view text) {
    std::istringstream stream{std::string(text)};
    stream.imbue(std::locale::classic());
    return stream;
}

float parse_float(std::string const& text) {
    auto stream = reader(text);
    float number = 0.0F;
    if (!(stream >> number) || stream.peek() != std::istringstream::traits_type::eof()) {
        fail(text + " 不是数");
    }
    return number;
}

// 与 deepseek_export/kernels/expression.py 的 OPERATORS 是同一张表。
bool apply(std::string const& token, int64_t a, int64_t b, int64_t& result) {
    if (token == "+") {
        result = a + b;
    } else if (token == "*") {
        result = a * b;
    } else if (token == "/" || token == "ceil") {
        if (b <= 0) {
            fail("除数 " + std::to_string(b) + " 不是正数");
        }
        result = token == "/" ? a / b : (a + b - 1) / b;
    } else if (token == "min") {
        result = std::min(a, b);
    } else if (token == "max") {
        result = std::max(a, b);
    } else if (token == "<=") {
        result = a <= b ? 1 : 0;
    } else {
        return false;
    }
    return true;
}

bool is_operator(std::string const& token) {
    int64_t ignored = 0;
    return apply(token, 1, 1, ignored);
}

Argument parse_argument(std::istringstream& line) {
    std::string kind;
    std::string rest;
    line >> kind;
    std::getline(line >> std::ws, rest);
    Argument argument;
    if (kind == "input" || kind == "output") {
        argument.kind = kind == "input" ? Argument::Kind::kInput : Argument::Kind::kOutput;
        argument.index = std::stoi(rest);
    } else if (kind == "workspace" || kind == "int32") {
        argument.kind = kind == "int32" ? Argument::Kind::kInt32 : Argument::Kind::kWorkspace;
        argument.expression = Expression(rest);
    } else if (kind == "float32") {
        argument.kind = Argument::Kind::kFloat32;
        argument.number = parse_float(rest);
    } else {
        fail("不认识的参数 " + kind);
    }
    return argument;
}

Tensor parse_tensor(std::istringstream& line) {
    Tensor tensor;
    line >> tensor.dtype;
    for (std::string dim; line >> dim;) {
        tensor.dims.push_back(dim);
    }
    return tensor;
}

}  // namespace

bool is_number(std::string_view token) {
    return !token.empty() && std::all_of(token.begin(), token.end(), [](char c) { return c >= '0' && c <= '9'; });
}

Expression::Expression(std::string_view text) {
    auto stream = reader(text);
    for (std::string token; stream >> token;) {
        tokens_.push_back(token);
    }
}

int64_t Expression::evaluate(Sizes const& sizes) const {
    std::vector<int64_t> stack;
    for (auto const& token : tokens_) {
        if (is_number(token)) {
            stack.push_back(std::stoll(token));
        } else if (is_operator(token)) {
            if (stack.size() < 2) {
                fail("算式不完整");
            }
            int64_t const right = stack.back();
            stack.pop_back();
            apply(token, stack.back(), right, stack.back());
        } else if (auto const found = sizes.find(token); found != sizes.end()) {
            stack.push_back(found->second);
        } else {
            fail("符号 " + token + " 没有值");
        }
    }
    if (stack.size() != 1) {
        fail("算式不完整");
    }
    return stack.front();
}

Program::Program(std::string_view text, size_t image_size) {
    auto stream = reader(text);
    std::string row;
    if (!std::getline(stream, row) || row != "dsx-program 2") {
        fail("程序的首行是 " + row + "，应为 dsx-program 2");
    }
    while (std::getline(stream, row)) {
        auto line = reader(row);
        std::string word;
        line >> word;
        if (word == "op") {
            line >> op >> sm;
            continue;
        }
        if (word == "input" || word == "output") {
            (word == "input" ? inputs : outputs).push_back(parse_tensor(line));
            continue;
        }
        if (word == "alias") {
            std::pair<size_t, size_t> alias;
            if (!(line >> alias.first >> alias.second) || alias.first >= outputs.size() ||
                alias.second >= inputs.size()) {
                fail("不认识的行 " + row);
            }
            aliases.push_back(alias);
            continue;
        }
        if (word == "variant") {
            variants.emplace_back();
        } else if (variants.empty()) {
            fail("不认识的行 " + row);
        }
        Variant& variant = variants.back();
        std::string rest;
        if (word == "launch") {
            Kernel kernel;
            if (!(line >> kernel.entry >> kernel.threads >> kernel.shared >> kernel.scratch >> kernel.offset >>
                    kernel.length) ||
                kernel.length > image_size || kernel.offset > image_size - kernel.length) {
                fail("image 只有 " + std::to_string(image_size) + " 字节，放不下 " + row);
            }
            // 偏移唯一确定一个 kernel：几个变体共用的只装载一次。
            auto const same = std::find_if(
                kernels.begin(), kernels.end(), [&](Kernel const& known) { return known.offset == kernel.offset; });
            variant.launches.emplace_back();
            variant.launches.back().kernel = static_cast<size_t>(same - kernels.begin());
            if (same == kernels.end()) {
                kernels.push_back(kernel);
            }
            continue;
        }
        if (word == "variant" || word == "workspace") {
            std::getline(line, rest);
            (word == "variant" ? variant.when : variant.workspace) = Expression(rest);
        } else if (variant.launches.empty()) {
            fail("不认识的行 " + row);
        } else if (word == "grid") {
            for (auto& axis : variant.launches.back().grid) {
                std::getline(line, rest, ';');
                axis = Expression(rest);
            }
        } else if (word == "argument") {
            variant.launches.back().arguments.push_back(parse_argument(line));
        } else {
            fail("不认识的行 " + row);
        }
    }
}

Sizes Program::sizes(std::vector<std::vector<int64_t>> const& shapes) const {
    if (shapes.size() != inputs.size()) {
        fail(op + " 有 " + std::to_string(shapes.size()) + " 个输入，应为 " + std::to_string(inputs.size()));
    }
    Sizes found;
    for (size_t i = 0; i < shapes.size(); ++i) {
        if (shapes[i].size() != inputs[i].dims.size()) {
            fail(op + " 的输入 " + std::to_string(i) + " 的秩不符");
        }
        for (size_t d = 0; d < shapes[i].size(); ++d) {
            std::string const& name = inputs[i].dims[d];
            int64_t const want = is_number(name) ? std::stoll(name) : found.emplace(name, shapes[i][d]).first->second;
            if (shapes[i][d] != want) {
                fail(op + " 的输入 " + std::to_string(i) + " 的维 " + name + " 是 " + std::to_string(shapes[i][d]) +
                    "，应为 " + std::to_string(want));
            }
        }
    }
    return found;
}

size_t Program::workspace(Sizes const& sizes) const {
    int64_t most = 0;
    for (auto const& variant : variants) {
        most = std::max(most, variant.workspace.evaluate(sizes));
    }
    return static_cast<size_t>(most);
}

std::vector<BoundLaunch> Program::bind(Sizes sizes, int sm_count) const {
    sizes[kSmCount] = sm_count;
    auto const variant = std::find_if(
        variants.begin(), variants.end(), [&](Variant const& v) { return v.when.evaluate(sizes) != 0; });
    if (variant == variants.end()) {
        fail(op + " 没有适用于这组尺寸的变体");
    }
    std::vector<BoundLaunch> bound;
    for (auto const& launch : variant->launches) {
        BoundLaunch one;
        one.kernel = launch.kernel;
        bool empty = false;
        for (int axis = 0; axis < 3; ++axis) {
            int64_t const size = launch.grid[axis].evaluate(sizes);
            empty = empty || size == 0;
            one.grid[axis] = static_cast<unsigned>(size);
        }
        if (empty) {
            continue;
        }
        for (auto const& argument : launch.arguments) {
            bool const computed = argument.kind == Argument::Kind::kWorkspace || argument.kind == Argument::Kind::kInt32;
            int64_t const value = computed ? argument.expression.evaluate(sizes) : argument.index;
            one.arguments.push_back({argument.kind, value, argument.number});
        }
        bound.push_back(std::move(one));
    }
    return bound;
}

}  // namespace dsx
