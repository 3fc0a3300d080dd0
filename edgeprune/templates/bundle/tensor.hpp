// One input or output of the model, and its values as bytes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

using Bytes = std::vector<char>;

struct Tensor {
  std::string name, type;
  std::vector<std::int64_t> shape;
  double scale;
  int zero_point;
  std::string file;

  std::size_t elements() const {
    std::size_t count = 1;
    for (const std::int64_t size : shape) count *= static_cast<std::size_t>(size);
    return count;
  }
  std::size_t bytes() const {
    if (type == "float64" || type == "int64") return 8 * elements();
    if (type == "float32" || type == "int32") return 4 * elements();
    if (type == "float16") return 2 * elements();
    return elements();
  }
};
