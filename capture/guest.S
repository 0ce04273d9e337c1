/*
 * The guest: makes the accesses that the client lists in its mailbox, one by one, and asks for more.
 *
 * One blob per operand size, assembled from the same lines. Offset 0 goes to guest address 0x1080 (CODE), the user
 * stub to 0xa000 (USER). DI points to this vCPU's mailbox {count, list}, BP is its stack top; an entry of the list is
 * six 64-bit words {op, gva, value, result, error code, cr2}. SI walks the list, CX counts down.
 */
#ifndef BITS
	.section .rodata
#define BITS 64
#define R(x) %r##x
#define NAME(x) x##64
#include "guest.S"
#undef BITS
#undef R
#undef NAME
#define BITS 32
#define R(x) %e##x
#define NAME(x) x##32
#include "guest.S"
	.section .note.GNU-stack, "", @progbits
#else
#if BITS == 64
	.code64
#define INC incq
#define IRET iretq
#else
	.code32
#define INC incl
#define IRET iretl
#endif
	.balign 16
	.globl NAME(guest)
NAME(guest):
1:	mov (R(di)), R(cx)		/* begin: how many, and where they are */
	mov 8(R(di)), R(si)
2:	test R(cx), R(cx)		/* loop */
	jz 9f
	mov (R(si)), R(ax)
	mov 8(R(si)), R(bx)
	mov 16(R(si)), R(dx)
	cmp $16, %al
	jae 8f				/* at CPL 3 */
	cmp $1, %al
	jb 30f
	je 31f
	cmp $3, %al
	jb 32f
	je 33f
	cmp $5, %al
	jb 34f
	je 35f
	mov R(bx), %cr0			/* 6 CR0 */
	jmp 7f
30:	mov (R(bx)), R(dx)		/* 0 R */
	mov R(dx), 24(R(si))
	jmp 7f
31:	mov R(dx), (R(bx))		/* 1 W */
	jmp 7f
32:	lock INC (R(bx))		/* 2 RMW */
	jmp 7f
33:	call *R(bx)			/* 3 X: a return instruction is there */
	jmp 7f
34:	invlpg (R(bx))			/* 4 INVLPG */
	jmp 7f
35:	mov R(bx), %cr3			/* 5 CR3 */
7:	add $48, R(si)			/* next */
	dec R(cx)
	jmp 2b
8:	shl $4, R(ax)			/* 16 + op: leave for the user stub, 16 bytes a piece */
	add $0x9f00, R(ax)
	push $0x23
	push $0
	push $2
	push $0x1b
	push R(ax)
	IRET
9:	out %al, $0xf0			/* done: the client takes over */
	jmp 1b

	.org NAME(guest) + 0x100	/* #PF: note it, give the access up */
	pop R(ax)
	mov R(ax), 32(R(si))
	mov %cr2, R(ax)
	mov R(ax), 40(R(si))
	mov R(bp), R(sp)
	jmp 7b

	.org NAME(guest) + 0x140	/* int 0x80: the user stub is through */
	mov R(dx), 24(R(si))
	mov R(bp), R(sp)
	jmp 7b

	.org NAME(guest) + 0x160	/* any other exception: the client gives up */
	out %al, $0xf1

	.org NAME(guest) + 0x180	/* user stub: R, W, RMW, X (a jump to an int 0x80) */
	mov (R(bx)), R(dx)
	int $0x80
	.org NAME(guest) + 0x190
	mov R(dx), (R(bx))
	int $0x80
	.org NAME(guest) + 0x1a0
	lock INC (R(bx))
	int $0x80
	.org NAME(guest) + 0x1b0
	jmp *R(bx)
	.org NAME(guest) + 0x1c0
#undef INC
#undef IRET
#endif
