/* Convolutions of several draws in one call: the twin in C of smi_kernels/ops/perturbed_conv.
 *
 *   out[d, n, y, x, o] = act( Σ weight[d, o, i, j, c] · image[d, n, y·s + i·l − p, x·s + j·l − p, c] + bias[d, o]
 *                             + residual[d, n, y, x, o] )
 *
 * A library's convolution is made for one large batch. Here every draw has weights of its own and few images, so that
 * starting threads, setting up and asking the system for memory cost as much as the work. An implicit matrix product:
 * PIXELS pixels by count · LANES outputs stay in registers while taps and channels go by. Sums are float32.
 */
#ifdef _OPENMP
#include <omp.h>
#endif
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#define LANES 16
#define LARGEST 3 /* vectors of outputs in a tile: with PIXELS of each they take 24 of AVX512's 32 registers */
#define RUN 4
#define PIXELS (2 * RUN) /* two runs of neighbours, so that an output four pixels wide fills a tile too */

#if defined(__AVX512BF16__) && defined(__AVX512VL__)
#include <immintrin.h>
#define HAS_BFLOAT16 1
#else
#define HAS_BFLOAT16 0
#endif

typedef float vector __attribute__((vector_size(4 * LANES), aligned(4)));

struct convolution {
    int64_t draws, images, channels, height, width, outputs, out_height, out_width;
    int64_t taps_down, taps_across, stride_down, stride_across, padding_down, padding_across;
    int64_t dilation_down, dilation_across, next_pixel, next_channel;
    int32_t is_bfloat16;  /* of image and weight; else float32 */
    int32_t out_bfloat16; /* of out and residual */
    int32_t relu, threads;
};

/* What the loops need, in units of 4 bytes: a float32, or two channels in bfloat16. */
struct layout {
    int64_t steps;              /* of one pixel */
    int64_t rows, columns;      /* of an image with its border */
    int64_t row, pixel;         /* from one output row or pixel to the next */
    int64_t tap_down, tap_across;
    int64_t runs_across, runs;  /* of output pixels */
    int64_t count, blocks;      /* vectors in a tile, tiles that cover the outputs */
    int64_t block;              /* packed weights of one of those */
};

/* Whether this processor runs float32 (1) and bfloat16 (2) well: not without AVX512 (with AVX2 a library took three
 * quarters of the time), and where there are units for matrices a library uses them. */
int convolves(void)
{
#if defined(__AMX_BF16__) || !defined(__AVX512F__)
    return 0;
#else
    return 1 + 2 * HAS_BFLOAT16;
#endif
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static struct layout layout_of(const struct convolution *c)
{
    struct layout l;
    l.steps = c->is_bfloat16 ? (c->channels + 1) / 2 : c->channels;
    l.runs_across = (c->out_width + RUN - 1) / RUN;
    l.runs = l.runs_across * c->out_height;
    l.rows = (c->out_height - 1) * c->stride_down + (c->taps_down - 1) * c->dilation_down + 1;
    l.columns = (RUN * l.runs_across - 1) * c->stride_across + (c->taps_across - 1) * c->dilation_across + 1;
    l.pixel = c->stride_across * l.steps;
    l.row = c->stride_down * l.columns * l.steps;
    l.tap_down = c->dilation_down * l.columns * l.steps;
    l.tap_across = c->dilation_across * l.steps;
    int64_t vectors = (c->outputs + LANES - 1) / LANES;
    l.count = vectors == 1 ? 1 : vectors % 3 == 0 ? 3 : 2;
    l.blocks = (vectors + l.count - 1) / l.count;
    l.block = c->taps_down * c->taps_across * l.steps * l.count * LANES;
    return l;
}

/* Channels of one pixel or tap that lie `next` elements apart, as units. */
static inline uint32_t unit(const void *from, int64_t step, int64_t next, const struct convolution *c)
{
    if (!c->is_bfloat16)
        return ((const uint32_t *)from)[step * next];
    const uint16_t *pair = (const uint16_t *)from + 2 * step * next;
    return pair[0] | (2 * step + 1 < c->channels ? (uint32_t)pair[next] << 16 : 0);
}

/* to[tap][step][lane] = weight[first + lane][tap][step], 0 for outputs that there are not. */
static void pack(uint32_t *to, const char *weight, int64_t first, const struct convolution *c, const struct layout *l)
{
    const int64_t taps = c->taps_down * c->taps_across, lanes = l->count * LANES;
    const int64_t size = c->channels * (c->is_bfloat16 ? 2 : 4), there = least(lanes, c->outputs - first);
    weight += first * taps * size;
    if (there < lanes)
        memset(to, 0, 4 * (size_t)(taps * l->steps * lanes));
    for (int64_t tap = 0; tap < taps; tap++, weight += size, to += l->steps * lanes)
        for (int64_t start = 0; start < l->steps; start += LANES) { /* what is written together stays in cache */
            const int64_t end = least(start + LANES, l->steps);
            for (int64_t lane = 0; lane < there; lane++) {
                const char *from = weight + lane * taps * size;
                if (size == 4 * l->steps)
                    for (int64_t step = start; step < end; step++)
                        memcpy(to + step * lanes + lane, from + 4 * step, 4);
                else
                    for (int64_t step = start; step < end; step++)
                        to[step * lanes + lane] = unit(from, step, 1, c);
            }
        }
}

/* The image in the middle of a frame whose border is 0 already. */
static void frame_image(uint32_t *frame, const char *image, const struct convolution *c, const struct layout *l)
{
    int64_t size = c->next_pixel * (c->is_bfloat16 ? 2 : 4), width = least(c->width, l->columns - c->padding_across);
    for (int64_t y = 0; y < c->height && y + c->padding_down < l->rows; y++) {
        uint32_t *to = frame + ((y + c->padding_down) * l->columns + c->padding_across) * l->steps;
        const char *from = image + y * c->width * size;
        if (size == 4 * l->steps && c->next_channel == 1)
            memcpy(to, from, (size_t)(width * size));
        else
            for (int64_t x = 0; x < width; x++)
                for (int64_t step = 0; step < l->steps; step++)
                    to[x * l->steps + step] = unit(from + x * size, step, c->next_channel, c);
    }
}

static inline __attribute__((always_inline)) vector add(vector sum, vector weight, uint32_t value, int is_bfloat16)
{
#if HAS_BFLOAT16
    if (is_bfloat16)
        return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight, (__m512bh)_mm512_set1_epi32((int)value));
#endif
    (void)is_bfloat16;
    float number;
    memcpy(&number, &value, 4);
    return sum + weight * number;
}

typedef void multiply(vector *, const uint32_t *, const uint32_t *, const float *, const float *,
                      const struct convolution *, const struct layout *);

/* sums[count][PIXELS] of the runs that begin at `first` and `second`, with the bias. */
static inline __attribute__((always_inline)) void multiply_by(
    const int count, const int is_bfloat16, vector *sums, const uint32_t *first, const uint32_t *second,
    const float *weight, const float *bias, const struct convolution *c, const struct layout *l)
{
    vector own[LARGEST][PIXELS];
    const int64_t pixel = l->pixel;
#pragma GCC unroll 3
    for (int v = 0; v < count; v++)
#pragma GCC unroll 8
        for (int p = 0; p < PIXELS; p++)
            memcpy(&own[v][p], bias + v * LANES, sizeof(vector));
    for (int64_t down = 0; down < c->taps_down; down++)
        for (int64_t across = 0; across < c->taps_across; across++) {
            const int64_t tap = down * l->tap_down + across * l->tap_across;
            for (int64_t step = tap; step < tap + l->steps; step++, weight += count * LANES) {
                vector w[LARGEST];
#pragma GCC unroll 3
                for (int v = 0; v < count; v++)
                    memcpy(&w[v], weight + v * LANES, sizeof(vector));
#pragma GCC unroll 4
                for (int p = 0; p < RUN; p++) {
                    const uint32_t a = first[step + p * pixel], b = second[step + p * pixel];
#pragma GCC unroll 3
                    for (int v = 0; v < count; v++) {
                        own[v][p] = add(own[v][p], w[v], a, is_bfloat16);
                        own[v][RUN + p] = add(own[v][RUN + p], w[v], b, is_bfloat16);
                    }
                }
            }
        }
#pragma GCC unroll 3
    for (int v = 0; v < count; v++)
#pragma GCC unroll 8
        for (int p = 0; p < PIXELS; p++)
            sums[v * PIXELS + p] = own[v][p];
}

#define MULTIPLY(name, count, is_bfloat16)                                                                         \
    static void name(vector *sums, const uint32_t *first, const uint32_t *second, const float *weight,            \
                     const float *bias, const struct convolution *c, const struct layout *l)                       \
    {                                                                                                              \
        multiply_by(count, is_bfloat16, sums, first, second, weight, bias, c, l);                                  \
    }
MULTIPLY(float32_by_1, 1, 0)
MULTIPLY(float32_by_2, 2, 0)
MULTIPLY(float32_by_3, 3, 0)
#if HAS_BFLOAT16
MULTIPLY(bfloat16_by_1, 1, 1)
MULTIPLY(bfloat16_by_2, 2, 1)
MULTIPLY(bfloat16_by_3, 3, 1)
#endif

static multiply *choose(int64_t count, int is_bfloat16)
{
#if HAS_BFLOAT16
    if (is_bfloat16)
        return count == 1 ? bfloat16_by_1 : count == 2 ? bfloat16_by_2 : bfloat16_by_3;
#endif
    (void)is_bfloat16;
    return count == 1 ? float32_by_1 : count == 2 ? float32_by_2 : float32_by_3;
}

typedef int32_t integers __attribute__((vector_size(4 * LANES)));

/* out[at ...] = act(sum + residual[at ...]) for all lanes. */
static inline void store_vector(void *out, const void *residual, int64_t at, vector sum, const struct convolution *c)
{
    vector other;
#if HAS_BFLOAT16
    if (residual != NULL && c->out_bfloat16) {
        __m256i bits = _mm256_loadu_si256((const void *)((const uint16_t *)residual + at));
        sum += (vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
    } else
#endif
    if (residual != NULL) {
        memcpy(&other, (const float *)residual + at, sizeof other);
        sum += other;
    }
    if (c->relu) /* NaN stays, so that it is seen */
        sum = (vector)((integers)sum & ~(integers)(sum < (vector){0}));
#if HAS_BFLOAT16
    if (c->out_bfloat16) {
        _mm256_storeu_si256((void *)((uint16_t *)out + at), (__m256i)_mm512_cvtneps_pbh((__m512)sum));
        return;
    }
#endif
    memcpy((float *)out + at, &sum, sizeof sum);
}

/* Likewise for the first `count` lanes. */
static void store_part(void *out, const void *residual, int64_t at, vector sum, int64_t count,
                       const struct convolution *c)
{
    size_t size = c->out_bfloat16 ? 2 : 4;
    float own[LANES], other[LANES] = {0};
    if (residual != NULL)
        memcpy(other, (const char *)residual + (size_t)at * size, (size_t)count * size);
    store_vector(own, residual == NULL ? NULL : other, 0, sum, c);
    memcpy((char *)out + (size_t)at * size, own, (size_t)count * size);
}

/* One image under one draw. */
static void convolve_image(void *out, const void *residual, const uint32_t *frame, const float *packed,
                           const float *bias, const struct convolution *c, const struct layout *l)
{
    vector sums[LARGEST * PIXELS];
    multiply *run = choose(l->count, c->is_bfloat16);
    for (int64_t b = 0; b < l->blocks; b++, packed += l->block, bias += l->count * LANES)
        for (int64_t r = 0; r < l->runs; r += 2) {
            const uint32_t *starts[2];
            int64_t y[2], x[2];
            for (int i = 0; i < 2; i++) {
                int64_t place = r + i < l->runs ? r + i : r; /* an odd one is computed twice */
                y[i] = place / l->runs_across, x[i] = place % l->runs_across * RUN;
                starts[i] = frame + y[i] * l->row + x[i] * l->pixel;
            }
            run(sums, starts[0], starts[1], packed, bias, c, l);
            for (int i = 0; i < 2; i++)
                for (int p = 0; p < RUN && x[i] + p < c->out_width; p++)
                    for (int64_t v = 0; v < l->count; v++) {
                        int64_t first = (b * l->count + v) * LANES, rest = c->outputs - first;
                        int64_t at = (y[i] * c->out_width + x[i] + p) * c->outputs + first;
                        if (rest >= LANES)
                            store_vector(out, residual, at, sums[v * PIXELS + i * RUN + p], c);
                        else if (rest > 0)
                            store_part(out, residual, at, sums[v * PIXELS + i * RUN + p], rest, c);
                    }
        }
}

static int thread(void)
{
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

/* out and residual [draws, images, out_height, out_width, outputs]; image [draws, images, height, width, channels] or with
 * the channels before the height;
 * weight [draws, outputs, taps_down, taps_across, channels]; bias [draws, outputs]. bias and residual may be NULL.
 * Returns 0 if there was no memory, else 1. */
int convolve(void *out, const void *image, const void *weight, const float *bias, const void *residual,
             struct convolution c)
{
    const struct layout l = layout_of(&c);
    const int64_t in_size = c.is_bfloat16 ? 2 : 4, out_size = c.out_bfloat16 ? 2 : 4;
    const int64_t in = c.height * c.width * c.channels * in_size;
    const int64_t outs = c.out_height * c.out_width * c.outputs * out_size;
    const int64_t weights = c.outputs * c.taps_down * c.taps_across * c.channels * in_size;
    const int64_t framed = l.rows * l.columns * l.steps, packs = c.draws * l.blocks, lanes = l.count * LANES;
    uint32_t *packed = malloc((size_t)(4 * packs * l.block)), *frames = calloc((size_t)(c.threads * framed), 4);
    float *biases = calloc((size_t)(packs * lanes), 4);
    int done = packed != NULL && frames != NULL && biases != NULL;
    if (done && bias != NULL)
        for (int64_t d = 0; d < c.draws; d++)
            memcpy(biases + d * l.blocks * lanes, bias + d * c.outputs, 4 * (size_t)c.outputs);
#pragma omp parallel num_threads(c.threads) if (done)
    if (done) {
#pragma omp for schedule(static)
        for (int64_t i = 0; i < packs; i++)
            pack(packed + i * l.block, (const char *)weight + i / l.blocks * weights, i % l.blocks * lanes, &c, &l);
        uint32_t *frame = frames + thread() * framed;
        /* Each thread keeps to few draws, whose weights then stay in its cache. */
#pragma omp for schedule(static)
        for (int64_t i = 0; i < c.draws * c.images; i++) {
            int64_t first = i / c.images * l.blocks;
            frame_image(frame, (const char *)image + i * in, &c, &l);
            convolve_image((char *)out + i * outs, residual == NULL ? NULL : (const char *)residual + i * outs, frame,
                           (const float *)packed + first * l.block, biases + first * lanes, &c, &l);
        }
    }
    free(packed);
    free(frames);
    free(biases);
    return done;
}
