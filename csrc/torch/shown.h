// Tensors as a Python field sees them, and the proof that it kept none of them.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <pybind11/pybind11.h>
#include <torch/csrc/autograd/python_variable.h>

#include <functional>
#include <numeric>
#include <utility>
#include <vector>

namespace flashode {

namespace py = pybind11;

inline at::Tensor unpack(py::handle object) { return THPVariable_Unpack(object.ptr()); }

inline py::object wrap(const at::Tensor& tensor) {
  return py::reinterpret_steal<py::object>(THPVariable_Wrap(tensor));
}

// Reference counts of a tensor that has a Python object. Whatever keeps the tensor, a view, its
// storage, a NumPy array of it, or saves it for a backward pass, raises one of them.
struct Counts {
  int64_t object, tensor, storage;
  bool operator==(const Counts&) const = default;
};

inline Counts counts_of(PyObject* object) {
  const at::Tensor& tensor = THPVariable_Unpack(object);
  return {int64_t(Py_REFCNT(object)), int64_t(tensor.use_count()),
          int64_t(tensor.storage().use_count())};
}

// What they are where nothing keeps the tensor. Found when the module is imported: a thread that
// waited for another to find it would hold the GIL that the other needs.
inline const Counts& counts_of_unshared() {
  static const Counts alone = [] {
    const py::object fresh = wrap(at::empty({1}, at::kFloat));
    return counts_of(fresh.ptr());
  }();
  return alone;
}

// Whether a tensor is held by its one Python object and by nothing else, but for `views` of ours. Memory that torch did not
// allocate (an array's, say) has an owner who does not count here; such storages cannot be resized.
inline bool is_ours_alone(PyObject* object, int64_t views = 0) {
  Counts counts = counts_of(object);
  counts.storage -= views;
  return counts == counts_of_unshared() && THPVariable_Unpack(object).storage().resizable();
}

// The members of a tuple state, one after the other in the flat state; none for a state of one tensor.
using Shapes = std::vector<std::vector<int64_t>>;

inline int64_t numel_of(const std::vector<int64_t>& shape) {
  return std::accumulate(shape.begin(), shape.end(), int64_t(1), std::multiplies<int64_t>());
}

// A flat state as the field sees it: itself, or a tuple of views.
inline py::object shown(const at::Tensor& flat, const Shapes& shapes) {
  if (shapes.empty()) return wrap(flat);
  py::tuple members(shapes.size());
  int64_t begin = 0;
  for (size_t m = 0; m < shapes.size(); ++m) {
    const int64_t size = numel_of(shapes[m]);
    members[m] = wrap(flat.narrow(0, begin, size).view(shapes[m]));
    begin += size;
  }
  return members;
}

// A tensor to show: a state, as one tensor or as a tuple of views of one flat tensor, or a time.
class Shown {
 public:
  // Makes the tensor safe to write: ours alone, or a new one.
  void make_writable(at::IntArrayRef sizes, const at::TensorOptions& options,
                     const Shapes& shapes = {}) {
    if (flat.defined() && unshared()) return;
    flat = at::empty(sizes, options);
    show(shapes);
    // What holds for a fresh tensor is what "nobody kept it" looks like.
    fresh_ = counts();
  }

  // Shows a tensor that autograd made and that is never written again.
  void adopt(at::Tensor state, const Shapes& shapes) {
    flat = std::move(state);
    show(shapes);
    fresh_.clear();
  }

  // To be compared after a call of the field, which may write into what it is shown. Inference
  // tensors do not count their writes, and are taken to be written.
  int64_t version() const { return flat.is_inference() ? 0 : int64_t(flat._version()); }
  bool written_since(int64_t version) const {
    return flat.is_inference() || int64_t(flat._version()) != version;
  }

  at::Tensor flat;
  py::object argument;

 private:
  void show(const Shapes& shapes) {
    whole_ = wrap(flat);
    argument = shapes.empty() ? whole_ : shown(flat, shapes);
  }

  bool is_tuple() const { return PyTuple_Check(argument.ptr()); }

  std::vector<Counts> counts() const {
    if (!is_tuple()) return {counts_of(argument.ptr())};
    // The flat tensor may be kept as well: of that its members' counts say nothing.
    std::vector<Counts> all = {{int64_t(Py_REFCNT(argument.ptr())), 0, 0},
                               counts_of(whole_.ptr())};
    for (const py::handle member : py::reinterpret_borrow<py::tuple>(argument)) {
      all.push_back(counts_of(member.ptr()));
    }
    return all;
  }

  bool unshared() const {
    // The field may have asked for gradients of what it was shown; that flag would stay.
    if (fresh_.empty() || flat.requires_grad()) return false;
    if (!is_tuple()) return counts_of(argument.ptr()) == fresh_[0];
    for (const py::handle member : py::reinterpret_borrow<py::tuple>(argument)) {
      if (THPVariable_Unpack(member.ptr()).requires_grad()) return false;
    }
    return counts() == fresh_;
  }

  py::object whole_;  // the flat tensor as Python sees it
  std::vector<Counts> fresh_;
};

}  // namespace flashode
