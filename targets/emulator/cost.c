/* Counts the instructions that an emulated program executes, by class: a plugin of QEMU's user-mode emulation.
 *
 * A guest's getppid() is a mark: a line of JSON with what the thread that calls it executed since its mark before.
 * Other threads are left out: runtimes start some that wake up by the clock, so that a sum would not repeat. Blocks
 * of translated code are counted as they are entered, which is exact unless a fault leaves one half-way.
 *
 * Built without headers or libraries of the host, which may be newer than, or no, glibc: what is used of the C
 * library is found in the emulator's own. The interface is QEMU's plugin API 1 (qemu-plugin.h), declared here because
 * Debian does not ship that file. */
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

typedef uint64_t plugin_id;
struct block;
struct instruction;
/* The head of qemu_info_t. */
struct info { const char *target; int oldest, newest; bool system; };
enum { NO_REGISTERS = 0 };

extern void qemu_plugin_register_vcpu_tb_trans_cb(plugin_id, void (*)(plugin_id, struct block *));
extern void qemu_plugin_register_vcpu_tb_exec_cb(struct block *, void (*)(unsigned, void *), int, void *);
extern void qemu_plugin_register_vcpu_syscall_cb(plugin_id, void (*)(plugin_id, unsigned, int64_t, uint64_t, uint64_t,
    uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t));
extern size_t qemu_plugin_tb_n_insns(const struct block *);
extern struct instruction *qemu_plugin_tb_get_insn(const struct block *, size_t);
extern const void *qemu_plugin_insn_data(const struct instruction *);
extern size_t qemu_plugin_insn_size(const struct instruction *);

extern void *calloc(size_t, size_t);
extern int open(const char *, int, ...);
extern long write(int, const void *, size_t);
extern int snprintf(char *, size_t, const char *, ...);
extern int strcmp(const char *, const char *);
extern int strncmp(const char *, const char *, size_t);

#define EXPORT __attribute__((visibility("default")))
EXPORT int qemu_plugin_version = 1;

enum { ALL, SIMD, DOT, MLA, FMLA, LOAD_STORE, BRANCH, CLASSES };
static const char *const names[CLASSES] = { "all", "simd", "dot", "mla", "fmla", "load_store", "branch" };
/* Numbers of threads are used again when one ends. */
enum { THREADS = 4096 };
struct counts { uint64_t of[CLASSES]; };
static struct counts counted[THREADS], marked[THREADS];
static int output = -1, classes = CLASSES;
static int64_t mark_call;

static bool is(uint32_t word, uint32_t mask, uint32_t value) { return (word & mask) == value; }

/* Encodings as in the Arm Architecture Reference Manual for A-profile, C4.1. Q, U, size and registers are left open. */
static bool is_dot(uint32_t w)
{
    return is(w, 0x9fe0fc00, 0x0e809400)     /* SDOT, UDOT (vector) */
        || is(w, 0x9fc0f400, 0x0f80e000)     /* SDOT, UDOT (by element) */
        || is(w, 0xbfe0fc00, 0x0e809c00)     /* USDOT (vector) */
        || is(w, 0xbf40f400, 0x0f00f000)     /* SUDOT, USDOT (by element) */
        || is(w, 0xdfe0f400, 0x4e80a400);    /* SMMLA, UMMLA, USMMLA */
}

static bool is_mla(uint32_t w)
{
    if (is(w, 0x9f3ffc00, 0x0e206800))       /* SADALP, UADALP */
        return true;
    if ((w >> 22 & 3) == 3)                  /* no such element size below */
        return false;
    return is(w, 0x9f20dc00, 0x0e208000)     /* SMLAL, UMLAL, SMLSL, UMLSL (vector) */
        || is(w, 0x9f20fc00, 0x0e20c000)     /* SMULL, UMULL (vector) */
        || is(w, 0x9f00b400, 0x0f002000)     /* the same six (by element): SMLAL, SMLSL ... */
        || is(w, 0x9f00f400, 0x0f00a000)     /* ... SMULL, UMULL */
        || is(w, 0x9f20fc00, 0x0e209400)     /* MLA, MLS (vector) */
        || is(w, 0xbf00b400, 0x2f000000);    /* MLA, MLS (by element) */
}

static bool is_fmla(uint32_t w)
{
    return is(w, 0xbf20fc00, 0x0e20cc00)     /* FMLA, FMLS (vector) */
        || is(w, 0xbf60fc00, 0x0e400c00)     /* the same, half precision */
        || is(w, 0xbf80b400, 0x0f801000)     /* FMLA, FMLS (by element) */
        || is(w, 0xbfc0b400, 0x0f001000);    /* the same, half precision */
}

static bool is_branch(uint32_t w)
{
    return is(w, 0x7c000000, 0x14000000)     /* B, BL */
        || is(w, 0xff000000, 0x54000000)     /* B.cond, BC.cond */
        || is(w, 0x7c000000, 0x34000000)     /* CBZ, CBNZ, TBZ, TBNZ */
        || is(w, 0xfe000000, 0xd6000000);    /* BR, BLR, RET and their authenticated kin */
}

static void classify(uint32_t w, uint64_t *count)
{
    count[SIMD] += is(w, 0x0e000000, 0x0e000000);        /* all of scalar floating point and vectors, but loads */
    count[LOAD_STORE] += is(w, 0x0a000000, 0x08000000);
    count[DOT] += is_dot(w);
    count[MLA] += is_mla(w);
    count[FMLA] += is_fmla(w);
    count[BRANCH] += is_branch(w);
}

static void entered(unsigned thread, void *data)
{
    const struct counts *block = data;
    if (thread < THREADS)
        for (int i = 0; i < CLASSES; i++)
            counted[thread].of[i] += block->of[i];
}

static void translated(plugin_id id, struct block *block)
{
    size_t length = qemu_plugin_tb_n_insns(block);
    struct counts *counts = calloc(1, sizeof *counts);   /* the block's for as long as the program runs */
    (void)id;
    if (!counts)
        __builtin_trap();
    counts->of[ALL] = length;
    for (size_t i = 0; i < length && classes == CLASSES; i++) {
        struct instruction *one = qemu_plugin_tb_get_insn(block, i);
        const uint8_t *b = qemu_plugin_insn_data(one);
        if (qemu_plugin_insn_size(one) == 4)
            classify(b[0] | b[1] << 8 | b[2] << 16 | (uint32_t)b[3] << 24, counts->of);
    }
    qemu_plugin_register_vcpu_tb_exec_cb(block, entered, NO_REGISTERS, counts);
}

static void called(plugin_id id, unsigned thread, int64_t number, uint64_t a, uint64_t b, uint64_t c, uint64_t d,
                   uint64_t e, uint64_t f, uint64_t g, uint64_t h)
{
    char line[512];
    int length = 0;
    (void)id, (void)a, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
    if (number != mark_call)
        return;
    if (thread >= THREADS)
        __builtin_trap();
    for (int i = 0; i < classes; i++)
        length += snprintf(line + length, sizeof line - length, "%s\"%s\": %llu", i ? ", " : "{", names[i],
                           (unsigned long long)(counted[thread].of[i] - marked[thread].of[i]));
    marked[thread] = counted[thread];
    length += snprintf(line + length, sizeof line - length, "}\n");
    if (write(output, line, length) != length)
        __builtin_trap();                    /* a line that is missing would give marks to the wrong inferences */
}

EXPORT int qemu_plugin_install(plugin_id id, const struct info *info, int count, char **arguments)
{
    for (int i = 0; i < count; i++)
        if (!strncmp(arguments[i], "out=", 4))
            output = open(arguments[i] + 4, 01 | 0100 | 01000 | 02000000, 0600);  /* O_WRONLY|CREAT|TRUNC|CLOEXEC */
    if (output < 0)
        return 1;
    if (!strcmp(info->target, "aarch64")) {
        mark_call = 173;
    } else if (!strcmp(info->target, "x86_64")) {
        mark_call = 110;
        classes = ALL + 1;
    } else {
        return 1;
    }
    qemu_plugin_register_vcpu_tb_trans_cb(id, translated);
    qemu_plugin_register_vcpu_syscall_cb(id, called);
    return 0;
}
