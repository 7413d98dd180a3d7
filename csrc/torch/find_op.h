// An op of this library by its types, past the dispatcher's boxing of arguments.
#pragma once

#include <ATen/core/dispatch/Dispatcher.h>

namespace pycnf {

template <typename Signature>
auto find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

}  // namespace pycnf
