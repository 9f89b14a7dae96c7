// The Python module llmops._C. Importing it loads the library, whose static initializers register
// the operators. Its two functions are what the front doors of llmops/ops ask before a small call:
// in Python the same questions cost a third of a layer norm of one row. Limited API only.
#define Py_LIMITED_API 0x030A0000
#include <Python.h>

namespace {

// Where shortcut's arguments lie in the tuple that its function is bound to.
enum Part : int {
  kTable,      // dict: dtype -> raw operator, or False where another backend serves
  kFind,       // dtype -> that entry; fills the table
  kOpened,     // list: empty where no use_backend is open in any thread
  kState,      // its `requested` is None where none is in this one
  kForwardAd,  // torch.autograd.forward_ad: its `_current_level` is -1 outside of dual_level
  kModes,      // () -> number of open dispatch modes
  kAutocast,   // () -> bool; None where it changes nothing
  kGrad,       // () -> bool
  kTensor,     // the types of tensors without behaviour of their own
  kParameter,
  kParts,
};

PyObject *is_cpu, *requested, *current_level, *requires_grad, *dtype, *shape;

// -1 with an exception set; takes the reference, which may be null after an error.
int truth(PyObject* taken) {
  if (taken == nullptr) return -1;
  const int answer = PyObject_IsTrue(taken);
  Py_DECREF(taken);
  return answer;
}

bool is_plain(PyObject* parts, PyObject* x) {
  PyObject* type = reinterpret_cast<PyObject*>(Py_TYPE(x));
  return type == PyTuple_GetItem(parts, kTensor) || type == PyTuple_GetItem(parts, kParameter);
}

// 1 where nothing stands between the raw operator and a call with these arguments, 0 where
// something does, -1 with an exception set. The order is that of the prices.
int is_direct(PyObject* parts, PyObject* const* args, Py_ssize_t count) {
  if (!is_plain(parts, args[0])) return 0;
  PyObject* level = PyObject_GetAttr(PyTuple_GetItem(parts, kForwardAd), current_level);
  if (level == nullptr) return -1;
  const long deep = PyLong_AsLong(level);
  Py_DECREF(level);
  if (deep >= 0) return 0;
  if (deep == -1 && PyErr_Occurred() != nullptr) return -1;
  int answer = truth(PyObject_CallNoArgs(PyTuple_GetItem(parts, kModes)));
  if (answer != 0) return answer < 0 ? -1 : 0;
  if (PyList_Size(PyTuple_GetItem(parts, kOpened)) > 0) {
    PyObject* request = PyObject_GetAttr(PyTuple_GetItem(parts, kState), requested);
    if (request == nullptr) return -1;
    Py_DECREF(request);
    if (request != Py_None) return 0;
  }
  answer = truth(PyObject_GetAttr(args[0], is_cpu));
  if (answer <= 0) return answer;
  PyObject* autocast = PyTuple_GetItem(parts, kAutocast);
  answer = autocast == Py_None ? 0 : truth(PyObject_CallNoArgs(autocast));
  if (answer != 0) return answer < 0 ? -1 : 0;
  const int grad = truth(PyObject_CallNoArgs(PyTuple_GetItem(parts, kGrad)));
  if (grad < 0) return -1;
  for (Py_ssize_t i = 0; grad != 0 && i < count; i++) {
    if (args[i] == Py_None) continue;
    if (!is_plain(parts, args[i])) return 0;
    answer = truth(PyObject_GetAttr(args[i], requires_grad));
    if (answer != 0) return answer < 0 ? -1 : 0;
  }
  return 1;
}

PyObject* raw(PyObject* parts, PyObject* const* args, Py_ssize_t count) {
  if (count == 0) {
    PyErr_SetString(PyExc_TypeError, "llmops._C.shortcut: expects the call's first tensor");
    return nullptr;
  }
  const int direct = is_direct(parts, args, count);
  if (direct < 0) return nullptr;
  if (direct == 0) Py_RETURN_NONE;
  PyObject* key = PyObject_GetAttr(args[0], dtype);
  if (key == nullptr) return nullptr;
  PyObject* found = PyDict_GetItemWithError(PyTuple_GetItem(parts, kTable), key);
  if (found != nullptr) {
    Py_INCREF(found);
  } else if (PyErr_Occurred() == nullptr) {
    found = PyObject_CallFunctionObjArgs(PyTuple_GetItem(parts, kFind), key, nullptr);
  }
  Py_DECREF(key);
  if (found == Py_False) {
    Py_DECREF(found);
    Py_RETURN_NONE;
  }
  return found;
}

template <class Function>
PyCFunction method(Function* f) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(f));
}

PyMethodDef raw_method = {"raw", method(raw), METH_FASTCALL, nullptr};

PyObject* shortcut(PyObject*, PyObject* parts) {
  if (PyTuple_Size(parts) != kParts || PyDict_Check(PyTuple_GetItem(parts, kTable)) == 0 ||
      PyList_Check(PyTuple_GetItem(parts, kOpened)) == 0) {
    PyErr_Format(PyExc_TypeError, "llmops._C.shortcut: expects the %d arguments of csrc/module.cpp",
                 kParts);
    return nullptr;
  }
  return PyCFunction_NewEx(&raw_method, parts, nullptr);
}

// is_last(x, weight, sizes): whether `sizes`, an int or a tuple, is x's last dimension alone. The
// weight's shape, or x's without one, answers: that the two agree is the raw operator's to check.
PyObject* is_last(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (count != 3) {
    PyErr_SetString(PyExc_TypeError, "llmops._C.is_last: expects x, weight and sizes");
    return nullptr;
  }
  PyObject* sizes = args[2];
  PyObject* own = PyObject_GetAttr(args[1] == Py_None ? args[0] : args[1], shape);
  if (own == nullptr) {  // no tensor: the checks of the long way say so
    PyErr_Clear();
    Py_RETURN_FALSE;
  }
  if (args[1] == Py_None) {
    const Py_ssize_t dims = PySequence_Size(own);
    PyObject* last = PySequence_GetSlice(own, dims - 1, dims);
    Py_DECREF(own);
    if (last == nullptr) return nullptr;
    own = last;
  }
  int equal = 0;
  if (PyTuple_Check(sizes) != 0) {
    equal = PyObject_RichCompareBool(own, sizes, Py_EQ);
  } else if (PyLong_CheckExact(sizes) != 0 && PyTuple_Check(own) != 0 && PyTuple_Size(own) == 1) {
    equal = PyObject_RichCompareBool(PyTuple_GetItem(own, 0), sizes, Py_EQ);
  }
  Py_DECREF(own);
  return equal < 0 ? nullptr : PyBool_FromLong(equal);
}

PyMethodDef methods[] = {{"shortcut", shortcut, METH_VARARGS, nullptr},
                         {"is_last", method(is_last), METH_FASTCALL, nullptr},
                         {}};
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_C", nullptr, 0, methods, nullptr, nullptr, nullptr, nullptr};

bool intern(PyObject*& name, const char* text) {
  name = PyUnicode_InternFromString(text);
  return name != nullptr;
}

}  // namespace

PyMODINIT_FUNC PyInit__C(void) {
  if (!intern(is_cpu, "is_cpu") || !intern(requested, "requested") ||
      !intern(current_level, "_current_level") || !intern(requires_grad, "requires_grad") ||
      !intern(dtype, "dtype") || !intern(shape, "shape")) {
    return nullptr;
  }
  return PyModule_Create(&module);
}
