#pragma once

#include "ort.h"

namespace dsx {

// 登记 dsx::MlaAttention。
void add_mla_attention(Ort::CustomOpDomain& domain);

}  // namespace dsx
