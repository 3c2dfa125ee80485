// Symbol visibility of the shared library.
#pragma once

#if defined(_WIN32)
#define QN_API __declspec(dllexport)
#else
#define QN_API __attribute__((visibility("default")))
#endif
