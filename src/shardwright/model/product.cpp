// What a stage of 16-bit weights computes most on a CPU: products of activations with weights in their plain row-major
// order, norms, rotary embedding, and attention of rows each by itself. Of products:
//
// y[m][n] = sum over k of x[m][k] * w[n][k] (+ bias[n]), summed in float32, rounded once. (Where the CPU multiplies pairs
// of bfloat16 by itself, subnormal values count as zero.)
//
// Each output is summed in one fixed order, whatever the other rows, the tiling and the number of threads: within a
// piece of K_PIECE positions every lane of a vector adds its own products, then the lanes are added, then the pieces.
// So a row's result does not depend on what it is batched with.
//
// No header of torch and no library beyond C's: it compiles in a few seconds. Threads are those of the OpenMP runtime
// that torch has loaded; its entry point is handed in, so that there is never a second runtime.

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
#elif defined(__AVX__)
#define VECTOR_BYTES 32
#else
#define VECTOR_BYTES 16
#endif
#if defined(__F16C__)
#include <immintrin.h>
#endif

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "written for little-endian machines"
#endif

#define INLINE static inline __attribute__((always_inline))

typedef float Floats __attribute__((vector_size(VECTOR_BYTES)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));
typedef Words LooseWords __attribute__((aligned(2), may_alias));
typedef float Quarter __attribute__((vector_size(16)));
typedef uint32_t QuarterWords __attribute__((vector_size(16)));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (QuarterWords){__VA_ARGS__})
#endif

enum : long {
    LANES = VECTOR_BYTES / 4,
    PAIR = 2 * LANES,   // 16-bit values in a vector
    LINE = 32,          // 16-bit values in a cache line: the step of all loops over k
    K_PIECE = 1024,     // positions whose sum stays in the lanes; part of the order of summation
    ROWS = 4,           // rows of x in a tile
    N_BLOCK = 96,       // rows of w that stay in the second-level cache while many rows of x pass
    M_BLOCK = 128,      // rows of x that pass them
    AHEAD_BYTES = 8192,  // so far ahead of what is multiplied, weights are fetched from memory, or a tile's rows
    ASK_AGAIN = 8,      // so many lines of a tile's rows later, the same weights are asked for again
};

// How many rows of w a tile of so many rows of x takes: as many sums as the registers hold, and with one row of x no more
// than keep the CPU busy.
template <int MR>
struct Width {
#if defined(__AVX512F__) || defined(__aarch64__)
    enum { value = MR == 1 ? 8 : MR == 2 ? 8 : 6 };
#else
    enum { value = MR == 1 ? 4 : MR == 2 ? 4 : 3 };
#endif
};

// sum += a * b, all three in registers and rounded once. Left to itself GCC reads x again for each use and keeps sums in
// memory, for which the tile is a third slower.
#if defined(__x86_64__) && defined(__FMA__)
INLINE void add_product(Floats &sum, Floats a, Floats b) {
    __asm__("vfmadd231ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
}
#else
INLINE void add_product(Floats &sum, Floats a, Floats b) { sum += a * b; }
#endif

// bfloat16 is the upper half of a float32: the even positions of a vector become one vector, the odd ones another.
struct BFloat16 {
    typedef float Value;  // as which a row of x is multiplied
    enum : bool { in_pairs = false };
    INLINE Floats first(const uint16_t *from) { return (Floats)(*(const LooseWords *)from << 16); }
    INLINE Floats second(const uint16_t *from) { return (Floats)(*(const LooseWords *)from & 0xffff0000u); }
    INLINE long place(long k) { return k % 2 * LANES + k / 2; }  // where position k of a pair of vectors stands
    INLINE float to_float(uint16_t bits) {
        uint32_t word = (uint32_t)bits << 16;
        float value;
        memcpy(&value, &word, 4);
        return value;
    }
    INLINE uint16_t from_float(float value) {  // to the nearest, ties to even
        uint32_t word;
        memcpy(&word, &value, 4);
        const uint32_t rounded = (word + 0x7fffu + (word >> 16 & 1)) >> 16;
        return (uint16_t)((word & 0x7fffffffu) > 0x7f800000u ? word >> 16 | 0x40 : rounded);  // or not a number
    }
    INLINE void from_floats(Quarter values, uint16_t *to) {  // the same for four
        const QuarterWords words = (QuarterWords)values;
        const QuarterWords rounded = (words + 0x7fffu + (words >> 16 & 1)) >> 16;
        const QuarterWords bits = (words & 0x7fffffffu) > 0x7f800000u ? (words >> 16 | 0x40) : rounded;
        for (int i = 0; i < 4; i++) to[i] = (uint16_t)bits[i];
    }
};

#if defined(__AVX512BF16__)
// On CPUs that multiply pairs of bfloat16 themselves: twice as many products in an instruction, and nothing to widen.
// Elsewhere they are widened as ever.
struct BFloat16Pairs : BFloat16 {
    typedef uint16_t Value;
    enum : bool { in_pairs = true };
    INLINE void add_products(Floats &sum, Words a, Words b) {
        __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(a), "v"(b));
    }
};
#else
typedef BFloat16 BFloat16Pairs;
#endif

#if (defined(__F16C__) && defined(__AVX__)) || defined(__aarch64__)
#define HAS_FLOAT16 1
struct Float16 {
    typedef float Value;
    enum : bool { in_pairs = false };
    INLINE Floats widen(const uint16_t *from) {
#if defined(__AVX512F__)
        return (Floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i *)from));
#elif defined(__F16C__)
        return (Floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)from));
#else
        typedef __fp16 Halves __attribute__((vector_size(2 * LANES)));
        Halves halves;
        memcpy(&halves, from, sizeof halves);
        return __builtin_convertvector(halves, Floats);
#endif
    }
    INLINE Floats first(const uint16_t *from) { return widen(from); }
    INLINE Floats second(const uint16_t *from) { return widen(from + LANES); }
    INLINE long place(long k) { return k; }
    INLINE void from_floats(Quarter values, uint16_t *to) {
        for (int i = 0; i < 4; i++) to[i] = from_float(values[i]);
    }
#if defined(__F16C__)
    INLINE float to_float(uint16_t bits) { return _cvtsh_ss(bits); }
    INLINE uint16_t from_float(float value) { return (uint16_t)_cvtss_sh(value, 0); }
#else
    INLINE float to_float(uint16_t bits) {
        __fp16 half;
        memcpy(&half, &bits, 2);
        return half;
    }
    INLINE uint16_t from_float(float value) {
        __fp16 half = (__fp16)value;
        uint16_t bits;
        memcpy(&bits, &half, 2);
        return bits;
    }
#endif
};
#endif

// What an entry gives: its work for the kind of 16-bit values that it was called with, bfloat16 being 0 (and computed as
// `bfloat16`) and float16 1, or 2 for a kind that this machine can't widen.
#if defined(HAS_FLOAT16)
#define OF_KIND(work, bfloat16, shared, kind, ...) \
    ((kind) == 0   ? work<bfloat16>(shared, __VA_ARGS__) \
     : (kind) == 1 ? work<Float16>(shared, __VA_ARGS__)  \
                   : 2)
#else
#define OF_KIND(work, bfloat16, shared, kind, ...) ((kind) == 0 ? work<bfloat16>(shared, __VA_ARGS__) : 2)
#endif

INLINE Quarter fold(Floats value) {
    Quarter parts[VECTOR_BYTES / 16];
    memcpy(parts, &value, sizeof parts);
#if VECTOR_BYTES == 64
    parts[0] += parts[2];
    parts[1] += parts[3];
#endif
#if VECTOR_BYTES > 16
    parts[0] += parts[1];
#endif
    return parts[0];
}

INLINE float add_lanes(Floats value) {
    const Quarter lanes = fold(value);
    return (lanes[0] + lanes[2]) + (lanes[1] + lanes[3]);
}

// The same sums in the same order, of four at once.
INLINE Quarter add_lanes(const Floats *values) {
    const Quarter a = fold(values[0]), b = fold(values[1]), c = fold(values[2]), d = fold(values[3]);
    const Quarter ab = SHUFFLE(a, b, 0, 4, 1, 5) + SHUFFLE(a, b, 2, 6, 3, 7);
    const Quarter cd = SHUFFLE(c, d, 0, 4, 1, 5) + SHUFFLE(c, d, 2, 6, 3, 7);
    return SHUFFLE(ab, cd, 0, 1, 4, 5) + SHUFFLE(ab, cd, 2, 3, 6, 7);
}

// One product: what all threads share.
struct Job {
    const uint16_t *x;   // [m][k], rows x_stride apart
    const uint16_t *w;   // [n][k], rows w_stride apart
    const uint16_t *bias;  // [n], or null
    uint16_t *y;         // [m][n], contiguous
    void *wide;          // x as its kind multiplies it (Value), rows of wide_stride, in the order in which weights are widened
    long x_stride, w_stride, wide_stride;
    long m, n, k;
    long num_items, item_rows;
    long next;           // the next item that no thread has taken
};

// Up to so many rows of x, each weight is read from memory once, in memory's order.
template <class Kind>
constexpr long few_rows() {
    return Kind::in_pairs ? 32 : 12;
}

// While a tile is multiplied, later weights are fetched: FETCH cache lines for each line of one of the tile's rows, one
// after the other as memory has them, which DRAM and the CPU's own fetching like better than the order in which a tile
// reads them. Into the second-level cache: the first has no room for more than a tile and x, and no more requests to
// spare. A CPU may drop such a request while too many are under way (Zen 4 does), so each is made three times; one for a
// line that is there already costs next to nothing.
template <int FETCH>
INLINE void fetch_lines(const uint16_t *ahead) {
#pragma GCC unroll 8
    for (long i = 0; i < FETCH; i++) {
        __builtin_prefetch(ahead + i * LINE, 0, 2);
        __builtin_prefetch(ahead + (i - ASK_AGAIN * FETCH) * LINE, 0, 2);
        __builtin_prefetch(ahead + (i - 2 * ASK_AGAIN * FETCH) * LINE, 0, 2);
    }
}

// Keeps GCC from reading a value again for each use, which takes half as long again where arithmetic is what there is to
// wait for. (Where memory is, reading again was a tenth faster.)
INLINE void stay_in_register(Words &value) {
#if defined(__x86_64__)
    __asm__("" : "+v"(value));
#endif
}

// Add to sums[MR][NR] what a cache line of each row of w gives. `once`: the rows come from memory and pass one tile only.
template <class Kind, bool once, int MR, int NR>
INLINE void multiply_line(const uint16_t *w, long w_stride, const typename Kind::Value *x, long x_stride,
                          Floats (&sums)[MR][NR]) {
#pragma GCC unroll 4
    for (long k = 0; k < LINE; k += PAIR) {
        if constexpr (Kind::in_pairs) {
            Words pairs[NR];
#pragma GCC unroll 8
            for (int n = 0; n < NR; n++) {
                pairs[n] = *(const LooseWords *)(w + n * w_stride + k);
                if constexpr (!once) stay_in_register(pairs[n]);
            }
#pragma GCC unroll 4
            for (int m = 0; m < MR; m++) {
                const Words value = *(const LooseWords *)(x + m * x_stride + k);
#pragma GCC unroll 8
                for (int n = 0; n < NR; n++) Kind::add_products(sums[m][n], value, pairs[n]);
            }
        } else {
            Floats half[NR];
#pragma GCC unroll 8
            for (int n = 0; n < NR; n++) half[n] = Kind::first(w + n * w_stride + k);
#pragma GCC unroll 4
            for (int m = 0; m < MR; m++) {
                const Floats value = *(const Floats *)(x + m * x_stride + k);
#pragma GCC unroll 8
                for (int n = 0; n < NR; n++) add_product(sums[m][n], value, half[n]);
            }
#pragma GCC unroll 8
            for (int n = 0; n < NR; n++) half[n] = Kind::second(w + n * w_stride + k);
#pragma GCC unroll 4
            for (int m = 0; m < MR; m++) {
                const Floats value = *(const Floats *)(x + m * x_stride + k + LANES);
#pragma GCC unroll 8
                for (int n = 0; n < NR; n++) add_product(sums[m][n], value, half[n]);
            }
        }
    }
}

// The same for `lines` of them.
template <class Kind, int FETCH, int MR, int NR>
INLINE void multiply_lines(const uint16_t *w, long w_stride, const typename Kind::Value *x, long x_stride, long lines,
                           const uint16_t *ahead, Floats (&sums)[MR][NR]) {
    for (long line = 0; line < lines; line++) {
        fetch_lines<FETCH>(ahead + line * FETCH * LINE);
        multiply_line<Kind, FETCH == NR>(w + line * LINE, w_stride, x + line * LINE, x_stride, sums);
    }
}

// One piece of K_PIECE positions, or what is left of k from `begin` on.
template <class Kind, int FETCH, int MR, int NR>
INLINE void multiply_piece(const Job &job, const uint16_t *w, const typename Kind::Value *x, long begin,
                           const uint16_t *ahead, float (&totals)[MR][NR]) {
    Floats sums[MR][NR];
#pragma GCC unroll 4
    for (int m = 0; m < MR; m++)
#pragma GCC unroll 8
        for (int n = 0; n < NR; n++) sums[m][n] = Floats{};
    const long count = job.k - begin < K_PIECE ? job.k - begin : K_PIECE;
    const long lines = count / LINE, rest = count % LINE;
    ahead += begin * FETCH;
    multiply_lines<Kind, FETCH>(w + begin, job.w_stride, x + begin, job.wide_stride, lines, ahead, sums);
    if (rest) {  // reading on would leave the row, and the last one's memory
        uint16_t padded[NR][LINE];
        memset(padded, 0, sizeof padded);
        const long at = begin + lines * LINE;
        for (int n = 0; n < NR; n++) memcpy(padded[n], w + n * job.w_stride + at, rest * sizeof(uint16_t));
        multiply_lines<Kind, 0>(padded[0], LINE, x + at, job.wide_stride, 1, nullptr, sums);
    }
    const Floats *sum = &sums[0][0];
    float *total = &totals[0][0];
#pragma GCC unroll 8
    for (int i = 0; i + 4 <= MR * NR; i += 4) {
        Quarter four;
        memcpy(&four, total + i, sizeof four);
        four += add_lanes(sum + i);
        memcpy(total + i, &four, sizeof four);
    }
#pragma GCC unroll 4
    for (int i = MR * NR / 4 * 4; i < MR * NR; i++) total[i] += add_lanes(sum[i]);
}

template <class Kind>
INLINE void store(const Job &job, long m, long n, float total) {
    if (job.bias) total += Kind::to_float(job.bias[n]);
    job.y[m * job.n + n] = Kind::from_float(total);
}

template <class Kind, int MR, int NR>
INLINE void store_tile(const Job &job, long m, long n, float (&totals)[MR][NR]) {
    float *total = &totals[0][0];
    if (job.bias)
        for (int i = 0; i < MR * NR; i++) total[i] += Kind::to_float(job.bias[n + i % NR]);
    uint16_t rounded[MR * NR];
    int i = 0;
#pragma GCC unroll 8
    for (; i + 4 <= MR * NR; i += 4) {
        Quarter four;
        memcpy(&four, total + i, sizeof four);
        Kind::from_floats(four, rounded + i);
    }
    for (; i < MR * NR; i++) rounded[i] = Kind::from_float(total[i]);
    for (int r = 0; r < MR; r++) memcpy(job.y + (m + r) * job.n + n, rounded + r * NR, NR * sizeof(uint16_t));
}

// Rows of W that one thread takes, and where those begin that it takes after them.
struct Span {
    long begin, end;
    long following;
};

// Few rows of x: all of k for NR rows of w. Meanwhile SHARE rows of a later tile are fetched.
template <class Kind, int SHARE, int MR, int NR>
static void stream_tile(const Job &job, Span span, long m, long n, long part) {
    const uint16_t *w = job.w + n * job.w_stride;
    const auto *x = (const typename Kind::Value *)job.wide + m * job.wide_stride;
    const long row_bytes = job.w_stride * (long)sizeof(uint16_t);
    long later = n + (AHEAD_BYTES / (NR * row_bytes) + 1) * NR;
    if (later >= span.end) later += span.following - span.end;
    const uint16_t *ahead = job.w + (later + part * SHARE) * job.w_stride;
    float totals[MR][NR] = {};
    for (long begin = 0; begin < job.k; begin += K_PIECE)
        multiply_piece<Kind, SHARE>(job, w, x, begin, ahead, totals);
    store_tile<Kind, MR, NR>(job, m, n, totals);
}

// All rows of x, in as many parts as they are cut into.
template <class Kind, int SHARE, int NR>
INLINE void stream_rows(const Job &job, Span span, long n) {
    const long parts = (job.m + ROWS - 1) / ROWS;
    for (long part = 0; part < parts; part++) {
        const long m = job.m * part / parts, count = job.m * (part + 1) / parts - m;
        if (count == 4) stream_tile<Kind, SHARE, 4, NR>(job, span, m, n, part);
        else if (count == 3) stream_tile<Kind, SHARE, 3, NR>(job, span, m, n, part);
        else if (count == 2) stream_tile<Kind, SHARE, 2, NR>(job, span, m, n, part);
        else stream_tile<Kind, SHARE, 1, NR>(job, span, m, n, part);
    }
}

// PARTS is how many parts share the fetching; where there are more, the last ones fetch what others fetch later.
template <class Kind, int PARTS, int NR>
static void stream_span(const Job &job, Span span) {
    enum { SHARE = (NR + PARTS - 1) / PARTS };
    long n = span.begin;
    for (; n + NR <= span.end; n += NR) stream_rows<Kind, SHARE, NR>(job, span, n);
    for (; n < span.end; n++) stream_rows<Kind, 1, 1>(job, span, n);
}

// Many rows of x: for one piece of k, tiles of a block of w against MR rows of x.
template <class Kind, int MR>
static void pass_rows(const Job &job, long m, long n, long n_end, long begin, float *totals, long totals_stride) {
    const auto *x = (const typename Kind::Value *)job.wide + m * job.wide_stride;
    enum { NR = Width<MR>::value };
    long at = n;
    for (; at + NR <= n_end; at += NR) {
        float sums[MR][NR] = {};
        multiply_piece<Kind, 0>(job, job.w + at * job.w_stride, x, begin, nullptr, sums);
        for (int i = 0; i < MR; i++)
            for (int r = 0; r < NR; r++) totals[i * totals_stride + at - n + r] += sums[i][r];
    }
    for (; at < n_end; at++) {
        float sums[MR][1] = {};
        multiply_piece<Kind, 0>(job, job.w + at * job.w_stride, x, begin, nullptr, sums);
        for (int i = 0; i < MR; i++) totals[i * totals_stride + at - n] += sums[i][0];
    }
}

template <class Kind>
static void pass_block(const Job &job, long m, long m_end, long n, long n_end) {
    float totals[M_BLOCK * N_BLOCK];
    memset(totals, 0, sizeof totals);
    for (long begin = 0; begin < job.k; begin += K_PIECE) {
        long at = m;
        for (; at + ROWS <= m_end; at += ROWS)
            pass_rows<Kind, ROWS>(job, at, n, n_end, begin, totals + (at - m) * N_BLOCK, N_BLOCK);
        for (; at < m_end; at++) pass_rows<Kind, 1>(job, at, n, n_end, begin, totals + (at - m) * N_BLOCK, N_BLOCK);
    }
    for (long i = m; i < m_end; i++)
        for (long r = n; r < n_end; r++) store<Kind>(job, i, r, totals[(i - m) * N_BLOCK + r - n]);
}

template <class Work>
INLINE long take(Work &work) {
    return __atomic_fetch_add(&work.next, 1, __ATOMIC_RELAXED);
}

template <class Kind>
static void multiply_items(void *data) {
    Job &job = *(Job *)data;
    if (job.m <= few_rows<Kind>()) {
        for (long item = take(job), after; item < job.num_items; item = after) {
            after = take(job);  // already now, so that it can be fetched
            const long begin = item * job.item_rows;
            const long end = begin + job.item_rows < job.n ? begin + job.item_rows : job.n;
            const Span span = {begin, end, after < job.num_items ? after * job.item_rows : end};
            if (job.m == 1) stream_span<Kind, 1, Width<1>::value>(job, span);
            else if (job.m == 2) stream_span<Kind, 1, Width<2>::value>(job, span);
            else if (job.m <= ROWS) stream_span<Kind, 1, Width<ROWS>::value>(job, span);
            else if (job.m <= 2 * ROWS) stream_span<Kind, 2, Width<ROWS>::value>(job, span);
            else if (job.m <= 5 * ROWS) stream_span<Kind, 3, Width<ROWS>::value>(job, span);
            else stream_span<Kind, 6, Width<ROWS>::value>(job, span);
        }
        return;
    }
    const long m_blocks = (job.m + M_BLOCK - 1) / M_BLOCK;
    for (long item = take(job); item < job.num_items; item = take(job)) {
        const long n = item / m_blocks * N_BLOCK, m = item % m_blocks * M_BLOCK;
        const long n_end = n + N_BLOCK < job.n ? n + N_BLOCK : job.n;
        const long m_end = m + M_BLOCK < job.m ? m + M_BLOCK : job.m;
        pass_block<Kind>(job, m, m_end, n, n_end);
    }
}

template <class Kind>
static void widen_row(const Job &job, long m) {
    const uint16_t *from = job.x + m * job.x_stride;
    auto *to = (typename Kind::Value *)job.wide + m * job.wide_stride;
    if constexpr (Kind::in_pairs) {
        memcpy(to, from, job.k * sizeof *to);
        memset(to + job.k, 0, (job.wide_stride - job.k) * sizeof *to);
    } else {
        long k = 0;
        for (; k + PAIR <= job.k; k += PAIR) {
            *(Floats *)(to + k) = Kind::first(from + k);
            *(Floats *)(to + k + LANES) = Kind::second(from + k);
        }
        if (k == job.wide_stride) return;
        memset(to + k, 0, (job.wide_stride - k) * sizeof *to);
        for (long i = k; i < job.k; i++) to[k + Kind::place(i - k)] = Kind::to_float(from[i]);
    }
}

template <class Kind>
static void widen_items(void *data) {
    Job &job = *(Job *)data;
    for (long m = take(job); m < job.num_items; m = take(job)) widen_row<Kind>(job, m);
}

// Always called for all threads: of a team that is smaller than the last one, libgomp ends the others' threads.
typedef void (*Parallel)(void (*)(void *), void *, unsigned, unsigned);

template <class Work>
INLINE void run(Parallel parallel, void (*work)(void *), Work &shared, long num_items, long threads) {
    shared.next = 0;
    if (threads > 1 && num_items > 1 && parallel) parallel(work, &shared, (unsigned)threads, 0);
    else work(&shared);
}

// Rows of x, mostly in float32, that are kept from call to call, one room for each calling thread.
static const long KEPT_BYTES = 1 << 20;
static thread_local void *kept = nullptr;

// How far apart rows of x lie once they are copied: an odd number of cache lines. With rows a power of two apart, all
// would lie in the same few places of a cache.
INLINE long wide_stride_for(long k) { return ((k + LINE - 1) / LINE | 1) * LINE; }

// Cut a product into items that threads take.
template <class Kind>
static void cut_product(Job &job, long threads) {
    if (job.m <= few_rows<Kind>()) {
        // a piece of some 64 KiB at a time, so that a thread that is held up holds up nobody else
        long rows = 32768 / job.k / 24 * 24;
        const long share = job.n / (4 * threads) / 24 * 24;
        if (rows > share) rows = share;
        job.item_rows = rows < 24 ? 24 : rows;
        job.num_items = (job.n + job.item_rows - 1) / job.item_rows;
    } else {
        job.num_items = (job.n + N_BLOCK - 1) / N_BLOCK * ((job.m + M_BLOCK - 1) / M_BLOCK);
    }
}

template <class Kind>
static int multiply(Job &job, Parallel parallel, long threads) {
    job.wide_stride = wide_stride_for(job.k);
    const long num_bytes = job.m * job.wide_stride * (long)sizeof(typename Kind::Value);
    void *room = kept;
    if (num_bytes > KEPT_BYTES || !room) {
        if (posix_memalign(&room, 64, num_bytes > KEPT_BYTES ? num_bytes : KEPT_BYTES)) return 1;
        if (num_bytes <= KEPT_BYTES) kept = room;
    }
    job.wide = room;
    const bool is_small = job.n * job.k < 32768;  // waking a thread takes longer
    job.num_items = job.m;
    run(parallel, widen_items<Kind>, job, job.num_items, job.m * job.k < 65536 ? 1 : threads);
    cut_product<Kind>(job, threads);
    run(parallel, multiply_items<Kind>, job, job.num_items, is_small ? 1 : threads);
    if (num_bytes > KEPT_BYTES) free(room);
    return 0;
}

// One root-mean-square norm (Zhang and Sennrich, 2019): what all threads share.
struct Norm {
    const uint16_t *x;       // [rows][size], contiguous
    const uint16_t *weight;  // [size]
    uint16_t *y;             // as x
    long rows, size;
    float epsilon;
    int form;
    long next;  // the next row that no thread has taken
};

// Where families round, and what they multiply by.
enum : int {
    ROUNDED_TWICE = 0,   // round(weight * round(x / rms)): Llama's
    ONE_PLUS_WEIGHT = 1,  // round((1 + weight) * x / rms): Gemma's
    ROUNDED_ONCE = 2,    // round(weight * x / rms): OLMo 2's
};

template <class Kind>
static void norm_row(const Norm &norm, const uint16_t *x, uint16_t *y) {
    // Pieces of a fixed size stay in registers and caches, and need no memory of their own.
    enum : long { PIECE = 512 };
    float wide[PIECE] __attribute__((aligned(64)));
    Floats sums[4] = {};
    for (long begin = 0; begin < norm.size; begin += PIECE) {
        const long count = norm.size - begin < PIECE ? norm.size - begin : PIECE;
        const long padded = (count + 4 * LANES - 1) / (4 * LANES) * (4 * LANES);
        for (long k = 0; k < count; k++) wide[k] = Kind::to_float(x[begin + k]);
        for (long k = count; k < padded; k++) wide[k] = 0.0f;
        for (long k = 0; k < padded; k += 4 * LANES)
            for (long i = 0; i < 4; i++) {
                const Floats value = *(const Floats *)(wide + k + i * LANES);
                sums[i] += value * value;
            }
    }
    const float mean = add_lanes((sums[0] + sums[1]) + (sums[2] + sums[3])) / (float)norm.size;
    const float scale = 1.0f / __builtin_sqrtf(mean + norm.epsilon);
    const uint16_t *weight = norm.weight;
    if (norm.form == ROUNDED_TWICE)
        for (long k = 0; k < norm.size; k++) {
            const float once = Kind::to_float(Kind::from_float(Kind::to_float(x[k]) * scale));
            y[k] = Kind::from_float(Kind::to_float(weight[k]) * once);
        }
    else if (norm.form == ONE_PLUS_WEIGHT)
        for (long k = 0; k < norm.size; k++)
            y[k] = Kind::from_float(Kind::to_float(x[k]) * scale * (1.0f + Kind::to_float(weight[k])));
    else
        for (long k = 0; k < norm.size; k++)
            y[k] = Kind::from_float(Kind::to_float(weight[k]) * (Kind::to_float(x[k]) * scale));
}

template <class Kind>
static void norm_rows(void *data) {
    Norm &norm = *(Norm *)data;
    for (long row = take(norm); row < norm.rows; row = take(norm))
        norm_row<Kind>(norm, norm.x + row * norm.size, norm.y + row * norm.size);
}

template <class Kind>
static int normalise(Norm &norm, Parallel parallel, long threads) {
    run(parallel, norm_rows<Kind>, norm, norm.rows, norm.rows * norm.size < 65536 ? 1 : threads);
    return 0;
}

// Nonzero: a kind that this machine can't widen.
extern "C" int shardwright_rms_norm(const void *x, const void *weight, void *y, long rows, long size, float epsilon,
                                    int form, int kind, long threads, Parallel parallel) {
    Norm norm = {(const uint16_t *)x, (const uint16_t *)weight, (uint16_t *)y, rows, size, epsilon, form, 0};
    return OF_KIND(normalise, BFloat16, norm, kind, parallel, threads);
}

// Rotary embedding (Su et al., 2021) of queries and keys, with halves turned into each other: what all threads share.
struct Turned {
    const uint16_t *x;   // [rows][heads][size]: rows and heads so far apart
    uint16_t *y;
    long heads, x_row, x_head, y_row, y_head;
};

struct Rotary {
    Turned queries, keys;
    const uint16_t *cosines, *sines;  // [rows][size]
    long cosine_row, sine_row;
    long rows, size;
    long next;  // the next row that no thread has taken
};

// Each product is rounded and then their sum, as torch does it.
template <class Kind>
INLINE uint16_t turned(uint16_t a, uint16_t cosine, float b, uint16_t sine) {
    const float first = Kind::to_float(Kind::from_float(Kind::to_float(a) * Kind::to_float(cosine)));
    const float second = Kind::to_float(Kind::from_float(b * Kind::to_float(sine)));
    return Kind::from_float(first + second);
}

template <class Kind>
static void turn_heads(const Turned &turn, long row, long size, const uint16_t *__restrict cosines,
                       const uint16_t *__restrict sines) {
    const long half = size / 2;
    for (long head = 0; head < turn.heads; head++) {
        const uint16_t *__restrict x = turn.x + row * turn.x_row + head * turn.x_head;
        uint16_t *__restrict y = turn.y + row * turn.y_row + head * turn.y_head;
        for (long i = 0; i < half; i++) y[i] = turned<Kind>(x[i], cosines[i], -Kind::to_float(x[half + i]), sines[i]);
        for (long i = half; i < size; i++) y[i] = turned<Kind>(x[i], cosines[i], Kind::to_float(x[i - half]), sines[i]);
    }
}

template <class Kind>
static void turn_row(const Rotary &rotary, long row) {
    const uint16_t *cosines = rotary.cosines + row * rotary.cosine_row;
    const uint16_t *sines = rotary.sines + row * rotary.sine_row;
    turn_heads<Kind>(rotary.queries, row, rotary.size, cosines, sines);
    turn_heads<Kind>(rotary.keys, row, rotary.size, cosines, sines);
}

template <class Kind>
static void turn_rows(void *data) {
    Rotary &rotary = *(Rotary *)data;
    for (long row = take(rotary); row < rotary.rows; row = take(rotary)) turn_row<Kind>(rotary, row);
}

template <class Kind>
static int rotate(Rotary &rotary, Parallel parallel, long threads) {
    const long num_values = rotary.rows * (rotary.queries.heads + rotary.keys.heads) * rotary.size;
    run(parallel, turn_rows<Kind>, rotary, rotary.rows, num_values < 32768 ? 1 : threads);
    return 0;
}

// The strides are of rows and of heads: queries', keys' and those of both results. Nonzero: a kind that this machine
// can't widen.
extern "C" int shardwright_rotate(const void *queries, const void *keys, const void *cosines, const void *sines,
                                  void *queries_out, void *keys_out, long q_row, long k_row, long q_out_row,
                                  long k_out_row, long q_head, long k_head, long q_out_head, long k_out_head,
                                  long cosine_row, long sine_row, long rows, long heads, long kv_heads, long size,
                                  int kind, long threads, Parallel parallel) {
    Rotary rotary = {};
    rotary.queries = {(const uint16_t *)queries, (uint16_t *)queries_out, heads, q_row, q_head, q_out_row, q_out_head};
    rotary.keys = {(const uint16_t *)keys, (uint16_t *)keys_out, kv_heads, k_row, k_head, k_out_row, k_out_head};
    rotary.cosines = (const uint16_t *)cosines;
    rotary.sines = (const uint16_t *)sines;
    rotary.cosine_row = cosine_row;
    rotary.sine_row = sine_row;
    rotary.rows = rows;
    rotary.size = size;
    return OF_KIND(rotate, BFloat16, rotary, kind, parallel, threads);
}

// Attention of rows, each by itself, over K and V in blocks: what all threads share.
struct Attention {
    const uint16_t *q;       // heads of key_dim, q_head apart, in rows that are q_row apart
    const uint16_t *keys;    // [slots][kv_heads][key_dim]
    const uint16_t *values;  // [slots][kv_heads][value_dim]
    uint16_t *y;             // [rows][kv_heads * shared][value_dim]
    const int64_t *table;    // of each row: which it is, the first position that it sees, the one after the last, and
                             // where in `table` its sequence's blocks begin, that of position 0 first
    float *parts;            // [items][shared][2 + value_dim]: of each chunk the maximum, the sum, and the weighted values
    const int32_t *chunks;   // [items / kv_heads][2]: row of the table and chunk
    const int32_t *firsts;   // [rows]: where a row's first chunk stands in `chunks`
    long q_row, q_head;
    long kv_heads, shared, key_dim, value_dim, block_size, num_rows;
    float scaling;
    long num_items, next;
};

enum : long {
    TABLE_FIELDS = 4,
    KEYS_AHEAD = 32,      // so many positions ahead, keys are fetched from memory
    CHUNK = 256,          // positions that one thread attends to at a time; part of the order of summation
    MAX_KEY_DIM = 1024,   // one piece of a product
};

typedef int32_t Ints __attribute__((vector_size(VECTOR_BYTES)));

// e to the power of x, for x up to 0: the method and the coefficients of Cephes' expf (Moshier).
INLINE Floats exp_of(Floats x) {
    const Floats least = Floats{} - 87.0f;
    x = x > least ? x : least;
    const Floats n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;  // to the nearest whole number
    const Floats r = (x - n * 0.693359375f) - n * -2.12194440e-4f;
    Floats sum = r * 1.9875691500e-4f + 1.3981999507e-3f;
    sum = sum * r + 8.3334519073e-3f;
    sum = sum * r + 4.1665795894e-2f;
    sum = sum * r + 1.6666665459e-1f;
    sum = sum * r + 5.0000001201e-1f;
    sum = sum * r * r + r + 1.0f;
    return sum * (Floats)((__builtin_convertvector(n, Ints) + 127) << 23);
}

// Scores of `count` positions, LANES at a time and padded, become their weights; gives the maximum and the sum.
INLINE void weigh(float *scores, long count, float scaling, float &maximum, float &sum) {
    const long padded = (count + LANES - 1) / LANES * LANES;
    for (long j = count; j < padded; j++) scores[j] = scores[count - 1];
    Floats largest = *(Floats *)scores * scaling;
    for (long j = 0; j < padded; j += LANES) {
        const Floats scaled = *(Floats *)(scores + j) * scaling;
        *(Floats *)(scores + j) = scaled;
        largest = scaled > largest ? scaled : largest;
    }
    maximum = largest[0];
    for (long i = 1; i < LANES; i++) maximum = largest[i] > maximum ? largest[i] : maximum;
    for (long j = 0; j < padded; j += LANES) *(Floats *)(scores + j) = exp_of(*(Floats *)(scores + j) - maximum);
    for (long j = count; j < padded; j++) scores[j] = 0.0f;
    Floats sums = {};
    for (long j = 0; j < padded; j += LANES) sums += *(Floats *)(scores + j);
    sum = add_lanes(sums);
}

// Rows of K or V lie so far apart that a CPU does not fetch them by itself: those of the values come while keys are
// multiplied, and those of later keys too.
template <int COUNT>
INLINE void fetch_rows(const uint16_t *const *rows, long begin, long end, long size) {
    for (long j = begin; j < begin + COUNT && j < end; j++)
        for (long k = 0; k < size; k += LINE) __builtin_prefetch(rows[j] + k, 0, 2);
}

// One chunk of one row for MR query heads that share a KV head.
template <class Kind, int MR>
static void attend_heads(const Attention &a, const uint16_t *q, const uint16_t *const *keys,
                         const uint16_t *const *values, long count, float *part) {
    float wide[MR * MAX_KEY_DIM] __attribute__((aligned(64)));
    float scores[MR][CHUNK] __attribute__((aligned(64)));
    Job job = {};
    job.x = q;
    job.x_stride = a.q_head;
    job.wide = wide;
    job.k = a.key_dim;
    job.wide_stride = (a.key_dim + LINE - 1) / LINE * LINE;
    job.w_stride = a.kv_heads * a.key_dim;
    for (long m = 0; m < MR; m++) widen_row<Kind>(job, m);
    enum { NR = 4 };  // keys at a time, where they follow each other; what a sum is does not depend on it
    for (long j = 0; j < count;) {
        fetch_rows<NR>(keys, j + KEYS_AHEAD, count, a.key_dim);
        fetch_rows<NR>(values, j, count, a.value_dim);
        bool follow = j + NR <= count;
        for (long r = 1; follow && r < NR; r++) follow = keys[j + r] == keys[j] + r * job.w_stride;
        if (follow) {
            float sums[MR][NR] = {};
            multiply_piece<Kind, 0>(job, keys[j], wide, 0, nullptr, sums);
            for (int m = 0; m < MR; m++)
                for (int r = 0; r < NR; r++) scores[m][j + r] = sums[m][r];
            j += NR;
        } else {
            float sums[MR][1] = {};
            multiply_piece<Kind, 0>(job, keys[j], wide, 0, nullptr, sums);
            for (int m = 0; m < MR; m++) scores[m][j] = sums[m][0];
            j++;
        }
    }
    const long stride = 2 + a.value_dim;
    for (int m = 0; m < MR; m++) weigh(scores[m], count, a.scaling, part[m * stride], part[m * stride + 1]);
    for (long k = 0; k < a.value_dim; k += PAIR) {
        Floats sums[MR][2] = {};
        for (long j = 0; j < count; j++) {
            const Floats first = Kind::first(values[j] + k), second = Kind::second(values[j] + k);
#pragma GCC unroll 4
            for (int m = 0; m < MR; m++) {
                const Floats weight = Floats{} + scores[m][j];
                add_product(sums[m][0], weight, first);
                add_product(sums[m][1], weight, second);
            }
        }
        for (int m = 0; m < MR; m++) {
            memcpy(part + m * stride + 2 + k, &sums[m][0], sizeof(Floats));
            memcpy(part + m * stride + 2 + k + LANES, &sums[m][1], sizeof(Floats));
        }
    }
}

template <class Kind>
static void attend_items(void *data) {
    Attention &a = *(Attention *)data;
    for (long item = take(a); item < a.num_items; item = take(a)) {
        const int32_t *chunk = a.chunks + item / a.kv_heads * 2;
        const long head = item % a.kv_heads;
        const int64_t *entry = a.table + chunk[0] * TABLE_FIELDS;
        const int64_t *blocks = a.table + entry[3];
        const long begin = entry[1] + chunk[1] * CHUNK;
        const long count = entry[2] - begin < CHUNK ? entry[2] - begin : CHUNK;
        const uint16_t *keys[CHUNK], *values[CHUNK];
        for (long j = 0; j < count; j++) {
            const long position = begin + j;
            const long slot = blocks[position / a.block_size] * a.block_size + position % a.block_size;
            keys[j] = a.keys + (slot * a.kv_heads + head) * a.key_dim;
            values[j] = a.values + (slot * a.kv_heads + head) * a.value_dim;
        }
        const uint16_t *q = a.q + entry[0] * a.q_row + head * a.shared * a.q_head;
        float *part = a.parts + item * a.shared * (2 + a.value_dim);
        for (long m = 0; m < a.shared;) {
            const long left = a.shared - m;
            const uint16_t *from = q + m * a.q_head;
            float *to = part + m * (2 + a.value_dim);
            if (left >= 4) attend_heads<Kind, 4>(a, from, keys, values, count, to), m += 4;
            else if (left == 3) attend_heads<Kind, 3>(a, from, keys, values, count, to), m += 3;
            else if (left == 2) attend_heads<Kind, 2>(a, from, keys, values, count, to), m += 2;
            else attend_heads<Kind, 1>(a, from, keys, values, count, to), m += 1;
        }
    }
}

// Bring the chunks of one row and head together, in their order.
template <class Kind>
static void join_chunks(const Attention &a, long index, long head) {
    const long stride = 2 + a.value_dim, heads = a.kv_heads * a.shared;
    const long group = head / a.shared, m = head % a.shared;
    const int64_t *entry = a.table + index * TABLE_FIELDS;
    const long num_chunks = (entry[2] - entry[1] + CHUNK - 1) / CHUNK;
    float *first = a.parts + ((a.firsts[index] * a.kv_heads + group) * a.shared + m) * stride;
    const long apart = a.kv_heads * a.shared * stride;
    float maximum = first[0];
    for (long c = 1; c < num_chunks; c++) maximum = first[c * apart] > maximum ? first[c * apart] : maximum;
    float sum = 0.0f;
    for (long c = 0; c < num_chunks; c++) {
        const float *part = first + c * apart;
        const float scale = num_chunks == 1 ? 1.0f : exp_of(Floats{} + (part[0] - maximum))[0];
        sum += part[1] * scale;
        if (c == 0)
            for (long k = 0; k < a.value_dim; k++) first[2 + k] *= scale;
        else
            for (long k = 0; k < a.value_dim; k++) first[2 + k] += part[2 + k] * scale;
    }
    uint16_t *y = a.y + (entry[0] * heads + head) * a.value_dim;
    const float over = 1.0f / sum;
    for (long k = 0; k < a.value_dim; k++)
        y[k] = Kind::from_float(first[2 + k / PAIR * PAIR + Kind::place(k % PAIR)] * over);
}

template <class Kind>
static void join_items(void *data) {
    Attention &a = *(Attention *)data;
    const long heads = a.kv_heads * a.shared;
    for (long item = take(a); item < a.num_rows * heads; item = take(a))
        join_chunks<Kind>(a, item / heads, item % heads);
}

// Count the items into which an attention is cut for threads to take. Nonzero: not for this kernel.
static int count_items(Attention &a) {
    if (a.value_dim % PAIR || a.key_dim > MAX_KEY_DIM) return 2;
    long num_chunks = 0;
    for (long i = 0; i < a.num_rows; i++) {
        const int64_t *entry = a.table + i * TABLE_FIELDS;
        num_chunks += (entry[2] - entry[1] + CHUNK - 1) / CHUNK;
    }
    a.num_items = num_chunks * a.kv_heads;
    return 0;
}

// What `cut_attention` takes, in bytes: of parts, which are of use from an attention's items to its joining, and of lists.
static long parts_bytes(const Attention &a) { return a.num_items * a.shared * (2 + a.value_dim) * (long)sizeof(float); }
static long lists_bytes(const Attention &a) { return (2 * a.num_items / a.kv_heads + a.num_rows) * (long)sizeof(int32_t); }

// Cut an attention whose items were counted.
static void cut_attention(Attention &a, void *parts, void *lists) {
    a.parts = (float *)parts;
    int32_t *chunks = (int32_t *)lists, *firsts = chunks + 2 * a.num_items / a.kv_heads;
    long at = 0;
    for (long i = 0; i < a.num_rows; i++) {
        const int64_t *entry = a.table + i * TABLE_FIELDS;
        firsts[i] = (int32_t)at;
        for (long c = 0; c * CHUNK < entry[2] - entry[1]; c++, at++) {
            chunks[2 * at] = (int32_t)i;
            chunks[2 * at + 1] = (int32_t)c;
        }
    }
    a.chunks = chunks;
    a.firsts = firsts;
}

template <class Kind>
static int attend(Attention &a, Parallel parallel, long threads) {
    const int status = count_items(a);
    if (status) return status;
    void *room;
    if (posix_memalign(&room, 64, parts_bytes(a) + lists_bytes(a))) return 1;
    cut_attention(a, room, (char *)room + parts_bytes(a));
    long num_positions = 0;
    for (long i = 0; i < a.num_rows; i++)
        num_positions += a.table[i * TABLE_FIELDS + 2] - a.table[i * TABLE_FIELDS + 1];
    // waking a thread takes as long as some thousand products
    const bool is_small = num_positions * a.kv_heads * a.shared * (a.key_dim + a.value_dim) < 131072;
    const bool is_long = a.num_items > 4 * a.num_rows * a.kv_heads;  // else there is little to join
    run(parallel, attend_items<Kind>, a, a.num_items, is_small ? 1 : threads);
    run(parallel, join_items<Kind>, a, a.num_rows * a.kv_heads * a.shared, is_small || !is_long ? 1 : threads);
    free(room);
    return 0;
}

// Nonzero: no memory, or a kind or shape that is not for this kernel.
extern "C" int shardwright_attend(const void *q, long q_row, long q_head, const void *keys, const void *values, void *y,
                                  const int64_t *table, long num_rows, long kv_heads, long shared, long key_dim,
                                  long value_dim, long block_size, float scaling, int kind, long threads,
                                  Parallel parallel) {
    Attention a = {};
    a.q = (const uint16_t *)q;
    a.keys = (const uint16_t *)keys;
    a.values = (const uint16_t *)values;
    a.y = (uint16_t *)y;
    a.table = table;
    a.q_row = q_row;
    a.q_head = q_head;
    a.kv_heads = kv_heads;
    a.shared = shared;
    a.key_dim = key_dim;
    a.value_dim = value_dim;
    a.block_size = block_size;
    a.num_rows = num_rows;
    a.scaling = scaling;
    return OF_KIND(attend, BFloat16, a, kind, parallel, threads);
}

// Nonzero: no memory, or a kind that this machine can't widen.
extern "C" int shardwright_multiply(const void *x, long x_stride, const void *w, long w_stride, const void *bias,
                                    void *y, long m, long n, long k, int kind, long threads, Parallel parallel) {
    Job job = {(const uint16_t *)x, (const uint16_t *)w, (const uint16_t *)bias, (uint16_t *)y, nullptr,
               x_stride, w_stride, 0, m, n, k, 0, 0, 0};
    return OF_KIND(multiply, BFloat16Pairs, job, kind, parallel, threads);
}
