// The names of the `confidence` argument.
#pragma once

#include <stdexcept>
#include <string>

#include "submodular.h"

namespace finecf {

inline Confidence confidence_named(const char* op, const std::string& name) {
  if (name == "entropy") return Confidence::kEntropy;
  if (name == "evidential") return Confidence::kEvidential;
  throw std::runtime_error(std::string(op) + R"(: confidence must be "entropy" or "evidential", got ")" + name + '"');
}

}  // namespace finecf
