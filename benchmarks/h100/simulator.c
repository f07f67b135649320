// One processor. Warps issue in order, by their stall counts and scoreboards; pipes, shared memory, and the processor's shares of L2
// and HBM are queues. Times are in clocks.
#include <math.h>
#include <stdint.h>
#include <string.h>

// What a warp issues: one record an instruction, as records.py writes them. Quarters of a clock: pipe4, memory4.
typedef struct {
    uint8_t pipe, stall, written, read, waits, kind, argument, last;
    uint16_t pipe4, memory4, latency, operand_latency, l2, hbm;
} Record;

enum { NORMAL, BARRIER, WGMMA, WGMMA_WAIT, COPY, COPY_GROUP, COPY_WAIT, LOAD, STORE, END };
enum { NO_PIPE, FMA, ALU, HEAVY, XU, MEMORY, TENSOR, UNIFORM };
// What a warp waits for, in the order of simulator.py's WAITS.
enum {
    FOR_STALL, FOR_BARRIER, FOR_GLOBAL, FOR_L1, FOR_STORE_OPERANDS, FOR_COPY_OPERANDS, FOR_SHARED, FOR_SHUFFLE, FOR_FUNCTION,
    FOR_UNIFORM, FOR_OTHER, FOR_SHARED_OPERANDS, FOR_OTHER_OPERANDS, FOR_COPIES, FOR_WGMMA, FOR_ISSUE
};

#define MOST_WARPS 64
#define BOARDS 6
#define RING 64           // groups of copies or of wgmma under way
#define MEMORY_QUEUE 48   // clocks of work that shared memory and L1 take before warps have to wait; a guess
#define FUNCTION_QUEUE 16 // the same of MUFU and conversions; a guess
#define FIRST_START 40    // between the first programs of a processor; a guess
#define NEXT_START 150    // from the end of a program to the start of the next in its place; a guess
#define FREED 20          // from a warp's end to what waits for it at a barrier; a guess

typedef struct {
    int active, place, warp, quarter; // place: which of the programs that are here at once
    int next;                         // record
    double ready, issued, freed;      // freed: when a barrier let it go, since it last issued
    int stall;                        // of the last record
    double board[BOARDS];             // when all that a scoreboard counts will have ended
    int reason[BOARDS];               // what it waits for
    double copied, copies[BOARDS][RING];
    int copy_groups[BOARDS];
    double products[RING];
    int product_groups;
    int at_barrier;
} Warp;

static double later(double a, double b) { return a > b ? a : b; }

// When the scoreboards and groups that a record asks for let it go, from ``time`` on; ``*reason``: what it waits for.
static double released(const Warp *w, const Record *r, double time, int *reason)
{
    for (int b = 0; b < BOARDS; b++)
        if ((r->waits >> b & 1) && w->board[b] > time) { time = w->board[b]; *reason = w->reason[b]; }
    if (r->kind == COPY_WAIT) {
        int board = r->argument >> 4, pending = r->argument & 15, groups = w->copy_groups[board];
        if (groups > pending) {
            double end = w->copies[board][(groups - 1 - pending) % RING];
            if (end > time) { time = end; *reason = FOR_COPIES; }
        }
    }
    if (r->kind == WGMMA_WAIT && w->product_groups > r->argument) {
        double end = w->products[(w->product_groups - 1 - r->argument) % RING];
        if (end > time) { time = end; *reason = FOR_WGMMA; }
    }
    return time;
}

static int reason_of(const Record *r)
{
    if (r->kind == LOAD) return r->l2 ? FOR_GLOBAL : FOR_L1;
    if (r->kind == STORE) return FOR_STORE_OPERANDS;
    if (r->kind == COPY) return FOR_COPY_OPERANDS;
    if (r->pipe == MEMORY) return r->argument ? FOR_SHUFFLE : FOR_SHARED;
    return r->pipe == XU ? FOR_FUNCTION : r->pipe == UNIFORM ? FOR_UNIFORM : FOR_OTHER;
}

static void open_barrier(Warp *program, int warps, double when)
{
    for (int k = 0; k < warps; k++)
        if (program[k].at_barrier) {
            program[k].at_barrier = 0;
            program[k].freed = when;
            program[k].ready = later(program[k].ready, when);
        }
}

// Clocks until ``programs`` have ended, ``resident`` at a time; -1: too many warps.
// records: those of warp 0, then of warp 1, ...; lengths [warps]. l2_rate, hbm_rate: bytes a clock.
// ends [programs]: when each ended. waits: sums of clocks over warps, see FOR_...
double simulate(const Record *records, const int *lengths, int warps, int resident, int programs, double l2_rate,
                double hbm_rate, double wgmma_latency, double *ends, double *waits)
{
    static Warp all[MOST_WARPS];
    const Record *start[MOST_WARPS];
    int total = resident * warps;
    if (total > MOST_WARPS) return -1;
    for (int k = 0; k < warps; k++) { start[k] = records; records += lengths[k]; }
    // When each is free again. Of two pipes for FMA, one takes multiplications of integers too.
    double fma[4] = {0}, heavy[4] = {0}, alu[4] = {0}, xu[4] = {0}, tensor[4] = {0}, uniform[4] = {0};
    double memory = 0, l2 = 0, hbm = 0, now = 0;
    int last[4] = {0}, arrived[MOST_WARPS] = {0}, ended[MOST_WARPS] = {0}, program_at[MOST_WARPS];
    int begun = 0, done = 0;
    memset(all, 0, sizeof all);
    for (int place = 0; place < resident; place++) {
        program_at[place] = begun < programs ? begun++ : -1;
        for (int k = 0; k < warps; k++)
            all[place * warps + k] = (Warp){ .active = program_at[place] >= 0, .place = place, .warp = k,
                                             .quarter = (place * warps + k) & 3, .ready = place * FIRST_START };
    }
    while (done < programs) {
        double soonest = INFINITY;
        int any = 0;
        for (int s = 0; s < 4; s++) {
            Warp *w = 0;
            for (int k = 0; k < total; k++) { // the warp that issued last goes on if it can
                int candidate = (last[s] + k) % total, reason = 0;
                Warp *x = &all[candidate];
                if (!x->active || x->quarter != s || x->at_barrier) continue;
                const Record *r = start[x->warp] + x->next;
                double time = released(x, r, x->ready, &reason);
                switch (r->pipe) {
                case FMA: time = later(time, fmin(fma[s], heavy[s])); break;
                case HEAVY: time = later(time, heavy[s]); break;
                case ALU: time = later(time, alu[s]); break;
                case XU: time = later(time, xu[s] - FUNCTION_QUEUE); break;
                case UNIFORM: time = later(time, uniform[s]); break;
                case TENSOR: if (r->kind != WGMMA) time = later(time, tensor[s]); break;
                case MEMORY: time = later(time, memory - MEMORY_QUEUE); break;
                }
                if (time <= now) { w = x; last[s] = candidate; break; }
                soonest = fmin(soonest, time);
            }
            if (!w) continue;
            any = 1;
            const Record *r = start[w->warp] + w->next;
            Warp *program = all + w->place * warps;
            if (w->next > 0) { // where the time since its last record went
                double own = fmin(w->freed > w->issued ? w->issued + w->stall : w->ready, now), ready = fmin(w->ready, now);
                int reason = FOR_STALL;
                waits[FOR_STALL] += own - w->issued;
                waits[FOR_BARRIER] += later(ready - own, 0);
                double free = fmin(released(w, r, ready, &reason), now);
                waits[reason] += free - ready;
                waits[FOR_ISSUE] += now - free;
            }
            double busy = r->pipe4 / 4.0, moving = r->memory4 / 4.0;
            double end = now + r->latency, operands = now + r->operand_latency;
            switch (r->pipe) {
            case FMA: *(fma[s] <= now ? &fma[s] : &heavy[s]) = now + 2 * busy; break;
            case HEAVY: heavy[s] = now + busy; break;
            case ALU: alu[s] = now + busy; break;
            case UNIFORM: uniform[s] = now + busy; break;
            case XU:
                xu[s] = later(xu[s], now) + busy;
                end = xu[s] + r->latency;
                operands = xu[s] - busy + r->operand_latency;
                break;
            case TENSOR:
                if (r->kind != WGMMA) { tensor[s] = now + busy; break; }
                memory = later(memory, now) + moving;
                tensor[s] = later(later(tensor[s], now + 8) + busy, memory);
                if (r->last) w->products[w->product_groups++ % RING] = tensor[s] + wgmma_latency;
                break;
            case MEMORY: {
                double from = later(memory, now), there;
                memory = from + moving;
                end = memory + r->latency;
                operands = memory + r->operand_latency;
                there = from;
                if (r->l2) { l2 = later(l2, from) + r->l2 / l2_rate; there = later(there, l2); }
                if (r->hbm) { hbm = later(hbm, from) + r->hbm / hbm_rate; there = later(there, hbm); }
                if ((r->l2 || r->hbm) && r->kind != STORE) end = there + r->latency;
                if (r->kind == COPY) w->copied = later(w->copied, end);
                break;
            }
            }
            if (r->kind == COPY_GROUP) {
                end = w->copied > now ? w->copied : now + 4;
                if (r->written < BOARDS) w->copies[r->written][w->copy_groups[r->written]++ % RING] = end;
            }
            int reason = reason_of(r);
            if (r->written < BOARDS && end > w->board[r->written]) { w->board[r->written] = end; w->reason[r->written] = reason; }
            if (r->read < BOARDS && operands > w->board[r->read]) {
                w->board[r->read] = operands;
                w->reason[r->read] = reason == FOR_SHARED ? FOR_SHARED_OPERANDS : FOR_OTHER_OPERANDS;
            }
            w->issued = now;
            w->freed = 0;
            w->stall = r->stall ? r->stall : 1;
            w->ready = now + w->stall;
            if (r->kind == BARRIER) {
                w->at_barrier = 1;
                if (++arrived[w->place] + ended[w->place] >= warps) {
                    arrived[w->place] = 0;
                    open_barrier(program, warps, now + r->latency);
                }
            }
            if (r->kind == END || ++w->next >= lengths[w->warp]) {
                int place = w->place;
                w->active = 0;
                if (++ended[place] == warps) {
                    ends[program_at[place]] = now;
                    done++;
                    ended[place] = arrived[place] = 0;
                    program_at[place] = begun < programs ? begun++ : -1;
                    for (int k = 0; k < warps; k++)
                        program[k] = (Warp){ .active = program_at[place] >= 0, .place = place, .warp = k,
                                             .quarter = program[k].quarter, .ready = now + NEXT_START };
                } else if (arrived[place] > 0 && arrived[place] + ended[place] >= warps) {
                    arrived[place] = 0;
                    open_barrier(program, warps, now + FREED);
                }
            }
        }
        now += 1;
        if (!any) now = later(now, ceil(soonest));
    }
    return now;
}
