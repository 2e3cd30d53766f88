// How DTensors among an optimizer's parameters are cut, and which sums over processes follow.
#pragma once

#include <Python.h>

#include <array>
#include <cstdint>

#include "owned.h"
#include "tensors.h"

namespace fastlr {

// How one parameter is cut, see NOTE: [distributed tensors]; of a plain one nothing and 0.
struct Cut {
  Owned spec;
  // Of its slots and then its gradient, where they are cut alike by a specification of their own.
  mutable std::array<Owned, kMaxSlots + 1> alike;
  int32_t share = 0;  // see NOTE: [shares]
  int64_t first = 0;  // of its elements, in the whole parameter
};

constexpr int kOfGradient = kMaxSlots;

// Whether the specification of a slot or gradient says the same as its parameter's of which part is
// where. of: the slot, or kOfGradient.
bool cut_alike(const Cut& own, PyObject* spec, int of);

class KnownShares {
 public:
  // runtime: an object with the method part(parameter): what stands for a DTensor's share, or None
  // for share 0, and its first element in the whole parameter; borrowed.
  explicit KnownShares(PyObject* runtime) : runtime_(runtime), known_(checked(PyList_New(0))) {}

  // Finds how a parameter of this specification, or of none, is cut; false where there are
  // kMaxShares other shares already.
  bool find(PyObject* parameter, PyObject* spec, Cut& cut);

  // What stands for each share but share 0, a list.
  PyObject* known() const { return known_.get(); }
  int count() const { return static_cast<int>(PyList_GET_SIZE(known_.get())); }

 private:
  PyObject* runtime_;
  Owned known_;
};

}  // namespace fastlr
