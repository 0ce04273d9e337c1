/* The same work as mmu.paging.fault_codes and mmu.tables.PageTable.walk, one access at a time, as one writes it in C. */
#include <stddef.h>
#include <stdint.h>

#define P 1u
#define W 2u
#define U 4u
#define RSVD 8u
#define F 16u
#define A 0x20ull
#define D 0x40ull
#define PS 0x80ull
#define NX (1ull << 63)
#define PFN 0xffffffffff000ull
#define NO_FAULT (-1)

struct cpu {
    uint64_t reserved;
    int wp, smep, smap;
};

static int denied(uint64_t allowed, uint64_t denials, unsigned kind, const struct cpu *cpu)
{
    if ((kind & U) && !(allowed & U))
        return 1;
    if ((kind & W) && !(allowed & W) && ((kind & U) || cpu->wp))
        return 1;
    if ((kind & F) && (denials & NX))
        return 1;
    return !(kind & U) && (allowed & U) && ((kind & F) ? cpu->smep : cpu->smap);
}

void fault_codes(const uint64_t *entries, const uint8_t *kinds, int8_t *codes, size_t count, const struct cpu *cpu)
{
    for (size_t i = 0; i < count; i++) {
        uint64_t entry = entries[i];
        unsigned kind = kinds[i];
        if (!(entry & P))
            codes[i] = (int8_t)kind;
        else if (entry & cpu->reserved)
            codes[i] = (int8_t)(kind | RSVD | P);
        else
            codes[i] = denied(entry, entry, kind, cpu) ? (int8_t)(kind | P) : NO_FAULT;
    }
}

/* What a programmer who knows the trick writes: the rule asked 256 times, the rest is look-up. */
void fault_codes_by_table(const uint64_t *entries, const uint8_t *kinds, int8_t *codes, size_t count,
                          const struct cpu *cpu, const int8_t *table)
{
    for (size_t i = 0; i < count; i++) {
        uint64_t entry = entries[i];
        unsigned index = (entry & 7) << 5 | (unsigned)(entry >> 63) | ((entry & cpu->reserved) != 0) << 3;
        codes[i] = table[index | (kinds[i] & (W | U | F))];
    }
}

/* entries may be NULL: then they are not kept. update: set A and D. */
void walk(uint64_t *words, const uint64_t *addresses, const uint8_t *kinds, size_t count, const struct cpu *cpu,
          int update, uint64_t *physical, int8_t *codes, uint8_t *levels, uint64_t *entries)
{
    for (size_t i = 0; i < count; i++) {
        uint64_t address = addresses[i], table = 0, entry = 0, allowed = ~0ull, denials = 0, inside;
        unsigned kind = kinds[i], level;
        size_t slots[4];
        int code = NO_FAULT;
        for (level = 4;; level--) {
            size_t slot = slots[4 - level] = (table >> 3) + (address >> (3 + 9 * level) & 511);
            entry = words[slot];
            if (entries)
                entries[4 * i + 4 - level] = entry;
            if (!(entry & P)) {
                code = (int)kind;
                break;
            }
            int leaf = level == 1 || (level < 4 && (entry & PS));
            inside = ((uint64_t)1 << (3 + 9 * level)) - 1;
            if (entry & (cpu->reserved | (level == 4 ? PS : leaf && level > 1 ? inside & PFN & ~0x1000ull : 0))) {
                code = (int)(kind | RSVD | P);
                break;
            }
            allowed &= entry;
            denials |= entry;
            if (leaf) {
                if (denied(allowed, denials, kind, cpu))
                    code = (int)(kind | P);
                break;
            }
            table = entry & PFN;
        }
        codes[i] = (int8_t)code;
        levels[i] = (uint8_t)level;
        physical[i] = code == NO_FAULT ? (entry & PFN & ~inside) | (address & inside) : 0;
        if (entries)
            for (unsigned below = 5 - level; below < 4; below++)
                entries[4 * i + below] = 0;
        if (update && code == NO_FAULT)
            for (unsigned step = 0; step <= 4 - level; step++) {
                uint64_t bits = step == 4 - level && (kind & W) ? A | D : A;
                if ((words[slots[step]] & bits) != bits)
                    words[slots[step]] |= bits;
            }
    }
}
