// The library as a Python module: kernel-builder names it, and the namespace of the ops, for each
// build.
#include "registration.h"

REGISTER_EXTENSION(TORCH_EXTENSION_NAME)
