#include "tensor_view.h"

#include <structmember.h>

#include <cstring>

#include "owned.h"

namespace fastlr {
namespace {

// The exchange API of a tensor type, or nullptr (no Python error is left set).
const dlpack::ExchangeApi* lookup_exchange(PyObject* type) {
  const Owned capsule(PyObject_GetAttrString(type, dlpack::kAttribute));
  const dlpack::ExchangeApi* api = nullptr;
  if (capsule && PyCapsule_IsValid(capsule.get(), dlpack::kCapsuleName)) {
    api = static_cast<const dlpack::ExchangeApi*>(
        PyCapsule_GetPointer(capsule.get(), dlpack::kCapsuleName));
    while (api != nullptr && api->version.major > dlpack::kAbiMajor) api = api->previous;
    if (api != nullptr &&
        (api->version.major != dlpack::kAbiMajor || api->tensor_from_py_object == nullptr)) {
      api = nullptr;
    }
  }
  PyErr_Clear();
  return api;
}

// What is known of a tensor type, looked up once; there are two in practice, Tensor and Parameter.
struct KnownType {
  PyTypeObject* type;
  const dlpack::ExchangeApi* exchange;
  const PyGetSetDef* grad;  // the type's own `grad`, or nullptr: get the attribute by name
  bool plain;               // its memory holds its values: no __torch_dispatch__ of its own
  Py_ssize_t local_at;      // where in a DTensor these two attributes stand; 0: it is none
  Py_ssize_t spec_at;
};

std::deque<KnownType> known_types;

const KnownType& new_type(PyTypeObject* type);

inline const KnownType& known_type(PyTypeObject* type) {
  for (const KnownType& entry : known_types) {
    if (entry.type == type) return entry;
  }
  return new_type(type);
}

// Where objects of a type keep an attribute that it has named in __slots__, or 0.
Py_ssize_t slot_of(PyObject* type, const char* name) {
  const Owned member(PyObject_GetAttrString(type, name));
  if (!member || Py_TYPE(member.get()) != &PyMemberDescr_Type) {
    PyErr_Clear();
    return 0;
  }
  return reinterpret_cast<PyMemberDescrObject*>(member.get())->d_member->offset;
}

// Whether PyTorch's DTensor is among a type's bases. Where its module was never imported there are
// none.
bool is_distributed(PyObject* type) {
  PyObject* const modules = PyImport_GetModuleDict();
  PyObject* const module = PyDict_GetItemString(modules, "torch.distributed.tensor");
  const Owned base(module == nullptr ? nullptr : PyObject_GetAttrString(module, "DTensor"));
  const int answer = base ? PyObject_IsSubclass(type, base.get()) : 0;
  PyErr_Clear();
  return answer == 1;
}

const KnownType& new_type(PyTypeObject* type) {
  Py_INCREF(type);  // a type that stays known must not be freed and its address taken by another
  PyObject* object = reinterpret_cast<PyObject*>(type);
  KnownType added{type, lookup_exchange(object), nullptr, true, 0, 0};
  const Owned grad(PyObject_GetAttrString(object, "grad"));
  if (grad && Py_TYPE(grad.get()) == &PyGetSetDescr_Type) {
    added.grad = reinterpret_cast<PyGetSetDescrObject*>(grad.get())->d_getset;
  }
  const Owned torch_c(PyImport_ImportModule("torch._C"));
  const Owned disabled(
      torch_c ? PyObject_GetAttrString(torch_c.get(), "_disabled_torch_dispatch_impl") : nullptr);
  const Owned dispatch(PyObject_GetAttrString(object, "__torch_dispatch__"));
  added.plain = !dispatch || !disabled || dispatch.get() == disabled.get();
  PyErr_Clear();
  if (!added.plain && is_distributed(object)) {
    added.local_at = slot_of(object, "_local_tensor");
    added.spec_at = slot_of(object, "_spec");
  }
  known_types.push_back(added);
  return known_types.back();
}

bool to_integers(PyObject* sequence, std::vector<int64_t>& out) {
  const Owned fast(sequence == nullptr ? nullptr : PySequence_Fast(sequence, "not a sequence"));
  if (!fast) return false;
  const Py_ssize_t size = PySequence_Fast_GET_SIZE(fast.get());
  for (Py_ssize_t i = 0; i < size; ++i) {
    const long long value = PyLong_AsLongLong(PySequence_Fast_GET_ITEM(fast.get(), i));
    if (value == -1 && PyErr_Occurred()) return false;
    out.push_back(value);
  }
  return true;
}

dlpack::DataType parse_type(const char* name) {
  static const struct {
    const char* name;
    dlpack::DataType type;
  } kNames[] = {
      {"torch.float32", {dlpack::kFloat, 32, 1}},
      {"torch.float64", {dlpack::kFloat, 64, 1}},
      {"torch.float16", {dlpack::kFloat, 16, 1}},
      {"torch.bfloat16", {dlpack::kBfloat, 16, 1}},
      {"torch.complex32", {dlpack::kComplex, 32, 1}},
      {"torch.complex64", {dlpack::kComplex, 64, 1}},
      {"torch.complex128", {dlpack::kComplex, 128, 1}},
      {"torch.int8", {dlpack::kInt, 8, 1}},
      {"torch.int16", {dlpack::kInt, 16, 1}},
      {"torch.int32", {dlpack::kInt, 32, 1}},
      {"torch.int64", {dlpack::kInt, 64, 1}},
  };
  for (const auto& entry : kNames) {
    if (std::strcmp(entry.name, name) == 0) return entry.type;
  }
  return {0, 0, 1};
}

}  // namespace

bool TensorReader::exchange_enabled_ = true;

bool TensorReader::exchange_available(PyObject* tensor_type) {
  return lookup_exchange(tensor_type) != nullptr;
}

PyObject* TensorReader::gradient(PyObject* tensor) {
  const PyGetSetDef* grad = known_type(Py_TYPE(tensor)).grad;
  if (grad != nullptr) return grad->get(tensor, grad->closure);
  return PyObject_GetAttrString(tensor, "grad");
}

TensorReader::Part TensorReader::part(PyObject* tensor) {
  const KnownType& type = known_type(Py_TYPE(tensor));
  if (type.local_at == 0 || type.spec_at == 0) return {nullptr, nullptr};
  const auto at = [&](Py_ssize_t offset) {
    return *reinterpret_cast<PyObject**>(reinterpret_cast<char*>(tensor) + offset);
  };
  const Part part{at(type.local_at), at(type.spec_at)};
  return part.spec == nullptr ? Part{nullptr, nullptr} : part;
}

bool TensorReader::is_plain(PyObject* tensor) { return known_type(Py_TYPE(tensor)).plain; }

bool TensorReader::is_lazy(PyObject* tensor) {
  for (const char* const method : {"is_conj", "is_neg"}) {
    if (checked(PyObject_CallMethod(tensor, method, nullptr)).get() == Py_True) return true;
  }
  return false;
}

bool TensorReader::read(PyObject* tensor, TensorView& view) {
  const KnownType& type = known_type(Py_TYPE(tensor));
  if (exchange_enabled_ && type.exchange != nullptr) {
    if (type.exchange->tensor_from_py_object(tensor, &view) != 0) return false;
    if (view.data != nullptr) view.data = static_cast<char*>(view.data) + view.byte_offset;
    view.byte_offset = 0;
  } else if (!read_attributes(tensor, type.plain, view)) {
    return false;
  }
  if (!type.plain) view.data = nullptr;
  return true;
}

bool TensorReader::read_attributes(PyObject* tensor, bool has_memory, TensorView& view) {
  view.data = nullptr;
  if (has_memory) {
    const Owned pointer(PyObject_CallMethod(tensor, "data_ptr", nullptr));
    if (!pointer) return false;
    view.data = PyLong_AsVoidPtr(pointer.get());
    if (view.data == nullptr && PyErr_Occurred()) return false;
  }

  const Owned device(PyObject_GetAttrString(tensor, "device"));
  const Owned kind(device ? PyObject_GetAttrString(device.get(), "type") : nullptr);
  const Owned index(device ? PyObject_GetAttrString(device.get(), "index") : nullptr);
  const char* kind_name = kind ? PyUnicode_AsUTF8(kind.get()) : nullptr;
  if (kind_name == nullptr || !index) return false;
  if (std::strcmp(kind_name, "meta") == 0) {  // as the exchange does
    PyErr_SetString(PyExc_ValueError, "a meta tensor has no memory");
    return false;
  }
  view.device.type = std::strcmp(kind_name, "cpu") == 0    ? dlpack::kCpu
                     : std::strcmp(kind_name, "cuda") == 0 ? dlpack::kCuda
                                                           : 0;
  view.device.id = index.get() == Py_None ? 0 : static_cast<int32_t>(PyLong_AsLong(index.get()));

  const Owned dtype(PyObject_GetAttrString(tensor, "dtype"));
  // Not PyObject_Str(): it lets Python handle signals, and a Ctrl-C would be taken for a tensor
  // that cannot be read.
  const Owned dtype_text(dtype ? Py_TYPE(dtype.get())->tp_repr(dtype.get()) : nullptr);
  const char* dtype_name = dtype_text ? PyUnicode_AsUTF8(dtype_text.get()) : nullptr;
  if (dtype_name == nullptr) return false;
  view.dtype = parse_type(dtype_name);

  copied_.emplace_back();
  std::vector<int64_t>& shape = copied_.back();
  copied_.emplace_back();
  std::vector<int64_t>& strides = copied_.back();
  const Owned size(PyObject_CallMethod(tensor, "size", nullptr));
  const Owned stride(PyObject_CallMethod(tensor, "stride", nullptr));
  if (!to_integers(size.get(), shape) || !to_integers(stride.get(), strides)) return false;
  view.byte_offset = 0;
  view.ndim = static_cast<int32_t>(shape.size());
  view.shape = shape.data();
  view.strides = strides.data();
  return true;
}

std::string type_name(dlpack::DataType type) {
  const std::string bits = std::to_string(type.bits);
  switch (type.code) {
    case dlpack::kInt:
      if (type.bits != 0) return "int" + bits;
      break;
    case dlpack::kFloat:
      return "float" + bits;
    case dlpack::kBfloat:
      return "bfloat" + bits;
    case dlpack::kComplex:
      return "complex" + bits;
    default:
      break;
  }
  return "an unsupported type";
}

std::string device_name(dlpack::Device device) {
  if (device.type == dlpack::kCpu) return "cpu";
  if (device.type == dlpack::kCuda) return "cuda:" + std::to_string(device.id);
  return "device type " + std::to_string(device.type);
}

}  // namespace fastlr
