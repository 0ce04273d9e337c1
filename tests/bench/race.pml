/* The looping model of the 2012 protocol on x86-TSO, cut exactly as mmu/protocols.py cuts it: one d_step is one access,
   one fence or one drained store. A process never leaves its do loop, so a SPIN state is the model's state and nothing
   else. Store-buffer entries: 0 none, 1 id := me, 2 wp := 1, 3 wp := 0, 4 lock := 0; b0 is the oldest. */
#ifndef N
#define N 3
#endif
#define IDLE 0
#define F1 1
#define F2 2
#define F3 3
#define F4 4
#define W1 5
#define W2 6
#define W3 7
#define W4 8
#define W5 9
#define U1 10
#define U2 11
#define ID 1
#define WP1 2
#define WP0 3
#define UNLOCK 4
#define push(x) if :: b0 == 0 -> b0 = x :: else -> if :: b1 == 0 -> b1 = x :: else -> b2 = x fi fi

bit w, wp, lock;
byte id;

active [N] proctype vcpu() {
    byte pc, b0, b1, b2;
    do
    :: d_step { pc == IDLE -> if :: w -> skip :: else -> pc = F1 fi }
    :: d_step { pc == F1 -> push(ID); pc = F2 }
    :: d_step { pc == F2 && b0 == 0 -> pc = F3 }
    :: d_step { pc == F3 -> if :: wp -> pc = IDLE :: else -> pc = F4 fi }
    :: d_step { pc == F4 && b0 == 0 -> if :: !w && id == _pid + 1 -> w = 1; id = 0 :: else -> skip fi; pc = IDLE }
    :: d_step { pc == IDLE && b0 == 0 && !lock -> lock = 1; pc = W1 }
    :: d_step { pc == W1 -> push(WP1); pc = W2 }
    :: d_step { pc == W2 && b0 == 0 -> pc = W3 }
    :: d_step { pc == W3 -> if :: w || id -> pc = W4 :: else -> pc = W5 fi }
    :: d_step { pc == W4 && b0 == 0 -> w = 0; id = 0; pc = W5 }
    :: d_step { pc == W5 -> push(UNLOCK); pc = IDLE }
    :: d_step { pc == IDLE && b0 == 0 && !lock -> lock = 1; pc = U1 }
    :: d_step { pc == U1 -> push(WP0); pc = U2 }
    :: d_step { pc == U2 -> push(UNLOCK); pc = IDLE }
    :: d_step { b0 != 0 ->
                if :: b0 == ID -> id = _pid + 1 :: b0 == WP1 -> wp = 1 :: b0 == WP0 -> wp = 0 :: b0 == UNLOCK -> lock = 0 fi;
                b0 = b1; b1 = b2; b2 = 0 }
    od
}
