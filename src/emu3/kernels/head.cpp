// Products of rows in float32 with the matrix of an output head, whose numbers take 8 or 16 bits.
//
// The matrix (V outputs, E inputs) lies as PyTorch stores it, row by row, so that any ids are a part of it. Rows are not
// rounded: with few of them, what takes time is to read the matrix. Each sum is added in the same order, however many
// rows and outputs are computed at once.

#include <omp.h>
#include <xmmintrin.h>

#include <cstdint>
#include <vector>

#include "vectors.h"

namespace {

// Of each output: bytes ahead of what is read, which the memory is asked for already.
constexpr int64_t HEAD_AHEAD = 1024;
// Outputs computed at once.
constexpr int HEAD_TILE = 4;

// ROWS rows times COUNT outputs. E is a multiple of 16.
template <int ROWS, int COUNT, typename Number>
void head_tile(const float* x, const Number* weights, const float* scales, int64_t inputs, int64_t stride, float* y) {
    constexpr int64_t STEP = 64 / sizeof(Number);  // numbers that the memory gives at once
    Vector sums[COUNT][ROWS] = {};
    int64_t k = 0;
    const auto add_products = [&](int64_t end) {
        for (; k < end; k += LANES) {
            Vector from[ROWS];
            for (int m = 0; m < ROWS; m++) from[m] = load(x + m * inputs + k);
            for (int n = 0; n < COUNT; n++) {
                const Vector weight = load(weights + n * inputs + k);
                for (int m = 0; m < ROWS; m++) add_product(sums[n][m], weight, from[m]);
            }
        }
    };
    while (k + STEP <= inputs) {
        // Behind the end of an output comes the one that is as far in the next tile.
        const int64_t ahead = k + HEAD_AHEAD / (int64_t)sizeof(Number);
        const Number* next = weights + ahead + (ahead < inputs ? 0 : (COUNT - 1) * inputs);
        for (int n = 0; n < COUNT; n++) _mm_prefetch((const char*)(next + n * inputs), _MM_HINT_T0);
        add_products(k + STEP);
    }
    add_products(inputs);
    for (int n = 0; n < COUNT; n++)
        for (int m = 0; m < ROWS; m++) {
            float sum = 0;
            for (int i = 0; i < LANES; i++) sum += sums[n][m][i];
            y[m * stride + n] = scales == nullptr ? sum : sum * (BYTE * scales[n]);
        }
}

// All rows times COUNT outputs: 4, 2 or 1 rows at a time.
template <int COUNT, typename Number>
void head_rows(const float* x, const Number* weights, const float* scales, int64_t rows, int64_t inputs,
               int64_t stride, float* y) {
    constexpr int HALF = COUNT / 2 > 0 ? COUNT / 2 : 1;
    int64_t m = 0;
    for (; m + 4 <= rows; m += 4)  // with half the outputs, as there are only so many registers
        for (int n = 0; n < COUNT; n += HALF)
            head_tile<4, HALF>(x + m * inputs, weights + n * inputs, scales == nullptr ? scales : scales + n, inputs,
                               stride, y + m * stride + n);
    for (; m + 2 <= rows; m += 2)
        head_tile<2, COUNT>(x + m * inputs, weights, scales, inputs, stride, y + m * stride);
    for (; m < rows; m++) head_tile<1, COUNT>(x + m * inputs, weights, scales, inputs, stride, y + m * stride);
}

// From so many rows on, numbers of 8 bits are made floats once, and not for each few rows.
constexpr int64_t MANY_ROWS = 5;

template <typename Number>
void head(const float* x, const Number* weights, const float* scales, int64_t rows, int64_t inputs, int64_t outputs,
          float* y) {
    const bool converts = sizeof(Number) == 1 && rows >= MANY_ROWS;
    std::vector<std::vector<float>> kept(omp_get_max_threads(), std::vector<float>(converts ? HEAD_TILE * inputs : 0));
#pragma omp parallel
    {
        float* floats = kept[omp_get_thread_num()].data();
#pragma omp for schedule(static)
        for (int64_t n = 0; n < outputs; n += HEAD_TILE) {
            const int64_t count = n + HEAD_TILE <= outputs ? HEAD_TILE : outputs - n;
            const auto multiply = [&](const auto* own) {
                const float* of_own = scales == nullptr ? scales : scales + n;
                if (count == HEAD_TILE) return head_rows<HEAD_TILE>(x, own, of_own, rows, inputs, outputs, y + n);
                for (int64_t i = 0; i < count; i++)
                    head_rows<1>(x, own + i * inputs, of_own == nullptr ? of_own : of_own + i, rows, inputs, outputs,
                                 y + n + i);
            };
            if (!converts) {
                multiply(weights + n * inputs);
                continue;
            }
            for (int64_t i = 0; i < count * inputs; i += LANES) store(floats + i, load(weights + n * inputs + i));
            multiply((const float*)floats);
        }
    }
}

}  // namespace

extern "C" {

// x (rows, inputs) times a matrix (outputs, inputs) to y (rows, outputs). `bits`: 8 with a scale for each output; 16 is
// bfloat16, and -16 is float16. As `compute` returns.
int emu3_head(const float* x, const void* weights, const float* scales, int64_t bits, int64_t rows, int64_t inputs,
              int64_t outputs, float* y) {
    return compute([&] {
        if (bits == 8)
            head(x, (const int8_t*)weights, scales, rows, inputs, outputs, y);
        else if (bits == 16)
            head(x, (const uint16_t*)weights, nullptr, rows, inputs, outputs, y);
        else
            head(x, (const Float16*)weights, nullptr, rows, inputs, outputs, y);
    });
}

}  // extern "C"
