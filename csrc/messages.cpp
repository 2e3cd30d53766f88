#include "messages.h"

#include <stdexcept>

#include "owned.h"

namespace fastlr {

void refuse(const std::string& message) { throw std::invalid_argument(message); }

std::string text_of(PyObject* made) {
  const Owned text(made);
  const char* utf8 = text ? PyUnicode_AsUTF8(text.get()) : nullptr;
  PyErr_Clear();
  return utf8 == nullptr ? "something that cannot be shown" : utf8;
}

std::string str_of(PyObject* object) {
  return text_of(object == nullptr ? nullptr : PyObject_Str(object));
}

std::string shape_of(PyObject* tensor) {
  const Owned size(PyObject_GetAttrString(tensor, "shape"));
  const Owned shape(size ? PySequence_Tuple(size.get()) : nullptr);
  return str_of(shape.get());
}

}  // namespace fastlr
