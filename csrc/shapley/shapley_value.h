// The names of the values, for the entry points. Apart from shapley.h, which the wide CPU kernels include: nothing of
// the standard library's code may be compiled with their instructions.
#pragma once

#include <stdexcept>
#include <string>

#include "shapley.h"

namespace finecf {

inline Value value_named(const char* op, const std::string& name) {
  const char* const names[] = {"prob", "log_prob", "log_odds", "logit"};  // in the order of Value
  for (int i = 0; i < 4; ++i)
    if (name == names[i]) return static_cast<Value>(i);
  throw std::runtime_error(std::string(op) +
                           ": value must be \"prob\", \"log_prob\", \"log_odds\" or \"logit\", got \"" + name + "\"");
}

}  // namespace finecf
