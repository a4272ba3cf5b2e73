/* The CPU's kernels: noise, moments, exact sums, summaries, comparisons and conversions over runs of stored values.

   Every function takes addresses of memory that its caller owns and keeps, with room for just the values named;
   nothing is allocated, nothing kept, nothing locked, and nothing called but memcpy and memset. Values lie as in
   a checkpoint: little-endian, of a dtype F32, F64, BF16 or F16, aligned to themselves or not at all. Counts are
   in elements. Many threads may call any function at a time.

   The results are the same bits on every machine. All arithmetic is IEEE 754, to nearest even, with subnormals,
   in the order written here: this file is compiled without contraction (no fused multiply-add) and without
   reassociation. The vectors are the compilers' own (GCC, Clang), of 64 bytes, which a compiler splits where a
   CPU's are shorter: so one text serves every level of instruction sets. It is compiled once for each (LEVEL
   names it and ends the functions' names), and the caller asks `noisytune_level` which of them this CPU has.

   Noise stream v1 (`noise/stream.py` is its reference in NumPy): element e takes word e mod 4 of the block
   Philox4x32-10(counter e / 4, stream), key the seed, and becomes round(x + float32(c · a)); of several noises
   and of shrunk values, see `mix_row`.
   Philox: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011. */

#include <stdint.h>
#include <string.h>

#define JOINED(name, level) name##_##level
#define AT(name, level) JOINED(name, level)
#define EXPORT(name) __attribute__((visibility("default"))) AT(name, LEVEL)
#define INLINE static inline __attribute__((always_inline))
#define RARELY(condition) __builtin_expect(!!(condition), 0)

typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef _Float16 f16x16 __attribute__((vector_size(32)));
typedef uint32_t u32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef float f32x8 __attribute__((vector_size(32)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef float f32x16 __attribute__((vector_size(64)));
typedef uint64_t u64x8 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));
typedef double f64x8 __attribute__((vector_size(64)));

/* The numbers that stand for dtypes and distributions; `library.py` has them too. */
enum dtype { F32, F64, BF16, F16 };
enum distribution { UNIFORM, GAUSSIAN };

INLINE int64_t size_of(enum dtype dtype) { return dtype == F64 ? 8 : dtype == F32 ? 4 : 2; }

/* ---- Vectors -------------------------------------------------------------------------------------------- */

#define SPLAT(type, value) ((type){0} + (value))
#define ABS(x) ((f64x8)((u64x8)(x) & (UINT64_MAX >> 1)))
/* Lanes of a where a mask's are all ones, and of b elsewhere. */
#define SELECT(type, mask, a, b) ((type)(((mask) & (__typeof__(mask))(a)) | (~(mask) & (__typeof__(mask))(b))))

INLINE u32x16 joined(u32x8 low, u32x8 high) {
    return __builtin_shufflevector(low, high, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
}
INLINE f32x8 lower(f32x16 x) { return __builtin_shufflevector(x, x, 0, 1, 2, 3, 4, 5, 6, 7); }
INLINE f32x8 upper(f32x16 x) { return __builtin_shufflevector(x, x, 8, 9, 10, 11, 12, 13, 14, 15); }

INLINE int any(u32x16 mask) {
    u64x8 lanes = (u64x8)mask;
#if defined(__clang__) /* which makes one test of this, but of the sum below eight */
    return __builtin_reduce_or(lanes) != 0;
#else
    return ((lanes[0] | lanes[1]) | (lanes[2] | lanes[3]) | (lanes[4] | lanes[5]) | (lanes[6] | lanes[7])) != 0;
#endif
}

/* How many lanes of a sum of masks were true, up to 2^32 - 1 each. */
INLINE int64_t counted(u32x16 masks) {
    u64x8 pairs = ((u64x8)masks & UINT32_MAX) + ((u64x8)masks >> 32);
    return (int64_t)(pairs[0] + pairs[1] + pairs[2] + pairs[3] + pairs[4] + pairs[5] + pairs[6] + pairs[7]);
}

INLINE f64x8 square_root(f64x8 x) {
#if defined(__clang__) /* which makes one instruction of this, but of the loop eight */
    return __builtin_elementwise_sqrt(x);
#else
    for (int i = 0; i < 8; i++) x[i] = __builtin_sqrt(x[i]);
    return x;
#endif
}

/* The sum of eight lanes, in the order that moments and summaries promise. */
INLINE double added(f64x8 x) { return ((x[0] + x[4]) + (x[2] + x[6])) + ((x[1] + x[5]) + (x[3] + x[7])); }

/* ---- Dtypes: what is stored, widened and rounded, sixteen values at a time ------------------------------- */

#if defined(__F16C__) || defined(__aarch64__)
#define HAS_F16 1
#else
#define HAS_F16 0
#endif

INLINE f32x16 widened_f16(u16x16 stored) {
#if HAS_F16
    return __builtin_convertvector((f16x16)stored, f32x16);
#else
    u32x16 half = __builtin_convertvector(stored, u32x16), magnitude = half & 0x7FFF;
    /* A half's bits, shifted into a float32, are its value times 2^-112; infinities and NaNs need more. */
    u32x16 bits = (u32x16)((f32x16)(magnitude << 13) * 0x1p112f);
    return (f32x16)(bits | ((u32x16)(magnitude >= 0x7C00) & 0x7F800000) | ((half & 0x8000) << 16));
#endif
}

/* Sixteen stored values from element i on as float32; not for F64. */
INLINE f32x16 loaded(enum dtype dtype, const char *x, int64_t i) {
    if (dtype == F32) {
        f32x16 values;
        memcpy(&values, x + 4 * i, sizeof values);
        return values;
    }
    u16x16 stored;
    memcpy(&stored, x + 2 * i, sizeof stored);
    return dtype == F16 ? widened_f16(stored) : (f32x16)(__builtin_convertvector(stored, u32x16) << 16);
}

/* Eight stored values from element i on as float64. */
INLINE f64x8 loaded_wide(const char *x, int64_t i) {
    f64x8 values;
    memcpy(&values, x + 8 * i, sizeof values);
    return values;
}

/* A float64 as float32: the nearest, or else cut off, with the last bit set where something was lost. That bit
   keeps what a second rounding, to a much shorter dtype, has to know, so that the two are one rounding (Boldo,
   Melquiond, "Emulation of a FMA and correctly rounded sums: proved algorithms using rounding to odd", IEEE
   Transactions on Computers 57, 2008). */
INLINE u32x8 narrowed(f64x8 y, int to_odd) {
    f32x8 nearest = __builtin_convertvector(y, f32x8);
    if (!to_odd) return (u32x8)nearest;
    f64x8 back = __builtin_convertvector(nearest, f64x8);
    u32x8 past = (u32x8)__builtin_convertvector(ABS(back) > ABS(y), i32x8);
    u32x8 lost = (u32x8)__builtin_convertvector(back != y, i32x8);
    return ((u32x8)nearest + past) | (lost & 1);
}

/* Sixteen float64 as the float32 that `rounded` goes on from. */
INLINE f32x16 narrowed_for(enum dtype out, f64x8 low, f64x8 high) {
    return (f32x16)joined(narrowed(low, out != F32), narrowed(high, out != F32));
}

/* The bits of float32 values rounded once to a dtype, nearest even, infinity past its range; not for NaNs but
   for those of F32. Those of F64 are left as float32's, which `store` widens. */
INLINE u32x16 rounded(enum dtype out, f32x16 y) {
    u32x16 bits = (u32x16)y;
    if (out == BF16) return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
    if (out != F16) return bits;
#if HAS_F16
    return __builtin_convertvector((u16x16)__builtin_convertvector(y, f16x16), u32x16);
#else
    u32x16 magnitude = bits & 0x7FFFFFFF;
    u32x16 normal = ((magnitude + 0xFFF + ((magnitude >> 13) & 1)) >> 13) - (112 << 10);
    /* Adding 1/2 lines a subnormal half's last bit up with a float32's, so the addition does the rounding. */
    u32x16 subnormal = (u32x16)((f32x16)magnitude + 0.5f) - 0x3F000000;
    u32x16 finite = SELECT(u32x16, (u32x16)(magnitude < 0x38800000), subnormal, normal);
    return SELECT(u32x16, (u32x16)(magnitude >= 0x47800000), SPLAT(u32x16, 0x7C00), finite) | ((bits >> 16) & 0x8000);
#endif
}

INLINE void store(enum dtype out, char *y, int64_t i, u32x16 bits) {
    if (out == F64) {
        f64x8 low = __builtin_convertvector(lower((f32x16)bits), f64x8);
        f64x8 high = __builtin_convertvector(upper((f32x16)bits), f64x8);
        memcpy(y + 8 * i, &low, sizeof low);
        memcpy(y + 8 * i + sizeof low, &high, sizeof high);
    } else if (out == F32) {
        memcpy(y + 4 * i, &bits, sizeof bits);
    } else {
        u16x16 halves = __builtin_convertvector(bits, u16x16);
        memcpy(y + 2 * i, &halves, sizeof halves);
    }
}

/* In the bits that `rounded` gives: all but the sign, and infinity. One below infinity is the largest value. */
INLINE uint32_t magnitude_of(enum dtype out) { return out == BF16 || out == F16 ? 0x7FFF : 0x7FFFFFFF; }
INLINE uint32_t infinity_of(enum dtype out) { return out == BF16 ? 0x7F80 : out == F16 ? 0x7C00 : 0x7F800000; }
INLINE uint32_t nan_of(enum dtype out) { return out == BF16 ? 0x7FC0 : out == F16 ? 0x7E00 : 0x7FC00000; }

/* ---- The stream: Philox4x32-10 and what distributions make of its words ---------------------------------- */

/* Vectors of eight counters that go through the rounds side by side: as many as the registers hold. */
#ifndef CHAINS
#ifdef __AVX512F__
#define CHAINS 4
#else
#define CHAINS 1
#endif
#endif
enum { BLOCK = 32 * CHAINS, VECTORS = BLOCK / 16 };

#define LOW UINT32_MAX

/* A stream as its rounds take it: the words of each one's key, and of the id. They lie in memory because a load
   spreads a word over a vector's lanes by itself; made in registers, they took a tenth of the time on AVX2. */
struct rounds {
    uint64_t keys[10][2], id[2];
};

INLINE struct rounds rounds_of(const uint32_t stream[4]) {
    struct rounds rounds = {.id = {stream[2], stream[3]}};
    for (uint32_t round = 0; round < 10; round++) {
        rounds.keys[round][0] = stream[0] + round * 0x9E3779B9u;
        rounds.keys[round][1] = stream[1] + round * 0xBB67AE85u;
    }
    return rounds;
}

/* The BLOCK words from a counter on, in order. */
INLINE void draw(u32x16 words[VECTORS], uint64_t counter, const struct rounds *rounds) {
    /* In this order of counters the last round's pairs of words come into theirs by one shuffle each. */
    const u64x8 order = {0, 4, 1, 5, 2, 6, 3, 7};
    u64x8 x0[CHAINS], x1[CHAINS], x2[CHAINS], x3[CHAINS];
    for (int j = 0; j < CHAINS; j++) {
        x0[j] = order + (counter + 8 * j);
        x1[j] = x0[j] >> 32;
        x2[j] = SPLAT(u64x8, rounds->id[0]);
        x3[j] = SPLAT(u64x8, rounds->id[1]);
    }
    /* Each word lies in the lower half of its lane; the upper half is whatever came, and never looked at. Three
       rounds at a time spare the moves of words from register to register. */
#pragma GCC unroll 3
    for (int round = 0; round < 9; round++) {
        const uint64_t *key = rounds->keys[round];
        for (int j = 0; j < CHAINS; j++) {
            u64x8 p0 = (x0[j] & LOW) * 0xD2511F53u, p1 = (x2[j] & LOW) * 0xCD9E8D57u;
            x0[j] = (p1 >> 32) ^ x1[j] ^ key[0];
            x2[j] = (p0 >> 32) ^ x3[j] ^ key[1];
            x1[j] = p1;
            x3[j] = p0;
        }
    }
    const uint64_t *last = rounds->keys[9];
    for (int j = 0; j < CHAINS; j++) {
        u64x8 p0 = (x0[j] & LOW) * 0xD2511F53u, p1 = (x2[j] & LOW) * 0xCD9E8D57u;
        u64x8 first = ((p1 >> 32) | (p1 << 32)) ^ ((x1[j] & LOW) ^ last[0]);
        u64x8 second = ((p0 >> 32) | (p0 << 32)) ^ ((x3[j] & LOW) ^ last[1]);
        words[2 * j] = (u32x16)__builtin_shufflevector(first, second, 0, 8, 2, 10, 4, 12, 6, 14);
        words[2 * j + 1] = (u32x16)__builtin_shufflevector(first, second, 1, 9, 3, 11, 5, 13, 7, 15);
    }
}

/* (2k + 1 - 2^24) · 2^-25, k the top 24 bits: as an int32 with its point after bit 31 it is those bits, the next
   one set, and the sign turned over. float32 holds it exactly. */
INLINE f32x16 uniform(u32x16 words) {
    i32x16 centred = (i32x16)((words & 0xFFFFFF00) ^ 0x80000080);
    return __builtin_convertvector(centred, f32x16) * 0x1p-32f;
}

/* Integers of less than 52 bits as float64, without an instruction that few CPUs have. */
INLINE f64x8 from_unsigned(u64x8 x) { return (f64x8)(x | 0x4330000000000000) - 0x1p52; }
INLINE f64x8 from_signed(i64x8 x) { return (f64x8)(x + 0x4338000000000000) - 0x1.8p52; }

/* -2 ln(u), u = (word + 1/2) · 2^-32 = m · 2^k, m in [sqrt(1/2), sqrt(2)), under the root. The formulas and
   where they are from: `noise/distributions/gaussian.py`, whose order of operations this is. */
INLINE f64x8 radius(u64x8 word) {
    const uint64_t sqrt_half = 0x3FE6A09E667F3BCC;
    f64x8 u = (from_unsigned(word) + 0.5) * 0x1p-32;
    /* Shifted up by 64, which is more than -k, so that a shift without signs will do. */
    u64x8 above = ((u64x8)u - sqrt_half + (64ull << 52)) >> 52;
    f64x8 k = from_signed((i64x8)above - 64);
    f64x8 m = (f64x8)((u64x8)u - ((above - 64) << 52));
    f64x8 s = (m - 1.0) / (m + 1.0), z = s * s, p;
    p = 1.0 / 15 + z * (1.0 / 17);
    p = 1.0 / 13 + z * p;
    p = 1.0 / 11 + z * p;
    p = 1.0 / 9 + z * p;
    p = 1.0 / 7 + z * p;
    p = 1.0 / 5 + z * p;
    p = 1.0 / 3 + z * p;
    f64x8 square = -2.0 * (k * 0.6931471805599453 + 2.0 * (s + s * (z * p)));
    return square_root(square);
}

/* cos and sin of 2π (word + 1/2) · 2^-32: the nearest quarter turn q and the rest x, |x| <= π/4. */
INLINE void turned(u64x8 word, f64x8 *cosine, f64x8 *sine) {
    const double radians = 2.0 * 3.141592653589793 * 0x1p-32;
    u64x8 q = (word + (1 << 29)) >> 30;
    f64x8 x = (from_signed((i64x8)(word - (q << 30))) + 0.5) * radians, z = x * x, p;
    p = 1.0 / 6227020800.0 + z * (-1.0 / 1307674368000.0);
    p = -1.0 / 39916800.0 + z * p;
    p = 1.0 / 362880.0 + z * p;
    p = -1.0 / 5040.0 + z * p;
    p = 1.0 / 120.0 + z * p;
    p = -1.0 / 6.0 + z * p;
    f64x8 sin = x + x * (z * p);
    p = -1.0 / 87178291200.0 + z * (1.0 / 20922789888000.0);
    p = 1.0 / 479001600.0 + z * p;
    p = -1.0 / 3628800.0 + z * p;
    p = 1.0 / 40320.0 + z * p;
    p = -1.0 / 720.0 + z * p;
    p = 1.0 / 24.0 + z * p;
    p = -1.0 / 2.0 + z * p;
    f64x8 cos = 1.0 + z * p;
    /* The quarter turns swap the two and turn their signs over. */
    u64x8 odd = -(q & 1), cos_sign = ((q + 1) & 2) << 62, sin_sign = (q & 2) << 62;
    *cosine = (f64x8)(SELECT(u64x8, odd, sin, cos) ^ cos_sign);
    *sine = (f64x8)(SELECT(u64x8, odd, cos, sin) ^ sin_sign);
}

/* Box-Muller: of each pair of words one gives the radius, the other the angle. */
INLINE f32x16 gaussian(u32x16 words) {
    u64x8 pairs = (u64x8)words;
    f64x8 length = radius(pairs & LOW), cosine, sine;
    turned(pairs >> 32, &cosine, &sine);
    u32x8 even = (u32x8)__builtin_convertvector(length * cosine, f32x8);
    u32x8 odd = (u32x8)__builtin_convertvector(length * sine, f32x8);
    return (f32x16)(__builtin_convertvector(even, u64x8) | (__builtin_convertvector(odd, u64x8) << 32));
}

INLINE f32x16 coefficients(enum distribution distribution, u32x16 words) {
    return distribution == GAUSSIAN ? gaussian(words) : uniform(words);
}

/* ---- Noise ----------------------------------------------------------------------------------------------- */

/* One run of values: y = x + noise, n elements, the first of which is element `first` of its tensor. x and y are
   apart or, in one dtype, the same. `unchanged` and `clamped` are results, in elements. n < 2^36. */
struct noise_row {
    const char *x;
    char *y;
    int64_t n;
    uint64_t first;
    uint32_t stream[4]; /* the key's words, then the stream id's */
    float amplitude;
    int64_t unchanged, clamped;
};

/* Sixteen sums, and sixteen values without noise, as `rounded` takes them. */
INLINE f32x16 summed(enum dtype dtype, enum dtype out, const char *x, int64_t i, f32x16 c, float a) {
    if (dtype != F64) return loaded(dtype, x, i) + c * a;
    f64x8 low = loaded_wide(x, i) + __builtin_convertvector(lower(c), f64x8) * (double)a;
    f64x8 high = loaded_wide(x, i + 8) + __builtin_convertvector(upper(c), f64x8) * (double)a;
    return narrowed_for(out, low, high);
}
INLINE f32x16 plain(enum dtype dtype, enum dtype out, const char *x, int64_t i) {
    return dtype != F64 ? loaded(dtype, x, i) : narrowed_for(out, loaded_wide(x, i), loaded_wide(x, i + 8));
}

/* The bits of sixteen values without noise: of one dtype those that are stored, which need no rounding. */
INLINE u32x16 unnoised(enum dtype dtype, enum dtype out, const char *x, int64_t i) {
    if (dtype != out || dtype == F32) return rounded(out, plain(dtype, out, x, i));
    u16x16 stored;
    memcpy(&stored, x + 2 * i, sizeof stored);
    return __builtin_convertvector(stored, u32x16);
}

/* A block of BLOCK values of which those from `from` up to `to` count. Nothing is written before it is known
   whether a sum overflowed: y may be x. `unchanged` counts in its lanes. */
INLINE void add_to_block(enum distribution distribution, enum dtype dtype, enum dtype out, const char *x, char *y,
                         const u32x16 words[VECTORS], int64_t from, int64_t to, struct noise_row *row, u32x16 *unchanged) {
    const uint32_t magnitude = magnitude_of(out), infinity = infinity_of(out);
    u32x16 bits[VECTORS], same = {0}, largest = {0};
    for (int v = 0; v < VECTORS; v++) {
        f32x16 c = coefficients(distribution, words[v]);
        bits[v] = rounded(out, summed(dtype, out, x, 16 * v, c, row->amplitude));
        same -= (u32x16)(bits[v] == unnoised(dtype, out, x, 16 * v));
        u32x16 size = bits[v] & magnitude;
        largest = SELECT(u32x16, (u32x16)(size > largest), size, largest);
    }
    if (RARELY(to - from < BLOCK || any((u32x16)(largest >= infinity)))) {
        u32x16 clamped = {0}, place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
        same = (u32x16){0};
        for (int v = 0; v < VECTORS; v++, place += 16) {
            u32x16 counts = (u32x16)(place >= (uint32_t)from) & (u32x16)(place < (uint32_t)to);
            u32x16 over = (u32x16)((bits[v] & magnitude) >= infinity);
            bits[v] = SELECT(u32x16, over, (bits[v] & ~magnitude) | (infinity - 1), bits[v]);
            clamped -= over & counts;
            same -= (u32x16)(bits[v] == unnoised(dtype, out, x, 16 * v)) & counts;
        }
        row->clamped += counted(clamped);
    }
    *unchanged += same;
    for (int v = 0; v < VECTORS; v++) store(out, y, 16 * v, bits[v]);
}

/* The same where values and sums are float64: no noise, which is within float32's range, makes one overflow. */
INLINE void add_to_wide_block(enum distribution distribution, const char *x, char *y, const u32x16 words[VECTORS],
                              int64_t from, int64_t to, struct noise_row *row) {
    u64x8 place = {0, 1, 2, 3, 4, 5, 6, 7}, same = {0};
    for (int v = 0; v < VECTORS; v++) {
        f32x16 c = coefficients(distribution, words[v]);
        f64x8 halves[2] = {__builtin_convertvector(lower(c), f64x8), __builtin_convertvector(upper(c), f64x8)};
        for (int h = 0; h < 2; h++, place += 8) {
            f64x8 before = loaded_wide(x, 16 * v + 8 * h);
            u64x8 bits = (u64x8)(before + halves[h] * (double)row->amplitude);
            u64x8 counts = (u64x8)(place >= (uint64_t)from) & (u64x8)(place < (uint64_t)to);
            same -= (u64x8)(bits == (u64x8)before) & counts;
            memcpy(y + 8 * (16 * v + 8 * h), &bits, sizeof bits);
        }
    }
    row->unchanged += counted((u32x16)same);
}

INLINE void add_to_row(enum distribution distribution, enum dtype dtype, enum dtype out, struct noise_row *row) {
    const int64_t size = size_of(dtype), out_size = size_of(out);
    const struct rounds rounds = rounds_of(row->stream);
    u32x16 unchanged = {0};
    row->unchanged = row->clamped = 0;
    for (int64_t at = -(int64_t)(row->first & 3); at < row->n; at += BLOCK) {
        const int64_t from = at < 0 ? -at : 0, to = row->n - at < BLOCK ? row->n - at : BLOCK;
        const char *x = row->x + at * size;
        char *y = row->y + at * out_size;
        char held[8 * BLOCK], noised[8 * BLOCK];
        const int whole = to - from == BLOCK;
        if (RARELY(!whole)) { /* a block that has other memory about it is worked on apart from it */
            memset(held, 0, sizeof held);
            memcpy(held + from * size, x + from * size, (size_t)((to - from) * size));
            x = held;
        }
        char *target = RARELY(!whole) ? noised : y;
        u32x16 words[VECTORS];
        draw(words, (row->first + (uint64_t)at) / 4, &rounds);
        if (dtype == F64 && out == F64)
            add_to_wide_block(distribution, x, target, words, from, to, row);
        else
            add_to_block(distribution, dtype, out, x, target, words, from, to, row, &unchanged);
        if (RARELY(!whole)) memcpy(y + from * out_size, noised + from * out_size, (size_t)((to - from) * out_size));
    }
    row->unchanged += counted(unchanged);
}

/* Each pair of dtypes and each distribution is a function of its own. */
#define EACH_OUT(macro, ...) macro(__VA_ARGS__, F32) macro(__VA_ARGS__, F64) macro(__VA_ARGS__, BF16) macro(__VA_ARGS__, F16)
#define EACH_PAIR(macro, ...)                                                  \
    EACH_OUT(macro, __VA_ARGS__, F32) EACH_OUT(macro, __VA_ARGS__, F64)        \
    EACH_OUT(macro, __VA_ARGS__, BF16) EACH_OUT(macro, __VA_ARGS__, F16)

#define ADDING(distribution, dtype, out)                                                                  \
    static __attribute__((noinline)) void add_##distribution##_##dtype##_##out(struct noise_row *row) { \
        add_to_row(distribution, dtype, out, row);                                                        \
    }
EACH_PAIR(ADDING, UNIFORM)
EACH_PAIR(ADDING, GAUSSIAN)

#define ADDED(distribution, dtype, out) [distribution][dtype][out] = add_##distribution##_##dtype##_##out,
typedef void adding(struct noise_row *);
static adding *const add[2][4][4] = {EACH_PAIR(ADDED, UNIFORM) EACH_PAIR(ADDED, GAUSSIAN)};

/* Threads that share rows each take the next one, `most` at most, until `count` are taken. */
#define TAKE(row) \
    for (int64_t row, taken = 0; taken < most && (row = __atomic_fetch_add(next, 1, __ATOMIC_RELAXED)) < count; taken++)

void EXPORT(noise)(int distribution, int dtype, int out, struct noise_row *rows, int64_t count, int64_t *next,
                   int64_t most) {
    TAKE(row) add[distribution][dtype][out](rows + row);
}

/* ---- Mixtures: noise of several seeds, and values shrunk -------------------------------------------------- */

/* One of the noises that are added up: a stream, and what its coefficients are multiplied by. */
struct term {
    uint32_t stream[4];
    float amplitude;
};

/* One run of values as in `noise_row`: y = kept · x + Σ c_k · a_k, the terms added up in order before they are
   added to x; without terms, y = kept · x. Every product and every sum is rounded, to float32 (to float64 where
   x is F64). The terms' sum must not overflow. `unchanged` counts the elements that kept · x would be too. */
struct mix_row {
    const char *x;
    char *y;
    int64_t n;
    uint64_t first;
    const struct term *terms;
    int64_t count;
    double kept;
    int64_t unchanged, clamped;
};

/* The terms of a block added up: float32, or float64 if `wide`. */
INLINE void add_terms(enum distribution distribution, int wide, uint64_t counter, const struct mix_row *row, char *sums) {
    for (int64_t k = 0; k < row->count; k++) {
        const struct term *term = row->terms + k;
        const struct rounds rounds = rounds_of(term->stream);
        u32x16 words[VECTORS];
        draw(words, counter, &rounds);
        for (int v = 0; v < VECTORS; v++) {
            f32x16 c = coefficients(distribution, words[v]);
            if (!wide) {
                f32x16 t = c * term->amplitude;
                if (k) t += loaded(F32, sums, 16 * v);
                memcpy(sums + 64 * v, &t, sizeof t);
                continue;
            }
            f64x8 halves[2] = {__builtin_convertvector(lower(c), f64x8), __builtin_convertvector(upper(c), f64x8)};
            for (int h = 0; h < 2; h++) {
                f64x8 t = halves[h] * (double)term->amplitude;
                if (k) t += loaded_wide(sums, 16 * v + 8 * h);
                memcpy(sums + 8 * (16 * v + 8 * h), &t, sizeof t);
            }
        }
    }
}

#define SUMMING(distribution, wide)                                                                              \
    static __attribute__((noinline)) void add_terms_##distribution##_##wide(uint64_t counter,                    \
                                                                            const struct mix_row *row, char *sums) { \
        add_terms(distribution, wide, counter, row, sums);                                                       \
    }
SUMMING(UNIFORM, 0) SUMMING(UNIFORM, 1) SUMMING(GAUSSIAN, 0) SUMMING(GAUSSIAN, 1)

typedef void summing(uint64_t, const struct mix_row *, char *);
static summing *const sum_terms[2][2] = {{add_terms_UNIFORM_0, add_terms_UNIFORM_1},
                                         {add_terms_GAUSSIAN_0, add_terms_GAUSSIAN_1}};

/* A block of values, of which those from `from` up to `to` count, with their sums of terms. */
INLINE void mix_block(enum dtype dtype, enum dtype out, const char *x, char *y, const char *sums, int64_t from, int64_t to,
                      struct mix_row *row) {
    const uint32_t magnitude = magnitude_of(out), infinity = infinity_of(out);
    u32x16 place = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15}, same = {0}, clamped = {0};
    u64x8 wide_place = {0, 1, 2, 3, 4, 5, 6, 7}, wide_same = {0};
    for (int v = 0; v < VECTORS; v++, place += 16) {
        f32x16 base, sum;
        if (dtype == F64) {
            f64x8 bases[2], totals[2];
            for (int h = 0; h < 2; h++, wide_place += 8) {
                bases[h] = loaded_wide(x, 16 * v + 8 * h) * row->kept;
                totals[h] = row->count ? bases[h] + loaded_wide(sums, 16 * v + 8 * h) : bases[h];
                if (out != F64) continue;
                u64x8 counts = (u64x8)(wide_place >= (uint64_t)from) & (u64x8)(wide_place < (uint64_t)to);
                wide_same -= (u64x8)((u64x8)totals[h] == (u64x8)bases[h]) & counts;
                memcpy(y + 8 * (16 * v + 8 * h), &totals[h], sizeof totals[h]);
            }
            if (out == F64) continue;
            base = narrowed_for(out, bases[0], bases[1]);
            sum = narrowed_for(out, totals[0], totals[1]);
        } else {
            base = loaded(dtype, x, 16 * v) * (float)row->kept;
            sum = row->count ? base + loaded(F32, sums, 16 * v) : base;
        }
        u32x16 counts = (u32x16)(place >= (uint32_t)from) & (u32x16)(place < (uint32_t)to);
        u32x16 bits = rounded(out, sum), over = (u32x16)((bits & magnitude) >= infinity);
        bits = SELECT(u32x16, over, (bits & ~magnitude) | (infinity - 1), bits);
        clamped -= over & counts;
        same -= (u32x16)(bits == rounded(out, base)) & counts;
        store(out, y, 16 * v, bits);
    }
    row->unchanged += counted(same) + counted((u32x16)wide_same);
    row->clamped += counted(clamped);
}

INLINE void mix_row(enum dtype dtype, enum dtype out, summing *sum, struct mix_row *row) {
    const int64_t size = size_of(dtype), out_size = size_of(out);
    row->unchanged = row->clamped = 0;
    for (int64_t at = -(int64_t)(row->first & 3); at < row->n; at += BLOCK) {
        const int64_t from = at < 0 ? -at : 0, to = row->n - at < BLOCK ? row->n - at : BLOCK;
        char held[8 * BLOCK], mixed[8 * BLOCK], sums[8 * BLOCK];
        const char *x = row->x + at * size;
        char *y = row->y + at * out_size;
        const int whole = to - from == BLOCK;
        if (!whole) {
            memset(held, 0, sizeof held);
            memcpy(held + from * size, x + from * size, (size_t)((to - from) * size));
        }
        sum((row->first + (uint64_t)at) / 4, row, sums);
        mix_block(dtype, out, whole ? x : held, whole ? y : mixed, sums, from, to, row);
        if (!whole) memcpy(y + from * out_size, mixed + from * out_size, (size_t)((to - from) * out_size));
    }
}

#define MIXING(prefix, dtype, out)                                                                              \
    static __attribute__((noinline)) void prefix##_##dtype##_##out(summing *sum, struct mix_row *row) { \
        mix_row(dtype, out, sum, row);                                                                          \
    }
EACH_PAIR(MIXING, mix)

#define MIXED(prefix, dtype, out) [dtype][out] = prefix##_##dtype##_##out,
typedef void mixing(summing *, struct mix_row *);
static mixing *const mixtures[4][4] = {EACH_PAIR(MIXED, mix)};

void EXPORT(mix)(int distribution, int dtype, int out, struct mix_row *rows, int64_t count, int64_t *next,
                 int64_t most) {
    TAKE(row) mixtures[dtype][out](sum_terms[distribution][dtype == F64], rows + row);
}

/* ---- Conversion ------------------------------------------------------------------------------------------ */

/* Returns how many finite values became infinite. Infinities stay, each NaN becomes the dtype's one, also where
   the two dtypes are one. */
INLINE int64_t convert(enum dtype dtype, enum dtype out, const char *x, char *y, int64_t n) {
    const int64_t size = size_of(dtype), out_size = size_of(out);
    int64_t overflowed = 0;
    for (int64_t at = 0; at < n; at += 16) {
        char held[8 * 16] = {0}, converted[8 * 16];
        const size_t left = n - at < 16 ? (size_t)(n - at) : 16;
        const char *from = x + at * size;
        if (RARELY(left < 16)) from = memcpy(held, from, left * (size_t)size);
        char *target = RARELY(left < 16) ? converted : y + at * out_size;
        if (dtype == F64 && out == F64) {
            for (int half = 0; half < 16; half += 8) {
                f64x8 value = loaded_wide(from, half);
                u64x8 bits = SELECT(u64x8, (u64x8)(value != value), SPLAT(u64x8, 0x7FF8000000000000), value);
                memcpy(target + 8 * half, &bits, sizeof bits);
            }
            if (RARELY(left < 16)) memcpy(y + at * out_size, converted, left * (size_t)out_size);
            continue;
        }
        f32x16 value = plain(dtype, out, from, 0);
        u32x16 bits = rounded(out, value), finite = (u32x16)(((u32x16)value & 0x7FFFFFFF) < 0x7F800000);
        if (dtype == F64) { /* whose finite values may be infinite as float32 */
            u32x8 low = (u32x8)__builtin_convertvector(ABS(loaded_wide(from, 0)) < __builtin_inf(), i32x8);
            u32x8 high = (u32x8)__builtin_convertvector(ABS(loaded_wide(from, 8)) < __builtin_inf(), i32x8);
            finite = joined(low, high);
        }
        bits = SELECT(u32x16, (u32x16)(value != value), SPLAT(u32x16, nan_of(out)), bits);
        u32x16 lost = (u32x16)((bits & magnitude_of(out)) == infinity_of(out)) & finite;
        if (RARELY(any(lost))) overflowed += counted(lost & 1);
        store(out, target, 0, bits);
        if (RARELY(left < 16)) memcpy(y + at * out_size, converted, left * (size_t)out_size);
    }
    return overflowed;
}

#define CONVERTING(prefix, dtype, out)                                                           \
    static __attribute__((noinline)) int64_t prefix##_##dtype##_##out(const char *x, char *y, int64_t n) { \
        return convert(dtype, out, x, y, n);                                                       \
    }
EACH_PAIR(CONVERTING, converted)

#define CONVERTED(prefix, dtype, out) [dtype][out] = prefix##_##dtype##_##out,
typedef int64_t converting(const char *, char *, int64_t);
static converting *const conversions[4][4] = {EACH_PAIR(CONVERTED, converted)};

int64_t EXPORT(convert)(int dtype, int out, const char *x, char *y, int64_t n) {
    return conversions[dtype][out](x, y, n);
}

/* ---- Sums ------------------------------------------------------------------------------------------------ */

/* Values are added up in float64 in runs of RUN, value i of a run into lane i mod 16, and the lanes as `folded`
   has them; the sums of runs are added with compensation. `noise/std.py` states the bound on the error. */
enum { RUN = 1024 };

struct lanes {
    f64x8 even, odd;
};

/* Sixteen values from element i on, of which `count` are there; the others are zeros. */
INLINE struct lanes lanes_at(enum dtype dtype, const char *x, int64_t i, int64_t count) {
    char held[8 * 16];
    const char *from = x + i * size_of(dtype);
    if (RARELY(count < 16)) {
        memset(held, 0, sizeof held);
        from = memcpy(held, from, (size_t)(count * size_of(dtype)));
    }
    if (dtype == F64) return (struct lanes){loaded_wide(from, 0), loaded_wide(from, 8)};
    f32x16 values = loaded(dtype, from, 0);
    return (struct lanes){__builtin_convertvector(lower(values), f64x8), __builtin_convertvector(upper(values), f64x8)};
}

INLINE double folded(struct lanes sums) { return added(sums.even + sums.odd); }

/* a + b, and its rounding error added to *low (Knuth). */
INLINE double compensated(double a, double b, double *low) {
    double sum = a + b, part = sum - a;
    *low += (a - (sum - part)) + (b - part);
    return sum;
}

/* Adds the sixteen values from element i on, of which `count` are there, to Σ(x - pivot) and Σ(x - pivot)². */
INLINE void add_lanes(enum dtype dtype, const char *x, int64_t i, int64_t count, double pivot, struct lanes sums[2]) {
    struct lanes d = lanes_at(dtype, x, i, count);
    d.even -= pivot;
    d.odd -= pivot;
    if (count < 16) { /* what is not there adds nothing */
        i64x8 place = {0, 1, 2, 3, 4, 5, 6, 7};
        d.even = (f64x8)((u64x8)d.even & (u64x8)(place < count));
        d.odd = (f64x8)((u64x8)d.odd & (u64x8)(place + 8 < count));
    }
    sums[0].even += d.even;
    sums[0].odd += d.odd;
    sums[1].even += d.even * d.even;
    sums[1].odd += d.odd * d.odd;
}

/* Both sums of count <= RUN values from element i on. */
INLINE void run_sums(enum dtype dtype, const char *x, int64_t i, int64_t count, double pivot, double sums[2]) {
    struct lanes both[2] = {{{0}, {0}}, {{0}, {0}}};
    int64_t at = 0;
    for (; at + 16 <= count; at += 16) add_lanes(dtype, x, i + at, 16, pivot, both);
    if (at < count) add_lanes(dtype, x, i + at, count - at, pivot, both);
    sums[0] = folded(both[0]);
    sums[1] = folded(both[1]);
}

/* One run of values to be measured, n elements; the rest are results. */
struct moments_row {
    const char *x;
    int64_t n;
    double pivot, s1, low1, s2, low2; /* Σ(x - pivot) = s1 + low1, Σ(x - pivot)² = s2 + low2 */
    int64_t finite;                   /* whether no value is NaN or infinite */
};

INLINE void measure(enum dtype dtype, struct moments_row *row) {
    const int64_t n = row->n, begun = n < 64 ? n : 64;
    double sums[2];
    run_sums(dtype, row->x, 0, begun, 0.0, sums);
    /* Zero does as well where values spread wider than their mean is from it. */
    row->pivot = 2 * sums[0] * sums[0] > (double)begun * sums[1] ? sums[0] / (double)begun : 0.0;
    row->s1 = row->s2 = row->low1 = row->low2 = 0.0;
    for (int64_t i = 0; i < n; i += RUN) {
        const int64_t count = n - i < RUN ? n - i : RUN;
        if (row->pivot == 0.0) /* the usual case, without the subtraction */
            run_sums(dtype, row->x, i, count, 0.0, sums);
        else
            run_sums(dtype, row->x, i, count, row->pivot, sums);
        row->s1 = compensated(row->s1, sums[0], &row->low1);
        row->s2 = compensated(row->s2, sums[1], &row->low2);
    }
    row->finite = 1;
    if (!__builtin_isfinite(row->s2)) { /* the square of a float64 may be infinite when it is not */
        for (int64_t i = 0; i < n; i += 16) {
            struct lanes values = lanes_at(dtype, row->x, i, n - i);
            u64x8 infinite = (u64x8) ~(ABS(values.even) < __builtin_inf()) | (u64x8) ~(ABS(values.odd) < __builtin_inf());
            if (any((u32x16)infinite)) row->finite = 0;
        }
    }
}

/* Sums over the mantissas, by exponent: a value is ±(h · 2^27 + l) · 2^(bin - 1075); see `noise/std.py`. */
INLINE void add_exactly(enum dtype dtype, const char *x, int64_t n, int64_t (*bins)[8]) {
    const int64_t low_mask = (1 << 27) - 1;
    for (int64_t i = 0; i < n; i += 16) {
        struct lanes values = lanes_at(dtype, x, i, n - i);
        uint64_t each[16];
        memcpy(each, &values, sizeof each);
        for (int64_t j = 0; j < 16 && i + j < n; j++) {
            int64_t power = (int64_t)(each[j] >> 52) & 0x7FF, m = (int64_t)(each[j] & ((1ull << 52) - 1));
            if (power > 0)
                m |= 1ll << 52;
            else
                power = 1; /* a subnormal's unit is that of power 1, without the leading bit */
            const int64_t h = m >> 27, l = m & low_mask, sign = each[j] >> 63 ? -1 : 1;
            const int64_t products[3] = {h * h, h * l, l * l};
            int64_t *bin = bins[power];
            bin[0] += sign * h;
            bin[1] += sign * l;
            for (int k = 0; k < 3; k++) {
                bin[2 + 2 * k] += products[k] >> 27;
                bin[3 + 2 * k] += products[k] & low_mask;
            }
        }
    }
}

/* What moments do not hold. The extremes are 0.0 of either sign as 0.0, and mean nothing where a NaN is. */
struct summary {
    double minimum, maximum, absolute_sum;
    int64_t zeros, nans, infinities;
};

INLINE void summarize(enum dtype dtype, const char *x, int64_t n, struct summary *found) {
    f64x8 least = SPLAT(f64x8, __builtin_inf()), most = -least;
    double total = 0.0, low = 0.0;
    int64_t zeros = 0, nans = 0, infinities = 0;
    for (int64_t i = 0; i < n; i += RUN) {
        const int64_t end = n - i < RUN ? n : i + RUN;
        struct lanes sums = {0};
        u64x8 nought = {0};
        for (int64_t at = i; at < end; at += 16) {
            struct lanes v = lanes_at(dtype, x, at, end - at);
            sums.even += ABS(v.even);
            sums.odd += ABS(v.odd);
            nought -= (u64x8)(v.even == 0.0) + (u64x8)(v.odd == 0.0);
            if (RARELY(end - at < 16)) { /* in place of what is not there, the first value again */
                u64x8 place = {0, 1, 2, 3, 4, 5, 6, 7}, here = (u64x8)(place < (uint64_t)(end - at));
                u64x8 next = (u64x8)(place + 8 < (uint64_t)(end - at));
                v.even = SELECT(f64x8, here, v.even, SPLAT(f64x8, v.even[0]));
                v.odd = SELECT(f64x8, next, v.odd, SPLAT(f64x8, v.even[0]));
                zeros -= 16 - (end - at);
            }
            least = SELECT(f64x8, (u64x8)(v.even < least), v.even, least);
            least = SELECT(f64x8, (u64x8)(v.odd < least), v.odd, least);
            most = SELECT(f64x8, (u64x8)(v.even > most), v.even, most);
            most = SELECT(f64x8, (u64x8)(v.odd > most), v.odd, most);
        }
        zeros += counted((u32x16)nought);
        const double sum = folded(sums);
        for (int64_t at = i; !__builtin_isfinite(sum) && at < end; at += 16) {
            struct lanes v = lanes_at(dtype, x, at, end - at);
            nans += counted((u32x16)((v.even != v.even) & 1)) + counted((u32x16)((v.odd != v.odd) & 1));
            infinities += counted((u32x16)((ABS(v.even) == __builtin_inf()) & 1)) +
                          counted((u32x16)((ABS(v.odd) == __builtin_inf()) & 1));
        }
        total = compensated(total, sum, &low);
    }
    found->minimum = least[0];
    found->maximum = most[0];
    for (int lane = 1; lane < 8; lane++) {
        if (least[lane] < found->minimum) found->minimum = least[lane];
        if (most[lane] > found->maximum) found->maximum = most[lane];
    }
    found->minimum += 0.0;
    found->maximum += 0.0;
    found->absolute_sum = __builtin_isfinite(total) ? total + low : total;
    found->zeros = zeros;
    found->nans = nans;
    found->infinities = infinities;
}

/* What the values of two runs are and differ by, d = y - x: sums in the order of `add_change`, the largest |d|, and
   how many are equal. Where a value is not finite, Σd² is not either, and all but that means nothing. */
enum { TERMS = 10 };
struct change {
    double sums[TERMS], largest;
    int64_t equal;
};

/* Adds eight terms of each sum. */
#define ADD_CHANGE(side)                                             \
    do {                                                             \
        const f64x8 x = a.side, y = b.side, d = y - x, q = d * d;    \
        const f64x8 terms[TERMS] = {ABS(x), ABS(y), ABS(d), x, d, x * x, y * y, q, q * q, x * y}; \
        for (int k = 0; k < TERMS; k++) sums[k].side += terms[k];    \
        most = SELECT(f64x8, (u64x8)(ABS(d) > most), ABS(d), most);  \
        same -= (u64x8)(d == 0.0);                                   \
    } while (0)

INLINE void measure_change(enum dtype dtype, enum dtype other, const char *x, const char *y, int64_t n,
                           struct change *found) {
    f64x8 most = {0};
    for (int k = 0; k < TERMS; k++) found->sums[k] = 0.0;
    found->equal = 0;
    for (int64_t i = 0; i < n; i += RUN) {
        const int64_t end = n - i < RUN ? n : i + RUN;
        struct lanes sums[TERMS] = {{{0}, {0}}};
        u64x8 same = {0};
        for (int64_t at = i; at < end; at += 16) {
            const struct lanes a = lanes_at(dtype, x, at, end - at), b = lanes_at(other, y, at, end - at);
            ADD_CHANGE(even);
            ADD_CHANGE(odd);
            if (RARELY(end - at < 16)) found->equal -= 16 - (end - at); /* what is not there is equal */
        }
        found->equal += counted((u32x16)same);
        for (int k = 0; k < TERMS; k++) found->sums[k] += folded(sums[k]);
    }
    found->largest = most[0];
    for (int lane = 1; lane < 8; lane++)
        if (most[lane] > found->largest) found->largest = most[lane];
}

#define CHANGING(prefix, dtype, other)                                                                              \
    static __attribute__((noinline)) void prefix##_##dtype##_##other(const char *x, const char *y, int64_t n,       \
                                                                     struct change *found) {                        \
        measure_change(dtype, other, x, y, n, found);                                                               \
    }
EACH_PAIR(CHANGING, changed)
#define CHANGED(prefix, dtype, other) [dtype][other] = prefix##_##dtype##_##other,
typedef void changing(const char *, const char *, int64_t, struct change *);
static changing *const changes[4][4] = {EACH_PAIR(CHANGED, changed)};

void EXPORT(change)(int dtype, int other, const char *x, const char *y, int64_t n, struct change *found) {
    changes[dtype][other](x, y, n, found);
}

#define EACH_DTYPE(macro) macro(F32) macro(F64) macro(BF16) macro(F16)
#define MEASURING(dtype)                                                                                            \
    static __attribute__((noinline)) void measure_##dtype(struct moments_row *row) { measure(dtype, row); }         \
    static __attribute__((noinline)) void add_exactly_##dtype(const char *x, int64_t n, int64_t (*bins)[8]) {       \
        add_exactly(dtype, x, n, bins);                                                                             \
    }                                                                                                               \
    static __attribute__((noinline)) void summarize_##dtype(const char *x, int64_t n, struct summary *found) {      \
        summarize(dtype, x, n, found);                                                                              \
    }
EACH_DTYPE(MEASURING)

#define CASE(dtype) case dtype: measure_##dtype(rows + row); break;
void EXPORT(moments)(int dtype, struct moments_row *rows, int64_t count, int64_t *next, int64_t most) {
    TAKE(row) switch (dtype) { EACH_DTYPE(CASE) }
}
#undef CASE

/* To exact sums of all values so far, which one thread at a time may do. */
#define CASE(dtype) case dtype: add_exactly_##dtype(x, n, bins); break;
void EXPORT(exact)(int dtype, const char *x, int64_t n, int64_t (*bins)[8]) {
    switch (dtype) { EACH_DTYPE(CASE) }
}
#undef CASE

#define CASE(dtype) case dtype: summarize_##dtype(x, n, found); break;
void EXPORT(summary)(int dtype, const char *x, int64_t n, struct summary *found) {
    switch (dtype) { EACH_DTYPE(CASE) }
}
#undef CASE

/* ---- Which level this CPU has, in the lowest level's part of the library ---------------------------------- */

#ifdef LOWEST
#if defined(__x86_64__)
#include <cpuid.h>

/* 4, 3 or 2 for x86-64-v4, -v3 and -v2 (the psABI's levels), as far as the system keeps their registers; else 0. */
__attribute__((visibility("default"))) int noisytune_level(void) {
    unsigned a, b, c, d, seven = 0, extended = 0, kept = 0, high;
    if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
    const unsigned v2 = 1u << 0 | 1u << 9 | 1u << 13 | 1u << 19 | 1u << 20 | 1u << 23; /* SSE3 to 4.2, cx16, popcnt */
    const unsigned v3 = 1u << 12 | 1u << 22 | 1u << 27 | 1u << 28 | 1u << 29; /* fma, movbe, osxsave, avx, f16c */
    if ((c & v2) != v2) return 0;
    if ((c & v3) != v3) return 2;
    __asm__("xgetbv" : "=a"(kept), "=d"(high) : "c"(0));
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d)) seven = b;
    if (__get_cpuid(0x80000001, &a, &b, &c, &d)) extended = c;
    const unsigned avx2 = 1u << 3 | 1u << 5 | 1u << 8;                            /* bmi1, avx2, bmi2 */
    const unsigned avx512 = 1u << 16 | 1u << 17 | 1u << 28 | 1u << 30 | 1u << 31; /* f, dq, cd, bw, vl */
    if ((seven & avx2) != avx2 || !(extended & 1u << 5) || (kept & 0x06) != 0x06) return 2;
    return (seven & avx512) == avx512 && (kept & 0xE6) == 0xE6 ? 4 : 3;
}
#else
__attribute__((visibility("default"))) int noisytune_level(void) { return 1; }
#endif
#endif
