/* What surrounds an integer product on the CPU, one pass each while the data is in the cache.
 *
 *     quantize         normalize (group norm), SiLU, divide by the step, round, clamp: uint8 codes, padded, their sums;
 *                      perhaps of the difference to what is held, to which what the codes stand for is then added
 *     finish           add the digits of a product, correct for the weight's zero points, add the residual
 *     finish_matrix    the same of a matrix product's integers, with all scales
 *     run_layer        quantize and product at once, prepared by plan_layer
 *     product          all of a small product: multiply codes with int8 weights, on AVX512-VNNI or AVX2, scale, add
 *
 * Images are channels last, (B, H, W, C); a matrix is an image of M rows of one position. Tensors come as addresses:
 * kernels/native.py checks their shapes and dtypes. Codes are those of kernels/affine.py: division and rounding to even are IEEE's,
 * and no option that would change them is on (no -ffast-math). Products and sums of norms, SiLU and finishing may be
 * contracted to fused ones, so there machines differ in the last place; what is held is none of these.
 */
#define PY_SSIZE_T_CLEAN
#include <Python.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#if defined(__x86_64__) && (defined(__GNUC__) || defined(__clang__))
#include <immintrin.h>
#define HAS_PRODUCT
#define VNNI __attribute__((target("avx512f,avx512bw,avx512vl,avx512vnni")))
/* Without FMA: a product is never fused with a sum. */
#define AVX2 __attribute__((target("avx2")))
#endif

/* One function for each generation of x86-64, chosen when it is loaded. */
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define CLONES
#endif
#define INLINE static inline __attribute__((always_inline))

/* Products and sums are rounded one by one. */
#if defined(__GNUC__) && !defined(__clang__)
#define UNFUSED __attribute__((optimize("fp-contract=off")))
#else
#define UNFUSED
#pragma STDC FP_CONTRACT OFF
#endif

/* Iterations of the next loop touch nothing of each other's, though addresses may be equal. */
#if defined(__clang__)
#define INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#elif defined(__GNUC__)
#define INDEPENDENT _Pragma("GCC ivdep")
#else
#define INDEPENDENT
#endif

/* Positions whose float sums are added to the double ones at a time. */
#define RUN 64
/* Codes that are computed before they are narrowed to bytes. */
#define BLOCK 2048

typedef struct {
    const void *x;
    uint8_t *codes;
    float *sums;            /* (B, H, W), or NULL */
    const float *step;      /* (runs, 1) or (runs, C) */
    const int32_t *zero;    /* (runs) */
    int64_t batch, height, width, channels, pitch; /* of positions, in elements */
    int64_t pad_h, pad_w, runs, rows_per_run, step_channels;
    int top, bfloat16, silu;
    int64_t groups;         /* 0: no norm */
    double eps;
    const float *weight, *bias;
    int threads;
    float *held;            /* (B, H, W, C), or NULL */
    const float *scale;     /* (runs), where something is held */
    const float *restore;   /* (C), or NULL: what else codes are multiplied with then */
    int is_first;           /* nothing is held yet */
} Quantize;

typedef struct {
    const float *product;   /* (M, digits * N) */
    void *out;              /* (M, N) */
    const void *residual;   /* (M, N), or NULL */
    const float *sums;      /* (B, H, W), or NULL */
    const float *scale;     /* (runs) */
    const float *correction; /* (N) */
    int64_t batch, out_height, out_width, outputs, digits, height, width, runs;
    int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w, pad_h, pad_w;
    int bfloat16, threads; /* bfloat16: out and residual */
} Finish;

typedef struct {
    const int32_t *product; /* (M, digits * N) of codes - 128 */
    void *out;              /* (M, N) */
    const void *residual;   /* (M, N), or NULL */
    const float *sums;      /* (M), or NULL */
    const float *scale;     /* (runs) */
    const int32_t *zero;    /* (runs) */
    const float *weight_scale; /* (digits * N) */
    const int32_t *weight_sums; /* (digits * N) */
    const float *correction; /* (N), or NULL */
    const float *bias;      /* (N) */
    int64_t rows, outputs, digits, runs;
    int bfloat16, threads; /* bfloat16: out and residual */
} FinishMatrix;

/* Outputs of a block, codes of one step, rows that are multiplied at a time. */
#define LANES 16
#define QUAD 4
#define ROWS 6
/* Rows that each block's weights are read for while they are in the cache. */
#define CHUNK 24

typedef struct {
    const uint8_t *codes;   /* (B, H, W, C), padded, C a multiple of QUAD */
    const int8_t *weight;   /* (blocks, taps, C / QUAD, LANES, QUAD), zeros beyond N */
    void *out;              /* (M, N) */
    const void *residual;   /* (M, N), or NULL */
    const float *scale;     /* (runs) */
    const int32_t *zero;    /* (runs) */
    const float *weight_scale; /* (blocks * LANES) */
    const int32_t *weight_sums; /* (blocks * LANES) */
    const int32_t *weight_zero; /* (blocks * LANES): what weights are less by, or NULL */
    const float *bias;      /* (blocks * LANES) */
    int64_t batch, height, width, channels, out_height, out_width, outputs, runs;
    int64_t kernel_h, kernel_w, stride_h, stride_w, dilation_h, dilation_w;
    int bfloat16, threads;  /* bfloat16: out and residual */
    int vnni;               /* whether to use AVX512-VNNI, else AVX2 */
} Product;

INLINE float bits_float(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE uint32_t float_bits(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

INLINE float load(const void *x, int64_t i, int bfloat16) {
    return bfloat16 ? bits_float((uint32_t)((const uint16_t *)x)[i] << 16) : ((const float *)x)[i];
}

/* Round to even, as PyTorch does; a NaN stays one. */
INLINE void store(void *x, int64_t i, float value, int bfloat16) {
    if (bfloat16) {
        uint32_t bits = float_bits(value);
        uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
        ((uint16_t *)x)[i] = (uint16_t)(value != value ? 0x7fc0 : rounded);
    } else {
        ((float *)x)[i] = value;
    }
}

/* exp(x) for x <= 0 within 2 units in the last place (from -40 on: that of -40): 2**n times a polynomial on
 * [-ln 2 / 2, ln 2 / 2]. */
INLINE float exponential(float x) {
    x = x > -40.0f ? x : -40.0f;
    float n = (x * 1.44269504f + 12582912.0f) - 12582912.0f;
    float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
    float p = 1.9875691e-4f;
    p = p * r + 1.3981999e-3f;
    p = p * r + 8.3334519e-3f;
    p = p * r + 4.1665796e-2f;
    p = p * r + 1.6666665e-1f;
    p = p * r + 5.0000001e-1f;
    p = p * r * r + r + 1.0f;
    return p * bits_float((uint32_t)((int32_t)n + 127) << 23);
}

/* x * sigmoid(x) / step. One-sided, as e**88 has subnormal quotients, which take a hundred cycles. */
INLINE float swish(float x, float step) {
    float e = exponential(-fabsf(x));
    return (x < 0.0f ? x * e : x) / ((1.0f + e) * step);
}

/* Quantize `positions` runs of `channels` codes to integers, and add each run's to `sums`. Floats and integers of one
 * width only, and no sum of floats: so compilers make vectors of it. What is constant where this is called makes loops
 * of their own. */
INLINE void quantize_block(
    const void *x, int64_t first, int64_t stride, int32_t *codes, int32_t *sums, int64_t positions, int64_t channels,
    const float *step, float zero, float top, const float *slope, const float *shift, int bfloat16, int norm, int silu,
    const float *held, int64_t held_stride
) {
    for (int64_t p = 0; p < positions; p++) {
        int32_t sum = 0;
        INDEPENDENT
        for (int64_t c = 0; c < channels; c++) {
            float value = load(x, first + p * stride + c, bfloat16);
            if (norm) value = value * slope[c] + shift[c];
            if (held) value = ((silu ? swish(value, 1.0f) : value) - held[p * held_stride + c]) / step[c];
            else value = silu ? swish(value, step[c]) : value / step[c];
            value = value > -zero ? value : -zero; /* whole bounds: clamping and rounding commute; a NaN becomes one */
            value = value < top - zero ? value : top - zero;
            int32_t code = (int32_t)(((value + 12582912.0f) - 12582912.0f) + zero);
            codes[p * channels + c] = code;
            sum += code;
        }
        sums[p] += sum;
    }
}

/* Add what codes stand for to what is held: (code - zero) * scale * restore, every product and sum rounded, so that it is
 * the same on all machines. */
CLONES UNFUSED static void hold(
    float *held, int64_t stride, const int32_t *codes, int64_t positions, int64_t channels, int32_t zero, float scale,
    const float *restore, int is_first
) {
    for (int64_t p = 0; p < positions; p++) {
        float *row = held + p * stride;
        const int32_t *code = codes + p * channels;
        if (restore) {
            INDEPENDENT
            for (int64_t c = 0; c < channels; c++) {
                float value = (float)(code[c] - zero) * scale;
                value = value * restore[c];
                row[c] = is_first ? value : row[c] + value;
            }
        } else {
            INDEPENDENT
            for (int64_t c = 0; c < channels; c++) {
                float value = (float)(code[c] - zero) * scale;
                row[c] = is_first ? value : row[c] + value;
            }
        }
    }
}

/* What a row has beside plain codes, where something is held: its part of `held`, the scale of its codes. */
typedef struct {
    float *held;
    float scale;
    const float *restore;
    int is_first;
} Held;

/* Quantize a row of positions, a few thousand codes at a time. */
CLONES static void quantize_row(
    const void *x, uint8_t *codes, float *sums, int64_t positions, int64_t channels, int64_t pitch, const float *step,
    float zero, float top, const float *slope, const float *shift, int bfloat16, int silu, Held held
) {
    int32_t block[BLOCK], totals[BLOCK];
    int64_t piece = channels < BLOCK ? channels : BLOCK, count = BLOCK / piece;
    for (int64_t p = 0; p < positions; p += count) {
        int64_t n = p + count < positions ? count : positions - p;
        memset(totals, 0, n * sizeof *totals);
        for (int64_t c = 0; c < channels; c += piece) {
            int64_t width = c + piece < channels ? piece : channels - c;
            const float *a = slope ? slope + c : NULL, *b = shift ? shift + c : NULL;
            float *kept = held.held ? held.held + p * channels + c : NULL;
#define QUANTIZE(bf16, norm, silu, old) \
    quantize_block( \
        x, p * pitch + c, pitch, block, totals, n, width, step + c, zero, top, a, b, bf16, norm, silu, old, channels)
#define BY_HELD(bf16, norm, silu) \
    if (kept && !held.is_first) QUANTIZE(bf16, norm, silu, kept); else QUANTIZE(bf16, norm, silu, NULL)
            if (slope && silu && bfloat16) { BY_HELD(1, 1, 1); }
            else if (slope && silu) { BY_HELD(0, 1, 1); }
            else if (slope && bfloat16) { BY_HELD(1, 1, 0); }
            else if (slope) { BY_HELD(0, 1, 0); }
            else if (bfloat16) { BY_HELD(1, 0, 0); }
            else { BY_HELD(0, 0, 0); }
#undef BY_HELD
#undef QUANTIZE
            const float *restore = held.restore ? held.restore + c : NULL;
            if (kept) hold(kept, channels, block, n, width, (int32_t)zero, held.scale, restore, held.is_first);
            for (int64_t i = 0; i < n * width; i++) codes[p * channels + c + i] = (uint8_t)block[i];
        }
        for (int64_t i = 0; sums && i < n; i++) sums[p + i] = (float)(totals[i] - (int32_t)zero * (int32_t)channels);
    }
}

/* Add the sums and sums of squares of x - origin over some positions to `total`, (2, C); `part`, (2, C), is scratch. */
INLINE void add_moments(
    const void *x, int64_t positions, int64_t channels, int64_t pitch, const float *origin, float *part, double *total,
    int bfloat16
) {
    for (int64_t first = 0; first < positions; first += RUN) {
        int64_t last = first + RUN < positions ? first + RUN : positions;
        memset(part, 0, 2 * channels * sizeof(float));
        for (int64_t p = first; p < last; p++) {
            INDEPENDENT
            for (int64_t c = 0; c < channels; c++) {
                float value = load(x, p * pitch + c, bfloat16) - origin[c];
                part[c] += value;
                part[channels + c] += value * value;
            }
        }
        for (int64_t c = 0; c < 2 * channels; c++) total[c] += part[c];
    }
}

CLONES static void moments(
    const void *x, int64_t positions, int64_t channels, int64_t pitch, const float *origin, float *part, double *total,
    int bfloat16
) {
    if (bfloat16) add_moments(x, positions, channels, pitch, origin, part, total, 1);
    else add_moments(x, positions, channels, pitch, origin, part, total, 0);
}

/* Turn the moments of each channel about `origin` into norm(x) = slope * x + shift, of its group. */
static void norm_coefficients(
    const Quantize *q, const double *total, const float *origin, int64_t positions, float *slope, float *shift
) {
    int64_t each = q->channels / q->groups;
    for (int64_t g = 0; g < q->groups; g++) {
        double mean = 0.0, square = 0.0, count = (double)positions * (double)each;
        int64_t first = g * each;
        for (int64_t c = first; c < first + each; c++) mean += total[c] + (double)positions * origin[c];
        mean /= count;
        for (int64_t c = first; c < first + each; c++) {
            double off = origin[c] - mean;  /* sum (x - mean)**2 = sum (x - o)**2 + 2 (o - mean) sum (x - o) + ... */
            square += total[q->channels + c] + off * (2.0 * total[c] + (double)positions * off);
        }
        double inverse = 1.0 / sqrt((square > 0.0 ? square : 0.0) / count + q->eps);
        for (int64_t c = first; c < first + each; c++) {
            double weight = q->weight ? q->weight[c] : 1.0, bias = q->bias ? q->bias[c] : 0.0;
            slope[c] = (float)(weight * inverse);
            shift[c] = (float)(bias - weight * inverse * mean);
        }
    }
}

/* Quantize sample b. `room` has space for (threads, 4, C) doubles. */
static void quantize_sample(const Quantize *q, int64_t b, double *room, int threads) {
    int64_t channels = q->channels, positions = q->height * q->width, pitch = q->pitch * (q->bfloat16 ? 2 : 4);
    const char *x = (const char *)q->x + b * positions * pitch;
    float *origin = (float *)(room + threads * 4 * channels), *slope = NULL, *shift = NULL;
    if (q->groups) {
        slope = origin + channels;
        shift = slope + channels;
        for (int64_t c = 0; c < channels; c++) origin[c] = load(x, c, q->bfloat16);
        memset(room, 0, threads * 4 * channels * sizeof(double));
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int t = 0; t < threads; t++) {
            int64_t first = positions * t / threads, last = positions * (t + 1) / threads;
            double *total = room + t * 4 * channels;
            moments(x + first * pitch, last - first, channels, q->pitch, origin, (float *)(total + 2 * channels), total,
                    q->bfloat16);
        }
        for (int t = 1; t < threads; t++) {
            for (int64_t c = 0; c < 2 * channels; c++) room[c] += room[t * 4 * channels + c];
        }
        norm_coefficients(q, room, origin, positions, slope, shift);
    }
    int64_t wide = (q->width + 2 * q->pad_w) * channels, tall = q->height + 2 * q->pad_h;
    /* Without padding, lines of a run follow one another: a matrix's are one position each. */
    int64_t most = q->height < q->rows_per_run ? q->height : q->rows_per_run, merged = 1;
    if (!q->pad_h && !q->pad_w && q->width < RUN) merged = RUN / q->width < most ? RUN / q->width : most;
    int64_t pieces = merged > 1 ? q->height / most * ((most + merged - 1) / merged) : tall;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t piece = 0; piece < pieces; piece++) {
        int64_t line = piece, lines = 1;
        if (merged > 1) {
            int64_t each = (most + merged - 1) / merged, in_run = piece % each * merged;
            line = piece / each * most + in_run;
            lines = most - in_run < merged ? most - in_run : merged;
        }
        int64_t h = line - q->pad_h, inside = h < 0 ? 0 : h < q->height ? h : q->height - 1;
        int64_t run = (b * q->height + inside) / q->rows_per_run;
        int32_t zero = q->zero[run];
        uint8_t *codes = q->codes + (b * tall + line) * wide;
        if (h < 0 || h >= q->height) {
            memset(codes, zero, wide);
            continue;
        }
        memset(codes, zero, q->pad_w * channels);
        memset(codes + (q->pad_w + q->width) * channels, zero, q->pad_w * channels);
        Held held = {NULL, 0.0f, q->restore, q->is_first};
        if (q->held) {
            held.held = q->held + (b * q->height + h) * q->width * channels;
            held.scale = q->scale[run];
        }
        quantize_row(
            x + h * q->width * pitch, codes + q->pad_w * channels,
            q->sums ? q->sums + (b * q->height + h) * q->width : NULL, lines * q->width, channels, q->pitch,
            q->step + run * channels, (float)zero, (float)q->top, slope, shift, q->bfloat16, q->silu, held);
    }
}

/* Quantize all samples; 0, or -1 without memory. */
static int quantize_all(const Quantize *q, const float *step) {
    int outer = q->batch > 1 ? q->threads : 1, inner = q->batch > 1 ? 1 : q->threads;
    int64_t each = inner * 4 * q->channels + 2 * q->channels; /* doubles: moments, then three rows of floats */
    double *room = malloc(outer * each * sizeof(double));
    float *steps = NULL;
    Quantize own = *q;
    own.step = step;
    if (q->step_channels == 1) {
        steps = malloc(q->runs * q->channels * sizeof(float));
        for (int64_t i = 0; steps && i < q->runs * q->channels; i++) steps[i] = step[i / q->channels];
        own.step = steps;
    }
    int failed = room == NULL || own.step == NULL;
    if (!failed) {
#pragma omp parallel for num_threads(outer) if (outer > 1)
        for (int t = 0; t < outer; t++) {
            for (int64_t b = q->batch * t / outer; b < q->batch * (t + 1) / outer; b++) {
                quantize_sample(&own, b, room + t * each, inner);
            }
        }
    }
    free(room);
    free(steps);
    return -failed;
}

/* The sum of the inputs that one output position sees; what is left out of `sums` is 0. */
INLINE float window_sum(const Finish *f, int64_t b, int64_t i, int64_t j) {
    float sum = 0.0f;
    for (int64_t kh = 0; kh < f->kernel_h; kh++) {
        int64_t h = i * f->stride_h - f->pad_h + kh * f->dilation_h;
        if (h < 0 || h >= f->height) continue;
        for (int64_t kw = 0; kw < f->kernel_w; kw++) {
            int64_t w = j * f->stride_w - f->pad_w + kw * f->dilation_w;
            if (w >= 0 && w < f->width) sum += f->sums[(b * f->height + h) * f->width + w];
        }
    }
    return sum;
}

INLINE void finish_row(
    const float *product, void *out, const void *residual, int64_t at, int64_t n, int64_t digits, float factor,
    const float *correction, int bfloat16
) {
    INDEPENDENT
    for (int64_t c = 0; c < n; c++) {
        float value = product[c];
        for (int64_t d = 1; d < digits; d++) value += product[d * n + c];
        if (correction) value -= factor * correction[c];
        if (residual) value += load(residual, at + c, bfloat16);
        store(out, at + c, value, bfloat16);
    }
}

INLINE void finish_matrix_row(
    const FinishMatrix *f, int64_t row, int64_t digits, int bfloat16, const float *correction, const void *residual
) {
    int64_t n = f->outputs, run = row / (f->rows / f->runs), at = row * n;
    int32_t zero = f->zero[run] - 128;
    float scale = f->scale[run], sum = correction ? f->sums[row] : 0.0f;
    const int32_t *product = f->product + row * digits * n, *weight_sums = f->weight_sums;
    const float *weight_scale = f->weight_scale, *bias = f->bias;
    void *out = f->out;
    INDEPENDENT
    for (int64_t c = 0; c < n; c++) {
        float value = (float)(product[c] - zero * weight_sums[c]) * weight_scale[c];
        for (int64_t d = 1; d < digits; d++) {
            value += (float)(product[d * n + c] - zero * weight_sums[d * n + c]) * weight_scale[d * n + c];
        }
        if (correction) value -= sum * correction[c];
        value = value * scale + bias[c];
        if (residual) value += load(residual, at + c, bfloat16);
        store(out, at + c, value, bfloat16);
    }
}

/* One loop for each kind of layer: what a CALL is given is constant in it, but for more than two digits. */
#define BY_DIGITS(CALL, f, bf16, correction, residual) \
    if ((f)->digits == 1) CALL(1, bf16, correction, residual); \
    else if ((f)->digits == 2) CALL(2, bf16, correction, residual); \
    else CALL((f)->digits, bf16, correction, residual)
#define BY_TERMS(CALL, f, bf16) \
    if ((f)->correction && (f)->residual) { BY_DIGITS(CALL, f, bf16, (f)->correction, (f)->residual); } \
    else if ((f)->correction) { BY_DIGITS(CALL, f, bf16, (f)->correction, NULL); } \
    else if ((f)->residual) { BY_DIGITS(CALL, f, bf16, NULL, (f)->residual); } \
    else { BY_DIGITS(CALL, f, bf16, NULL, NULL); }
#define BY_KIND(CALL, f) \
    if ((f)->bfloat16) { BY_TERMS(CALL, f, 1) } else { BY_TERMS(CALL, f, 0) }

CLONES static void finish_line(const Finish *f, int64_t line) {
    int64_t b = line / f->out_height, i = line % f->out_height, n = f->outputs;
    float scale = f->correction ? f->scale[line / (f->batch * f->out_height / f->runs)] : 0.0f;
    for (int64_t j = 0; j < f->out_width; j++) {
        int64_t m = line * f->out_width + j;
        const float *product = f->product + m * f->digits * n;
        float factor = f->correction ? scale * window_sum(f, b, i, j) : 0.0f;
#define ROW(digits, bf16, correction, residual) \
    finish_row(product, f->out, residual, m * n, n, digits, factor, correction, bf16)
        BY_KIND(ROW, f)
#undef ROW
    }
}

CLONES static void finish_matrix_any_row(const FinishMatrix *f, int64_t row) {
#define ROW(digits, bf16, correction, residual) finish_matrix_row(f, row, digits, bf16, correction, residual)
    BY_KIND(ROW, f)
#undef ROW
}

static void finish_all(const Finish *f) {
    int64_t lines = f->batch * f->out_height;
    int threads = f->threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t line = 0; line < lines; line++) finish_line(f, line);
}

static void finish_matrix(const FinishMatrix *f) {
    int threads = f->threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < f->rows; row++) finish_matrix_any_row(f, row);
}

#ifdef HAS_PRODUCT
/* Where a chunk's rows begin, which they are of all, what runs they are of, and the sums of what they multiply. */
typedef struct {
    int64_t input[CHUNK], row[CHUNK], run[CHUNK];
    int32_t total[CHUNK];
} Rows;

/* Find positions `first` to `last`, at most CHUNK; `sums` of each input position may be NULL, `offset` is of taps. */
INLINE Rows find_rows(const Product *p, const int32_t *sums, const int64_t *offset, int64_t first, int64_t last) {
    Rows rows = {0};
    int64_t area = p->out_height * p->out_width, each = p->batch * area / p->runs, taps = p->kernel_h * p->kernel_w;
    for (int64_t m = first; m < last; m++) {
        int64_t pixel = m % area, i = pixel / p->out_width, j = pixel % p->out_width;
        int64_t position = (m / area * p->height + i * p->stride_h) * p->width + j * p->stride_w;
        rows.row[m - first] = m;
        rows.run[m - first] = m / each;
        rows.input[m - first] = position * p->channels;
        for (int64_t tap = 0; sums && tap < taps; tap++) {
            rows.total[m - first] += sums[position + offset[tap] / p->channels];
        }
    }
    return rows;
}

/* Correct the sums of one row and `vectors` blocks of outputs for zero points, scale them, add bias and residual, store.
 * `total` is the sum of the row's codes less their zero points, if weights have zero points. */
VNNI static inline void store_sums(
    const Product *p, const __m512i *sums, int32_t total, int64_t row, int64_t block, int vectors, int64_t run
) {
    __m512i zero = _mm512_set1_epi32(p->zero[run]);
    __m512 scale = _mm512_set1_ps(p->scale[run]);
    for (int v = 0; v < vectors; v++) {
        int64_t n = (block + v) * LANES, at = row * p->outputs + n, left = p->outputs - n;
        __mmask16 mask = left >= LANES ? 0xffff : (__mmask16)((1u << left) - 1);
        __m512i sum = _mm512_sub_epi32(sums[v], _mm512_mullo_epi32(zero, _mm512_loadu_si512(p->weight_sums + n)));
        if (p->weight_zero) {
            sum = _mm512_sub_epi32(sum, _mm512_mullo_epi32(_mm512_set1_epi32(total), _mm512_loadu_si512(p->weight_zero + n)));
        }
        __m512 value = _mm512_mul_ps(_mm512_cvtepi32_ps(sum), _mm512_loadu_ps(p->weight_scale + n));
        /* With its rounding named, a product is not fused with the sum. */
        value = _mm512_mul_round_ps(value, scale, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
        value = _mm512_add_ps(value, _mm512_loadu_ps(p->bias + n));
        if (p->bfloat16) {
            for (int64_t i = 0; i < LANES && i < left; i++) {
                float one = ((const float *)&value)[i];
                store(p->out, at + i, p->residual ? one + load(p->residual, at + i, 1) : one, 1);
            }
            continue;
        }
        if (p->residual) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(mask, (const float *)p->residual + at));
        _mm512_mask_storeu_ps((float *)p->out + at, mask, value);
    }
}

/* Multiply `rows` positions, whose codes begin at `base`, with `vectors` blocks of outputs. Both are constant where this is
 * called, so that all sums stay in registers. */
VNNI __attribute__((always_inline)) static inline void multiply_tile(
    const Product *p, const uint8_t *const *base, const Rows *at, int64_t first, const int64_t *offset, int64_t block,
    int rows, int vectors
) {
    __m512i sums[ROWS][4];
    int64_t taps = p->kernel_h * p->kernel_w, quads = p->channels / QUAD, step = LANES * QUAD;
    const int8_t *weight = p->weight + block * taps * quads * step;
    for (int r = 0; r < rows; r++) {
        for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_setzero_si512();
    }
    for (int64_t tap = 0; tap < taps; tap++) {
        const uint8_t *code[ROWS];
        for (int r = 0; r < rows; r++) code[r] = base[r] + offset[tap];
        for (int64_t q = 0; q < quads; q++, weight += step) {
            __m512i w[4];
            for (int v = 0; v < vectors; v++) w[v] = _mm512_loadu_si512(weight + v * taps * quads * step);
            for (int r = 0; r < rows; r++) {
                int32_t four;
                memcpy(&four, code[r] + q * QUAD, QUAD);
                __m512i x = _mm512_set1_epi32(four);
                for (int v = 0; v < vectors; v++) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], x, w[v]);
            }
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        store_sums(p, sums[r], at->total[first + r], at->row[first + r], block, vectors, at->run[first + r]);
    }
}

/* Multiply positions `first` to `last` (at most CHUNK) with all outputs. */
VNNI static void multiply_rows(
    const Product *p, const int32_t *sums, const int64_t *offset, int64_t first, int64_t last
) {
    const uint8_t *base[CHUNK];
    int64_t blocks = (p->outputs + LANES - 1) / LANES;
    Rows at = find_rows(p, sums, offset, first, last);
    for (int64_t r = 0; r < last - first; r++) base[r] = p->codes + at.input[r];
    for (int64_t block = 0; block < blocks;) {
        int64_t left = blocks - block;
        int vectors = left % 4 == 0 || left >= 8 ? 4 : left % 3 == 0 ? 3 : left >= 2 ? 2 : 1;
        for (int64_t r = 0; r < last - first; r += ROWS) {
            int rows = (int)(last - first - r < ROWS ? last - first - r : ROWS);
#define TILE(n, v) multiply_tile(p, base + r, &at, r, offset, block, n, v)
#define BY_ROWS(v) \
            if (rows == 6) { TILE(6, v); } else if (rows == 5) { TILE(5, v); } else if (rows == 4) { TILE(4, v); } \
            else if (rows == 3) { TILE(3, v); } else if (rows == 2) { TILE(2, v); } else { TILE(1, v); }
            if (vectors == 4) { BY_ROWS(4); }
            else if (vectors == 3) { BY_ROWS(3); }
            else if (vectors == 2) { BY_ROWS(2); }
            else { BY_ROWS(1); }
#undef BY_ROWS
#undef TILE
        }
        block += vectors;
    }
}

/* Write codes less their zero points to `wide`, as pairs of them are multiplied by AVX2. */
CLONES static void widen(const Product *p, int16_t *wide) {
    int64_t each = p->batch * p->height * p->width / p->runs * p->channels;
    for (int64_t run = 0; run < p->runs; run++) {
        const uint8_t *codes = p->codes + run * each;
        int16_t zero = (int16_t)p->zero[run], *to = wide + run * each;
        INDEPENDENT
        for (int64_t i = 0; i < each; i++) to[i] = (int16_t)(codes[i] - zero);
    }
}

/* As store_sums, of one row and half a block: the sums of code - zero point need no correction by the weights' sums. */
AVX2 static inline void store_half(const Product *p, __m256i sum, int32_t total, int64_t row, int64_t n, int64_t run) {
    int64_t at = row * p->outputs + n, left = p->outputs - n;
    if (p->weight_zero) {
        __m256i zero = _mm256_loadu_si256((const __m256i *)(p->weight_zero + n));
        sum = _mm256_sub_epi32(sum, _mm256_mullo_epi32(_mm256_set1_epi32(total), zero));
    }
    __m256 value = _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_loadu_ps(p->weight_scale + n));
    value = _mm256_mul_ps(value, _mm256_set1_ps(p->scale[run]));
    value = _mm256_add_ps(value, _mm256_loadu_ps(p->bias + n));
    if (p->bfloat16 || left < LANES / 2) {
        float each[LANES / 2];
        _mm256_storeu_ps(each, value);
        for (int64_t i = 0; i < LANES / 2 && i < left; i++) {
            float one = p->residual ? each[i] + load(p->residual, at + i, p->bfloat16) : each[i];
            store(p->out, at + i, one, p->bfloat16);
        }
        return;
    }
    if (p->residual) value = _mm256_add_ps(value, _mm256_loadu_ps((const float *)p->residual + at));
    _mm256_storeu_ps((float *)p->out + at, value);
}

/* Multiply `rows` positions with half a block of outputs. A vector of 16 weights is 4 outputs' of 4 codes, so it adds up
 * in pairs: two sums an output, which are added at the end. */
AVX2 __attribute__((always_inline)) static inline void multiply_tile_avx2(
    const Product *p, const int16_t *const *base, const Rows *at, int64_t first, const int64_t *offset, int64_t n,
    int rows
) {
    __m256i sums[ROWS][2];
    int64_t taps = p->kernel_h * p->kernel_w, quads = p->channels / QUAD, step = LANES * QUAD;
    const int8_t *weight = p->weight + n / LANES * taps * quads * step + n % LANES * QUAD;
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm256_setzero_si256();
    for (int64_t tap = 0; tap < taps; tap++) {
        const int16_t *code[ROWS];
        for (int r = 0; r < rows; r++) code[r] = base[r] + offset[tap];
        for (int64_t q = 0; q < quads; q++, weight += step) { /* 16 registers: 12 sums, 2 weights, codes, a product */
            __m256i w0 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)weight));
            __m256i w1 = _mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i *)(weight + 16)));
            for (int r = 0; r < rows; r++) {
                int64_t four;
                memcpy(&four, code[r] + q * QUAD, sizeof four);
                __m256i x = _mm256_set1_epi64x(four);
                sums[r][0] = _mm256_add_epi32(sums[r][0], _mm256_madd_epi16(x, w0));
                sums[r][1] = _mm256_add_epi32(sums[r][1], _mm256_madd_epi16(x, w1));
            }
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        /* Within each 128 bits: outputs 0, 1 and 4, 5 | 2, 3 and 6, 7. */
        __m256i sum = _mm256_permute4x64_epi64(_mm256_hadd_epi32(sums[r][0], sums[r][1]), _MM_SHUFFLE(3, 1, 2, 0));
        store_half(p, sum, at->total[first + r], at->row[first + r], n, at->run[first + r]);
    }
}

/* As multiply_rows, of codes that were widened. */
AVX2 static void multiply_rows_avx2(
    const Product *p, const int16_t *wide, const int32_t *sums, const int64_t *offset, int64_t first, int64_t last
) {
    const int16_t *base[CHUNK];
    Rows at = find_rows(p, sums, offset, first, last);
    for (int64_t r = 0; r < last - first; r++) base[r] = wide + at.input[r];
    for (int64_t n = 0; n < p->outputs; n += LANES / 2) {
        for (int64_t r = 0; r < last - first; r += ROWS) {
            int rows = (int)(last - first - r < ROWS ? last - first - r : ROWS);
#define TILE(rows) multiply_tile_avx2(p, base + r, &at, r, offset, n, rows)
            if (rows == 6) TILE(6);
            else if (rows == 5) TILE(5);
            else if (rows == 4) TILE(4);
            else if (rows == 3) TILE(3);
            else if (rows == 2) TILE(2);
            else TILE(1);
#undef TILE
        }
    }
}

/* Add up the codes of each position, less their zero points. */
CLONES static void sum_positions(const Product *p, int32_t *sums) {
    int64_t positions = p->batch * p->height * p->width, each = positions / p->runs;
    for (int64_t i = 0; i < positions; i++) {
        const uint8_t *codes = p->codes + i * p->channels;
        int32_t sum = 0;
        for (int64_t c = 0; c < p->channels; c++) sum += codes[c];
        sums[i] = sum - p->zero[i / each] * (int32_t)p->channels;
    }
}

static int multiply_all(const Product *p) {
    int64_t taps = p->kernel_h * p->kernel_w, positions = p->batch * p->out_height * p->out_width;
    int64_t *offset = malloc(taps * sizeof(int64_t));
    int64_t inputs = p->batch * p->height * p->width;
    int16_t *wide = p->vnni ? NULL : malloc(inputs * p->channels * sizeof(int16_t));
    int32_t *sums = p->weight_zero ? malloc(inputs * sizeof(int32_t)) : NULL;
    if (!offset || (!p->vnni && !wide) || (p->weight_zero && !sums)) {
        free(offset);
        free(wide);
        free(sums);
        return -1;
    }
    if (wide) widen(p, wide);
    if (sums) sum_positions(p, sums);
    for (int64_t tap = 0; tap < taps; tap++) {
        int64_t down = tap / p->kernel_w * p->dilation_h, across = tap % p->kernel_w * p->dilation_w;
        offset[tap] = (down * p->width + across) * p->channels;
    }
    int64_t pieces = (positions + CHUNK - 1) / CHUNK;
    int threads = p->threads;
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t piece = 0; piece < pieces; piece++) {
        int64_t first = piece * CHUNK, last = first + CHUNK < positions ? first + CHUNK : positions;
        if (wide) multiply_rows_avx2(p, wide, sums, offset, first, last);
        else multiply_rows(p, sums, offset, first, last);
    }
    free(offset);
    free(wide);
    free(sums);
    return 0;
}
#endif

/* Read `count` integers (addresses too); 0 with an exception set if they are not. */
static int integers(PyObject *const *args, Py_ssize_t given, Py_ssize_t count, long long *out) {
    if (given != count) {
        PyErr_Format(PyExc_TypeError, "got %zd arguments, wanted %zd", given, count);
        return 0;
    }
    for (Py_ssize_t i = 0; i < count; i++) {
        out[i] = PyLong_AsLongLong(args[i]);
        if (out[i] == -1 && PyErr_Occurred()) return 0;
    }
    return 1;
}

#define ADDRESS(value) ((void *)(intptr_t)(value))

INLINE Quantize read_quantize(const long long *a, double eps) {
    return (Quantize){
        .x = ADDRESS(a[0]), .codes = ADDRESS(a[1]), .sums = ADDRESS(a[2]), .step = ADDRESS(a[3]), .zero = ADDRESS(a[4]),
        .batch = a[5], .height = a[6], .width = a[7], .channels = a[8], .pitch = a[9], .pad_h = a[10], .pad_w = a[11],
        .runs = a[12], .rows_per_run = a[5] * a[6] / (a[12] ? a[12] : 1), .step_channels = a[13], .top = (int)a[14],
        .bfloat16 = (int)a[15], .silu = (int)a[16], .groups = a[17], .weight = ADDRESS(a[18]), .bias = ADDRESS(a[19]),
        .threads = (int)a[20], .held = ADDRESS(a[21]), .scale = ADDRESS(a[22]), .restore = ADDRESS(a[23]),
        .is_first = (int)a[24], .eps = eps,
    };
}

static PyObject *py_quantize(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long a[25];
    double eps = given == 26 ? PyFloat_AsDouble(args[25]) : 0.0;
    if (PyErr_Occurred() || !integers(args, given - (given == 26), 25, a)) return NULL;
    Quantize q = read_quantize(a, eps);
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = quantize_all(&q, q.step);
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
}

static PyObject *py_finish(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long a[24];
    if (!integers(args, given, 24, a)) return NULL;
    Finish f = {
        .product = ADDRESS(a[0]), .out = ADDRESS(a[1]), .residual = ADDRESS(a[2]), .sums = ADDRESS(a[3]),
        .scale = ADDRESS(a[4]), .correction = ADDRESS(a[5]), .batch = a[6], .out_height = a[7], .out_width = a[8],
        .outputs = a[9], .digits = a[10], .height = a[11], .width = a[12], .runs = a[13], .kernel_h = a[14],
        .kernel_w = a[15], .stride_h = a[16], .stride_w = a[17], .dilation_h = a[18], .dilation_w = a[19],
        .pad_h = a[20], .pad_w = a[21], .bfloat16 = (int)a[22], .threads = (int)a[23],
    };
    Py_BEGIN_ALLOW_THREADS
    finish_all(&f);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_finish_matrix(PyObject *self, PyObject *const *args, Py_ssize_t given) {
    long long a[16];
    if (!integers(args, given, 16, a)) return NULL;
    FinishMatrix f = {
        .product = ADDRESS(a[0]), .out = ADDRESS(a[1]), .residual = ADDRESS(a[2]), .sums = ADDRESS(a[3]),
        .scale = ADDRESS(a[4]), .zero = ADDRESS(a[5]), .weight_scale = ADDRESS(a[6]), .weight_sums = ADDRESS(a[7]),
        .correction = ADDRESS(a[8]), .bias = ADDRESS(a[9]), .rows = a[10], .outputs = a[11], .digits = a[12],
        .runs = a[13], .bfloat16 = (int)a[14], .threads = (int)a[15],
    };
    Py_BEGIN_ALLOW_THREADS
    finish_matrix(&f);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

static PyObject *py_product_level(PyObject *self, PyObject *unused) {
#ifdef HAS_PRODUCT
    int vnni =
        __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl");
    return PyLong_FromLong(vnni ? 2 : __builtin_cpu_supports("avx2") ? 1 : 0);
#else
    return PyLong_FromLong(0);
#endif
}

#ifdef HAS_PRODUCT
INLINE Product read_product(const long long *a) {
    return (Product){
        .codes = ADDRESS(a[0]), .weight = ADDRESS(a[1]), .out = ADDRESS(a[2]), .residual = ADDRESS(a[3]),
        .scale = ADDRESS(a[4]), .zero = ADDRESS(a[5]), .weight_scale = ADDRESS(a[6]), .weight_sums = ADDRESS(a[7]),
        .weight_zero = ADDRESS(a[9]), .bias = ADDRESS(a[8]), .batch = a[10], .height = a[11], .width = a[12],
        .channels = a[13], .out_height = a[14], .out_width = a[15], .outputs = a[16], .runs = a[17], .kernel_h = a[18],
        .kernel_w = a[19], .stride_h = a[20], .stride_w = a[21], .dilation_h = a[22], .dilation_w = a[23],
        .bfloat16 = (int)a[24], .threads = (int)a[25], .vnni = (int)a[26],
    };
}
#endif

static PyObject *py_product(PyObject *self, PyObject *const *args, Py_ssize_t given) {
#ifdef HAS_PRODUCT
    long long a[27];
    if (!integers(args, given, 27, a)) return NULL;
    Product p = read_product(a);
    int failed;
    Py_BEGIN_ALLOW_THREADS
    failed = multiply_all(&p);
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
#else
    PyErr_SetString(PyExc_RuntimeError, "got neither AVX512-VNNI nor AVX2, wanted one: see product_level");
    return NULL;
#endif
}

#ifdef HAS_PRODUCT
typedef struct {
    Quantize quantize;
    Product product;
} Layer;
#endif

/* Arguments as of quantize, then of product, then eps; those that run_layer is given are 0. */
static PyObject *py_plan_layer(PyObject *self, PyObject *const *args, Py_ssize_t given) {
#ifdef HAS_PRODUCT
    long long a[52];
    double eps = given == 53 ? PyFloat_AsDouble(args[52]) : 0.0;
    if (PyErr_Occurred() || !integers(args, given - (given == 53), 52, a)) return NULL;
    Layer layer = {.quantize = read_quantize(a, eps), .product = read_product(a + 25)};
    return PyBytes_FromStringAndSize((const char *)&layer, sizeof layer);
#else
    PyErr_SetString(PyExc_RuntimeError, "got neither AVX512-VNNI nor AVX2, wanted one: see product_level");
    return NULL;
#endif
}

static PyObject *py_run_layer(PyObject *self, PyObject *const *args, Py_ssize_t given) {
#ifdef HAS_PRODUCT
    long long a[6];
    Layer layer;
    if (given != 7 || !PyBytes_Check(args[0]) || PyBytes_GET_SIZE(args[0]) != sizeof layer) {
        PyErr_SetString(PyExc_TypeError, "got other arguments, wanted a plan and six addresses");
        return NULL;
    }
    if (!integers(args + 1, 6, 6, a)) return NULL;
    memcpy(&layer, PyBytes_AS_STRING(args[0]), sizeof layer);
    Quantize *q = &layer.quantize;
    Product *p = &layer.product;
    q->x = ADDRESS(a[0]);
    p->out = ADDRESS(a[1]);
    p->residual = ADDRESS(a[2]);
    q->step = ADDRESS(a[3]);
    q->zero = p->zero = ADDRESS(a[4]);
    p->scale = ADDRESS(a[5]);
    int failed;
    Py_BEGIN_ALLOW_THREADS
    q->codes = malloc(p->batch * p->height * p->width * p->channels);
    p->codes = q->codes;
    failed = q->codes == NULL || quantize_all(q, q->step) || multiply_all(p);
    free(q->codes);
    Py_END_ALLOW_THREADS
    if (failed) return PyErr_NoMemory();
    Py_RETURN_NONE;
#else
    PyErr_SetString(PyExc_RuntimeError, "got neither AVX512-VNNI nor AVX2, wanted one: see product_level");
    return NULL;
#endif
}

static PyMethodDef methods[] = {
    {"quantize", (PyCFunction)(void (*)(void))py_quantize, METH_FASTCALL, "See kernels/native.py."},
    {"finish", (PyCFunction)(void (*)(void))py_finish, METH_FASTCALL, "See kernels/native.py."},
    {"finish_matrix", (PyCFunction)(void (*)(void))py_finish_matrix, METH_FASTCALL, "See kernels/native.py."},
    {"product_level", py_product_level, METH_NOARGS, "What `product` can use here: 2 AVX512-VNNI, 1 AVX2, 0 nothing."},
    {"plan_layer", (PyCFunction)(void (*)(void))py_plan_layer, METH_FASTCALL, "See kernels/native.py."},
    {"run_layer", (PyCFunction)(void (*)(void))py_run_layer, METH_FASTCALL, "See kernels/native.py."},
    {"product", (PyCFunction)(void (*)(void))py_product, METH_FASTCALL, "See kernels/native.py."},
    {NULL, NULL, 0, NULL},
};

static struct PyModuleDef module = {PyModuleDef_HEAD_INIT, "_native", NULL, 0, methods, NULL, NULL, NULL, NULL};

PyMODINIT_FUNC PyInit__native(void) { return PyModuleDef_Init(&module); }
