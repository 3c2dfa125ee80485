// The parts of the extension module.
#pragma once

#include <nanobind/nanobind.h>

void bind_kernels(nanobind::module_& m);
void bind_cpu_threads(nanobind::module_& m);
void bind_ops(nanobind::module_& m);
void bind_lora(nanobind::module_& m);
void bind_eager(nanobind::module_& m);
void bind_memory(nanobind::module_& m);
void bind_optimizer(nanobind::module_& m);
