// How this bundle's model runs: LiteRT's C API, version 2.3. Packages bring libLiteRt.so without headers,
// so the few functions that are needed are declared here; the types are only passed on.
#pragma once
#include <algorithm>
#include <utility>

#include "tensor.hpp"

extern "C" {
int LiteRtCreateEnvironment(int options, const void* option, void** environment);
void LiteRtDestroyEnvironment(void* environment);
int LiteRtCreateModelFromFile(void* environment, const char* path, void** model);
void LiteRtDestroyModel(void* model);
int LiteRtGetModelSubgraph(void* model, std::size_t index, void** subgraph);
int LiteRtGetNumSubgraphInputs(void* subgraph, std::size_t* count);
int LiteRtGetSubgraphInput(void* subgraph, std::size_t index, void** tensor);
int LiteRtGetNumSubgraphOutputs(void* subgraph, std::size_t* count);
int LiteRtGetSubgraphOutput(void* subgraph, std::size_t index, void** tensor);
int LiteRtGetRankedTensorType(void* tensor, void* type);
int LiteRtCreateOptions(void** options);
void LiteRtDestroyOptions(void* options);
int LiteRtSetOptionsHardwareAccelerators(void* options, int accelerators);
int LiteRtCreateCompiledModel(void* environment, void* model, void* options, void** compiled);
void LiteRtDestroyCompiledModel(void* compiled);
int LiteRtGetCompiledModelInputBufferRequirements(void* compiled, std::size_t signature, std::size_t index, void** of);
int LiteRtGetCompiledModelOutputBufferRequirements(void* compiled, std::size_t signature, std::size_t index, void** of);
int LiteRtCreateManagedTensorBufferFromRequirements(void* environment, const void* type, void* of, void** buffer);
void LiteRtDestroyTensorBuffer(void* buffer);
int LiteRtLockTensorBuffer(void* buffer, void** memory, int mode);
int LiteRtUnlockTensorBuffer(void* buffer);
int LiteRtGetTensorBufferPackedSize(void* buffer, std::size_t* bytes);
int LiteRtRunCompiledModel(void* compiled, std::size_t signature, std::size_t in, void** ins, std::size_t out,
                           void** outs);
}

class Model {
 public:
  // LiteRT's C API sets the number of threads through options that change between versions: it takes its default.
  Model(const std::string& path, int /* threads */, std::vector<Tensor> inputs, std::vector<Tensor> outputs)
      : inputs_(std::move(inputs)), outputs_(std::move(outputs)) {
    check(LiteRtCreateEnvironment(0, nullptr, &environment_), "start LiteRT");
    check(LiteRtCreateModelFromFile(environment_, path.c_str(), &model_), "read the model");
    void *options = nullptr, *subgraph = nullptr;
    check(LiteRtCreateOptions(&options), "make options");
    constexpr int cpu = 1;
    check(LiteRtSetOptionsHardwareAccelerators(options, cpu), "choose the processor");
    const int status = LiteRtCreateCompiledModel(environment_, model_, options, &compiled_);
    LiteRtDestroyOptions(options);
    check(status, "prepare the model");
    check(LiteRtGetModelSubgraph(model_, 0, &subgraph), "find the graph");
    make_buffers(subgraph, inputs_, ins_, LiteRtGetNumSubgraphInputs, LiteRtGetSubgraphInput,
                 LiteRtGetCompiledModelInputBufferRequirements);
    make_buffers(subgraph, outputs_, outs_, LiteRtGetNumSubgraphOutputs, LiteRtGetSubgraphOutput,
                 LiteRtGetCompiledModelOutputBufferRequirements);
  }
  Model(const Model&) = delete;
  Model& operator=(const Model&) = delete;
  ~Model() {
    for (void* buffer : ins_) LiteRtDestroyTensorBuffer(buffer);
    for (void* buffer : outs_) LiteRtDestroyTensorBuffer(buffer);
    if (compiled_) LiteRtDestroyCompiledModel(compiled_);
    if (model_) LiteRtDestroyModel(model_);
    if (environment_) LiteRtDestroyEnvironment(environment_);
  }

  std::vector<Bytes> run(std::vector<Bytes>& given) {
    for (std::size_t place = 0; place < ins_.size(); ++place) {
      Lock memory(ins_[place], 1);
      std::copy(given[place].begin(), given[place].end(), memory.bytes);
    }
    check(LiteRtRunCompiledModel(compiled_, 0, ins_.size(), ins_.data(), outs_.size(), outs_.data()), "run the model");
    std::vector<Bytes> results;
    for (std::size_t place = 0; place < outs_.size(); ++place) {
      const Lock memory(outs_[place], 0);
      results.emplace_back(memory.bytes, memory.bytes + outputs_[place].bytes());
    }
    return results;
  }

 private:
  struct Lock {  // mode: 0 to read, 1 to write
    Lock(void* of, int mode) : buffer(of) {
      void* memory = nullptr;
      check(LiteRtLockTensorBuffer(of, &memory, mode), "reach a tensor");
      bytes = static_cast<char*>(memory);
    }
    ~Lock() { LiteRtUnlockTensorBuffer(buffer); }
    void* buffer;
    char* bytes;
  };
  template <typename Count, typename Get, typename Need>
  void make_buffers(void* subgraph, const std::vector<Tensor>& tensors, std::vector<void*>& buffers, Count count_of,
                    Get get, Need need) {
    std::size_t count = 0, bytes = 0;
    check(count_of(subgraph, &count), "count the tensors");
    if (count != tensors.size()) throw std::runtime_error("the model does not have the tensors of manifest.json");
    for (std::size_t place = 0; place < count; ++place) {
      void *tensor = nullptr, *of = nullptr, *buffer = nullptr;
      alignas(8) char type[256] = {};  // larger than any version's struct
      check(get(subgraph, place, &tensor), "find a tensor");
      check(LiteRtGetRankedTensorType(tensor, type), "tell a tensor's type");
      check(need(compiled_, 0, place, &of), "size a tensor");
      check(LiteRtCreateManagedTensorBufferFromRequirements(environment_, type, of, &buffer), "make a tensor");
      buffers.push_back(buffer);
      check(LiteRtGetTensorBufferPackedSize(buffer, &bytes), "size a tensor");
      // Another version of the library would show here, before anything is written.
      if (bytes != tensors[place].bytes()) throw std::runtime_error("a tensor's size is not that of manifest.json");
    }
  }
  static void check(int status, const char* what) {
    if (status)
      throw std::runtime_error(std::string("LiteRT cannot ") + what + " (status " + std::to_string(status) + ")");
  }

  void *environment_ = nullptr, *model_ = nullptr, *compiled_ = nullptr;
  std::vector<Tensor> inputs_, outputs_;
  std::vector<void*> ins_, outs_;
};
