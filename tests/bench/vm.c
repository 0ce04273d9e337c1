/* The same work as mmu.vm.Guest.drive on one logged slot, one access at a time, as one writes it in C. */
#include <stddef.h>
#include <stdint.h>

#define INCREMENT 2
#define CAN_WRITE 6 /* bit k of a page's rights allows the access whose op is k */
#define PAGE_SHIFT 12

struct guest {
    uint64_t *sptes;
    uint8_t *rights, *dirty;
    uint64_t base, w, mmu_w;
};

/* Let accesses happen; return how many faults the fast path repaired, or -1 for what is not the steady state. */
int64_t drive(const struct guest *guest, const uint8_t *ops, const uint64_t *addresses, size_t count)
{
    int64_t fixed = 0;
    for (size_t i = 0; i < count; i++) {
        uint64_t index = (addresses[i] >> PAGE_SHIFT) - guest->base;
        unsigned op = ops[i];
        if (guest->rights[index] >> op & 1)
            continue;
        uint64_t spte = guest->sptes[index];
        if (op < 1 || op > INCREMENT || (spte & guest->w) || !(spte & guest->mmu_w))
            return -1;
        guest->sptes[index] = spte | guest->w;
        guest->rights[index] |= CAN_WRITE;
        guest->dirty[index] = 1;
        fixed++;
    }
    return fixed;
}

/* Take the dirty bitmap; its pages become clean and write-protected. */
void get_dirty_log(const struct guest *guest, uint8_t *bitmap, size_t pages)
{
    for (size_t i = 0; i < pages; i++) {
        bitmap[i] = guest->dirty[i];
        if (!guest->dirty[i])
            continue;
        guest->dirty[i] = 0;
        guest->sptes[i] &= ~guest->w;
        guest->rights[i] &= (uint8_t)~CAN_WRITE;
    }
}
