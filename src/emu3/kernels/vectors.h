// Vectors of floats as the processor has them: loads and stores in 32 and 16 bits, e^x, and sums of many at once.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <new>

namespace {

// Calls a function: 0, or 1 where memory ran out. No exception may leave a function of C or a parallel region.
template <typename Function>
int compute(Function function) {
    try {
        function();
        return 0;
    } catch (const std::bad_alloc&) {
        return 1;
    }
}

#if defined(__AVX512F__)
constexpr int LANES = 16;  // floats of a vector
#else
constexpr int LANES = 8;
#endif
typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4)));
typedef int32_t Whole __attribute__((vector_size(LANES * 4), aligned(4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2)));
typedef int8_t Quarters __attribute__((vector_size(LANES), aligned(1)));

#if defined(__clang__)
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (Whole){__VA_ARGS__})
#endif

inline Vector load(const float* p) { return *(const Vector*)p; }
struct Float16 {
    uint16_t bits;
};
// Of bfloat16, which is the upper half of a float; of float16; and of bytes, in units of BYTE.
#if defined(__AVX512F__)
inline Vector load(const uint16_t* p) { return (Vector)(__builtin_convertvector(*(const Halves*)p, Whole) << 16); }
inline Vector load(const Float16* p) { return (Vector)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
constexpr float BYTE = 1;
inline Vector load(const int8_t* p) {
    return (Vector)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p)));
}
#else
// One shuffle puts each number into the upper bytes of its float: half of what it takes to extend it.
inline Vector load(const uint16_t* p) {
    const __m256i to = _mm256_setr_epi8(-1, -1, 0, 1, -1, -1, 2, 3, -1, -1, 4, 5, -1, -1, 6, 7, -1, -1, 8, 9, -1, -1,
                                        10, 11, -1, -1, 12, 13, -1, -1, 14, 15);
    return (Vector)_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)p)), to);
}
inline Vector load(const Float16* p) { return (Vector)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)); }
constexpr float BYTE = 0x1p-24f;
inline Vector load(const int8_t* p) {
    const __m256i to = _mm256_setr_epi8(-1, -1, -1, 0, -1, -1, -1, 1, -1, -1, -1, 2, -1, -1, -1, 3, -1, -1, -1, 4, -1,
                                        -1, -1, 5, -1, -1, -1, 6, -1, -1, -1, 7);
    int64_t eight;
    std::memcpy(&eight, p, 8);
    return (Vector)_mm256_cvtepi32_ps(_mm256_shuffle_epi8(_mm256_set1_epi64x(eight), to));
}
#endif
inline void store(float* p, Vector x) { *(Vector*)p = x; }

// Adds a product, rounded once. Compilers choose so for some processors and some loops only.
inline void add_product(Vector& sum, Vector a, Vector b) {
#if defined(__AVX512F__)
    sum = (Vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#else
    sum = (Vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#endif
}

inline void store(uint16_t* p, Vector x) {
    const Whole bits = (Whole)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);  // to nearest, ties to even
    const Whole kept = x != x ? bits | 0x400000 : rounded;                       // NaN stays NaN
    *(Halves*)p = __builtin_convertvector(kept >> 16 & 0xffff, Halves);
}

inline void store(int8_t* p, Whole x) { *(Quarters*)p = __builtin_convertvector(x, Quarters); }

// To nearest, ties to even; below 2^22.
inline Whole rounded(Vector x) { return (Whole)(x + 12582912.0f) - 0x4b400000; }

inline int32_t sum_of(Whole x) {
    int32_t sum = 0;
    for (int i = 0; i < LANES; i++) sum += x[i];
    return sum;
}

// The largest magnitude of a multiple of LANES numbers; NaN if one is NaN, whose bits are above those of infinity.
inline float largest(const float* x, int64_t count) {
    Whole most = {};
    for (int64_t i = 0; i < count; i += LANES) {
        const Whole size = (Whole)load(x + i) & 0x7fffffff;
        most = size > most ? size : most;
    }
    int32_t found = 0;
    for (int i = 0; i < LANES; i++) found = most[i] > found ? most[i] : found;
    float as_float;
    std::memcpy(&as_float, &found, 4);
    return as_float;
}

// e^x for x <= 0; 0 where that is no normal float, NaN for NaN.
inline Vector exponential(Vector x) {
    const Vector shifted = x * 1.44269504f + 12582912.0f, whole = shifted - 12582912.0f;  // rounds to a whole number
    const Vector rest = (x - whole * 0.693359375f) + whole * 2.12194440e-4f;
    Vector y = rest * 1.9875691500e-4f + 1.3981999507e-3f;
    y = y * rest + 8.3334519073e-3f;
    y = y * rest + 4.1665795894e-2f;
    y = y * rest + 1.6666665459e-1f;
    y = y * rest + 5.0000001201e-1f;
    y = y * rest * rest + rest + 1.0f;
    const Whole power = ((Whole)shifted - 0x4b400000) << 23;
    y = (Vector)((Whole)y + power);
    const Vector known = x == x ? y : x;
    return x < -87.0f ? Vector{} : known;
}

// The sums of as many vectors as one has floats, in order. Neighbours are added until each vector is one float.
#if defined(__AVX512F__)
inline Vector sums_of(const Vector (&x)[16]) {
    Vector a[8], b[4], c[2];
    for (int i = 0; i < 8; i++)
        a[i] = SHUFFLE(x[2 * i], x[2 * i + 1], 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +
               SHUFFLE(x[2 * i], x[2 * i + 1], 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31);
    for (int i = 0; i < 4; i++)
        b[i] = SHUFFLE(a[2 * i], a[2 * i + 1], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               SHUFFLE(a[2 * i], a[2 * i + 1], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    for (int i = 0; i < 2; i++)
        c[i] = SHUFFLE(b[2 * i], b[2 * i + 1], 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +
               SHUFFLE(b[2 * i], b[2 * i + 1], 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31);
    return SHUFFLE(c[0], c[1], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
           SHUFFLE(c[0], c[1], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
}
#else
inline Vector sums_of(const Vector (&x)[8]) {
    Vector a[4], b[2];
    for (int i = 0; i < 4; i++)
        a[i] = SHUFFLE(x[2 * i], x[2 * i + 1], 0, 8, 2, 10, 4, 12, 6, 14) +
               SHUFFLE(x[2 * i], x[2 * i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    for (int i = 0; i < 2; i++)
        b[i] = SHUFFLE(a[2 * i], a[2 * i + 1], 0, 1, 8, 9, 4, 5, 12, 13) +
               SHUFFLE(a[2 * i], a[2 * i + 1], 2, 3, 10, 11, 6, 7, 14, 15);
    return SHUFFLE(b[0], b[1], 0, 1, 2, 3, 8, 9, 10, 11) + SHUFFLE(b[0], b[1], 4, 5, 6, 7, 12, 13, 14, 15);
}
#endif

}  // namespace
