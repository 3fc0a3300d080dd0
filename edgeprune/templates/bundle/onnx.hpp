// How this bundle's model runs: ONNX Runtime's C API, version 16 of it (ONNX Runtime 1.16) or newer.
#pragma once
#include <utility>

#include <onnxruntime_c_api.h>

#include "tensor.hpp"

class Model {
 public:
  Model(const std::string& path, int threads, std::vector<Tensor> inputs, std::vector<Tensor> outputs)
      : inputs_(std::move(inputs)), outputs_(std::move(outputs)) {
    constexpr std::uint32_t version = 16;
    if (!(api_ = OrtGetApiBase()->GetApi(version)))
      throw std::runtime_error(std::string("ONNX Runtime ") + OrtGetApiBase()->GetVersionString() +
                               " is too old; 1.16 or newer is needed");
    check(api_->CreateEnv(ORT_LOGGING_LEVEL_WARNING, "edgeprune", &environment_));
    OrtSessionOptions* options = nullptr;
    check(api_->CreateSessionOptions(&options));
    check(api_->SetIntraOpNumThreads(options, threads));
#ifdef _WIN32
    const std::basic_string<ORTCHAR_T> file(path.begin(), path.end());
#else
    const std::string& file = path;
#endif
    OrtStatus* status = api_->CreateSession(environment_, file.c_str(), options, &session_);
    api_->ReleaseSessionOptions(options);
    check(status);
    check(api_->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory_));
  }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;
  ~Model() {
    if (memory_) api_->ReleaseMemoryInfo(memory_);
    if (session_) api_->ReleaseSession(session_);
    if (environment_) api_->ReleaseEnv(environment_);
  }

  std::vector<Bytes> run(std::vector<Bytes>& given) {
    std::vector<OrtValue*> in(inputs_.size()), out(outputs_.size());
    std::vector<const char*> in_names, out_names;
    for (const Tensor& tensor : outputs_) out_names.push_back(tensor.name.c_str());
    for (std::size_t place = 0; place < in.size(); ++place) {
      const Tensor& tensor = inputs_[place];
      in_names.push_back(tensor.name.c_str());
      check(api_->CreateTensorWithDataAsOrtValue(memory_, given[place].data(), given[place].size(),
                                                 tensor.shape.data(), tensor.shape.size(), type_of(tensor),
                                                 &in[place]));
    }
    OrtStatus* status = api_->Run(session_, nullptr, in_names.data(), in.data(), in.size(), out_names.data(),
                                  out.size(), out.data());
    for (OrtValue* value : in) api_->ReleaseValue(value);
    check(status);
    std::vector<Bytes> results;
    for (std::size_t place = 0; place < out.size(); ++place) {
      void* data = nullptr;
      check(api_->GetTensorMutableData(out[place], &data));
      const char* first = static_cast<const char*>(data);
      results.emplace_back(first, first + outputs_[place].bytes());
      api_->ReleaseValue(out[place]);
    }
    return results;
  }

 private:
  void check(OrtStatus* status) const {
    if (!status) return;
    const std::string message = api_->GetErrorMessage(status);
    api_->ReleaseStatus(status);
    throw std::runtime_error(message);
  }
  static ONNXTensorElementDataType type_of(const Tensor& tensor) {
    if (tensor.type == "float32") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
    if (tensor.type == "float64") return ONNX_TENSOR_ELEMENT_DATA_TYPE_DOUBLE;
    if (tensor.type == "float16") return ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
    if (tensor.type == "int8") return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT8;
    if (tensor.type == "uint8") return ONNX_TENSOR_ELEMENT_DATA_TYPE_UINT8;
    if (tensor.type == "int32") return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
    if (tensor.type == "int64") return ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;
    if (tensor.type == "bool") return ONNX_TENSOR_ELEMENT_DATA_TYPE_BOOL;
    throw std::runtime_error("this example does not know the type " + tensor.type);
  }

  const OrtApi* api_ = nullptr;
  OrtEnv* environment_ = nullptr;
  OrtSession* session_ = nullptr;
  OrtMemoryInfo* memory_ = nullptr;
  std::vector<Tensor> inputs_, outputs_;
};
