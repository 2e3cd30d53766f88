#include "shares.h"

namespace fastlr {

bool cut_alike(const Cut& own, PyObject* spec, int of) {
  static PyObject* const says[] = {PyUnicode_InternFromString("mesh"),
                                   PyUnicode_InternFromString("placements")};
  if (spec == own.spec.get()) return true;
  if (spec == nullptr || !own.spec) return false;
  if (spec == own.alike[of].get()) return true;
  for (PyObject* const name : says) {
    const Owned one = checked(PyObject_GetAttr(own.spec.get(), name));
    const Owned two = checked(PyObject_GetAttr(spec, name));
    if (one.get() == two.get()) continue;
    const int same = PyObject_RichCompareBool(one.get(), two.get(), Py_EQ);
    if (same < 0) throw PythonError();
    if (same == 0) return false;
  }
  own.alike[of] = Owned::borrow(spec);
  return true;
}

bool KnownShares::find(PyObject* parameter, PyObject* spec, Cut& cut) {
  cut = Cut();
  if (spec == nullptr) return true;
  const Owned part = checked(PyObject_CallMethod(runtime_, "part", "O", parameter));
  PyObject* const share = PyTuple_GetItem(part.get(), 0);
  PyObject* const first = PyTuple_GetItem(part.get(), 1);
  if (first == nullptr) throw PythonError();
  const int64_t first_element = PyLong_AsLongLong(first);
  if (PyErr_Occurred()) throw PythonError();
  if (share != Py_None) {
    const Py_ssize_t at = PySequence_Contains(known(), share) == 1
                              ? PySequence_Index(known(), share)
                              : PyList_GET_SIZE(known());
    if (at < 0 || PyErr_Occurred()) throw PythonError();
    if (at == kMaxShares) return false;
    if (at == PyList_GET_SIZE(known()) && PyList_Append(known(), share) != 0) throw PythonError();
    cut.share = static_cast<int32_t>(at) + 1;
  }
  cut.first = first_element;
  cut.spec = Owned::borrow(spec);
  return true;
}

}  // namespace fastlr
