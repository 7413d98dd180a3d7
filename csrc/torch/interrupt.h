// Ctrl-C inside a compiled solve.
#pragma once

namespace pycnf {

// Throws if the user has asked for an end. Cheap enough for every step; set by module.cpp, for only
// Python knows.
extern void (*check_interrupt)();

}  // namespace pycnf
