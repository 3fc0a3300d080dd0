# cmake -B build && cmake --build build && ./build/example
# Where ONNX Runtime was unpacked by hand: cmake -B build -DONNXRUNTIME_ROOT=/path/to/onnxruntime-linux-aarch64-1.23.0
cmake_minimum_required(VERSION 3.16)
project(edgeprune_example CXX)

set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()

find_path(ONNXRUNTIME_INCLUDE onnxruntime_c_api.h HINTS ${ONNXRUNTIME_ROOT}
          PATH_SUFFIXES include include/onnxruntime onnxruntime REQUIRED)
find_library(ONNXRUNTIME_LIBRARY onnxruntime HINTS ${ONNXRUNTIME_ROOT} PATH_SUFFIXES lib REQUIRED)

add_executable(example example.cpp)
target_include_directories(example PRIVATE ${ONNXRUNTIME_INCLUDE})
target_link_libraries(example PRIVATE ${ONNXRUNTIME_LIBRARY})
