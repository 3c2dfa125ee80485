# What installing the core puts into a prefix: libraries, headers, and the files by which CMake and
# pkg-config find them, all of which name each other relatively, so that the prefix can be moved.
include(CMakePackageConfigHelpers)
set(package_dir ${CMAKE_INSTALL_LIBDIR}/cmake/qlora_native)
set(installed_components "")

foreach(kind shared static)
  if(NOT TARGET qlora_native_${kind})
    continue()
  endif()
  list(APPEND installed_components ${kind})
  # An export of its own each, so that one can be installed, and loaded, without the other.
  install(TARGETS qlora_native_${kind} EXPORT qlora_native_${kind}_targets
    LIBRARY DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT qlora_native_runtime
      NAMELINK_COMPONENT qlora_native_development
    ARCHIVE DESTINATION ${CMAKE_INSTALL_LIBDIR} COMPONENT qlora_native_development)
  install(EXPORT qlora_native_${kind}_targets NAMESPACE qlora_native::
    DESTINATION ${package_dir} COMPONENT qlora_native_development)
endforeach()
if(QLORA_NATIVE_WITH_CUDA)
  list(APPEND installed_components cuda)
endif()

install(DIRECTORY cpp/include/ DESTINATION ${CMAKE_INSTALL_INCLUDEDIR}
  COMPONENT qlora_native_development)

if(NOT SKBUILD)  # which puts it where Python's packages have it
  install(FILES LICENSE DESTINATION ${CMAKE_INSTALL_DOCDIR} COMPONENT qlora_native_development)
endif()

# What a program that links the static library needs besides, and a C compiler does not add itself.
set(private_libraries ${CMAKE_CXX_IMPLICIT_LINK_LIBRARIES})
list(FILTER private_libraries INCLUDE REGEX "^(stdc\\+\\+|c\\+\\+|c\\+\\+abi|m)$")
list(REMOVE_DUPLICATES private_libraries)

configure_package_config_file(cmake/qlora_nativeConfig.cmake.in
  ${PROJECT_BINARY_DIR}/qlora_nativeConfig.cmake INSTALL_DESTINATION ${package_dir})
write_basic_package_version_file(${PROJECT_BINARY_DIR}/qlora_nativeConfigVersion.cmake
  COMPATIBILITY SameMinorVersion)
install(FILES ${PROJECT_BINARY_DIR}/qlora_nativeConfig.cmake
              ${PROJECT_BINARY_DIR}/qlora_nativeConfigVersion.cmake
  DESTINATION ${package_dir} COMPONENT qlora_native_development)

set(pc_dir ${CMAKE_INSTALL_LIBDIR}/pkgconfig)
cmake_path(RELATIVE_PATH CMAKE_INSTALL_PREFIX BASE_DIRECTORY ${CMAKE_INSTALL_FULL_LIBDIR}/pkgconfig
           OUTPUT_VARIABLE pc_dir_to_prefix)
# Absolute directories stay what they are.
set(pc_includedir "\${prefix}")
cmake_path(APPEND pc_includedir "${CMAKE_INSTALL_INCLUDEDIR}")
set(pc_libdir "\${prefix}")
cmake_path(APPEND pc_libdir "${CMAKE_INSTALL_LIBDIR}")
list(TRANSFORM private_libraries PREPEND "-l" OUTPUT_VARIABLE pc_private)
list(APPEND pc_private -pthread)
if(QLORA_NATIVE_WITH_CUDA)
  list(PREPEND pc_private -lcudart_static -ldl -lrt)
endif()
list(JOIN pc_private " " pc_private)
set(pc_libs "-lqlora_native")
if(NOT TARGET qlora_native_shared)
  string(APPEND pc_libs " ${pc_private}")
endif()
configure_file(cmake/qlora_native.pc.in ${PROJECT_BINARY_DIR}/qlora_native.pc @ONLY)
install(FILES ${PROJECT_BINARY_DIR}/qlora_native.pc DESTINATION ${pc_dir}
  COMPONENT qlora_native_development)
