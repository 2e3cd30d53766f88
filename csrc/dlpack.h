// The few C declarations of DLPack's exchange API that fastlr uses. Source of the layout: the
// DLPack 1.x specification of `__dlpack_c_exchange_api__`; ABI major version 1.
#pragma once

#include <cstdint>

namespace fastlr {
namespace dlpack {

constexpr uint32_t kAbiMajor = 1;
constexpr const char* kAttribute = "__dlpack_c_exchange_api__";
constexpr const char* kCapsuleName = "dlpack_exchange_api";

enum DeviceType : int32_t { kCpu = 1, kCuda = 2 };
enum TypeCode : uint8_t { kInt = 0, kFloat = 2, kBfloat = 4, kComplex = 5 };

struct Version {
  uint32_t major;
  uint32_t minor;
};

struct Device {
  int32_t type;
  int32_t id;
};

struct DataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};

struct Tensor {
  void* data;
  Device device;
  int32_t ndim;
  DataType dtype;
  int64_t* shape;
  int64_t* strides;  // in elements
  uint64_t byte_offset;
};

struct ExchangeApi {
  Version version;
  ExchangeApi* previous;
  // Functions that fastlr does not call; they keep the next one at its place.
  void* managed_tensor_allocator;
  void* managed_tensor_from_py_object;
  void* managed_tensor_to_py_object;
  // Fills a view of a tensor that the Python object keeps owning; 0, or -1 with a Python error set.
  int (*tensor_from_py_object)(void* object, Tensor* out);
};

}  // namespace dlpack
}  // namespace fastlr
