/*
 * The recording client: a KVM user small enough to read, which does what a script says and writes down what it did.
 *
 *   client SCRIPT OUT.json
 *
 * The script has one action a line (capture/scenarios.py writes it; numbers are hexadecimal). Each action is carried
 * out, marked in the trace buffer, and written as one JSON event with the same clock as the trace. The guest is
 * guest.S; its code, descriptor tables, stacks, mailboxes and, unless a script says otherwise, its page tables lie in
 * slot 0.
 */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/kvm.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/utsname.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

typedef uint64_t u64;
#define PAGE 0x1000ul
#define HUGE 0x200000ul
#define SLOTS 16
#define VCPUS 2
#define MOST 8192 /* accesses in a run */
#define RUNS 16	  /* runs that can wait for one go */

/* Guest-physical places in slot 0. */
enum { CODE = 0x1080, GDT = 0x2000, IDT = 0x3000, TSS = 0x4000, MAILBOX = 0x5000, STACK = 0x8000, USER = 0xa000 };
enum { LIST = 0x100000, LIST_STEP = 0x80000 }; /* per vCPU */

extern const uint8_t guest64[], guest32[];

struct access {
	u64 op, gva, value, result, error, cr2;
};
static const char *OPS[] = { "R", "W", "RMW", "X", "INVLPG", "CR3", "CR0" };

struct run {
	char phase[64];
	int n;
	struct access *access;
};

struct vcpu {
	int fd;
	struct kvm_run *kvm;
	struct kvm_dirty_gfn *ring;
	unsigned ring_at;
	int queued;
	struct run queue[RUNS];
	pthread_t thread;
};

static struct slot {
	u64 gpa, size, room;
	char *host;
} slots[SLOTS];

static struct {
	const char *name;
	bool paging, wide; /* wide: 64-bit operands */
	int levels, bits, bytes;
	u64 cr0, cr4, efer;
} MODES[] = {
	{ "long64", true, true, 4, 9, 8, 0x80010033, 0x20, 0xd01 },
	{ "pae32", true, false, 3, 9, 8, 0x80010033, 0x20, 0x800 },
	{ "leg32", true, false, 2, 10, 4, 0x80010033, 0, 0 },
	{ "pse32", true, false, 2, 10, 4, 0x80010033, 0x10, 0 },
	{ "flat32", false, false, 0, 0, 0, 0x10033, 0, 0 },
}, *mode;

static struct vcpu vcpus[VCPUS];
static int kvm, vm, marker = -1, seq, ring_bytes;
static pid_t child;
static FILE *json;
static bool first_event = true;
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER; /* of the JSON */
static pthread_barrier_t start;
static int running;

static void __attribute__((noreturn, format(printf, 1, 2))) fail(const char *format, ...)
{
	va_list args;
	va_start(args, format);
	fprintf(stderr, "client: ");
	vfprintf(stderr, format, args);
	fprintf(stderr, " (%s)\n", strerror(errno));
	va_end(args);
	exit(1);
}

static u64 now(void)
{
	struct timespec t;
	clock_gettime(CLOCK_MONOTONIC, &t);
	return t.tv_sec * 1000000000ull + t.tv_nsec;
}

static void __attribute__((format(printf, 1, 2))) mark(const char *format, ...)
{
	char text[256];
	va_list args;
	int n;
	va_start(args, format);
	n = vsnprintf(text, sizeof text, format, args);
	va_end(args);
	if (marker >= 0 && write(marker, text, n) < 0)
		fail("trace_marker");
}

/* One JSON event; the caller holds the lock when other threads run. */
static void __attribute__((format(printf, 1, 2))) event(const char *format, ...)
{
	va_list args;
	fputs(first_event ? "\n  " : ",\n  ", json);
	first_event = false;
	va_start(args, format);
	vfprintf(json, format, args);
	va_end(args);
}

static void put_bitmap(const uint8_t *bits, u64 pages)
{
	for (u64 i = 0; i < (pages + 7) / 8; i++)
		fprintf(json, "%02x", bits[i]);
}

/* Where the host has a guest-physical address. */
static char *host(u64 gpa, u64 length)
{
	for (struct slot *s = slots; s < slots + SLOTS; s++)
		if (s->size && gpa >= s->gpa && gpa + length <= s->gpa + s->size)
			return s->host + (gpa - s->gpa);
	fail("no slot at 0x%lx", gpa);
}

static u64 hex(char **line)
{
	char *end;
	u64 value = strtoull(*line, &end, 16);
	if (end == *line)
		fail("a number is missing before '%s'", *line);
	*line = end + strspn(end, " ");
	return value;
}

static char *word(char **line)
{
	char *text = *line + strspn(*line, " ");
	*line = text + strcspn(text, " ");
	if (**line)
		*(*line)++ = 0;
	return text;
}

static int vcpu_number(char **line)
{
	u64 id = hex(line);
	if (id >= VCPUS)
		fail("vCPU %lu; there are %d", id, VCPUS);
	return id;
}

/* slot ID GPA SIZE FLAGS BACKING...: the words of the backing say how the memory is made on first mention. */
static void do_slot(char *line)
{
	u64 id = hex(&line), gpa = hex(&line), size = hex(&line), flags = hex(&line), ns, end;
	struct slot *s = slots + id;
	int rc;
	if (id >= SLOTS)
		fail("slot %lu; there are %d", id, SLOTS);
	if (!s->host) {
		char *any = mmap(NULL, size + 2 * HUGE, PROT_READ | PROT_WRITE,
				 MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

		if (any == MAP_FAILED)
			fail("mmap");
		s->host = (char *)(((u64)any + HUGE - 1) & -HUGE);
		s->room = size;
		if (madvise(s->host, size, strstr(line, "MADV_HUGEPAGE") ? MADV_HUGEPAGE : MADV_NOHUGEPAGE))
			fail("madvise");
		if (strstr(line, "prefaulted") && !strstr(line, "not prefaulted"))
			memset(s->host, 0, size);
	}
	if (size > s->room)
		fail("slot %lu grows", id);
	s->gpa = gpa;
	s->size = size;
	mark("SET_MEMSLOT id=%lu gpa=%lx size=%lx flags=%lx", id, gpa, size, flags);
	ns = now();
	rc = ioctl(vm, KVM_SET_USER_MEMORY_REGION,
		   &(struct kvm_userspace_memory_region){ id, flags, gpa, size, (u64)s->host });
	end = now();
	mark("SET_MEMSLOT_DONE id=%lu", id);
	if (rc)
		fail("KVM_SET_USER_MEMORY_REGION %lu", id);
	event("{\"t\":\"memslot\",\"slot\":%lu,\"gpa\":\"0x%lx\",\"size\":\"0x%lx\",\"flags\":%lu,\"hva\":\"0x%lx\","
	      "\"backing\":\"%s\",\"rc\":%d,\"ns\":%lu,\"ns_end\":%lu}",
	      id, gpa, size, flags, (u64)s->host, line, rc, ns, end);
}

/* Write one guest page-table entry. */
static void put_entry(u64 gpa, u64 value)
{
	memcpy(host(gpa, mode->bytes), &value, mode->bytes);
}

/* Where the entry of gva at a level lies; table pages are taken in ascending order behind the root. */
static u64 entry_of(u64 root, u64 gva, int leaf)
{
	static struct {
		u64 root, next;
	} known[8], *k;
	u64 table = root;
	for (k = known; k->next && k->root != root; k++)
		;
	if (!k->next) {
		*k = (typeof(*k)){ root, root + PAGE };
		for (int i = 0; mode->levels == 3 && i < 4; i++, k->next += PAGE)
			put_entry(root + 8 * i, k->next | 1);
	}
	for (int level = mode->levels; level > leaf; level--) {
		u64 at = table + ((gva >> (12 + mode->bits * (level - 1))) & ((1 << mode->bits) - 1)) * mode->bytes;
		u64 entry = 0;
		memcpy(&entry, host(at, mode->bytes), mode->bytes);
		if (!entry) {
			put_entry(at, entry = k->next | 0x27);
			k->next += PAGE;
		}
		table = entry & ~0xffful;
	}
	return table + ((gva >> (12 + mode->bits * (leaf - 1))) & ((1 << mode->bits) - 1)) * mode->bytes;
}

/* Leaf entries of a level; pages are of 4K all the same. */
static void map_by(int level, char *line)
{
	u64 root = hex(&line), gva = hex(&line), gpa = hex(&line), n = hex(&line), flags = hex(&line), first = 0, at = 0;
	if (!mode->paging)
		return;
	for (u64 off = 0; off < n * PAGE; off += PAGE << mode->bits * (level - 1)) {
		at = entry_of(root, gva + off, level);
		put_entry(at, (gpa + off) | flags);
		first = off ? first : at;
	}
	if (n == 1)
		event("{\"t\":\"gmap\",\"root\":\"0x%lx\",\"gva\":\"0x%lx\",\"gpa\":\"0x%lx\",\"flags\":\"0x%lx\",\"note\":\"%s\"}",
		      root, gva, gpa, flags, line);
	else
		event("{\"t\":\"gmap_range\",\"root\":\"0x%lx\",\"gva\":\"0x%lx\",\"gpa\":\"0x%lx\",\"n\":%lu,\"flags\":\"0x%lx\","
		      "\"first_pte_gpa\":\"0x%lx\",\"last_pte_gpa\":\"0x%lx\"%s}",
		      root, gva, gpa, n, flags, first, at, level > 1 ? ",\"level\":2" : "");
}

/* map ROOT GVA GPA PAGES FLAGS [NOTE...] */
static void do_map(char *line)
{
	map_by(1, line);
}

/* large ROOT GVA GPA PAGES FLAGS: by large pages, whose leaves are of level 2. */
static void do_large(char *line)
{
	map_by(2, line);
}

static void put_gate(int vector, u64 target, int dpl)
{
	u64 low = (target & 0xffff) | 0x80000 | (0x8e00ull | dpl << 13) << 32 | (target >> 16 & 0xffff) << 48;
	memcpy(host(IDT + vector * (mode->wide ? 16 : 8), 8), &low, 8);
}

/* The guest's code, descriptor tables and task state segment. */
static void put_guest(void)
{
	const uint8_t *blob = mode->wide ? guest64 : guest32;
	/* null, code and data at CPL 0, code and data at CPL 3, task state segment (two entries in long mode) */
	u64 gdt[] = { 0, 0xcf9b000000ffff, 0xcf93000000ffff, 0xcffb000000ffff, 0xcff3000000ffff, 0x8b0040000067, 0 };
	u64 stack = STACK, data = 0x10;
	if (mode->wide)
		gdt[1] = 0xaf9b000000ffff, gdt[3] = 0xaffb000000ffff;
	memcpy(host(CODE, 0x180), blob, 0x180);
	memcpy(host(USER, 0x40), blob + 0x180, 0x40);
	memcpy(host(GDT, sizeof gdt), gdt, sizeof gdt);
	memcpy(host(TSS + 4, 8), &stack, mode->wide ? 8 : 4);
	if (!mode->wide)
		memcpy(host(TSS + 8, 4), &data, 4);
	for (int vector = 0; vector < 32; vector++)
		put_gate(vector, CODE + (vector == 14 ? 0x100 : 0x160), 0);
	put_gate(0x80, CODE + 0x140, 3);
}

static struct kvm_segment segment(int selector, int type, int dpl, bool code)
{
	return (struct kvm_segment){ .limit = ~0u, .selector = selector, .type = type, .present = 1, .dpl = dpl, .s = 1,
				     .g = 1, .l = code && mode->wide, .db = !(code && mode->wide) };
}

/* vcpu ID CR3 */
static void do_vcpu(char *line)
{
	int id = vcpu_number(&line), size = ioctl(kvm, KVM_GET_VCPU_MMAP_SIZE, 0);
	u64 cr3 = mode->paging ? hex(&line) : 0;
	struct { struct kvm_cpuid2 head; struct kvm_cpuid_entry2 entry[128]; } cpuid = { .head.nent = 128 };
	struct kvm_regs regs = { .rip = CODE, .rflags = 2, .rdi = MAILBOX + id * PAGE, .rsp = STACK + id * PAGE,
				 .rbp = STACK + id * PAGE };
	struct kvm_sregs s;
	struct vcpu *v = vcpus + id;
	if (!id)
		put_guest();
	v->fd = ioctl(vm, KVM_CREATE_VCPU, id);
	if (v->fd < 0)
		fail("KVM_CREATE_VCPU");
	v->kvm = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, 0);
	if (v->kvm == MAP_FAILED)
		fail("mmap of the vCPU");
	if (ring_bytes) {
		v->ring = mmap(NULL, ring_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, v->fd, KVM_DIRTY_LOG_PAGE_OFFSET * PAGE);
		if (v->ring == MAP_FAILED)
			fail("mmap of the dirty ring");
	}
	if (ioctl(kvm, KVM_GET_SUPPORTED_CPUID, &cpuid) || ioctl(v->fd, KVM_SET_CPUID2, &cpuid))
		fail("CPUID");
	if (ioctl(v->fd, KVM_GET_SREGS, &s))
		fail("KVM_GET_SREGS");
	s.cr0 = mode->cr0, s.cr3 = cr3, s.cr4 = mode->cr4, s.efer = mode->efer;
	s.cs = segment(0x08, 11, 0, true);
	s.ss = segment(0x10, 3, 0, false);
	s.ds = s.es = s.fs = s.gs = segment(0x23, 3, 3, false);
	/* Busy, as LTR would leave it; but QEMU 7.2 ends itself when a 32-bit guest in SVM changes levels with that. */
	s.tr = (struct kvm_segment){ .base = TSS, .limit = 0x67, .selector = 0x28, .type = mode->wide ? 11 : 9, .present = 1 };
	s.ldt = (struct kvm_segment){ .unusable = 1 };
	s.gdt.base = GDT, s.gdt.limit = 7 * 8 - 1;
	s.idt.base = IDT, s.idt.limit = 0xfff;
	if (ioctl(v->fd, KVM_SET_SREGS, &s) || ioctl(v->fd, KVM_SET_REGS, &regs))
		fail("registers");
	event("{\"t\":\"vcpu\",\"vcpu\":%d,\"gmode\":\"%s\",\"cr0\":\"0x%lx\",\"cr3\":\"0x%lx\",\"cr4\":\"0x%lx\","
	      "\"efer\":\"0x%lx\"}", id, mode->name, mode->cr0, cr3, mode->cr4, mode->efer);
}

/* ring VCPU WHY: collect a vCPU's dirty ring and give its entries back to KVM. */
static void harvest(int id, const char *why)
{
	struct vcpu *v = vcpus + id;
	unsigned size = ring_bytes / sizeof *v->ring;
	u64 ns;
	int n = 0, rc;
	mark("RING_HARVEST vcpu=%d %s", id, why);
	ns = now();
	event("{\"t\":\"dirty_ring\",\"vcpu\":%d,\"why\":\"%s\",\"ns\":%lu,\"entries\":[", id, why, ns);
	for (;; n++, v->ring_at++) {
		struct kvm_dirty_gfn *gfn = v->ring + v->ring_at % size;
		if (__atomic_load_n(&gfn->flags, __ATOMIC_ACQUIRE) != KVM_DIRTY_GFN_F_DIRTY)
			break;
		fprintf(json, "%s[%u,%llu]", n ? "," : "", gfn->slot, gfn->offset);
		__atomic_store_n(&gfn->flags, KVM_DIRTY_GFN_F_RESET, __ATOMIC_RELEASE);
	}
	rc = ioctl(vm, KVM_RESET_DIRTY_RINGS, 0);
	fprintf(json, "],\"n\":%d,\"reset_rc\":%d,\"ns_end\":%lu}", n, rc, now());
	mark("RING_RESET n=%d rc=%d", n, rc);
}

static void put_run(int id, struct run *run, struct access *seen, char *mmio, u64 ns, u64 end)
{
	event("{\"t\":\"run\",\"vcpu\":%d,\"phase\":\"%s\",\"ns\":%lu,\"ns_end\":%lu,\"n\":%d,\"accesses\":[",
	      id, run->phase, ns, end, run->n);
	for (int i = 0; i < run->n; i++) {
		struct access *a = seen + i;
		bool faulted = (uint32_t)a->error != ~0u;
		u64 result = (a->op & 15) || faulted ? 0 : a->result;
		fprintf(json, "%s[\"%s%s\",\"0x%lx\",\"0x%lx\",\"0x%lx\",", i ? "," : "", a->op & 16 ? "u" : "",
			OPS[a->op & 15], a->gva, a->value, result);
		if (faulted)
			fprintf(json, "\"0x%x\",\"0x%lx\"]", (uint32_t)a->error, a->cr2);
		else
			fputs("null]", json);
	}
	fputs("]", json);
	if (*mmio)
		fprintf(json, ",\"mmio_exits\":[%s]", mmio + 1);
	fputs("}", json);
}

/* Let the guest make one run's accesses. */
static void do_run(int id, struct run *run)
{
	struct vcpu *v = vcpus + id;
	u64 mailbox[2] = { run->n, LIST + id * LIST_STEP }, ns, end;
	struct access *list = (struct access *)host(mailbox[1], run->n * sizeof *list);
	size_t room = 0;
	char *mmio = NULL;
	FILE *exits = open_memstream(&mmio, &room);
	memcpy(list, run->access, run->n * sizeof *list);
	memcpy(host(MAILBOX + id * PAGE, sizeof mailbox), mailbox, sizeof mailbox);
	mark("RUN_BEGIN vcpu=%d n=%d %s", id, run->n, run->phase);
	ns = now();
	for (;;) {
		if (ioctl(v->fd, KVM_RUN, 0) && errno != EINTR)
			fail("KVM_RUN");
		if (v->kvm->exit_reason == KVM_EXIT_IO && v->kvm->io.port == 0xf0) {
			break;
		} else if (v->kvm->exit_reason == KVM_EXIT_MMIO) {
			bool store = v->kvm->mmio.is_write;
			u64 gpa = v->kvm->mmio.phys_addr, value = 0;
			unsigned len = v->kvm->mmio.len;
			if (store) {
				memcpy(&value, v->kvm->mmio.data, len);
			} else {
				value = 0x5a5a5a5a00000000 | gpa;
				memcpy(v->kvm->mmio.data, &value, len);
			}
			fprintf(exits, ",[\"0x%lx\",%u,\"%s\",\"0x%lx\"]", gpa, len, store ? "W" : "R", value);
		} else if (v->kvm->exit_reason == KVM_EXIT_DIRTY_RING_FULL) {
			harvest(id, "ring_full_exit");
		} else if (v->kvm->exit_reason != KVM_EXIT_INTR) {
			fail("vCPU %d left for reason %u in %s", id, v->kvm->exit_reason, run->phase);
		}
	}
	end = now();
	mark("RUN_END vcpu=%d %s", id, run->phase);
	fclose(exits);
	pthread_mutex_lock(&lock);
	put_run(id, run, list, mmio, ns, end);
	pthread_mutex_unlock(&lock);
	free(mmio);
	free(run->access);
}

/* get SLOT */
static void do_get(char *line)
{
	static uint8_t bits[1 << 16];
	u64 id = hex(&line);
	struct slot *s = slots + id;
	u64 pages = s->size / PAGE, ns, end;
	int rc, n = 0, at = seq++;
	memset(bits, 0, sizeof bits);
	mark("DIRTY_GET_BEGIN slot=%lu seq=%d", id, at);
	ns = now();
	rc = ioctl(vm, KVM_GET_DIRTY_LOG, &(struct kvm_dirty_log){ .slot = id, .dirty_bitmap = bits });
	end = now();
	for (u64 i = 0; i < pages / 8; i++)
		n += __builtin_popcount(bits[i]);
	mark("DIRTY_GET_END slot=%lu seq=%d n=%d", id, at, n);
	if (rc)
		fail("KVM_GET_DIRTY_LOG");
	pthread_mutex_lock(&lock);
	event("{\"t\":\"dirty_get\",\"slot\":%lu,\"seq\":%d,\"rc\":%d,\"ns\":%lu,\"ns_end\":%lu,\"ndirty\":%d,\"bitmap\":\"",
	      id, at, rc, ns, end, n);
	put_bitmap(bits, pages);
	fputs("\"}", json);
	pthread_mutex_unlock(&lock);
}

static void *vcpu_thread(void *arg)
{
	struct vcpu *v = arg;
	pthread_barrier_wait(&start);
	for (int i = 0; i < v->queued; i++)
		do_run(v - vcpus, v->queue + i);
	__atomic_fetch_sub(&running, 1, __ATOMIC_RELAXED);
	return NULL;
}

/*
 * go [log SLOT]: carry out the runs that wait. One vCPU's run in this thread; two vCPUs' in threads of their own, which
 * begin together, while this thread waits or, with log, fetches the slot's dirty log again and again.
 */
static void do_go(char *line)
{
	bool log = !strcmp(word(&line), "log");
	running = 0;
	for (struct vcpu *v = vcpus; v < vcpus + VCPUS; v++)
		running += v->queued > 0;
	if (running == 1 && !log) {
		for (int id = 0; id < VCPUS; id++)
			for (int i = 0; i < vcpus[id].queued; i++)
				do_run(id, vcpus[id].queue + i);
	} else {
		pthread_barrier_init(&start, NULL, running + 1);
		for (struct vcpu *v = vcpus; v < vcpus + VCPUS; v++)
			if (v->queued && pthread_create(&v->thread, NULL, vcpu_thread, v))
				fail("thread");
		pthread_barrier_wait(&start);
		while (log && __atomic_load_n(&running, __ATOMIC_RELAXED)) {
			do_get(line);
			usleep(400);
		}
		for (struct vcpu *v = vcpus; v < vcpus + VCPUS; v++)
			if (v->queued)
				pthread_join(v->thread, NULL);
		pthread_barrier_destroy(&start);
	}
	for (struct vcpu *v = vcpus; v < vcpus + VCPUS; v++)
		v->queued = 0;
}

/* run VCPU PHASE: the accesses follow, one a line, up to the next action. */
static struct run *new_run(char *line)
{
	struct vcpu *v = vcpus + vcpu_number(&line);
	struct run *run = v->queue + v->queued;
	if (v->queued++ == RUNS)
		fail("more than %d runs wait", RUNS);
	*run = (struct run){ .access = calloc(MOST, sizeof *run->access) };
	snprintf(run->phase, sizeof run->phase, "%s", line);
	return run;
}

/* An access is OP GVA VALUE; returns false when the word is no op. */
static bool add_access(struct run *run, const char *name, char *line)
{
	struct access *a = run->access + run->n;
	bool user = name[0] == 'u';
	for (u64 op = 0; op < sizeof OPS / sizeof *OPS; op++)
		if (!strcmp(name + user, OPS[op])) {
			if (run->n++ == MOST)
				fail("more than %d accesses in %s", MOST, run->phase);
			*a = (struct access){ .op = op | user << 4, .gva = hex(&line), .error = ~0ul };
			a->value = hex(&line);
			return true;
		}
	return false;
}

static void put_file(const char *path, const char *text)
{
	int fd = open(path, O_WRONLY);
	if (fd < 0 || write(fd, text, strlen(text)) < 0)
		fail("%s", path);
	close(fd);
}

/* Read a small file into text; a missing one is "". */
static char *get_file(const char *path, char *text, int size)
{
	int fd = open(path, O_RDONLY), n = fd < 0 ? 0 : read(fd, text, size - 1);
	if (fd >= 0)
		close(fd);
	text[n > 0 ? n : 0] = 0;
	text[strcspn(text, "\n")] = 0;
	return text;
}

#define KSM "/sys/kernel/mm/ksm/"

static void wait_child(void)
{
	if (child <= 0)
		fail("no child is alive");
	kill(child, SIGKILL);
	waitpid(child, NULL, 0);
	child = 0;
}

/* host ACTION GPA LENGTH: something that happens to the memory behind a slot; the trace and the JSON name it. */
static void do_host(char *line)
{
	static const struct { const char *action, *what; } ACTIONS[] = {
		{ "dontneed", "madvise(MADV_DONTNEED)" },
		{ "fork", "fork (child alive)" },
		{ "reap", "child exits" },
		{ "readonly", "mprotect(PROT_READ)" },
		{ "writable", "mprotect(PROT_READ|PROT_WRITE)" },
		{ "blink", "mprotect(PROT_NONE) then RW" },
		{ "clear_refs", "echo 4 > /proc/self/clear_refs" },
		{ "ksm", "madvise(MADV_MERGEABLE), ksm run=1 for 1.5s" },
		{ "ksm_stop", "ksm stop" },
	};
	char *action = word(&line), text[32];
	u64 gpa = hex(&line), length = hex(&line);
	char *at = length ? host(gpa, length) : NULL;
	int rc = 0, i = 0, all = sizeof ACTIONS / sizeof *ACTIONS;
	while (i < all && strcmp(action, ACTIONS[i].action))
		i++;
	if (i == all)
		fail("host action '%s' is unknown", action);
	mark("HOST %s gpa=%lx len=%lx", ACTIONS[i].what, gpa, length);
	event("{\"t\":\"host\",\"what\":\"%s\",\"gpa\":\"0x%lx\",\"len\":\"0x%lx\",\"ns\":%lu}", ACTIONS[i].what, gpa, length,
	      now());
	switch (i) {
	case 0:
		rc = madvise(at, length, MADV_DONTNEED);
		break;
	case 1:
		child = fork();
		if (!child)
			for (;;)
				pause();
		break;
	case 2:
		wait_child();
		break;
	case 3:
		rc = mprotect(at, length, PROT_READ);
		break;
	case 5:
		rc = mprotect(at, length, PROT_NONE);
		/* fall through */
	case 4:
		rc |= mprotect(at, length, PROT_READ | PROT_WRITE);
		break;
	case 6:
		put_file("/proc/self/clear_refs", "4");
		break;
	case 7:
		rc = madvise(at, length, MADV_MERGEABLE);
		put_file(KSM "sleep_millisecs", "5");
		put_file(KSM "pages_to_scan", "1000");
		put_file(KSM "run", "1");
		usleep(1500000);
		break;
	case 8:
		put_file(KSM "run", "0");
		event("{\"t\":\"note\",\"ksm_pages_sharing\":\"%s\"}", get_file(KSM "pages_sharing", text, sizeof text));
	}
	if (rc)
		fail("%s", ACTIONS[i].what);
}

/* clear SLOT FIRST PAGES BITMAP */
static void do_clear(char *line)
{
	u64 slot = hex(&line), first = hex(&line), n = hex(&line), ns, end;
	uint8_t bits[1 << 12] = { 0 };
	int rc;
	for (u64 i = 0; i < (n + 7) / 8 && i < sizeof bits; i++)
		if (sscanf(line + 2 * i, "%2hhx", bits + i) != 1)
			fail("clear: the bitmap is too short");
	mark("DIRTY_CLEAR_BEGIN slot=%lu first=%lu n=%lu", slot, first, n);
	ns = now();
	rc = ioctl(vm, KVM_CLEAR_DIRTY_LOG, &(struct kvm_clear_dirty_log){ slot, n, first, { bits } });
	end = now();
	mark("DIRTY_CLEAR_END slot=%lu", slot);
	if (rc)
		fail("KVM_CLEAR_DIRTY_LOG");
	event("{\"t\":\"dirty_clear\",\"slot\":%lu,\"first_page\":%lu,\"num_pages\":%lu,\"rc\":0,\"ns\":%lu,\"ns_end\":%lu,"
	      "\"bitmap\":\"", slot, first, n, ns, end);
	put_bitmap(bits, n);
	fputs("\"}", json);
}

/* counters GPA PAGES EXPECT: what locked increments of two vCPUs, 64 bytes apart, have come to in each page. */
static void do_counters(char *line)
{
	u64 gpa = hex(&line), n = hex(&line), expect = hex(&line);
	event("{\"t\":\"check\",\"what\":\"final counters per page [off0,off64]\",\"expect\":%lu,\"values\":[", expect);
	for (u64 i = 0; i < n; i++) {
		char *page = host(gpa + i * PAGE, PAGE);
		fprintf(json, "%s[%u,%u]", i ? "," : "", *(uint32_t *)page, *(uint32_t *)(page + 64));
	}
	fputs("]}", json);
}

static void do_phase(char *line)
{
	mark("PHASE %s", line);
	event("{\"t\":\"phase\",\"name\":\"%s\",\"ns\":%lu}", line, now());
}

static void do_ring(char *line)
{
	int id = vcpu_number(&line);
	harvest(id, line);
}

/* fill GPA LENGTH BYTE: the host writes; no event says so. */
static void do_fill(char *line)
{
	u64 gpa = hex(&line), length = hex(&line);
	memset(host(gpa, length), hex(&line), length);
}

/* code GPA: make the page's end callable (0xff0) and, at CPL 3, jumpable (0xfe0); no event says so. */
static void do_code(char *line)
{
	char *page = host(hex(&line), PAGE);
	memcpy(page + 0xff0, "\xc3", 1);
	memcpy(page + 0xfe0, "\xcd\x80", 2);
}

/* cap CAP ARG */
static void do_cap(char *line)
{
	struct kvm_enable_cap cap = { .cap = hex(&line) };
	cap.args[0] = hex(&line);
	if (ioctl(vm, KVM_ENABLE_CAP, &cap))
		fail("KVM_ENABLE_CAP %u", cap.cap);
	if (cap.cap == KVM_CAP_DIRTY_LOG_RING)
		ring_bytes = cap.args[0];
	event("{\"t\":\"enable_cap\",\"cap\":%u,\"arg0\":%llu,\"rc\":0}", cap.cap, cap.args[0]);
}

/* json TEXT: an event that informs, as it stands. */
static void do_json(char *line)
{
	event("%s", line);
}

static void do_line(char *line)
{
	static const struct { const char *name; void (*act)(char *); } ACTIONS[] = {
		{ "slot", do_slot }, { "map", do_map }, { "large", do_large }, { "vcpu", do_vcpu }, { "phase", do_phase }, { "go", do_go },
		{ "get", do_get }, { "clear", do_clear }, { "ring", do_ring }, { "host", do_host }, { "fill", do_fill },
		{ "code", do_code }, { "cap", do_cap }, { "counters", do_counters }, { "json", do_json },
	};
	static struct run *run;
	char *action = word(&line);
	if (run && add_access(run, action, line))
		return;
	run = strcmp(action, "run") ? NULL : new_run(line);
	if (run)
		return;
	for (u64 i = 0; i < sizeof ACTIONS / sizeof *ACTIONS; i++)
		if (!strcmp(action, ACTIONS[i].name))
			return ACTIONS[i].act(line);
	fail("'%s' is no action", action);
}

/* scenario NAME CONFIG MODE HOST...: the first line of a script. */
static void do_head(char *line)
{
	static const char *PARAMS[] = { "kvm.tdp_mmu", "kvm.mmio_caching", "kvm.eager_page_split", "kvm.nx_huge_pages",
					"kvm.flush_on_reuse", "kvm_amd.npt", "kvm_amd.nested" };
	char *first = word(&line), *name = word(&line), *config = word(&line), *gmode = word(&line), path[128], text[16];
	struct utsname u;
	int n = 0;
	for (mode = MODES; mode < MODES + sizeof MODES / sizeof *MODES && strcmp(mode->name, gmode); mode++)
		;
	if (strcmp(first, "scenario") || mode == MODES + sizeof MODES / sizeof *MODES)
		fail("the first line is no 'scenario NAME CONFIG MODE HOST'");
	uname(&u);
	fprintf(json, "{\"scenario\":\"%s\",\"prefix\":\"%s\",\"trace\":\"%s_%s.trace\",\"kernel\":\"%s %s\",\"host\":\"%s\","
		"\"guest_mode\":\"%s\",\"params\":{", name, config, config, name, u.release, u.version, line, gmode);
	for (unsigned i = 0; i < sizeof PARAMS / sizeof *PARAMS; i++) {
		const char *dot = strchr(PARAMS[i], '.');
		snprintf(path, sizeof path, "/sys/module/%.*s/parameters/%s", (int)(dot - PARAMS[i]), PARAMS[i], dot + 1);
		if (*get_file(path, text, sizeof text))
			fprintf(json, "%s\"%s\":\"%s\"", n++ ? "," : "", PARAMS[i], text);
	}
	fputs("},\n\"access_format\":\"[op, gva, value, result, pf_error_or_null, pf_cr2]\",\"bitmap_format\":\"hex bytes, "
	      "little endian bit order: page i = byte i/8 bit i%8\",\"slot_flags\":\"1=LOG_DIRTY_PAGES 2=READONLY\","
	      "\"clock\":\"mono (ns, same as trace_clock)\",\n\"events\":[", json);
	mark("SCENARIO %s %s gmode=%s", config, name, gmode);
}

int main(int argc, char **argv)
{
	FILE *script = argc == 3 ? fopen(argv[1], "r") : NULL;
	size_t room = 0;
	char *line = NULL;
	if (!script || !(json = fopen(argv[2], "w")))
		fail("client SCRIPT OUT.json");
	marker = open("/sys/kernel/tracing/trace_marker", O_WRONLY);
	kvm = open("/dev/kvm", O_RDWR | O_CLOEXEC);
	if (kvm < 0 || (vm = ioctl(kvm, KVM_CREATE_VM, 0)) < 0)
		fail("KVM");
	for (int n = 0; getline(&line, &room, script) >= 0; n++) {
		line[strcspn(line, "\n")] = 0;
		if (!n)
			do_head(line);
		else if (*line)
			do_line(line);
	}
	mark("SCENARIO_END");
	put_file("/sys/kernel/tracing/tracing_on", "0"); /* what takes the guest down is no part of the recording */
	if (child)
		wait_child();
	fputs("\n]}\n", json);
	return fclose(json) ? 1 : 0;
}
