// TensorRT 的运行时插件：一个通用的类，启动序列化在引擎里的 kernel。
//
// 插件的名字、namespace、版本、字段与 dsx build 在 Python 里用的插件相同，所以用 Python 建好的引擎换成本库就能在没有 Python 的
// 进程里运行。字段只有两个（deepseek_export/kernels/program.py）：program 是启动方法的文本，image 是机器码。
// 各算子之间没有别的差别，所以不需要逐个算子写类。
#include <NvInfer.h>
#include <dlfcn.h>

#include <array>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../ops.h"
#include "driver.h"
#include "program.h"

namespace dsx {
namespace {

using namespace nvinfer1;

// 错误不能越过 TensorRT 的 noexcept 边界：记一行日志，把失败作为返回值交出去。
ILogger* logger() noexcept;

void report(std::exception const& error) noexcept {
    if (auto* log = logger()) {
        log->log(ILogger::Severity::kERROR, error.what());
    }
}

template <typename Body>
int32_t guard(Body&& body) noexcept {
    try {
        body();
        return 0;
    } catch (std::exception const& error) {
        report(error);
        return 1;
    }
}

template <typename Factory>
auto make(Factory&& factory) noexcept -> decltype(factory().release()) {
    decltype(factory().release()) made = nullptr;
    guard([&] { made = factory().release(); });
    return made;
}

std::map<std::string, DataType> const& data_types() {
    static std::map<std::string, DataType> const table{{"float16", DataType::kHALF}, {"bfloat16", DataType::kBF16},
        {"float32", DataType::kFLOAT}, {"int32", DataType::kINT32}, {"int64", DataType::kINT64},
        {"int8", DataType::kINT8}, {"int4", DataType::kINT4}};
    return table;
}

std::vector<int64_t> shape(Dims const& dims) { return {dims.d, dims.d + dims.nbDims}; }

// 输出的一维：常数、输入里的一维，或它们的积（B*S）。
IDimensionExpr const* dimension(
    std::string const& name, std::map<std::string, IDimensionExpr const*> const& symbols, IExprBuilder& builder) {
    auto const star = name.find('*');
    if (star == std::string::npos) {
        return is_number(name) ? builder.constant(std::stoll(name)) : symbols.at(name);
    }
    auto const* left = dimension(name.substr(0, star), symbols, builder);
    auto const* right = dimension(name.substr(star + 1), symbols, builder);
    return builder.operation(DimensionOperation::kPROD, *left, *right);
}

class Plugin final : public IPluginV3, public IPluginV3OneCore, public IPluginV3OneBuild, public IPluginV3OneRuntime {
public:
    Plugin(std::shared_ptr<std::string const> text, std::shared_ptr<std::string const> image)
        : text_(std::move(text)),
          image_(std::move(image)),
          program_(std::make_shared<Program const>(*text_, image_->size())),
          fields_{PluginField{"program", text_->data(), PluginFieldType::kUNKNOWN, static_cast<int32_t>(text_->size())},
              PluginField{"image", image_->data(), PluginFieldType::kUNKNOWN, static_cast<int32_t>(image_->size())}},
          collection_{static_cast<int32_t>(fields_.size()), fields_.data()},
          launcher_(program_, image_) {}

    Plugin(Plugin const& other) : Plugin(other.text_, other.image_) { launcher_ = other.launcher_; }
    Plugin& operator=(Plugin const&) = delete;

    IPluginCapability* getCapabilityInterface(PluginCapabilityType type) noexcept override {
        switch (type) {
        case PluginCapabilityType::kCORE: return static_cast<IPluginV3OneCore*>(this);
        case PluginCapabilityType::kBUILD: return static_cast<IPluginV3OneBuild*>(this);
        case PluginCapabilityType::kRUNTIME: return static_cast<IPluginV3OneRuntime*>(this);
        }
        return nullptr;
    }

    IPluginV3* clone() noexcept override {
        return make([&] { return std::make_unique<Plugin>(*this); });
    }

    AsciiChar const* getPluginName() const noexcept override { return program_->op.c_str(); }
    AsciiChar const* getPluginVersion() const noexcept override { return ops::kPluginVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return ops::kPluginNamespace; }

    int32_t configurePlugin(
        DynamicPluginTensorDesc const*, int32_t, DynamicPluginTensorDesc const*, int32_t) noexcept override {
        return 0;
    }

    int32_t getOutputDataTypes(
        DataType* types, int32_t count, DataType const*, int32_t) const noexcept override {
        return guard([&] {
            for (int32_t i = 0; i < count; ++i) {
                types[i] = data_types().at(program_->outputs.at(static_cast<size_t>(i)).dtype);
            }
        });
    }

    int32_t getOutputShapes(DimsExprs const* inputs, int32_t count, DimsExprs const*, int32_t, DimsExprs* outputs,
        int32_t output_count, IExprBuilder& builder) noexcept override {
        return guard([&] {
            std::map<std::string, IDimensionExpr const*> symbols;
            for (int32_t i = 0; i < count; ++i) {
                auto const& names = program_->inputs.at(static_cast<size_t>(i)).dims;
                for (size_t d = 0; d < names.size(); ++d) {
                    symbols.emplace(names[d], inputs[i].d[d]);
                }
            }
            for (int32_t i = 0; i < output_count; ++i) {
                auto const& names = program_->outputs.at(static_cast<size_t>(i)).dims;
                outputs[i].nbDims = static_cast<int32_t>(names.size());
                for (size_t d = 0; d < names.size(); ++d) {
                    outputs[i].d[d] = dimension(names[d], symbols, builder);
                }
            }
        });
    }

    bool supportsFormatCombination(
        int32_t position, DynamicPluginTensorDesc const* tensors, int32_t input_count, int32_t) noexcept override {
        bool supported = false;
        guard([&] {
            auto const index = static_cast<size_t>(position < input_count ? position : position - input_count);
            auto const& tensor = (position < input_count ? program_->inputs : program_->outputs).at(index);
            auto const& desc = tensors[position].desc;
            supported = desc.format == TensorFormat::kLINEAR && desc.type == data_types().at(tensor.dtype);
        });
        return supported;
    }

    int32_t getNbOutputs() const noexcept override { return static_cast<int32_t>(program_->outputs.size()); }

    size_t getWorkspaceSize(DynamicPluginTensorDesc const* inputs, int32_t count, DynamicPluginTensorDesc const*,
        int32_t) const noexcept override {
        size_t bytes = 0;
        guard([&] {
            std::vector<std::vector<int64_t>> shapes;
            for (int32_t i = 0; i < count; ++i) {
                shapes.push_back(shape(inputs[i].max));
            }
            bytes = program_->workspace(program_->sizes(shapes));
        });
        return bytes;
    }

    int32_t onShapeChange(PluginTensorDesc const* inputs, int32_t count, PluginTensorDesc const*, int32_t) noexcept override {
        return guard([&] {
            std::vector<std::vector<int64_t>> shapes;
            for (int32_t i = 0; i < count; ++i) {
                shapes.push_back(shape(inputs[i].dims));
            }
            program_->sizes(shapes);  // 形状不符在这里就说；启动序列由 enqueue 按它自己的形状得到
        });
    }

    int32_t enqueue(PluginTensorDesc const* descriptions, PluginTensorDesc const*, void const* const* inputs, void* const* outputs,
        void* workspace, cudaStream_t stream) noexcept override {
        return guard([&] {
            std::vector<std::vector<int64_t>> shapes;
            for (size_t i = 0; i < program_->inputs.size(); ++i) {
                shapes.push_back(shape(descriptions[i].dims));
            }
            launcher_.enqueue(shapes, inputs, outputs, workspace, stream);
        });
    }

    IPluginV3* attachToContext(IPluginResourceContext*) noexcept override {
        // 装载推迟到这里，而不是构造时：建引擎、解析计算图不需要 GPU。
        return make([&] {
            auto attached = std::make_unique<Plugin>(*this);
            attached->launcher_.load();
            return attached;
        });
    }

    PluginFieldCollection const* getFieldsToSerialize() noexcept override { return &collection_; }

private:
    std::shared_ptr<std::string const> text_;
    std::shared_ptr<std::string const> image_;
    std::shared_ptr<Program const> program_;
    std::array<PluginField, 2> fields_;
    PluginFieldCollection collection_;
    Launcher launcher_;
};

class Creator final : public IPluginCreatorV3One {
public:
    explicit Creator(char const* op) : op_(op) {}

    IPluginV3* createPlugin(
        AsciiChar const* name, PluginFieldCollection const* fields, TensorRTPhase) noexcept override {
        return make([&] {
            auto text = std::make_shared<std::string const>(field(*fields, "program", name));
            auto image = std::make_shared<std::string const>(field(*fields, "image", name));
            return std::make_unique<Plugin>(std::move(text), std::move(image));
        });
    }

    PluginFieldCollection const* getFieldNames() noexcept override {
        static std::array<PluginField, 2> const fields{
            PluginField{"program", nullptr, PluginFieldType::kCHAR, 0},
            PluginField{"image", nullptr, PluginFieldType::kINT8, 0},
        };
        static PluginFieldCollection const collection{static_cast<int32_t>(fields.size()), fields.data()};
        return &collection;
    }

    AsciiChar const* getPluginName() const noexcept override { return op_; }
    AsciiChar const* getPluginVersion() const noexcept override { return ops::kPluginVersion; }
    AsciiChar const* getPluginNamespace() const noexcept override { return ops::kPluginNamespace; }

private:
    static std::string field(PluginFieldCollection const& fields, std::string const& wanted, char const* node) {
        for (int32_t i = 0; i < fields.nbFields; ++i) {
            PluginField const& found = fields.fields[i];
            if (wanted == found.name) {
                std::string value(static_cast<char const*>(found.data), static_cast<size_t>(found.length));
                // 来自 ONNX 属性的字符串带结尾的 NUL。
                if (found.type == PluginFieldType::kCHAR) {
                    value.resize(std::strlen(value.c_str()));
                }
                return value;
            }
        }
        throw std::runtime_error(std::string("dsx: 节点 ") + node + " 没有字段 " + wanted +
            "：kernel 由 dsx build 编译并写进引擎，本库只负责运行");
    }

    char const* op_;
};

template <size_t... I>
auto& creators(std::index_sequence<I...>) {
    static std::array<Creator, sizeof...(I)> all{Creator(ops::kPlugins[I])...};
    return all;
}

auto& creators() { return creators(std::make_index_sequence<ops::kPlugins.size()>()); }

// TensorRT 11 从 IPluginRegistry 的虚表里去掉了几个旧方法，所以用哪一代头文件构建，就只能与那一代的库共用。
struct Runtime {
    char const* library;
    int headers;   // 虚表属于哪一代头文件
    int oldest;    // 从哪个版本起（getInferLibVersion）
};
constexpr std::array<Runtime, 3> kRuntimes{{
    {"libnvinfer.so.11", 11, 0},
    {"libnvinfer.so.10", 10, 0},
    {"libtensorrt_rtx.so.1", 11, 10700},
}};
// RTX 自己的头文件主版本是 1。
constexpr int kHeaders = NV_TENSORRT_MAJOR == 1 ? 11 : NV_TENSORRT_MAJOR;
static_assert(kHeaders == 10 || kHeaders == 11, "只支持 TensorRT 10、11 与 RTX 的头文件");

// 已经装载的、同一代的 TensorRT；不在链接时绑定，由装载本库的进程提供。
void* find_runtime() noexcept {
    for (auto const& runtime : kRuntimes) {
        void* library = dlopen(runtime.library, RTLD_NOW | RTLD_NOLOAD);
        if (library == nullptr) {
            continue;
        }
        auto* version = reinterpret_cast<int32_t (*)()>(dlsym(library, "getInferLibVersion"));
        if (runtime.headers == kHeaders && version != nullptr && version() >= runtime.oldest) {
            return library;
        }
        std::fprintf(stderr, "dsx: 本库用 TensorRT %d 的头文件构建，与已装载的 %s（%d）不是同一代，没有登记插件\n",
            NV_TENSORRT_MAJOR, runtime.library, version != nullptr ? version() : 0);
    }
    return nullptr;
}

void* runtime_symbol(char const* symbol) noexcept {
    static std::atomic<void*> known{nullptr};
    void* library = known.load();
    if (library == nullptr) {  // 本库可能先于 TensorRT 装载，所以没找到不算定论
        library = find_runtime();
        known.store(library);
    }
    return library != nullptr ? dlsym(library, symbol) : nullptr;
}

std::atomic<ILoggerFinder*> logger_finder{nullptr};

ILogger* logger() noexcept {
    if (auto* finder = logger_finder.load()) {
        return finder->findLogger();
    }
    auto* get = reinterpret_cast<ILogger* (*)()>(runtime_symbol("getLogger"));
    return get != nullptr ? get() : nullptr;
}

IPluginRegistry* registry() noexcept {
    auto* get = reinterpret_cast<IPluginRegistry* (*)()>(runtime_symbol("getPluginRegistry"));
    return get != nullptr ? get() : nullptr;
}

// 同名的 creator：不用 getCreator，它找不到时会报错。
IPluginCreatorInterface* registered(IPluginRegistry& registry, Creator const& wanted) noexcept {
    int32_t count = 0;
    auto* const* all = registry.getAllCreators(&count);
    for (int32_t i = 0; i < count; ++i) {
        // TensorRT 自己的插件还有旧的 creator 类；按接口的版本信息区分，不依赖跨库的 RTTI。
        if (std::strcmp(all[i]->getInterfaceInfo().kind, wanted.getInterfaceInfo().kind) != 0) {
            continue;
        }
        auto const* creator = static_cast<IPluginCreatorV3One const*>(all[i]);
        if (std::strcmp(creator->getPluginName(), wanted.getPluginName()) == 0 &&
            std::strcmp(creator->getPluginVersion(), ops::kPluginVersion) == 0 &&
            std::strcmp(creator->getPluginNamespace(), ops::kPluginNamespace) == 0) {
            return all[i];
        }
    }
    return nullptr;
}

// dlopen（ctypes、trtexec --dynamicPlugins、polygraphy --plugins）不会调用 getCreators，所以装载时自己登记。
__attribute__((constructor)) void register_creators() noexcept {
    if (auto* found = registry()) {
        for (auto& creator : creators()) {
            if (registered(*found, creator) == nullptr) {
                found->registerCreator(creator, ops::kPluginNamespace);
            }
        }
    }
}

// IPluginRegistry::loadLibrary 装载之后自己登记 getCreators 给出的 creator，名字已在就算失败：把刚才登记的让出来。
void deregister_creators() noexcept {
    if (auto* found = registry()) {
        for (auto& creator : creators()) {
            if (registered(*found, creator) == &creator) {
                found->deregisterCreator(creator);
            }
        }
    }
}

}  // namespace
}  // namespace dsx

// IPluginRegistry::loadLibrary 的入口。
extern "C" __attribute__((visibility("default"))) nvinfer1::IPluginCreatorInterface* const* getCreators(
    int32_t& count) noexcept {
    static auto const all = [] {
        std::array<nvinfer1::IPluginCreatorInterface*, dsx::ops::kPlugins.size()> pointers{};
        for (size_t i = 0; i < pointers.size(); ++i) {
            pointers[i] = &dsx::creators()[i];
        }
        return pointers;
    }();
    dsx::deregister_creators();
    count = dsx::registry() != nullptr ? static_cast<int32_t>(all.size()) : 0;
    return all.data();
}

extern "C" __attribute__((visibility("default"))) void setLoggerFinder(nvinfer1::ILoggerFinder* finder) noexcept {
    dsx::logger_finder.store(finder);
}
