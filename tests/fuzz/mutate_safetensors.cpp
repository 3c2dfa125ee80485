// Mutations of safetensors files for libFuzzer: of the bytes, with the header's length following.
#include <cstddef>
#include <cstdint>
#include <string_view>

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t max_size);

extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t max_size,
                                          unsigned seed) {
  constexpr size_t kLengthBytes = 8;
  size = LLVMFuzzerMutate(data, size, max_size);
  if (size < kLengthBytes || seed % 8 == 0) return size;
  // Nearly every insertion would only make a wrong length otherwise.
  const std::string_view rest(reinterpret_cast<const char*>(data) + kLengthBytes,
                              size - kLengthBytes);
  size_t header = rest.rfind("]}}");
  header = header == rest.npos ? rest.size() : header + 3;
  for (size_t i = 0; i < kLengthBytes; ++i) data[i] = static_cast<uint8_t>(header >> (8 * i));
  return size;
}
