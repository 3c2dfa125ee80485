// THE definition of the 4-bit and 8-bit code tables, the nibble order and the block arithmetic.
// CPU, CUDA and Python read them from here; no other file holds a code value.
//
// 4-bit quantizers are all of one form: fifteen ascending decision points split the real line into
// sixteen intervals; the number of points strictly below x ("rank") picks the code. A tie therefore
// goes to the lower interval. NF4 is from Dettmers et al., "QLoRA" (2023), appendix E; FP4 is the
// E2M1 layout that bitsandbytes uses; both produce its bytes.
#pragma once

#include <array>
#include <cstdint>
#include <limits>

namespace qlora_native {

enum class QuantType : int32_t { kNF4 = 0, kFP4 = 1, kINT4 = 2, kCustom = 3 };

constexpr const char* name(QuantType type) {
  switch (type) {
    case QuantType::kNF4:
      return "nf4";
    case QuantType::kFP4:
      return "fp4";
    case QuantType::kINT4:
      return "int4";
    case QuantType::kCustom:
      return "custom";
  }
  return "unknown";
}

/// One 4-bit code: how to encode a value scaled to [-1, 1], and what each code decodes to.
/// A plain aggregate, so that it can be a CUDA kernel's parameter.
struct Codebook {
  QuantType type = QuantType::kNF4;
  float values[16] = {};           ///< value of each code
  float decision_points[15] = {};  ///< ascending; rank(x) = number of points p with x > p
  uint8_t code_of_rank[16] = {};
  uint8_t zero_code =
      0;  ///< the code that stands for 0.0: zero blocks and the odd tail's low nibble
};

namespace detail {

/// The largest float whose value is <= x.
constexpr float round_down_to_float(double x) {
  const float nearest = static_cast<float>(x);
  if (static_cast<double>(nearest) <= x) return nearest;
  // One step toward minus infinity. Only normal, nonzero floats come here.
  const uint32_t bits = __builtin_bit_cast(uint32_t, nearest);
  return __builtin_bit_cast(float, nearest > 0 ? bits - 1 : bits + 1);
}

/// Decision points of a sorted codebook: the fp32 midpoints of neighbours.
constexpr Codebook sorted_codebook(QuantType type, const float (&values)[16]) {
  Codebook book;
  book.type = type;
  for (int i = 0; i < 16; ++i) {
    book.values[i] = values[i];
    book.code_of_rank[i] = static_cast<uint8_t>(i);
  }
  for (int i = 0; i < 15; ++i) book.decision_points[i] = (values[i] + values[i + 1]) / 2;
  int rank_of_zero = 0;
  while (rank_of_zero < 15 && 0.0f > book.decision_points[rank_of_zero]) ++rank_of_zero;
  book.zero_code = static_cast<uint8_t>(rank_of_zero);
  return book;
}

constexpr Codebook nf4_codebook() {
  constexpr float values[16] = {-1.0f,         -0.696192801f, -0.525073051f,  -0.394917488f,
                                -0.284441382f, -0.18477343f,  -0.0910500363f, 0.0f,
                                0.0795802996f, 0.160930201f,  0.246112302f,   0.337915242f,
                                0.440709829f,  0.562617004f,  0.722956836f,   1.0f};
  return sorted_codebook(QuantType::kNF4, values);
}

/// FP4: bit 3 is the sign, the other three index a magnitude. The published rule compares |x| with
/// seven thresholds and keeps the sign of a value that underflows; the same rule in the form above
/// has the points "just below -t" for negative values and "just below 0" between the two zeros.
constexpr Codebook fp4_codebook() {
  constexpr float magnitudes[8] = {0.0f,        0.0052083333f, 0.6666667f,  1.0f,
                                   0.33333333f, 0.5f,          0.16666667f, 0.25f};
  constexpr uint8_t code_of_magnitude_rank[8] = {0, 1, 6, 7, 4, 5, 2, 3};
  constexpr float thresholds[7] = {0.00260417f, 0.0859375f, 0.20833333f, 0.29166667f,
                                   0.4166667f,  0.583333f,  0.8333333f};
  Codebook book;
  book.type = QuantType::kFP4;
  for (int i = 0; i < 8; ++i) {
    book.values[i] = magnitudes[i];
    book.values[i + 8] = -magnitudes[i];
    book.code_of_rank[8 + i] = code_of_magnitude_rank[i];
    book.code_of_rank[7 - i] = static_cast<uint8_t>(8 + code_of_magnitude_rank[i]);
  }
  for (int i = 0; i < 7; ++i) {
    book.decision_points[8 + i] = thresholds[i];
    // The float just below -t: x > that  <=>  x >= -t  <=>  not (|x| > t).
    const uint32_t bits = __builtin_bit_cast(uint32_t, -thresholds[i]);
    book.decision_points[6 - i] = __builtin_bit_cast(float, bits + 1);
  }
  book.decision_points[7] = -std::numeric_limits<float>::denorm_min();
  book.zero_code = 0;
  return book;
}

/// INT4: code c stands for (c - 8) / 7. Values scaled to [-1, 1] use -7..7; code 0 is never
/// produced.
constexpr Codebook int4_codebook() {
  float values[16] = {};
  for (int i = 0; i < 16; ++i) values[i] = static_cast<float>(i - 8) / 7.0f;
  return sorted_codebook(QuantType::kINT4, values);
}

}  // namespace detail

inline constexpr Codebook kNF4 = detail::nf4_codebook();
inline constexpr Codebook kFP4 = detail::fp4_codebook();
inline constexpr Codebook kINT4 = detail::int4_codebook();

/// Decodes like `sorted_codebook`; the caller has checked that the values are finite and ascending.
constexpr Codebook make_custom_codebook(const float (&values)[16]) {
  return detail::sorted_codebook(QuantType::kCustom, values);
}

/// Reference encoder of a value already scaled by 1 / absmax.
constexpr uint8_t encode_4bit(const Codebook& book, float x) {
  int rank = 0;
  for (int i = 0; i < 15; ++i) rank += x > book.decision_points[i];
  return book.code_of_rank[rank];
}

// ---- Dynamic 8-bit map (Dettmers, "8-bit Approximations for Parallelism in Deep Learning") ----

/// 256 values, ascending, and the points between them: rank(x) = number of points p with x > p is
/// the nearest value, a tie going to the lower. A point is the exact midpoint rounded down to fp32,
/// which gives the same answer for every fp32 x as the exact midpoint does.
struct DynamicMap {
  float values[256] = {};
  float decision_points[255] = {};
};

namespace detail {

/// The positive half below 1.0. Decade 10^(i-6), i = 0..6, holds 2^i values: the centres of equal
/// slices of [0.1, 1]. The literals are the fp32 results of that formula as PyTorch's linspace
/// rounds them on AVX2 and AVX-512, one unit in the last place away from the exact ones at times;
/// published checkpoints carry these.
inline constexpr float kDynamicMagnitudes[127] = {
    5.50000038e-07f, 3.25000019e-06f, 7.7499999e-06f,  2.12499981e-05f, 4.37499984e-05f,
    6.62500024e-05f, 8.87499991e-05f, 0.000156250011f, 0.000268750038f, 0.000381250022f,
    0.000493750034f, 0.000606250076f, 0.00071875006f,  0.000831249985f, 0.000943750085f,
    0.00128124992f,  0.00184375001f,  0.00240624999f,  0.00296874996f,  0.00353124971f,
    0.00409374991f,  0.00465624966f,  0.00521875033f,  0.00578125007f,  0.00634374982f,
    0.00690625003f,  0.00746874977f,  0.00803124998f,  0.00859375019f,  0.00915624946f,
    0.00971874967f,  0.0114062503f,   0.0142187504f,   0.0170312505f,   0.0198437516f,
    0.0226562507f,   0.0254687499f,   0.028281251f,    0.0310937501f,   0.0339062512f,
    0.0367187522f,   0.0395312496f,   0.0423437469f,   0.0451562516f,   0.047968749f,
    0.05078125f,     0.053593751f,    0.0564062484f,   0.0592187531f,   0.0620312504f,
    0.0648437515f,   0.0676562563f,   0.0704687461f,   0.0732812509f,   0.0760937482f,
    0.078906253f,    0.0817187577f,   0.0845312476f,   0.0873437524f,   0.0901562497f,
    0.0929687545f,   0.0957812592f,   0.0985937491f,   0.107031256f,    0.12109375f,
    0.135156244f,    0.149218753f,    0.163281247f,    0.177343756f,    0.19140625f,
    0.205468744f,    0.219531253f,    0.233593747f,    0.247656241f,    0.26171875f,
    0.275781274f,    0.289843738f,    0.303906262f,    0.317968726f,    0.33203125f,
    0.346093744f,    0.360156238f,    0.374218762f,    0.388281226f,    0.40234375f,
    0.416406244f,    0.430468738f,    0.444531262f,    0.458593726f,    0.47265625f,
    0.486718714f,    0.500781238f,    0.514843702f,    0.528906226f,    0.54296875f,
    0.557031274f,    0.571093798f,    0.585156262f,    0.599218726f,    0.61328125f,
    0.627343774f,    0.641406298f,    0.655468762f,    0.669531226f,    0.68359375f,
    0.697656274f,    0.711718798f,    0.725781262f,    0.739843726f,    0.75390625f,
    0.767968774f,    0.782031238f,    0.796093762f,    0.810156226f,    0.82421875f,
    0.838281274f,    0.852343738f,    0.866406262f,    0.880468726f,    0.89453125f,
    0.908593774f,    0.922656238f,    0.936718762f,    0.950781226f,    0.96484375f,
    0.978906274f,    0.992968738f,
};

/// The same without a sign: decade 10^(i-6) holds 2^(i+1) values. From the same formula and rounded
/// in the same way.
inline constexpr float kUnsignedDynamicMagnitudes[254] = {
    3.2500003e-07f,  7.7499999e-07f,  2.12499981e-06f, 4.37499966e-06f, 6.62499997e-06f,
    8.87499937e-06f, 1.56249989e-05f, 2.68750009e-05f, 3.81249993e-05f, 4.93749976e-05f,
    6.06250032e-05f, 7.18750016e-05f, 8.31249927e-05f, 9.43749983e-05f, 0.000128125001f,
    0.000184375007f, 0.000240625013f, 0.00029687502f,  0.000353124982f, 0.000409375032f,
    0.000465625024f, 0.000521875045f, 0.000578125007f, 0.000634375028f, 0.000690625049f,
    0.000746875012f, 0.000803125091f, 0.000859375054f, 0.000915625016f, 0.000971875037f,
    0.00114062498f,  0.00142187497f,  0.00170312496f,  0.00198437506f,  0.00226562493f,
    0.00254687481f,  0.00282812491f,  0.00310937478f,  0.00339062512f,  0.00367187499f,
    0.00395312486f,  0.0042343745f,   0.00451562507f,  0.00479687471f,  0.00507812481f,
    0.00535937492f,  0.00564062456f,  0.00592187513f,  0.00620312477f,  0.00648437487f,
    0.00676562544f,  0.00704687461f,  0.00732812518f,  0.00760937436f,  0.00789062493f,
    0.00817187503f,  0.0084531242f,   0.00873437524f,  0.00901562441f,  0.00929687452f,
    0.00957812555f,  0.00985937472f,  0.010703126f,    0.0121093756f,   0.0135156242f,
    0.0149218757f,   0.0163281243f,   0.0177343767f,   0.0191406254f,   0.020546874f,
    0.0219531264f,   0.0233593751f,   0.0247656237f,   0.0261718761f,   0.0275781285f,
    0.0289843734f,   0.0303906258f,   0.0317968726f,   0.033203125f,    0.0346093737f,
    0.036015626f,    0.0374218784f,   0.0388281234f,   0.0402343757f,   0.0416406244f,
    0.0430468731f,   0.0444531254f,   0.0458593741f,   0.0472656265f,   0.0486718714f,
    0.0500781238f,   0.0514843725f,   0.0528906249f,   0.0542968772f,   0.0557031296f,
    0.057109382f,    0.0585156269f,   0.0599218719f,   0.0613281243f,   0.0627343804f,
    0.0641406327f,   0.0655468777f,   0.0669531226f,   0.068359375f,    0.0697656274f,
    0.0711718798f,   0.0725781247f,   0.0739843771f,   0.0753906295f,   0.0767968819f,
    0.0782031268f,   0.0796093792f,   0.0810156241f,   0.0824218765f,   0.0838281289f,
    0.0852343738f,   0.0866406262f,   0.0880468711f,   0.0894531235f,   0.0908593759f,
    0.0922656283f,   0.0936718807f,   0.0950781256f,   0.096484378f,    0.0978906304f,
    0.0992968753f,   0.103515625f,    0.110546872f,    0.117578126f,    0.124609374f,
    0.131640613f,    0.138671875f,    0.145703137f,    0.152734369f,    0.159765631f,
    0.166796863f,    0.173828125f,    0.180859387f,    0.187890619f,    0.194921881f,
    0.201953113f,    0.208984375f,    0.216015637f,    0.223046869f,    0.230078131f,
    0.237109363f,    0.244140625f,    0.251171857f,    0.258203119f,    0.265234381f,
    0.272265613f,    0.279296875f,    0.286328137f,    0.293359369f,    0.300390601f,
    0.307421863f,    0.314453125f,    0.321484387f,    0.328515619f,    0.335546851f,
    0.342578113f,    0.349609375f,    0.356640637f,    0.363671869f,    0.370703101f,
    0.377734363f,    0.384765625f,    0.391796887f,    0.398828119f,    0.405859351f,
    0.412890613f,    0.419921875f,    0.426953137f,    0.433984369f,    0.441015601f,
    0.448046863f,    0.455078125f,    0.462109387f,    0.469140619f,    0.476171851f,
    0.483203113f,    0.490234375f,    0.497265607f,    0.504296899f,    0.511328101f,
    0.518359363f,    0.525390625f,    0.532421827f,    0.539453149f,    0.546484351f,
    0.553515673f,    0.560546875f,    0.567578137f,    0.574609399f,    0.581640601f,
    0.588671923f,    0.595703125f,    0.602734387f,    0.609765649f,    0.616796851f,
    0.623828173f,    0.630859375f,    0.637890637f,    0.644921899f,    0.651953101f,
    0.658984423f,    0.666015625f,    0.673046887f,    0.680078149f,    0.687109351f,
    0.694140673f,    0.701171875f,    0.708203137f,    0.715234399f,    0.722265601f,
    0.729296923f,    0.736328125f,    0.743359387f,    0.750390649f,    0.757421851f,
    0.764453173f,    0.771484375f,    0.778515577f,    0.785546899f,    0.792578101f,
    0.799609423f,    0.806640625f,    0.813671827f,    0.820703149f,    0.827734351f,
    0.834765673f,    0.841796875f,    0.848828077f,    0.855859399f,    0.862890601f,
    0.869921923f,    0.876953125f,    0.883984327f,    0.891015649f,    0.898046851f,
    0.905078173f,    0.912109375f,    0.919140577f,    0.926171899f,    0.933203101f,
    0.940234423f,    0.947265625f,    0.954296827f,    0.961328149f,    0.968359351f,
    0.975390673f,    0.982421875f,    0.989453077f,    0.996484399f,
};

constexpr DynamicMap with_decision_points(DynamicMap map) {
  for (int i = 0; i < 255; ++i) {
    const double midpoint =
        (static_cast<double>(map.values[i]) + static_cast<double>(map.values[i + 1])) / 2;
    map.decision_points[i] = round_down_to_float(midpoint);
  }
  return map;
}

constexpr DynamicMap signed_dynamic_map() {
  DynamicMap map;
  for (int i = 0; i < 127; ++i) {
    map.values[128 + i] = kDynamicMagnitudes[i];
    map.values[126 - i] = -kDynamicMagnitudes[i];
  }
  map.values[127] = 0.0f;
  map.values[255] = 1.0f;
  return with_decision_points(map);
}

constexpr DynamicMap unsigned_dynamic_map() {
  DynamicMap map;
  for (int i = 0; i < 254; ++i) map.values[1 + i] = kUnsignedDynamicMagnitudes[i];
  map.values[255] = 1.0f;
  return with_decision_points(map);
}

}  // namespace detail

inline constexpr DynamicMap kSignedDynamicMap = detail::signed_dynamic_map();
inline constexpr uint8_t kSignedDynamicZeroCode = 127;

/// For values that are not negative: second moments of gradients. Code 0 is 0.
inline constexpr DynamicMap kUnsignedDynamicMap = detail::unsigned_dynamic_map();

/// Reference encoder: nearest entry by bisection, 8 comparisons.
constexpr uint8_t encode_dynamic(const DynamicMap& map, float x) {
  int rank = 0;
  for (int step = 128; step > 0; step /= 2) {
    if (rank + step <= 255 && x > map.decision_points[rank + step - 1]) rank += step;
  }
  return static_cast<uint8_t>(rank);
}

// ---- Nibbles, blocks and sizes ----

inline constexpr int64_t kMinBlockSize = 32;
inline constexpr int64_t kMaxBlockSize = 4096;
inline constexpr int64_t kGroupSize = 256;  ///< blocks that share one absmax2

/// Block sizes are powers of two from 32 to 4096.
constexpr bool is_valid_block_size(int64_t block_size) {
  return block_size >= kMinBlockSize && block_size <= kMaxBlockSize &&
         (block_size & (block_size - 1)) == 0;
}

/// The first element of a pair is the high nibble.
constexpr uint8_t pack_nibbles(uint8_t first, uint8_t second) {
  return static_cast<uint8_t>(first << 4 | second);
}
constexpr uint8_t first_nibble(uint8_t byte) { return byte >> 4; }
constexpr uint8_t second_nibble(uint8_t byte) { return byte & 0xF; }

constexpr int64_t packed_bytes(int64_t numel) { return numel / 2 + numel % 2; }
constexpr int64_t num_blocks(int64_t numel, int64_t block_size) {
  return numel / block_size + (numel % block_size != 0);
}
constexpr int64_t num_groups(int64_t blocks) {
  return blocks / kGroupSize + (blocks % kGroupSize != 0);
}

}  // namespace qlora_native
