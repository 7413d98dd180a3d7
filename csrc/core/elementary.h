// Elementary functions of one number, on host and device.
//
// By the names of C, so that no inline overload of the standard library is compiled (and left as a
// weak symbol, without optimization) for an instruction set that another machine lacks.
#pragma once

#include <math.h>

#include "core/host_device.h"

namespace pycnf {

PYCNF_HD float cosine(float x) { return cosf(x); }
PYCNF_HD double cosine(double x) { return ::cos(x); }
PYCNF_HD float sine(float x) { return sinf(x); }
PYCNF_HD double sine(double x) { return ::sin(x); }

// Of a normal distribution, below √2 x.
PYCNF_HD float normal_share(float x) { return 0.5f * (1 + erff(x)); }
PYCNF_HD double normal_share(double x) { return 0.5 * (1 + ::erf(x)); }

}  // namespace pycnf
