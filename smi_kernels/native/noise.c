/* Unit noise from Philox-4x32-10 counters: the twin in C of smi_kernels/philox.py and noise.py, bit for bit.
 *
 * Only correctly rounded operations are used and none may be fused: compile with -ffp-contract=off. Loops have no
 * branches, so that a compiler turns them into vector instructions.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#define BLOCK 256 /* counters at a time: their words stay in the first-level cache */

struct stream {
    uint32_t tensor, draw, stream, key_low, key_high;
};

static void philox(uint32_t words[4][BLOCK], uint32_t first, const struct stream *s)
{
    for (int i = 0; i < BLOCK; i++) {
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

/* out[0 .. size): elements 4·first onwards, times sign (+1 or −1). */
void gaussian(float *out, int64_t size, uint32_t first, struct stream s, float sign)
{
    uint32_t words[4][BLOCK];
    float values[4 * BLOCK];
    for (int64_t start = 0; start < size; start += 4 * BLOCK, first += BLOCK) {
        philox(words, first, &s);
        for (int i = 0; i < BLOCK; i++) {
            float a, b, c, d;
            normals(uniform(words[0][i]), uniform(words[1][i]), &a, &b);
            normals(uniform(words[2][i]), uniform(words[3][i]), &c, &d);
            values[4 * i] = sign * a, values[4 * i + 1] = sign * b;
            values[4 * i + 2] = sign * c, values[4 * i + 3] = sign * d;
        }
        int64_t rest = size - start;
        memcpy(out + start, values, 4 * (rest < 4 * BLOCK ? rest : 4 * BLOCK));
    }
}

/* out[0 .. size): elements 128·first onwards, times sign (+1 or −1). */
void rademacher(float *out, int64_t size, uint32_t first, struct stream s, float sign)
{
    uint32_t words[4][BLOCK];
    for (int64_t start = 0; start < size; start += 128 * BLOCK, first += BLOCK) {
        philox(words, first, &s);
        int64_t rest = size - start < 128 * BLOCK ? size - start : 128 * BLOCK;
        for (int64_t j = 0; j < rest; j += 32) {
            uint32_t word = words[j % 128 / 32][j / 128];
            float values[32];
            for (int bit = 0; bit < 32; bit++)
                values[bit] = sign * (1.0f - 2.0f * (float)((word >> bit) & 1));
            memcpy(out + start + j, values, 4 * (rest - j < 32 ? rest - j : 32));
        }
    }
}
