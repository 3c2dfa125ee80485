/* What the library says of itself, its codebooks and the machine. */
#include <math.h>
#include <string.h>

#include "check.h"
#include "problem.h"

static void test_names(void) {
  static const char* const statuses[] = {
      "ok", "invalid argument", "unsupported", "out of memory", "CUDA error", "internal error"};
  for (qn_status s = QN_OK; s <= QN_INTERNAL_ERROR; ++s) {
    CHECK(strcmp(qn_status_string(s), statuses[s]) == 0);
  }
  CHECK(strcmp(qn_dtype_name(QN_FLOAT32), "float32") == 0);
  CHECK(strcmp(qn_dtype_name(QN_FLOAT16), "float16") == 0);
  CHECK(strcmp(qn_dtype_name(QN_BFLOAT16), "bfloat16") == 0);
  CHECK(strcmp(qn_device_type_name(QN_CPU), "cpu") == 0);
  CHECK(strcmp(qn_device_type_name(QN_CUDA), "cuda") == 0);
  CHECK(strcmp(qn_quant_type_name(QN_NF4), "nf4") == 0);
  CHECK(strcmp(qn_quant_type_name(QN_FP4), "fp4") == 0);
  CHECK(strcmp(qn_quant_type_name(QN_INT4), "int4") == 0);
  CHECK(strcmp(qn_quant_type_name(QN_CUSTOM), "custom") == 0);
  CHECK(strcmp(qn_op_name(QN_QUANTIZE_4BIT), "quantize_4bit") == 0);
  CHECK(strcmp(qn_op_name(QN_DEQUANTIZE_4BIT), "dequantize_4bit") == 0);
  CHECK(strcmp(qn_op_name(QN_MATMUL_4BIT), "matmul_4bit") == 0);
  CHECK(strcmp(qn_op_name(QN_MATMUL_4BIT_TRANSPOSED), "matmul_4bit_transposed") == 0);
  CHECK(strcmp(qn_op_name(QN_OPTIMIZER_STEP), "optimizer_step") == 0);
  CHECK(strcmp(qn_op_name(QN_GRADIENT_NORM), "gradient_norm") == 0);
  CHECK(strcmp(qn_op_name(QN_LORA_PROJECT), "lora_project") == 0);
  CHECK(strcmp(qn_op_name(QN_LORA_GRADIENT), "lora_gradient") == 0);
  CHECK(strcmp(qn_op_name(QN_GROUPED_MATMUL_4BIT), "grouped_matmul_4bit") == 0);
  CHECK(strcmp(qn_status_string(QN_INTERNAL_ERROR + 1), "unknown") == 0);
  static const int32_t unknown[] = {-1, 11, 1000, INT32_MIN, INT32_MAX};
  for (size_t i = 0; i < sizeof(unknown) / sizeof(unknown[0]); ++i) {
    CHECK(strcmp(qn_status_string(unknown[i]), "unknown") == 0);
    CHECK(strcmp(qn_dtype_name(unknown[i]), "unknown") == 0);
    CHECK(strcmp(qn_device_type_name(unknown[i]), "unknown") == 0);
    CHECK(strcmp(qn_quant_type_name(unknown[i]), "unknown") == 0);
    CHECK(strcmp(qn_op_name(unknown[i]), "unknown") == 0);
  }
}

static void test_build(void) {
  CHECK(qn_abi_version() == QN_ABI_VERSION);
  qn_build_info info = {.struct_size = sizeof(info)};
  CHECK_OK(qn_describe_build(&info));
  CHECK(strcmp(info.version, qn_version()) == 0 && strlen(qn_version()) >= 5);
  CHECK(strlen(info.compiler) > 0);
  CHECK((strlen(info.cuda_toolkit) > 0) == (strlen(info.cuda_architectures) > 0));
  CHECK(info.struct_size == sizeof(info));
}

static void test_codebooks(void) {
  /* Dettmers et al., "QLoRA", appendix E. */
  static const float nf4[16] = {-1.0f,
                                -0.6961928009986877f,
                                -0.5250730514526367f,
                                -0.39491748809814453f,
                                -0.28444138169288635f,
                                -0.18477343022823334f,
                                -0.09105003625154495f,
                                0.0f,
                                0.07958029955625534f,
                                0.16093020141124725f,
                                0.24611230194568634f,
                                0.33791524171829224f,
                                0.44070982933044434f,
                                0.5626170039176941f,
                                0.7229568362236023f,
                                1.0f};
  qn_codebook book = {.struct_size = sizeof(book)};
  CHECK_OK(qn_describe_codebook(QN_NF4, NULL, &book));
  CHECK_BYTES(book.values, nf4, sizeof(nf4));
  CHECK(book.quant_type == QN_NF4 && book.zero_code == 7);
  CHECK_OK(qn_describe_codebook(QN_INT4, NULL, &book));
  for (int c = 0; c < 16; ++c) CHECK(book.values[c] == (float)(c - 8) / 7.0f);
  CHECK(book.zero_code == 8);
  CHECK_OK(qn_describe_codebook(QN_FP4, NULL, &book));
  CHECK(book.values[0] == 0.0f && book.values[3] == 1.0f && book.values[11] == -1.0f);
  for (int i = 1; i < 15; ++i) CHECK(book.decision_points[i - 1] < book.decision_points[i]);
  CHECK_OK(qn_describe_codebook(QN_CUSTOM, custom_values, &book));
  CHECK_BYTES(book.values, custom_values, sizeof(custom_values));
  for (int i = 0; i < 15; ++i) {
    CHECK(book.decision_points[i] == (custom_values[i] + custom_values[i + 1]) / 2);
    CHECK(book.code_of_rank[i] == i);
  }
  CHECK(book.zero_code == 8 && book.quant_type == QN_CUSTOM);

  float map[256];
  CHECK_OK(qn_signed_dynamic_map(map));
  for (int i = 1; i < 256; ++i) CHECK(map[i - 1] < map[i]);
  CHECK(map[127] == 0.0f && map[255] == 1.0f && map[0] == -map[254]);
}

static void test_sizes(void) {
  qn_weight_sizes sizes = {.struct_size = sizeof(sizes)};
  CHECK_OK(qn_describe_weight(3, 11, 32, &sizes));
  CHECK(sizes.packed_bytes == 17 && sizes.num_blocks == 2 && sizes.num_groups == 1);
  CHECK_OK(qn_describe_weight(257, 64, 64, &sizes));
  CHECK(sizes.packed_bytes == 257 * 32 && sizes.num_blocks == 257 && sizes.num_groups == 2);
  CHECK_OK(qn_describe_weight(0, 64, 64, &sizes));
  CHECK(sizes.packed_bytes == 0 && sizes.num_blocks == 0 && sizes.num_groups == 0);
  CHECK_OK(qn_describe_weight(INT64_C(1) << 29, INT64_C(1) << 30, 4096, &sizes));
  CHECK(sizes.packed_bytes == INT64_C(1) << 58);
}

static void test_devices(void) {
  int64_t count = 0;
  CHECK_OK(qn_device_count(&count));
  CHECK(count >= 1);
  int32_t last_index = -1;
  for (int64_t i = 0; i < count; ++i) {
    qn_device_info info = {.struct_size = sizeof(info)};
    CHECK_OK(qn_describe_device(i, &info));
    CHECK(info.device_type == (i == 0 ? QN_CPU : QN_CUDA));
    /* A GPU that this build cannot use is left out, and keeps its index. */
    CHECK(i == 0 ? info.device_index == 0 : info.device_index > last_index);
    last_index = i == 0 ? -1 : info.device_index;
    CHECK(info.memory_bytes > 0 && strlen(info.name) > 0);
  }
  char reason[512];
  CHECK_OK(qn_cuda_unavailable_reason(reason, sizeof(reason)));
  CHECK((strlen(reason) == 0) == (count > 1));
  if (count == 1) {
    char cut[4] = "xyz";
    CHECK_OK(qn_cuda_unavailable_reason(cut, sizeof(cut)));
    CHECK(memcmp(cut, reason, 3) == 0 && cut[3] == '\0');
  }
}

static int executed;

static void run_once(int32_t threads, void (*body)(void* context), void* context) {
  (void)threads;
  ++executed;
  body(context);
}

static void test_cpu_threads(void) {
  int32_t before = 0, now = 0;
  CHECK_OK(qn_cpu_threads(&before));
  CHECK(before >= 1);
  CHECK_OK(qn_set_cpu_threads(3));
  CHECK_OK(qn_cpu_threads(&now));
  CHECK(now == 3);

  problem p = make_problem(256, 1024, 64, QN_NF4, false);
  CHECK_OK(qn_set_cpu_executor(run_once));
  quantize(&p);
  CHECK(executed > 0);
  CHECK_OK(qn_set_cpu_executor(NULL));
  executed = 0;
  dequantize(&p);
  CHECK(executed == 0);
  free_problem(&p);
  CHECK_OK(qn_set_cpu_threads(before));
}

void test_queries(void) {
  test_names();
  test_build();
  test_codebooks();
  test_sizes();
  test_devices();
  test_cpu_threads();
}
