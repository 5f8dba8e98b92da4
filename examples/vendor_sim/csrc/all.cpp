// All sources as one: torch's headers, which take most of the time to compile, are read once.
#include "dispatch.cpp"
#include "driver.cpp"
#include "faults.cpp"
#include "ops.cpp"
#include "plugin.cpp"
