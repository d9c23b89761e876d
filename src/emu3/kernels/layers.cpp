// All decoder layers of a quantized model in one function. Where a model is small, calling its parts one by one takes
// longer than what they compute.

#include "attention.cpp"
#include "head.cpp"
#include "linear.cpp"

namespace {

// As Python lays it out: 8 bytes for each.
struct Layer {
    const float* attention_norm;
    Matrix query, key, value, output;
    const float* feed_forward_norm;
    Matrix gate, up, down;
    double scaling, attention_epsilon, feed_forward_epsilon;
};
static_assert(sizeof(Layer) == 8 * (2 + 7 * 5 + 3), "no gaps");

// Runs in parallel where it is called in a parallel region, as all below.
void normalize(const float* x, const float* weight, double epsilon, int64_t rows, int64_t width, float* y) {
#pragma omp for schedule(static)
    for (int64_t m = 0; m < rows; m++) {
        const float* row = x + m * width;
        Vector sums = {};
        for (int64_t d = 0; d < width; d += LANES) sums += load(row + d) * load(row + d);
        float sum = 0;
        for (int i = 0; i < LANES; i++) sum += sums[i];
        const float factor = 1 / std::sqrt(sum / width + (float)epsilon);
        for (int64_t d = 0; d < width; d += LANES) store(y + m * width + d, load(row + d) * factor * load(weight + d));
    }
}

void add(float* x, const float* y, int64_t count) {
#pragma omp for schedule(static)
    for (int64_t i = 0; i < count; i += LANES) store(x + i, load(x + i) + load(y + i));
}

// silu(gate) * up of rows (gate, up), to rows of `width`. The exponential is of the side where it does not overflow.
void activate(const float* x, int64_t rows, int64_t width, float* y) {
#pragma omp for schedule(static)
    for (int64_t m = 0; m < rows; m++)
        for (int64_t d = 0; d < width; d += LANES) {
            const Vector gate = load(x + 2 * m * width + d), up = load(x + (2 * m + 1) * width + d);
            const Vector small = exponential(gate < 0 ? gate : -gate);
            store(y + m * width + d, gate * (gate < 0 ? small : Vector{} + 1) / (1 + small) * up);
        }
}

}  // namespace

extern "C" {

// hidden (T, E) before and after `layers`; `keys` and `values` of each; the other arguments as of `emu3_attend`. As
// `compute` returns.
int emu3_layers(const Layer* layers, int64_t number, float* hidden, int64_t rows, const float* cos, const float* sin,
                const int64_t* slots, const int64_t* turns, const int64_t* lanes, const int64_t* starts,
                const int64_t* turns_of_slots, int64_t count, int64_t halves, int64_t length, int64_t heads,
                int64_t groups, int64_t width, void* const* keys, void* const* values) {
    return compute([&] {
        const Tokens tokens{cos,   sin,    slots,  turns, lanes,  starts, turns_of_slots,
                            count, halves, length, heads, groups, width};
        const int64_t embedded = layers[0].query.inputs, inner = layers[0].down.inputs, mixed = heads * groups * width;
        const int64_t attended = (groups + 2) * heads * width;
        int64_t widest = embedded > inner ? embedded : inner;
        widest = widest > mixed ? widest : mixed;
        std::unique_ptr<float[]> narrow(new float[rows * widest]), wide(new float[rows * (2 * inner + attended)]);
        float *states = narrow.get(), *parts = wide.get();
        Rounded rounded(rows, widest);
        std::vector<Work>& own = works(width);
#pragma omp parallel
        {
            Work& work = own[omp_get_thread_num()];
            for (int64_t n = 0; n < number; n++) {
                const Layer& layer = layers[n];
                normalize(hidden, layer.attention_norm, layer.attention_epsilon, rows, embedded, states);
                rounded.round(states, rows, layer.query);
                rounded.times(layer.query, rows, parts, attended);
                rounded.times(layer.key, rows, parts + mixed, attended);
                rounded.times(layer.value, rows, parts + mixed + heads * width, attended);
                attend_all(work, tokens, parts, keys[n], values[n], (float)layer.scaling, states);
                rounded.round(states, rows, layer.output);
                rounded.times(layer.output, rows, states, embedded);
                add(hidden, states, rows * embedded);
                normalize(hidden, layer.feed_forward_norm, layer.feed_forward_epsilon, rows, embedded, states);
                rounded.round(states, rows, layer.gate);
                rounded.times(layer.gate, rows, parts, 2 * inner);
                rounded.times(layer.up, rows, parts + inner, 2 * inner);
                activate(parts, rows, inner, states);
                rounded.round(states, rows, layer.down);
                rounded.times(layer.down, rows, states, embedded);
                add(hidden, states, rows * embedded);
            }
        }
    });
}

}  // extern "C"
