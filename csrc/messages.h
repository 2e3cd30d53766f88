// What errors say of Python's objects.
#pragma once

#include <Python.h>

#include <string>

namespace fastlr {

[[noreturn]] void refuse(const std::string& message);

// Of a new str, which is taken over, or of nullptr.
std::string text_of(PyObject* made);
// str() of an object or of nullptr.
std::string str_of(PyObject* object);
// "(64, 3, 7, 7)"
std::string shape_of(PyObject* tensor);

}  // namespace fastlr
