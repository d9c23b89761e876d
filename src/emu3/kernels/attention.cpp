// Attention of new tokens to the keys and values of their lanes: rotation, cache and softmax in one function.
//
// A lane and a key-value head are one piece of work: rotate and keep the head's new keys and values, then run its
// queries, up to `ROWS` at a time, over the lane's slots, `SLOTS` at a time. As a softmax needs the largest score
// first, and scores come in parts, what was summed so far is scaled down whenever a larger one turns up (Milakov and
// Gimelshein, arXiv 1805.02867).
//
// T tokens of all lanes, one lane behind the other; N query heads, K key-value heads, D width of a head, L slots.

#include <omp.h>

#include <limits>
#include <vector>

#include "vectors.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace {

constexpr int64_t SLOTS = 64;
constexpr int64_t ROWS = 64;
// From so many slots on, attention in bfloat16 is where the time goes, and queries are rounded to it, too.
constexpr int64_t MANY_SLOTS = 1024;

// Scores of QUERIES queries with `count` slots of a tile, LANES at a time: (QUERIES, SLOTS). The last ones may be
// followed by scores of no slot.
template <int QUERIES, typename Element>
void multiply_keys(const float* queries, const Element* keys, int64_t count, int64_t width, float* scores) {
    constexpr int EACH = LANES / QUERIES;
    const auto multiply = [&](int64_t slot, auto slot_of) {
        Vector sums[LANES] = {};
        for (int64_t d = 0; d < width; d += LANES) {
            Vector q[QUERIES];
            for (int i = 0; i < QUERIES; i++) q[i] = load(queries + i * width + d);
            for (int j = 0; j < EACH; j++) {
                const Vector k = load(keys + slot_of(j) * width + d);
                for (int i = 0; i < QUERIES; i++) add_product(sums[i * EACH + j], q[i], k);
            }
        }
        const Vector found = sums_of(sums);
        for (int i = 0; i < QUERIES; i++)
            std::memcpy(scores + i * SLOTS + slot, (const float*)&found + i * EACH, 4 * EACH);
    };
    int64_t slot = 0;
    for (; slot + EACH <= count; slot += EACH) multiply(slot, [&](int j) { return slot + j; });
    // What follows the last slot may not be ours, so that one is read again.
    if (slot < count) multiply(slot, [&](int j) { return slot + j < count ? slot + j : count - 1; });
}

// Adds weights (QUERIES, SLOTS) times `count` values (count, width) to sums (QUERIES, width): VECTORS vectors of each.
// CHAINS slots at a time are summed apart, as an addition waits for the one before.
template <int QUERIES, int VECTORS, int CHAINS, typename Element>
void add_values(const float* weights, const Element* values, int64_t count, int64_t width, float* sums) {
    Vector found[CHAINS][QUERIES][VECTORS] = {};
    auto add = [&](int chain, int64_t slot) {
        for (int j = 0; j < VECTORS; j++) {
            const Vector v = load(values + slot * width + j * LANES);
            for (int i = 0; i < QUERIES; i++) add_product(found[chain][i][j], v, Vector{} + weights[i * SLOTS + slot]);
        }
    };
    int64_t slot = 0;
    for (; slot + CHAINS <= count; slot += CHAINS)
        for (int chain = 0; chain < CHAINS; chain++) add(chain, slot + chain);
    for (; slot < count; slot++) add(0, slot);
    for (int i = 0; i < QUERIES; i++)
        for (int j = 0; j < VECTORS; j++) {
            Vector sum = load(sums + i * width + j * LANES);
            for (int chain = 0; chain < CHAINS; chain++) sum += found[chain][i][j];
            store(sums + i * width + j * LANES, sum);
        }
}

template <int QUERIES, typename Element>
void add_all_values(const float* weights, const Element* values, int64_t count, int64_t width, float* sums) {
    constexpr int CHAINS = QUERIES == 1 ? 4 : 1;
    int64_t d = 0;
    for (; d + 4 * LANES <= width; d += 4 * LANES)
        add_values<QUERIES, 4, CHAINS>(weights, values + d, count, width, sums + d);
    for (; d + 2 * LANES <= width; d += 2 * LANES)
        add_values<QUERIES, 2, CHAINS>(weights, values + d, count, width, sums + d);
    for (; d < width; d += LANES) add_values<QUERIES, 1, CHAINS>(weights, values + d, count, width, sums + d);
}

// Positions in a head are rotated in pairs (d, d + width / 2); the sine of the first half is negative.
inline void rotate(const float* x, const float* cos, const float* sin, float scale, int64_t width, float* y) {
    const int64_t half = width / 2;
    for (int64_t d = 0; d < half; d++) y[d] = (x[d] * cos[d] + x[d + half] * sin[d]) * scale;
    for (int64_t d = half; d < width; d++) y[d] = (x[d] * cos[d] + x[d - half] * sin[d]) * scale;
}

struct Work {  // of a thread
    std::vector<float> queries, scores, sums, keys, values, largest, total;
    std::vector<uint16_t> rounded, rounded_weights;
    explicit Work(int64_t width)
        : queries(ROWS * width), scores(ROWS * SLOTS), sums(ROWS * width), keys(SLOTS * width), values(SLOTS * width),
          largest(ROWS), total(ROWS), rounded(ROWS * width), rounded_weights(ROWS * SLOTS) {}
};

// One for each thread of a parallel region; kept for the next call.
inline std::vector<Work>& works(int64_t width) {
    thread_local std::vector<Work> kept;
    thread_local int64_t kept_width = 0;
    if (kept_width != width || kept.size() < (size_t)omp_get_max_threads()) {
        kept = std::vector<Work>(omp_get_max_threads(), Work(width));
        kept_width = width;
    }
    return kept;
}

// `count` slots as floats.
template <typename Element>
void convert(const Element* from, int64_t count, int64_t width, float* to) {
    for (int64_t i = 0; i < count * width; i += LANES) store(to + i, load(from + i));
}

template <typename Element>
void multiply_all_keys(Work& work, int64_t rows, const Element* keys, int64_t count, int64_t width) {
    float *queries = work.queries.data(), *scores = work.scores.data();
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) multiply_keys<4>(queries + r * width, keys, count, width, scores + r * SLOTS);
    for (; r < rows; r++) multiply_keys<1>(queries + r * width, keys, count, width, scores + r * SLOTS);
}

template <typename Element>
void add_values_of_all(Work& work, int64_t rows, const Element* values, int64_t count, int64_t width) {
    float *weights = work.scores.data(), *sums = work.sums.data();
    int64_t r = 0;
    for (; r + 4 <= rows; r += 4) add_all_values<4>(weights + r * SLOTS, values, count, width, sums + r * width);
    for (; r < rows; r++) add_all_values<1>(weights + r * SLOTS, values, count, width, sums + r * width);
}

// From scores of a row with slots start to start + count - 1 to weights; what was summed before is scaled to them.
// `latest`: of the turns of these slots.
void weigh(Work& work, int64_t r, int64_t start, int64_t count, int64_t slot, int64_t turn, int64_t latest,
           const int64_t* turns_of_slots, int64_t width) {
    const float least = -std::numeric_limits<float>::infinity();
    float *row = work.scores.data() + r * SLOTS, *sums = work.sums.data() + r * width;
    if (start + count - 1 > slot || latest > turn)
        for (int64_t j = 0; j < count; j++) {
            const bool seen = start + j <= slot && turns_of_slots[start + j] <= turn;
            row[j] = seen ? row[j] : least;
        }
    const int64_t end = (count + LANES - 1) / LANES * LANES;
    for (int64_t j = count; j < end; j++) row[j] = least;
    Vector tops = load(row);
    for (int64_t j = LANES; j < end; j += LANES) tops = load(row + j) > tops ? load(row + j) : tops;
    float top = work.largest[r];
    for (int i = 0; i < LANES; i++) top = tops[i] > top ? tops[i] : top;
    if (top == least) {  // nothing is seen so far
        std::memset(row, 0, SLOTS * sizeof(float));
        return;
    }
    Vector sum = {};
    for (int64_t j = 0; j < end; j += LANES) {
        const Vector weight = exponential(load(row + j) - top);
        store(row + j, weight);
        sum += weight;
    }
    if (top != work.largest[r]) {
        const float factor = std::exp(work.largest[r] - top);
        for (int64_t d = 0; d < width; d += LANES) store(sums + d, load(sums + d) * factor);
        work.total[r] *= factor;
        work.largest[r] = top;
    }
    for (int i = 0; i < LANES; i++) work.total[r] += sum[i];
}

#if defined(__AVX512BF16__)
// Many queries on keys and values in bfloat16: products of pairs in 16 bits, added in 32, twice as many at a time.
constexpr bool PAIRS = true;

inline __m512bh load_pairs(const void* p) { return (__m512bh)_mm512_loadu_si512(p); }

void multiply_pairs_of_keys(Work& work, int64_t rows, const uint16_t* keys, int64_t width) {
    const uint16_t* queries = work.rounded.data();
    for (int64_t r = 0; r < rows; r += 4)
        for (int64_t slot = 0; slot < SLOTS; slot += 4) {
            Vector sums[16] = {};
            for (int64_t d = 0; d < width; d += 32) {
                __m512bh q[4];
                for (int i = 0; i < 4; i++) q[i] = load_pairs(queries + (r + i) * width + d);
                for (int j = 0; j < 4; j++) {
                    const __m512bh k = load_pairs(keys + (slot + j) * width + d);
                    for (int i = 0; i < 4; i++)
                        sums[i * 4 + j] = (Vector)_mm512_dpbf16_ps((__m512)sums[i * 4 + j], q[i], k);
                }
            }
            const Vector found = sums_of(sums);
            for (int i = 0; i < 4; i++)
                std::memcpy(work.scores.data() + (r + i) * SLOTS + slot, (const float*)&found + i * 4, 16);
        }
}

// Four rows from r on, VECTORS vectors from d on.
template <int VECTORS>
void add_pairs(Work& work, int64_t r, const uint32_t* values, int64_t d, int64_t width) {
    __m512 found[4][VECTORS];
    float* sums = work.sums.data() + r * width + d;
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < VECTORS; j++) found[i][j] = (__m512)load(sums + i * width + j * LANES);
    for (int64_t slot = 0; slot < SLOTS; slot += 2) {
        __m512bh v[VECTORS];
        for (int j = 0; j < VECTORS; j++) v[j] = load_pairs(values + slot / 2 * width + j * LANES);
        for (int i = 0; i < 4; i++) {
            int32_t two;
            std::memcpy(&two, work.rounded_weights.data() + (r + i) * SLOTS + slot, 4);
            const __m512bh w = (__m512bh)_mm512_set1_epi32(two);
            for (int j = 0; j < VECTORS; j++) found[i][j] = _mm512_dpbf16_ps(found[i][j], w, v[j]);
        }
    }
    for (int i = 0; i < 4; i++)
        for (int j = 0; j < VECTORS; j++) store(sums + i * width + j * LANES, (Vector)found[i][j]);
}

void add_pairs_of_values(Work& work, int64_t rows, const uint16_t* values, int64_t width) {
    uint32_t* both = (uint32_t*)work.values.data();  // (SLOTS / 2, width), two neighbours in each
    for (int64_t slot = 0; slot < SLOTS; slot += 2)
        for (int64_t d = 0; d < width; d += LANES) {
            const Whole first = __builtin_convertvector(*(const Halves*)(values + slot * width + d), Whole);
            const Whole second = __builtin_convertvector(*(const Halves*)(values + (slot + 1) * width + d), Whole);
            *(Whole*)(both + slot / 2 * width + d) = first | second << 16;
        }
    uint16_t* weights = work.rounded_weights.data();
    for (int64_t i = 0; i < rows * SLOTS; i += LANES) store(weights + i, load(work.scores.data() + i));
    for (int64_t r = 0; r < rows; r += 4) {
        int64_t d = 0;
        for (; d + 4 * LANES <= width; d += 4 * LANES) add_pairs<4>(work, r, both + d, d, width);
        for (; d < width; d += LANES) add_pairs<1>(work, r, both + d, d, width);
    }
}
#else
constexpr bool PAIRS = false;
void multiply_pairs_of_keys(Work&, int64_t, const uint16_t*, int64_t) {}
void add_pairs_of_values(Work&, int64_t, const uint16_t*, int64_t) {}
#endif

// Queries `first` and so on over slots 0 to end - 1 of one lane and head; each belongs to its number % `tokens`.
template <typename Element>
void attend(Work& work, int64_t rows, int64_t first, int64_t tokens, const int64_t* slots, const int64_t* turns,
            const int64_t* turns_of_slots, const Element* keys, const Element* values, int64_t end, int64_t width) {
    for (int64_t r = 0; r < rows; r++) work.largest[r] = -std::numeric_limits<float>::infinity(), work.total[r] = 0;
    std::memset(work.sums.data(), 0, (rows + 3) / 4 * 4 * width * sizeof(float));
    const bool in_pairs = PAIRS && sizeof(Element) == 2 && rows > 8 && end >= MANY_SLOTS && width % 32 == 0;
    const int64_t whole_rows = (rows + 3) / 4 * 4;
    if (in_pairs)
        for (int64_t i = 0; i < whole_rows * width; i += LANES)
            store(work.rounded.data() + i, load(work.queries.data() + i));
    for (int64_t start = 0; start < end; start += SLOTS) {
        const int64_t count = end - start < SLOTS ? end - start : SLOTS;
        const Element *k = keys + start * width, *v = values + start * width;
        const bool pairs = in_pairs && count == SLOTS;
        const bool copied = sizeof(Element) < sizeof(float) && rows > 8;  // worth it where many queries read it
        if (pairs) {
            multiply_pairs_of_keys(work, whole_rows, (const uint16_t*)k, width);
        } else if (copied) {
            convert(k, count, width, work.keys.data());
            convert(v, count, width, work.values.data());
            multiply_all_keys(work, rows, (const float*)work.keys.data(), count, width);
        } else {
            multiply_all_keys(work, rows, k, count, width);
        }
        int64_t latest = 0;
        for (int64_t j = 0; j < count; j++)
            latest = turns_of_slots[start + j] > latest ? turns_of_slots[start + j] : latest;
        for (int64_t r = 0; r < rows; r++) {
            const int64_t token = (first + r) % tokens;
            weigh(work, r, start, count, slots[token], turns[token], latest, turns_of_slots, width);
        }
        if (pairs)
            add_pairs_of_values(work, whole_rows, (const uint16_t*)v, width);
        else if (copied)
            add_values_of_all(work, rows, (const float*)work.values.data(), count, width);
        else
            add_values_of_all(work, rows, v, count, width);
    }
}

// What is known of new tokens; see `emu3_attend`.
struct Tokens {
    const float *cos, *sin;
    const int64_t *slots, *turns, *lanes, *starts, *turns_of_slots;
    int64_t count, halves, length, heads, groups, width;  // count: of the lanes
};

// The memory is asked for what a piece will read, as far as that is worth it.
template <typename Element>
void ask_for(const Element* from, int64_t elements) {
    const int64_t bytes = elements * (int64_t)sizeof(Element), most = bytes < 32768 ? bytes : 32768;
    for (int64_t i = 0; i < most; i += 64) __builtin_prefetch((const char*)from + i, 0, 2);
}

// Runs in parallel where it is called in a parallel region.
template <typename Element>
void attend_all(Work& work, const Tokens& tokens, const float* x, Element* keys, Element* values, float scaling,
                float* y) {
    const int64_t heads = tokens.heads, groups = tokens.groups, width = tokens.width, *slots = tokens.slots;
    const int64_t row_width = (groups + 2) * heads * width, pieces = tokens.count * heads;
    const int64_t at_once = pieces / 32 + 1;
#pragma omp for schedule(dynamic, at_once)
    for (int64_t piece = 0; piece < pieces; piece++) {
        const int64_t lane = piece / heads, head = piece % heads, start = tokens.starts[lane];
        const int64_t count = tokens.starts[lane + 1] - start;
        const int64_t size = tokens.length * width;
        Element* own_keys = keys + (tokens.lanes[lane] * heads + head) * size;
        Element* own_values = values + (tokens.lanes[lane] * heads + head) * size;
        const int64_t next = (piece + 1) / heads;
        if (piece + 1 < pieces && tokens.starts[next + 1] > tokens.starts[next]) {
            const int64_t end = slots[tokens.starts[next + 1] - 1] + 1;
            const int64_t place = (tokens.lanes[next] * heads + (piece + 1) % heads) * size;
            ask_for(keys + place, end * width);
            ask_for(values + place, end * width);
        }
        for (int64_t t = start; t < start + count; t++) {
            const float* key = x + t * row_width + (groups * heads + head) * width;
            const float* value = key + heads * width;
            float* rotated = work.keys.data();
            rotate(key, tokens.cos + t * width, tokens.sin + t * width, 1, width, rotated);
            for (int64_t d = 0; d < width; d += LANES) {
                store(own_keys + slots[t] * width + d, load(rotated + d));
                store(own_values + slots[t] * width + d, load(value + d));
            }
        }
        for (int64_t first = 0; first < groups * count; first += ROWS) {
            const int64_t rows = groups * count - first < ROWS ? groups * count - first : ROWS;
            int64_t end = 0;
            for (int64_t r = 0; r < rows; r++) {
                const int64_t t = start + (first + r) % count, group = (first + r) / count;
                const float* query = x + t * row_width + (head * groups + group) * width;
                float* rotated = work.queries.data() + r * width;
                rotate(query, tokens.cos + t * width, tokens.sin + t * width, scaling, width, rotated);
                end = slots[t] + 1 > end ? slots[t] + 1 : end;
            }
            attend(work, rows, first, count, slots + start, tokens.turns + start,
                   tokens.turns_of_slots + tokens.lanes[lane] * tokens.length, own_keys, own_values, end, width);
            for (int64_t r = 0; r < rows; r++) {
                const int64_t t = start + (first + r) % count, group = (first + r) / count;
                float* to = y + (t * heads * groups + head * groups + group) * width;
                const float* from = work.sums.data() + r * width;
                for (int64_t d = 0; d < width; d += LANES) store(to + d, load(from + d) / work.total[r]);
            }
        }
    }
}

void attend_all(Work& work, const Tokens& tokens, const float* x, void* keys, void* values, float scaling, float* y) {
    if (tokens.halves)
        attend_all(work, tokens, x, (uint16_t*)keys, (uint16_t*)values, scaling, y);
    else
        attend_all(work, tokens, x, (float*)keys, (float*)values, scaling, y);
}

}  // namespace

extern "C" {

// x (T, (N + 2 K) * D): queries, keys and values of T tokens; cos, sin (T, D). Lane `lanes[b]` of the cache has the
// tokens starts[b] to starts[b + 1] - 1, with their `slots` and `turns` (T). turns_of_slots (lanes, L) holds these
// already. Keys and values (lanes, K, L, D) in float, or in bfloat16 if `halves`. D is a multiple of 16. To y
// (T, N * D). As `compute` returns.
int emu3_attend(const float* x, const float* cos, const float* sin, const int64_t* slots, const int64_t* turns,
                const int64_t* lanes, const int64_t* starts, const int64_t* turns_of_slots, int64_t count,
                int64_t halves, int64_t length, int64_t heads, int64_t groups, int64_t width, void* keys, void* values,
                double scaling, float* y) {
    return compute([&] {
        const Tokens tokens{cos,   sin,    slots,  turns, lanes,  starts, turns_of_slots,
                            count, halves, length, heads, groups, width};
        std::vector<Work>& own = works(width);
#pragma omp parallel
        attend_all(own[omp_get_thread_num()], tokens, x, keys, values, (float)scaling, y);
    });
}

}  // extern "C"
