# cmake -B build -DLITERT_ROOT=/path/to/folder/of/libLiteRt.so && cmake --build build && ./build/example
# The library lies in the Python package: python -c "import ai_edge_litert; print(ai_edge_litert.__path__[0])"
cmake_minimum_required(VERSION 3.16)
project(edgeprune_example CXX)

set(CMAKE_CXX_STANDARD 17)
set(CMAKE_CXX_STANDARD_REQUIRED ON)
if(NOT CMAKE_BUILD_TYPE)
  set(CMAKE_BUILD_TYPE Release)
endif()

find_library(LITERT_LIBRARY LiteRt HINTS ${LITERT_ROOT} PATH_SUFFIXES lib REQUIRED)

add_executable(example example.cpp)
target_link_libraries(example PRIVATE ${LITERT_LIBRARY})
