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
#include <memory>
#include <type_traits>

namespace {

constexpr int64_t OUTPUTS = 16;  // of a block
constexpr int64_t GROUP = 32;    // inputs that share a scale of the activations, in 4 bits

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)

struct Sums {  // one for each output of a block
    __m512i value;
    static Sums all(int32_t x) { return {_mm512_set1_epi32(x)}; }
};
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
// Adds unsigned weights times four activations. HALVES: no weight is above 15.
template <bool HALVES>
inline void add_products(Sums& sums, const Bytes& weights, const int8_t* activations) {
    int32_t four;
    std::memcpy(&four, activations, 4);
    sums.value = _mm512_dpbusd_epi32(sums.value, weights.value, _mm512_set1_epi32(four));
}
inline Floats to_floats(const Sums& sums) { return {_mm512_cvtepi32_ps(sums.value)}; }
inline Floats load_16_bits(const uint16_t* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p))}; }
inline Floats load_floats(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Floats times(const Floats& a, const Floats& b) { return {_mm512_mul_ps(a.value, b.value)}; }
inline Floats times(const Floats& a, float b) { return {_mm512_mul_ps(a.value, _mm512_set1_ps(b))}; }
inline void add_product(Floats& to, const Floats& a, const Floats& b) {
    to.value = _mm512_fmadd_ps(a.value, b.value, to.value);
}
inline void store_floats(float* p, const Floats& a) { _mm512_storeu_ps(p, a.value); }
inline void add(Sums& to, const Sums& other) { to.value = _mm512_add_epi32(to.value, other.value); }

#else

struct Sums {
    __m256i low, high;
    static Sums all(int32_t x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
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
// Two products are added in 16 bits, where those of weights above 128 could overflow. So a weight is split in halves.
inline __m256i dot_halves(__m256i weights, __m256i four) {
    return _mm256_madd_epi16(_mm256_maddubs_epi16(weights, four), _mm256_set1_epi16(1));
}
inline __m256i dot(__m256i weights, __m256i four) {
    const __m256i high = _mm256_slli_epi32(dot_halves(high_halves(weights), four), 4);
    return _mm256_add_epi32(dot_halves(low_halves(weights), four), high);
}
template <bool HALVES>
inline void add_products(Sums& sums, const Bytes& weights, const int8_t* activations) {
    int32_t packed;
    std::memcpy(&packed, activations, 4);
    const __m256i four = _mm256_set1_epi32(packed);
    sums.low = _mm256_add_epi32(sums.low, HALVES ? dot_halves(weights.first, four) : dot(weights.first, four));
    sums.high = _mm256_add_epi32(sums.high, HALVES ? dot_halves(weights.second, four) : dot(weights.second, four));
}
inline void add(Sums& to, const Sums& other) {
    to.low = _mm256_add_epi32(to.low, other.low);
    to.high = _mm256_add_epi32(to.high, other.high);
}
inline Floats to_floats(const Sums& sums) { return {_mm256_cvtepi32_ps(sums.low), _mm256_cvtepi32_ps(sums.high)}; }
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

// ROWS rows of activations times one block in 8 bits.
template <int ROWS>
void block_8(const uint8_t* weights, const float* scales, const int8_t* activations, const int32_t* sums_of_rows,
             const float* row_scales, int64_t inputs, int64_t stride, float* y) {
    Sums sums[ROWS], more[ROWS];
    for (int m = 0; m < ROWS; m++) {
        sums[m] = Sums::all(-128 * sums_of_rows[m]);
        more[m] = Sums::all(0);  // a second chain of additions, as one waits for its last
    }
    for (int64_t k = 0; k < inputs; k += 16) {
        ask_for(weights);
        for (int half = 0; half < 16; half += 8) {
            const Bytes first = Bytes::load(weights), second = Bytes::load(weights + 64);
            for (int m = 0; m < ROWS; m++) {
                const int8_t* a = activations + m * inputs + k + half;
                add_products<false>(sums[m], first, a);
                add_products<false>(more[m], second, a + 4);
            }
            weights += 128;
        }
    }
    const Floats of_outputs = load_floats(scales);
    for (int m = 0; m < ROWS; m++) {
        add(sums[m], more[m]);
        store_floats(y + m * stride, times(times(to_floats(sums[m]), of_outputs), row_scales[m]));
    }
}

// ROWS rows of activations times one block in 4 bits. `per_scale`: groups of 32 inputs that share a scale.
template <int ROWS>
void block_4(const uint8_t* weights, const uint16_t* scales, const int8_t* activations, const int32_t* sums_of_groups,
             const float* group_scales, int64_t inputs, int64_t stride, int64_t per_scale, float* y) {
    const int64_t groups = inputs / GROUP;
    Floats found[ROWS];
    for (int m = 0; m < ROWS; m++) found[m] = Floats::zero();
    for (int64_t g = 0; g < groups; g++) {
        ask_for(weights);
        Sums sums[ROWS];
        for (int m = 0; m < ROWS; m++) sums[m] = Sums::all(-8 * sums_of_groups[m * groups + g]);
        for (int j = 0; j < 4; j++) {
            const Bytes both = Bytes::load(weights);
            const Bytes low = both.low(), high = both.high();
            for (int m = 0; m < ROWS; m++) {
                const int8_t* a = activations + m * inputs + g * GROUP + 4 * j;
                add_products<true>(sums[m], low, a);
                add_products<true>(sums[m], high, a + 16);
            }
            weights += 64;
        }
        const Floats of_outputs = load_16_bits(scales + g / per_scale * OUTPUTS);
        for (int m = 0; m < ROWS; m++)
            add_product(found[m], to_floats(sums[m]), times(of_outputs, group_scales[m * groups + g]));
    }
    for (int m = 0; m < ROWS; m++) store_floats(y + m * stride, found[m]);
}

// Calls `block` for 8, 4, 2 or 1 rows at a time.
template <typename Block>
void in_tiles(int64_t rows, Block block) {
    int64_t m = 0;
    for (; m + 8 <= rows; m += 8) block(std::integral_constant<int, 8>(), m);
    for (; m + 4 <= rows; m += 4) block(std::integral_constant<int, 4>(), m);
    for (; m + 2 <= rows; m += 2) block(std::integral_constant<int, 2>(), m);
    for (; m < rows; m++) block(std::integral_constant<int, 1>(), m);
}

// The largest magnitude of a multiple of 16 numbers: in 16 parts, which the compiler computes at once.
float largest(const float* x, int64_t count) {
    float found[16] = {};
    for (int64_t i = 0; i < count; i += 16)
        for (int j = 0; j < 16; j++) {
            const float size = std::fabs(x[i + j]);
            found[j] = size > found[j] ? size : found[j];
        }
    float most = 0;
    for (float each : found) most = each > most ? each : most;
    return most;
}

// All of these run in parallel where they are called in a parallel region, and end together.

// 8 bits: rows (rows, inputs) to bytes, with the sum of a row's bytes and its scale.
void round_8(const float* x, int64_t rows, int64_t inputs, int8_t* bytes, int32_t* sums, float* scales) {
#pragma omp for schedule(static)
    for (int64_t m = 0; m < rows; m++) {
        const float* row = x + m * inputs;
        const float scale = std::fmax(largest(row, inputs), 1e-12f) / 127;
        int32_t sum = 0;
        for (int64_t k = 0; k < inputs; k++) {
            const int32_t value = (int32_t)(row[k] / scale + 128.5f) - 128;  // cutting off rounds to nearest
            bytes[m * inputs + k] = (int8_t)value;
            sum += value;
        }
        scales[m] = scale;
        sums[m] = sum;
    }
}

// 4 bits: the same with a sum and a scale for each 32 inputs.
void round_4(const float* x, int64_t rows, int64_t inputs, int8_t* bytes, int32_t* sums, float* scales) {
#pragma omp for schedule(static)
    for (int64_t part = 0; part < rows * (inputs / GROUP); part++) {
        const float* from = x + part * GROUP;
        const float scale = largest(from, GROUP) / 127, inverse = scale > 0 ? 1 / scale : 0;
        int32_t sum = 0;
        for (int64_t k = 0; k < GROUP; k++) {
            const int32_t value = (int32_t)std::nearbyint(from[k] * inverse);
            bytes[part * GROUP + k] = (int8_t)value;
            sum += value;
        }
        scales[part] = scale;
        sums[part] = sum;
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
                                 row_scales + m, inputs, stride, to);
            else
                block_4<count()>(matrix.weights + block * OUTPUTS * inputs / 2,
                                 (const uint16_t*)matrix.scales + block * OUTPUTS * inputs / matrix.group,
                                 bytes + m * inputs, sums + m * groups, row_scales + m * groups, inputs, stride,
                                 matrix.group / GROUP, to);
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

// x (rows, inputs) times a matrix to y (rows, outputs); see `Matrix`.
void emu3_linear(const float* x, const uint8_t* weights, const void* scales, int64_t group, int64_t rows,
                 int64_t inputs, int64_t outputs, float* y) {
    const Matrix matrix{weights, scales, inputs, outputs, group};
    Rounded rounded(rows, inputs);
#pragma omp parallel
    {
        rounded.round(x, rows, matrix);
        rounded.times(matrix, rows, y, outputs);
    }
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
