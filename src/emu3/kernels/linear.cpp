// Products of a few rows with quantized matrices, on x86-64 processors with AVX2 or AVX512-VNNI.
//
// A matrix (N outputs, K inputs) is stored in blocks of 16 outputs. Inside a block four inputs of output 0 are followed
// by the same four of output 1, and so on: 64 bytes are what one instruction multiplies, and a block is read once, from
// front to back. In 4 bits, a byte holds input k in its low half and input k + 16 in its high half.
//
// 8 bits: bytes are the weight + 128. One scale for each output, one for each row of activations.
// 4 bits: values are the weight + 8. One scale in 16 bits for each output and `group` inputs; activations have one
// scale for each 32 inputs.

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <type_traits>

#include "vectors.h"

namespace {

constexpr int64_t OUTPUTS = 16;  // of a block
constexpr int64_t GROUP = 32;    // inputs that share a scale of the activations, in 4 bits

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)

constexpr int TILE = 8;          // of activations, multiplied at a time: so many sums fit into the registers
constexpr int CHAINS = 2;        // of additions, as one waits for its last
constexpr int32_t OFFSET = 128;  // of the weights in 8 bits, as they are multiplied

struct Sums {  // one for each output of a block
    __m512i value;
    static Sums zero() { return {_mm512_setzero_si512()}; }
};
using GroupSums = Sums;
struct Floats {
    __m512 value;
    static Floats zero() { return {_mm512_setzero_ps()}; }
};
struct Bytes {
    __m512i value;
    static Bytes load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
    Bytes low() const { return {_mm512_and_si512(value, _mm512_set1_epi8(15))}; }
    Bytes high() const { return {_mm512_and_si512(_mm512_srli_epi16(value, 4), _mm512_set1_epi8(15))}; }
};
// Adds weights times four activations.
inline void add_products(Sums& sums, const Bytes& weights, const int8_t* activations) {
    int32_t four;
    std::memcpy(&four, activations, 4);
    sums.value = _mm512_dpbusd_epi32(sums.value, weights.value, _mm512_set1_epi32(four));
}
inline void add_products_of_halves(Sums& sums, const Bytes& weights, const int8_t* activations) {
    add_products(sums, weights, activations);
}
inline void add(Sums& to, const Sums& other) { to.value = _mm512_add_epi32(to.value, other.value); }
inline Floats to_floats(const Sums& sums, int32_t more) {
    return {_mm512_cvtepi32_ps(_mm512_add_epi32(sums.value, _mm512_set1_epi32(more)))};
}
inline Floats load_16_bits(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline Floats load_floats(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats times(const Floats& a, const Floats& b) { return {_mm512_mul_ps(a.value, b.value)}; }
inline Floats times(const Floats& a, float b) { return {_mm512_mul_ps(a.value, _mm512_set1_ps(b))}; }
inline void add_product(Floats& to, const Floats& a, const Floats& b) {
    to.value = _mm512_fmadd_ps(a.value, b.value, to.value);
}
inline void store_floats(float* p, const Floats& a) { _mm512_storeu_ps(p, a.value); }

#else

constexpr int TILE = 4;
constexpr int CHAINS = 1;
constexpr int32_t OFFSET = 0;

struct Sums {
    __m256i low, high;
    static Sums zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
};
// Of products of a group in 4 bits, in 16 bits: 2 * 8 products of at most 15 * 127 do not reach 2^15.
struct GroupSums {
    __m256i low, high;
    static GroupSums zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
};
struct Floats {
    __m256 low, high;
    static Floats zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
};
inline __m256i low_halves(__m256i bytes) { return _mm256_and_si256(bytes, _mm256_set1_epi8(15)); }
inline __m256i high_halves(__m256i bytes) { return low_halves(_mm256_srli_epi16(bytes, 4)); }
struct Bytes {
    __m256i first, second;
    static Bytes load(const uint8_t* p) {
        return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)(p + 32))};
    }
    Bytes low() const { return {low_halves(first), low_halves(second)}; }
    Bytes high() const { return {high_halves(first), high_halves(second)}; }
};
inline __m256i four_times(const int8_t* activations) {
    int32_t four;
    std::memcpy(&four, activations, 4);
    return _mm256_set1_epi32(four);
}
inline __m256i in_32_bits(__m256i pairs) { return _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)); }
// The instruction takes one side as unsigned, and adds two products in 16 bits. Magnitudes of weights, at most 128,
// times activations with the sign of the weight stay below 2^15; weights plus 128 would not.
inline __m256i dot(__m256i weights, __m256i four) {
    const __m256i whole = _mm256_xor_si256(weights, _mm256_set1_epi8(-128));  // minus 128
    return in_32_bits(_mm256_maddubs_epi16(_mm256_abs_epi8(whole), _mm256_sign_epi8(four, whole)));
}
inline void add_products(Sums& sums, const Bytes& weights, const int8_t* activations) {
    const __m256i four = four_times(activations);
    sums.low = _mm256_add_epi32(sums.low, dot(weights.first, four));
    sums.high = _mm256_add_epi32(sums.high, dot(weights.second, four));
}
inline void add_products_of_halves(GroupSums& sums, const Bytes& weights, const int8_t* activations) {
    const __m256i four = four_times(activations);
    sums.low = _mm256_add_epi16(sums.low, _mm256_maddubs_epi16(weights.first, four));
    sums.high = _mm256_add_epi16(sums.high, _mm256_maddubs_epi16(weights.second, four));
}
inline void add(Sums& to, const Sums& other) {
    to.low = _mm256_add_epi32(to.low, other.low);
    to.high = _mm256_add_epi32(to.high, other.high);
}
inline Floats to_floats(const Sums& sums, int32_t more) {
    const __m256i each = _mm256_set1_epi32(more);
    return {_mm256_cvtepi32_ps(_mm256_add_epi32(sums.low, each)),
            _mm256_cvtepi32_ps(_mm256_add_epi32(sums.high, each))};
}
inline Floats to_floats(const GroupSums& sums, int32_t more) {
    return to_floats(Sums{in_32_bits(sums.low), in_32_bits(sums.high)}, more);
}
inline Floats load_16_bits(const uint16_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)),
            _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)(p + 8)))};
}
inline Floats load_floats(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
inline Floats times(const Floats& a, const Floats& b) {
    return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)};
}
inline Floats times(const Floats& a, float b) { return times(a, {_mm256_set1_ps(b), _mm256_set1_ps(b)}); }
inline void add_product(Floats& to, const Floats& a, const Floats& b) {
    to.low = _mm256_fmadd_ps(a.low, b.low, to.low);
    to.high = _mm256_fmadd_ps(a.high, b.high, to.high);
}
inline void store_floats(float* p, const Floats& a) {
    _mm256_storeu_ps(p, a.low);
    _mm256_storeu_ps(p + 8, a.high);
}

#endif

// Bytes ahead of what is read, which the memory is asked for already.
constexpr int64_t AHEAD = 2048;

inline void ask_for(const uint8_t* p) {
    for (int64_t line = 0; line < 256; line += 64) _mm_prefetch((const char*)(p + AHEAD + line), _MM_HINT_T0);
}

// COUNT rows of activations times one block in 8 bits. `ask`: whether the block is not in a cache yet.
template <int COUNT>
void block_8(const uint8_t* weights, const float* scales, const int8_t* activations, const int32_t* sums_of_rows,
             const float* row_scales, int64_t inputs, int64_t stride, bool ask, float* y) {
    Sums sums[CHAINS][COUNT];
    for (auto& chain : sums)
        for (auto& each : chain) each = Sums::zero();
    for (int64_t k = 0; k < inputs; k += 16) {
        if (ask) ask_for(weights);
        for (int four = 0; four < 4; four++) {
            const Bytes bytes = Bytes::load(weights);
            for (int m = 0; m < COUNT; m++)
                add_products(sums[four % CHAINS][m], bytes, activations + m * inputs + k + 4 * four);
            weights += 64;
        }
    }
    const Floats of_outputs = load_floats(scales);
    for (int m = 0; m < COUNT; m++) {
        for (int chain = 1; chain < CHAINS; chain++) add(sums[0][m], sums[chain][m]);
        const Floats found = to_floats(sums[0][m], -OFFSET * sums_of_rows[m]);
        store_floats(y + m * stride, times(times(found, of_outputs), row_scales[m]));
    }
}

// COUNT rows of activations times one block in 4 bits. `per_scale`: groups of 32 inputs that share a scale.
template <int COUNT>
void block_4(const uint8_t* weights, const uint16_t* scales, const int8_t* activations, const int32_t* sums_of_groups,
             const float* group_scales, int64_t inputs, int64_t stride, int64_t per_scale, bool ask, float* y) {
    const int64_t groups = inputs / GROUP;
    Floats found[COUNT];
    for (auto& each : found) each = Floats::zero();
    for (int64_t g = 0; g < groups; g++) {
        if (ask) ask_for(weights);
        GroupSums sums[COUNT];
        for (auto& each : sums) each = GroupSums::zero();
        for (int j = 0; j < 4; j++) {
            const Bytes both = Bytes::load(weights);
            const Bytes low = both.low(), high = both.high();
            for (int m = 0; m < COUNT; m++) {
                const int8_t* a = activations + m * inputs + g * GROUP + 4 * j;
                add_products_of_halves(sums[m], low, a);
                add_products_of_halves(sums[m], high, a + 16);
            }
            weights += 64;
        }
        const Floats of_outputs = load_16_bits(scales + g / per_scale * OUTPUTS);
        for (int m = 0; m < COUNT; m++) {
            const Floats of_group = to_floats(sums[m], -8 * sums_of_groups[m * groups + g]);
            add_product(found[m], of_group, times(of_outputs, group_scales[m * groups + g]));
        }
    }
    for (int m = 0; m < COUNT; m++) store_floats(y + m * stride, found[m]);
}

// Calls `block` for TILE rows at a time, then for half as many, and so on.
template <int COUNT = TILE, typename Block>
void in_tiles(int64_t rows, Block block, int64_t m = 0) {
    for (; m + COUNT <= rows; m += COUNT) block(std::integral_constant<int, COUNT>(), m);
    if constexpr (COUNT > 1) in_tiles<COUNT / 2>(rows, block, m);
}

// All of these run in parallel where they are called in a parallel region, and end together.

// What is not finite has no bytes. Its scale is NaN, and so is what is computed with it.
inline bool round_unknown(float most, int64_t count, int8_t* bytes, int32_t& sum, float& scale) {
    if (most <= std::numeric_limits<float>::max()) return false;
    std::memset(bytes, 0, count);
    sum = 0;
    scale = std::numeric_limits<float>::quiet_NaN();
    return true;
}

// 8 bits: rows (rows, inputs) to bytes, with the sum of a row's bytes and its scale.
void round_8(const float* x, int64_t rows, int64_t inputs, int8_t* bytes, int32_t* sums, float* scales) {
#pragma omp for schedule(static)
    for (int64_t m = 0; m < rows; m++) {
        const float *row = x + m * inputs, most = largest(row, inputs), scale = std::fmax(most, 1e-12f) / 127;
        if (round_unknown(most, inputs, bytes + m * inputs, sums[m], scales[m])) continue;
        Whole sum = {};
        for (int64_t k = 0; k < inputs; k += LANES) {
            // Cutting off rounds to nearest.
            const Whole value = __builtin_convertvector(load(row + k) / scale + 128.5f, Whole) - 128;
            store(bytes + m * inputs + k, value);
            sum += value;
        }
        scales[m] = scale;
        sums[m] = sum_of(sum);
    }
}

// 4 bits: the same with a sum and a scale for each 32 inputs.
void round_4(const float* x, int64_t rows, int64_t inputs, int8_t* bytes, int32_t* sums, float* scales) {
#pragma omp for schedule(static)
    for (int64_t part = 0; part < rows * (inputs / GROUP); part++) {
        const float *from = x + part * GROUP, most = largest(from, GROUP), scale = most / 127;
        if (round_unknown(most, GROUP, bytes + part * GROUP, sums[part], scales[part])) continue;
        const float inverse = scale > 1e-37f ? 1 / scale : 0;  // finite
        Whole sum = {};
        for (int64_t k = 0; k < GROUP; k += LANES) {
            const Whole value = rounded(load(from + k) * inverse);
            store(bytes + part * GROUP + k, value);
            sum += value;
        }
        scales[part] = scale;
        sums[part] = sum_of(sum);
    }
}

struct Matrix {
    const uint8_t* weights;
    const void* scales;  // float in 8 bits, float16 in 4
    int64_t inputs, outputs;
    int64_t group;  // inputs that share a scale in 4 bits; 0 is 8 bits
};

// Rounded rows times a matrix, to rows of y that are `stride` apart.
void multiply(const Matrix& matrix, int64_t rows, const int8_t* bytes, const int32_t* sums, const float* row_scales,
              float* y, int64_t stride) {
    const int64_t inputs = matrix.inputs, groups = inputs / GROUP;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < matrix.outputs / OUTPUTS; block++)
        in_tiles(rows, [&](auto count, int64_t m) {
            float* to = y + m * stride + block * OUTPUTS;
            if (matrix.group == 0)
                block_8<count()>(matrix.weights + block * OUTPUTS * inputs,
                                 (const float*)matrix.scales + block * OUTPUTS, bytes + m * inputs, sums + m,
                                 row_scales + m, inputs, stride, m == 0, to);
            else
                block_4<count()>(matrix.weights + block * OUTPUTS * inputs / 2,
                                 (const uint16_t*)matrix.scales + block * OUTPUTS * inputs / matrix.group,
                                 bytes + m * inputs, sums + m * groups, row_scales + m * groups, inputs, stride,
                                 matrix.group / GROUP, m == 0, to);
        });
}

// For rounded rows.
struct Rounded {
    std::unique_ptr<int8_t[]> bytes;
    std::unique_ptr<int32_t[]> sums;
    std::unique_ptr<float[]> scales;
    Rounded(int64_t rows, int64_t inputs)
        : bytes(new int8_t[rows * inputs]), sums(new int32_t[rows * (inputs / GROUP + 1)]),
          scales(new float[rows * (inputs / GROUP + 1)]) {}
    void round(const float* x, int64_t rows, const Matrix& first) {  // as the matrix wants them
        (first.group == 0 ? round_8 : round_4)(x, rows, first.inputs, bytes.get(), sums.get(), scales.get());
    }
    void times(const Matrix& matrix, int64_t rows, float* y, int64_t stride) const {
        multiply(matrix, rows, bytes.get(), sums.get(), scales.get(), y, stride);
    }
};

}  // namespace

extern "C" {

// x (rows, inputs) times a matrix to y (rows, outputs); see `Matrix`. As `compute` returns.
int emu3_linear(const float* x, const uint8_t* weights, const void* scales, int64_t group, int64_t rows,
                int64_t inputs, int64_t outputs, float* y) {
    return compute([&] {
        const Matrix matrix{weights, scales, inputs, outputs, group};
        Rounded rounded(rows, inputs);
#pragma omp parallel
        {
            rounded.round(x, rows, matrix);
            rounded.times(matrix, rows, y, outputs);
        }
    });
}

// The sum of all bytes, in words of 8: how fast memory can be read. `count` is a multiple of 65,536.
int64_t emu3_read(const int64_t* data, int64_t count) {
    int64_t total = 0;
#pragma omp parallel for schedule(static) reduction(+ : total)
    for (int64_t start = 0; start < count / 8; start += 8192) {
        int64_t sums[32] = {};
        for (int64_t i = start; i < start + 8192; i += 32)
            for (int64_t j = 0; j < 32; j++) sums[j] += data[i + j];
        for (int64_t each : sums) total += each;
    }
    return total;
}

}  // extern "C"
