// Run the model of this bundle: ./example [INPUT.f32], raw float32 values in the model's own layout,
// already normalised as manifest.json says; without a file, zeros. Needs ONNX Runtime 1.16 or newer.
#include <algorithm>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <exception>
#include <fstream>
#include <iostream>
#include <stdexcept>
#include <string>
#include <vector>

#include <onnxruntime_cxx_api.h>

namespace {

std::vector<float> read_floats(const char* path, std::size_t count) {
  std::vector<float> values(count);
  std::ifstream file(path, std::ios::binary);
  const auto bytes = static_cast<std::streamsize>(count * sizeof(float));
  if (!file.read(reinterpret_cast<char*>(values.data()), bytes) || file.peek() != std::char_traits<char>::eof())
    throw std::runtime_error(std::string(path) + " does not hold " + std::to_string(count) + " float32 values");
  return values;
}

int run(int argc, char** argv) {
  Ort::Env env(ORT_LOGGING_LEVEL_WARNING, "edgeprune");
  Ort::SessionOptions options;
  options.SetIntraOpNumThreads(@THREADS@);
  Ort::Session session(env, ORT_TSTR("@MODEL@"), options);

  Ort::AllocatorWithDefaultOptions allocator;
  const auto input_name = session.GetInputNameAllocated(0, allocator);
  const auto output_name = session.GetOutputNameAllocated(0, allocator);
  const auto type = session.GetInputTypeInfo(0);
  std::vector<std::int64_t> shape = type.GetTensorTypeAndShapeInfo().GetShape();
  std::size_t count = 1;
  for (auto& size : shape) {
    size = std::max<std::int64_t>(size, 1);  // a free batch axis reads as -1
    count *= static_cast<std::size_t>(size);
  }

  std::vector<float> input = argc > 1 ? read_floats(argv[1], count) : std::vector<float>(count, 0.0f);
  const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
  const auto tensor = Ort::Value::CreateTensor<float>(memory, input.data(), count, shape.data(), shape.size());
  const char* input_names[] = {input_name.get()};
  const char* output_names[] = {output_name.get()};

  std::vector<Ort::Value> outputs;
  std::vector<double> milliseconds;
  for (int turn = 0; turn < 20; ++turn) {
    const auto start = std::chrono::steady_clock::now();
    outputs = session.Run(Ort::RunOptions{nullptr}, input_names, &tensor, 1, output_names, 1);
    milliseconds.push_back(std::chrono::duration<double, std::milli>(std::chrono::steady_clock::now() - start).count());
  }
  std::sort(milliseconds.begin(), milliseconds.end());

  const auto shape_out = outputs[0].GetTensorTypeAndShapeInfo().GetShape();
  const auto values = outputs[0].GetTensorTypeAndShapeInfo().GetElementCount() / static_cast<std::size_t>(shape_out[0]);
  const float* scores = outputs[0].GetTensorData<float>();
  const auto best = std::max_element(scores, scores + values) - scores;
  std::ifstream labels("labels.txt");
  std::string label;
  for (std::ptrdiff_t line = 0; line <= best && std::getline(labels, label); ++line) {
  }
  std::cout << "top-1: " << best << ' ' << (labels ? label : "") << " (output " << scores[best] << ")\n"
            << "latency: " << milliseconds[milliseconds.size() / 2] << " ms, median of " << milliseconds.size() << '\n';
  return 0;
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
