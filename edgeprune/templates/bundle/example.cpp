// Run the model of this bundle: ./example [INPUT.bin], raw values of the first input in the type and layout that
// manifest.json states. Without a file the recorded input, whose outputs are held against the recorded ones.
// From another folder: ./example INPUT.bin BUNDLE_FOLDER (or "" for the recorded input).
#include <algorithm>
#include <chrono>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <exception>
#include <fstream>
#include <iostream>
#include <iterator>
#include <stdexcept>
#include <string>
#include <vector>

#include "runtime.hpp"

namespace {

// From manifest.json: name, type, shape, scale and zero point of 8-bit numbers, recorded values.
const std::vector<Tensor> inputs = {
    @INPUTS@
};
const std::vector<Tensor> outputs = {
    @OUTPUTS@
};
const double tolerance = @TOLERANCE@;

Bytes read_tensor(const std::string& path, const Tensor& tensor) {
  std::ifstream file(path, std::ios::binary);
  Bytes bytes((std::istreambuf_iterator<char>(file)), std::istreambuf_iterator<char>());
  if (!file || bytes.size() != tensor.bytes())
    throw std::runtime_error(path + " does not hold " + std::to_string(tensor.elements()) + " " + tensor.type +
                             " values");
  return bytes;
}

template <typename Number>
std::vector<double> convert(const Bytes& bytes) {
  std::vector<Number> numbers(bytes.size() / sizeof(Number));
  std::memcpy(numbers.data(), bytes.data(), bytes.size());
  return std::vector<double>(numbers.begin(), numbers.end());
}

// What the stored numbers stand for.
std::vector<double> values_of(const Bytes& bytes, const Tensor& tensor) {
  std::vector<double> values;
  if (tensor.type == "float32") values = convert<float>(bytes);
  else if (tensor.type == "float64") values = convert<double>(bytes);
  else if (tensor.type == "int8") values = convert<std::int8_t>(bytes);
  else if (tensor.type == "uint8" || tensor.type == "bool") values = convert<std::uint8_t>(bytes);
  else if (tensor.type == "int32") values = convert<std::int32_t>(bytes);
  else if (tensor.type == "int64") values = convert<std::int64_t>(bytes);
  else throw std::runtime_error("this example does not read outputs of type " + tensor.type);
  for (double& value : values) value = (value - tensor.zero_point) * tensor.scale;
  return values;
}

int run(int argc, char** argv) {
  const std::string folder = argc > 2 ? std::string(argv[2]) + "/" : "";
  const bool recorded = argc < 2 || !*argv[1];
  std::vector<Bytes> given;
  for (const Tensor& tensor : inputs)
    given.push_back(read_tensor(given.empty() && !recorded ? argv[1] : folder + tensor.file, tensor));

  Model model(folder + "@MODEL@", @THREADS@, inputs, outputs);
  std::vector<Bytes> results;
  std::vector<double> milliseconds;
  for (int turn = 0; turn < 20; ++turn) {
    const auto start = std::chrono::steady_clock::now();
    results = model.run(given);
    milliseconds.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(milliseconds.begin(), milliseconds.end());

  const std::vector<double> all = values_of(results[0], outputs[0]);
  const auto classes = static_cast<std::ptrdiff_t>(all.size()) / outputs[0].shape[0];
  const auto best = std::max_element(all.begin(), all.begin() + classes) - all.begin();
  std::ifstream labels(folder + "labels.txt");
  std::string label;
  for (std::ptrdiff_t line = 0; line <= best && std::getline(labels, label); ++line) {
  }
  std::cout << "top-1: " << best << ' ' << (labels ? label : "") << " (output " << all[best] << ")\n"
            << "latency: " << milliseconds[milliseconds.size() / 2] << " ms, median of " << milliseconds.size() << '\n';
  if (!recorded) return 0;

  double worst = 0;
  for (std::size_t place = 0; place < outputs.size(); ++place) {
    Tensor stored = outputs[place];
    stored.scale = 1, stored.zero_point = 0;  // compared as stored, as the other examples do
    const std::vector<double> got = values_of(results[place], stored);
    const std::vector<double> expected = values_of(read_tensor(folder + stored.file, stored), stored);
    double difference = 0, largest = 1e-12;
    for (std::size_t index = 0; index < got.size(); ++index) {
      const double off = std::abs(got[index] - expected[index]);
      difference = std::isfinite(off) ? std::max(difference, off) : INFINITY;
      largest = std::max(largest, std::abs(expected[index]));
    }
    worst = std::max(worst, difference / largest);
  }
  std::cout << "recorded outputs: " << worst << " off, relative; allowed " << tolerance << '\n';
  return worst <= tolerance ? 0 : 1;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    return run(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << error.what() << '\n';
    return 1;
  }
}
