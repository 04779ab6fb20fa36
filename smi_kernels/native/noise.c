/* Unit noise from Philox-4x32-10 counters, and weights perturbed by it: the twin in C of smi_kernels/noise/philox.py,
 * noise/torch.py and ops/perturb_weight, bit for bit.
 *
 * Only correctly rounded operations are used and none may be fused: compile with -ffp-contract=off. Loops have no
 * branches, so that a compiler turns them into vector instructions.
 */
#ifdef _OPENMP
#include <omp.h>
#endif
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define BLOCK 256 /* counters at a time: their words stay in the first-level cache */

struct stream {
    uint32_t tensor, draw, stream, key_low, key_high;
};

static void philox(uint32_t words[4][BLOCK], int count, uint32_t first, const struct stream *s)
{
    for (int i = 0; i < count; i++) {
        uint32_t c0 = first + (uint32_t)i, c1 = s->tensor, c2 = s->draw, c3 = s->stream;
        uint32_t k0 = s->key_low, k1 = s->key_high;
        for (int round = 0; round < 10; round++) {
            uint64_t a = (uint64_t)c0 * 0xD2511F53u, b = (uint64_t)c2 * 0xCD9E8D57u;
            c0 = (uint32_t)(b >> 32) ^ c1 ^ k0;
            c1 = (uint32_t)b;
            c2 = (uint32_t)(a >> 32) ^ c3 ^ k1;
            c3 = (uint32_t)a;
            k0 += 0x9E3779B9u;
            k1 += 0xBB67AE85u;
        }
        words[0][i] = c0, words[1][i] = c1, words[2][i] = c2, words[3][i] = c3;
    }
}

static inline float uniform(uint32_t word)
{
    int32_t s = (int32_t)word;
    return (float)(s < 0 ? ~s : s) * 4.6566127342e-10f;
}

static inline float logarithm(float value)
{
    int32_t bits;
    memcpy(&bits, &value, 4);
    int32_t exponent = (bits - 0x3F3504F3) >> 23;
    bits -= (int32_t)((uint32_t)exponent << 23);
    float x;
    memcpy(&x, &bits, 4);
    x -= 1.0f;
    float e = (float)exponent, square = x * x, p = -0.078596115f * x;
    p = (p + 0.12881647f) * x;
    p = (p - 0.13128755f) * x;
    p = (p + 0.1418119f) * x;
    p = (p - 0.16624554f) * x;
    p = (p + 0.20002286f) * x;
    p = (p - 0.2500081f) * x;
    p = p + 0.33333316f;
    float small = (x * square) * p + e * -2.1219444e-4f - 0.5f * square;
    return small + x + e * 0.693359375f;
}

static inline void normals(float radius, float angle, float *first, float *second)
{
    float r = sqrtf(-2.0f * logarithm(radius < 1e-7f ? 1e-7f : radius));
    float turns = 4.0f * angle;
    int32_t quarter = (int32_t)(turns + 0.5f); /* floor: turns is not negative */
    float rest = turns - (float)quarter, square = rest * rest;
    float s = -0.0046021771f * square, c = 0.00090402167f * square;
    s = (s + 0.079680227f) * square;
    c = (c - 0.020860288f) * square;
    s = (s - 0.6459635f) * square;
    c = (c + 0.25366923f) * square;
    float sine = rest * (s + 1.5707964f), cosine = 1.0f + square * (c - 1.2337005f);
    float across = quarter & 1 ? sine : cosine, up = quarter & 1 ? cosine : sine;
    *first = r * ((quarter + 1) & 2 ? -across : across);
    *second = r * (quarter & 2 ? -up : up);
}

static int thread(void)
{
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

/* out[0 .. size): elements 4·first onwards, times sign (+1 or −1). */
void gaussian(float *out, int64_t size, uint32_t first, struct stream s, float sign)
{
    uint32_t words[4][BLOCK];
    float values[4 * BLOCK];
    for (int64_t start = 0; start < size; start += 4 * BLOCK, first += BLOCK) {
        int64_t rest = least(size - start, 4 * BLOCK);
        int count = (int)(rest + 3) / 4;
        philox(words, count, first, &s);
        for (int i = 0; i < count; i++) {
            float a, b, c, d;
            normals(uniform(words[0][i]), uniform(words[1][i]), &a, &b);
            normals(uniform(words[2][i]), uniform(words[3][i]), &c, &d);
            values[4 * i] = sign * a, values[4 * i + 1] = sign * b;
            values[4 * i + 2] = sign * c, values[4 * i + 3] = sign * d;
        }
        memcpy(out + start, values, 4 * (size_t)rest);
    }
}

/* out[0 .. size): elements 128·first onwards, times sign (+1 or −1). */
void rademacher(float *out, int64_t size, uint32_t first, struct stream s, float sign)
{
    uint32_t words[4][BLOCK];
    for (int64_t start = 0; start < size; start += 128 * BLOCK, first += BLOCK) {
        int64_t rest = least(size - start, 128 * BLOCK);
        philox(words, (int)(rest + 127) / 128, first, &s);
        for (int64_t j = 0; j < rest; j += 32) {
            uint32_t word = words[j % 128 / 32][j / 128];
            float values[32];
            for (int bit = 0; bit < 32; bit++)
                values[bit] = sign * (1.0f - 2.0f * (float)((word >> bit) & 1));
            memcpy(out + start + j, values, 4 * (size_t)least(rest - j, 32));
        }
    }
}

static inline uint16_t bfloat16(float value)
{
    uint32_t bits;
    memcpy(&bits, &value, 4);
    uint32_t rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16; /* to nearest, ties to even */
    return (bits & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : (uint16_t)rounded;
}

typedef void family(float *, int64_t, uint32_t, struct stream, float);

struct weight {
    const float *theta; /* [rows, channels, taps] */
    int64_t rows, channels, taps;
    float std;
};

/* out[r, t, c] = (theta[r, c, t] + std · noise[r, c, t]) · scale[r] for rows first .. last, whose noise is given. */
static void perturb_rows(void *out, int is_bfloat16, const float *noise, const float *scale, const struct weight *w,
                         int64_t first, int64_t last)
{
    int64_t columns = w->channels * w->taps, at = first * columns;
    for (int64_t r = first; r < last; r++, noise += columns) {
        const float *theta = w->theta + r * columns;
        float factor = scale == NULL ? 1.0f : scale[r];
        for (int64_t t = 0; t < w->taps; t++, at += w->channels) {
            uint16_t *low = (uint16_t *)out + at;
            float *full = (float *)out + at;
            if (is_bfloat16)
                for (int64_t c = 0; c < w->channels; c++)
                    low[c] = bfloat16((theta[c * w->taps + t] + w->std * noise[c * w->taps + t]) * factor);
            else
                for (int64_t c = 0; c < w->channels; c++)
                    full[c] = (theta[c * w->taps + t] + w->std * noise[c * w->taps + t]) * factor;
        }
    }
}

/* out[d, r, t, c] = (theta[r, c, t] + signs[d] · std · noise of draws[d]) · scale[d, r]; a sign of 0 draws none. out is
 * bfloat16 or float32; scale may be NULL for 1. Returns 0 if there was no memory, else 1. */
int perturb_weights(void *out, const float *scale, const uint32_t *draws, const float *signs, int count,
                    int is_bfloat16, int is_rademacher, int threads, struct weight w, struct stream s)
{
    family *draw = is_rademacher ? rademacher : gaussian;
    int64_t per_counter = is_rademacher ? 128 : 4, columns = w.channels * w.taps;
    int64_t group = 4096 / columns + 1; /* rows at a time: their noise stays in cache */
    int64_t groups = (w.rows + group - 1) / group, size = group * columns + 128;
    float *noise = calloc((size_t)(threads * size), sizeof(float));
    if (noise == NULL)
        return 0;
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count * groups; i++) {
        int64_t d = i / groups, first = i % groups * group, last = least(first + group, w.rows);
        int64_t start = first * columns, skip = start % per_counter;
        float *own = noise + thread() * size;
        struct stream stream = s;
        stream.draw = draws[d];
        if (signs[d] != 0)
            draw(own, (last - first) * columns + skip, (uint32_t)(start / per_counter), stream, signs[d]);
        else
            memset(own, 0, (size_t)size * sizeof(float));
        perturb_rows((char *)out + d * w.rows * columns * (is_bfloat16 ? 2 : 4), is_bfloat16, own + skip,
                     scale == NULL ? NULL : scale + d * w.rows, &w, first, last);
    }
    free(noise);
    return 1;
}

/* out = theta + std · noise for tensors that lie one after the other, each with its own id and std. */
void perturb_vectors(float *out, const float *theta, const int64_t *sizes, const uint32_t *tensors, const float *stds,
                     int64_t count, int is_rademacher, struct stream s, float sign)
{
    family *draw = is_rademacher ? rademacher : gaussian;
    float noise[512]; /* whole counters, whatever the family */
    for (int64_t i = 0; i < count; out += sizes[i], theta += sizes[i], i++) {
        s.tensor = tensors[i];
        for (int64_t start = 0; start < sizes[i]; start += 512) {
            int64_t rest = least(sizes[i] - start, 512);
            draw(noise, rest, (uint32_t)(start / (is_rademacher ? 128 : 4)), s, sign);
            for (int64_t j = 0; j < rest; j++)
                out[start + j] = theta[start + j] + stds[i] * noise[j];
        }
    }
}
