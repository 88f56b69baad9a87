// Compiled behind product.cpp, as one text with it: activation functions, and runs of whole decoder layers in one call.
//
// A layer is a list of operations (`recording.py` writes it) in phases. Threads take rows, or pieces of weights, within a
// phase and wait for each other between phases. A phase of row operations computes all of them for one row before the
// next: whatever they hand to each other is still in the first-level cache. Each operation is computed by the function
// that computes it alone, so a layer's result has the same bits either way. A layer reads what the one before it wrote, so
// threads wait for each other between layers too.

// --- activation functions and sums -------------------------------------------------------------------------------

INLINE void store_pair(BFloat16, uint16_t *to, Floats first, Floats second) {
    const Words a = (Words)first, b = (Words)second;
    const Words low = (a & 0x7fffffffu) > 0x7f800000u ? (a | 0x400000u) : a + 0x7fffu + (a >> 16 & 1);
    const Words high = (b & 0x7fffffffu) > 0x7f800000u ? (b | 0x400000u) : b + 0x7fffu + (b >> 16 & 1);
    *(LooseWords *)to = low >> 16 | (high & 0xffff0000u);
}

#if defined(HAS_FLOAT16)
INLINE void store_pair(Float16, uint16_t *to, Floats first, Floats second) {
    for (long i = 0; i < LANES; i++) to[i] = Float16::from_float(first[i]);
    for (long i = 0; i < LANES; i++) to[LANES + i] = Float16::from_float(second[i]);
}
#endif

// Rows of values, and what becomes of them; with one operand, `b` is `a`.
struct Rowwise {
    const uint16_t *a, *b;
    uint16_t *y;
    long a_row, b_row, y_row, width;
    float scalar;
    int form;
    long rows, next;
};

// Each gives float32, which is rounded once.
struct Sum {
    INLINE Floats of(Floats a, Floats b, float) { return a + b; }
};
struct Times {
    INLINE Floats of(Floats a, Floats b, float) { return a * b; }
};
struct Scaled {
    INLINE Floats of(Floats a, Floats, float scalar) { return a * scalar; }
};

INLINE Floats magnitude(Floats x) { return (Floats)((Words)x & 0x7fffffffu); }

// x / (1 + exp(-x)): SiLU (Hendrycks and Gimpel, 2016).
struct Silu {
    INLINE Floats of(Floats x, Floats, float) {
        const Floats e = exp_of(-magnitude(x)), zero = {};
        return x < zero ? x * e / (e + 1.0f) : x / (e + 1.0f);
    }
};

// x / 2 * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x^3))): GELU in its approximation by tanh (as Silu).
struct GeluTanh {
    INLINE Floats of(Floats x, Floats, float) {
        const Floats inner = 0.79788456080286535588f * (x + 0.044715f * (x * x * x)), zero = {};
        const Floats e = exp_of(-2.0f * magnitude(inner));
        const Floats size = (1.0f - e) / (1.0f + e);
        return 0.5f * x * (1.0f + (inner < zero ? -size : size));
    }
};

enum : int { SILU = 0, GELU_TANH = 1 };

template <class Kind, class Function>
INLINE void change_row(const uint16_t *a, const uint16_t *b, uint16_t *y, long width, float scalar) {
    long k = 0;
    for (; k + PAIR <= width; k += PAIR)
        store_pair(Kind(), y + k, Function::of(Kind::first(a + k), Kind::first(b + k), scalar),
                   Function::of(Kind::second(a + k), Kind::second(b + k), scalar));
    if (k == width) return;
    uint16_t rest[3][PAIR] = {};
    memcpy(rest[0], a + k, (width - k) * sizeof(uint16_t));
    memcpy(rest[1], b + k, (width - k) * sizeof(uint16_t));
    store_pair(Kind(), rest[2], Function::of(Kind::first(rest[0]), Kind::first(rest[1]), scalar),
               Function::of(Kind::second(rest[0]), Kind::second(rest[1]), scalar));
    memcpy(y + k, rest[2], (width - k) * sizeof(uint16_t));
}

template <class Kind, class Function>
static void change(const Rowwise &r, long row) {
    change_row<Kind, Function>(r.a + row * r.a_row, r.b + row * r.b_row, r.y + row * r.y_row, r.width, r.scalar);
}

template <class Kind>
static void activate_row(const Rowwise &rowwise, long row) {
    if (rowwise.form == SILU) change<Kind, Silu>(rowwise, row);
    else change<Kind, GeluTanh>(rowwise, row);
}

template <class Kind>
static void activate_rows(void *data) {
    Rowwise &rowwise = *(Rowwise *)data;
    for (long row = take(rowwise); row < rowwise.rows; row = take(rowwise)) activate_row<Kind>(rowwise, row);
}

template <class Kind>
static int activate(Rowwise &rowwise, Parallel parallel, long threads) {
    run(parallel, activate_rows<Kind>, rowwise, rowwise.rows, rowwise.rows * rowwise.width < 16384 ? 1 : threads);
    return 0;
}

// Nonzero: a kind that this machine can't widen. Both are contiguous.
extern "C" int shardwright_activate(const void *x, void *y, long rows, long width, int form, int kind, long threads,
                                    Parallel parallel) {
    const uint16_t *a = (const uint16_t *)x;
    Rowwise rowwise = {a, a, (uint16_t *)y, width, width, width, width, 0.0f, form, rows, 0};
    return OF_KIND(activate, BFloat16, rowwise, kind, parallel, threads);
}

// --- whole layers ------------------------------------------------------------------------------------------------

// New keys or values on their way into their slots: [rows][heads][size], rows and heads so far apart.
struct Kept {
    const uint16_t *x;
    uint16_t *slots;         // [slots][heads][size]
    const int64_t *indices;  // of each row
    long row, head, heads, size;
};

// What an operation does, as recording.py numbers it.
enum : long { WIDEN, MULTIPLY, NORM, ROTATE, KEEP, ATTEND, JOIN, ADD, TIMES, SCALE, ACTIVATE };

// An operation as recording.py writes it: where its operands begin, each as the number of a base and bytes behind it,
// and its sizes in the order in which `read_operation` takes them. Strides count values.
struct Record {
    int64_t kind, phase;
    int64_t base[6], offset[6];
    int64_t size[13];
    double value;
};

struct Operation {
    long kind, phase;
    union {
        Job job;
        Norm norm;
        Rotary rotary;
        Kept kept;
        Attention attention;
        Rowwise rowwise;
        const Attention *joined;
    };
};

enum : long { MAX_OPERATIONS = 64 };

struct Layer {
    Operation operations[MAX_OPERATIONS];
    long count, rows;
    long next[MAX_OPERATIONS];  // of each phase the next row that no thread has taken
};

// Layers of which each reads what the one before it wrote.
struct Run {
    Layer *layers;
    long num_layers;
    void (*barrier)();  // null for one thread
};

template <class Kind, class Multiplied>
static void compute_row(const Operation &operation, long row) {
    switch (operation.kind) {
    case WIDEN: widen_row<Multiplied>(operation.job, row); break;
    case NORM: {
        const long each = operation.norm.rows, size = operation.norm.size;
        for (long i = row * each; i < (row + 1) * each; i++)
            norm_row<Kind>(operation.norm, operation.norm.x + i * size, operation.norm.y + i * size);
        break;
    }
    case ROTATE: turn_row<Kind>(operation.rotary, row); break;
    case KEEP: {
        const Kept &kept = operation.kept;
        uint16_t *slot = kept.slots + kept.indices[row] * kept.heads * kept.size;
        for (long head = 0; head < kept.heads; head++)
            memcpy(slot + head * kept.size, kept.x + row * kept.row + head * kept.head, kept.size * sizeof(uint16_t));
        break;
    }
    case JOIN:
        for (long head = 0; head < operation.joined->kv_heads * operation.joined->shared; head++)
            join_chunks<Kind>(*operation.joined, row, head);
        break;
    case ADD: change<Kind, Sum>(operation.rowwise, row); break;
    case TIMES: change<Kind, Times>(operation.rowwise, row); break;
    case SCALE: change<Kind, Scaled>(operation.rowwise, row); break;
    default: activate_row<Kind>(operation.rowwise, row);
    }
}

template <class Kind, class Multiplied>
static void compute_layer(Layer &layer, void (*barrier)()) {
    for (long begin = 0, end; begin < layer.count; begin = end) {
        if (begin && barrier) barrier();
        const long phase = layer.operations[begin].phase;
        for (end = begin + 1; end < layer.count && layer.operations[end].phase == phase; end++) continue;
        Operation &first = layer.operations[begin];
        if (first.kind == MULTIPLY) {
            for (long i = begin; i < end; i++) multiply_items<Multiplied>(&layer.operations[i].job);
        } else if (first.kind == ATTEND) {
            for (long i = begin; i < end; i++) attend_items<Kind>(&layer.operations[i].attention);
        } else {
            for (;;) {
                const long row = __atomic_fetch_add(&layer.next[phase], 1, __ATOMIC_RELAXED);
                if (row >= layer.rows) break;
                for (long i = begin; i < end; i++) compute_row<Kind, Multiplied>(layer.operations[i], row);
            }
        }
    }
}

template <class Kind, class Multiplied>
static void compute_run(void *data) {
    Run &run = *(Run *)data;
    for (long i = 0; i < run.num_layers; i++) {
        if (i && run.barrier) run.barrier();
        compute_layer<Kind, Multiplied>(run.layers[i], run.barrier);
    }
}

// Nonzero as of `count_items`; 3: an operation that is not known.
template <class Multiplied>
static int read_operation(Layer &layer, long index, const Record &record, char *const *bases, long threads) {
    Operation &operation = layer.operations[index];
    operation.kind = record.kind;
    operation.phase = record.phase;
    uint16_t *at[6];
    for (long i = 0; i < 6; i++)
        at[i] = record.base[i] < 0 ? nullptr : (uint16_t *)(bases[record.base[i]] + record.offset[i]);
    const int64_t *size = record.size;
    switch (record.kind) {
    case WIDEN:
        operation.job = {};
        operation.job.x = at[0];
        operation.job.wide = at[1];
        operation.job.x_stride = size[0];
        operation.job.k = size[1];
        operation.job.wide_stride = wide_stride_for(size[1]);
        return 0;
    case MULTIPLY: {
        Job &job = operation.job = {};
        job.wide = at[0];
        job.w = at[1];
        job.bias = at[2];
        job.y = at[3];
        job.n = size[0];
        job.k = job.w_stride = size[1];
        job.wide_stride = wide_stride_for(size[1]);
        job.m = layer.rows;
        cut_product<Multiplied>(job, threads);
        return 0;
    }
    case NORM:
        operation.norm = {at[0], at[1], at[2], size[0], size[1], (float)record.value, (int)size[2], 0};
        return 0;
    case ROTATE:
        operation.rotary = {};
        operation.rotary.queries = {at[0], at[4], size[10], size[0], size[4], size[2], size[6]};
        operation.rotary.keys = {at[1], at[5], size[11], size[1], size[5], size[3], size[7]};
        operation.rotary.cosines = at[2];
        operation.rotary.sines = at[3];
        operation.rotary.cosine_row = size[8];
        operation.rotary.sine_row = size[9];
        operation.rotary.size = size[12];
        return 0;
    case KEEP:
        operation.kept = {at[0], at[1], (const int64_t *)at[2], size[0], size[1], size[2], size[3]};
        return 0;
    case ATTEND: {
        Attention &a = operation.attention = {};
        a.q = at[0];
        a.keys = at[1];
        a.values = at[2];
        a.y = at[3];
        a.table = (const int64_t *)at[4];
        a.q_row = size[0];
        a.q_head = size[1];
        a.kv_heads = size[2];
        a.shared = size[3];
        a.key_dim = size[4];
        a.value_dim = size[5];
        a.block_size = size[6];
        a.num_rows = layer.rows;
        a.scaling = (float)record.value;
        return count_items(a);
    }
    case JOIN:
        operation.joined = &layer.operations[size[0]].attention;
        return 0;
    case ADD:
    case TIMES:
    case SCALE:
    case ACTIVATE:
        operation.rowwise = {at[0], at[1], at[2], size[0], size[1], size[2], size[3], (float)record.value, (int)size[4], 0, 0};
        return 0;
    default: return 3;
    }
}

// Give each attention of a run the room that it takes: lists of their own, and parts that serve one layer after the other.
// Gives what is to be freed, null where there is no memory.
static void *cut_attentions(Run &run) {
    long parts = 0, lists = 0;
    for (long i = 0; i < run.num_layers; i++) {
        long of_layer = 0;
        for (long j = 0; j < run.layers[i].count; j++) {
            const Operation &operation = run.layers[i].operations[j];
            if (operation.kind != ATTEND) continue;
            of_layer += parts_bytes(operation.attention);
            lists += lists_bytes(operation.attention);
        }
        parts = of_layer > parts ? of_layer : parts;
    }
    void *room;
    if (posix_memalign(&room, 64, parts + lists + 1)) return nullptr;
    char *list = (char *)room + parts;
    for (long i = 0; i < run.num_layers; i++) {
        char *part = (char *)room;
        for (long j = 0; j < run.layers[i].count; j++) {
            Operation &operation = run.layers[i].operations[j];
            if (operation.kind != ATTEND) continue;
            cut_attention(operation.attention, part, list);
            part += parts_bytes(operation.attention);
            list += lists_bytes(operation.attention);
        }
    }
    return room;
}

// As `Listed` of layer_plan.py.
struct Listed {
    const Record *records;
    int64_t count;
};

enum : long { HIDDEN_BASE = 1, RESULT_BASE = 2, NUM_BASES = 16 };

template <class Kind, class Multiplied>
static int compute(Run &run, const Listed *list, char *const *given, long rows, long result_bytes, Parallel parallel,
                   long threads) {
    char *bases[NUM_BASES];
    memcpy(bases, given, sizeof bases);
    for (long i = 0; i < run.num_layers; i++) {
        Layer &layer = run.layers[i];
        layer.count = list[i].count;
        layer.rows = rows;
        memset(layer.next, 0, sizeof layer.next);
        for (long j = 0; j < layer.count; j++) {
            const int status = read_operation<Multiplied>(layer, j, list[i].records[j], bases, threads);
            if (status) return status;
        }
        bases[HIDDEN_BASE] = bases[RESULT_BASE];
        bases[RESULT_BASE] += result_bytes;
    }
    void *room = cut_attentions(run);
    if (!room) return 1;
    if (run.barrier) parallel(compute_run<Kind, Multiplied>, &run, (unsigned)threads, 0);
    else compute_run<Kind, Multiplied>(&run);
    free(room);
    return 0;
}

// Layers for rows that are attended each by itself, each behind the one before it, whose results lie `result_bytes` apart.
// Nonzero: no memory (1), or what this kernel does not know.
extern "C" int shardwright_layers(const void *listed, long num_layers, char *const *bases, long rows, long result_bytes,
                                  int kind, long threads, Parallel parallel, void (*barrier)()) {
    const Listed *list = (const Listed *)listed;
    for (long i = 0; i < num_layers; i++)
        if (list[i].count > MAX_OPERATIONS) return 3;
    Run run = {(Layer *)malloc(num_layers * sizeof(Layer)), num_layers, threads > 1 && parallel ? barrier : nullptr};
    if (!run.layers) return 1;
    int status = 2;
    if (kind == 0) status = compute<BFloat16, BFloat16Pairs>(run, list, bases, rows, result_bytes, parallel, threads);
#if defined(HAS_FLOAT16)
    if (kind == 1) status = compute<Float16, Float16>(run, list, bases, rows, result_bytes, parallel, threads);
#endif
    free(run.layers);
    return status;
}

// How many values of the kind in which rows are multiplied one row of k takes, in bytes; 0 for a kind that is not known.
extern "C" long shardwright_wide_bytes(long k, int kind) {
    if (kind == 0) return wide_stride_for(k) * (long)sizeof(BFloat16Pairs::Value);
#if defined(HAS_FLOAT16)
    if (kind == 1) return wide_stride_for(k) * (long)sizeof(Float16::Value);
#endif
    return 0;
}
